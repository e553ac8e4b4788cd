"""Run killer tests against copies of the package: ``python driver.py WORKDIR`` prints JSON.

``WORKDIR/<name>/fiberpo`` are the copies and ``WORKDIR/jobs.json`` maps each name to test ids.
Heavy imports happen once; every copy is then tested in a fork of this process.
"""

import json
import os
import sys
import traceback
import warnings
from pathlib import Path

import beartype  # noqa: F401
import hypothesis  # noqa: F401
import jaxtyping  # noqa: F401
import numpy  # noqa: F401
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def in_child(place, tests):
    """Test one copy; leaves a report beside it."""
    with open(place / "output.txt", "w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    sys.path.insert(0, str(place))
    sys.dont_write_bytecode = True
    assert "fiberpo" not in sys.modules
    ids = [str(ROOT / "tests" / "core" / test) for test in tests]
    quiet = ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # plugins are imported already
    options = ["-x", "-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT), *quiet]
    code = pytest.main([*options, *ids])
    where = getattr(sys.modules.get("fiberpo"), "__file__", "")
    (place / "report.json").write_text(json.dumps({"code": int(code), "file": where}))


def main(workdir):
    """Fork once per copy, one after the other."""
    torch.set_num_threads(1)
    os.environ["FIBERPO_BACKEND"] = "reference"  # the faults are in the gate classes
    os.chdir(ROOT)
    found = {}
    for name, tests in json.loads((workdir / "jobs.json").read_text()).items():
        place = workdir / name
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # forking beside idle threads
            child = os.fork()
        if child == 0:
            try:
                in_child(place, tests)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(0)
        os.waitpid(child, 0)
        report = place / "report.json"
        found[name] = json.loads(report.read_text()) if report.exists() else {"code": -1}
        found[name]["output"] = (place / "output.txt").read_text()[-3000:]
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
