"""The tests can fail: every deliberate fault turns its named test red."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fiberpo
from mutants.table import MUTANTS

SOURCE = Path(fiberpo.__file__).parent
CORE = [*sorted(SOURCE.glob("*.py")), *sorted((SOURCE / "ops").glob("*.*"))]
RED, GREEN = 1, 0  # exit codes of pytest; anything else is a test that did not run

pytestmark = pytest.mark.slow


def copy_core(place):
    """The core of the package alone, without what is built on it."""
    for path in CORE:
        target = place / "fiberpo" / path.relative_to(SOURCE)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Exit code, imported file and output of every copy."""
    workdir = tmp_path_factory.mktemp("mutants")
    jobs = {"sound": list(dict.fromkeys(mutant.killer for mutant in MUTANTS))}
    copy_core(workdir / "sound")
    for i, mutant in enumerate(MUTANTS):
        place = workdir / f"m{i}"
        copy_core(place)
        path = place / "fiberpo" / mutant.file
        text = path.read_text()
        if text.count(mutant.old) == 1:
            path.write_text(text.replace(mutant.old, mutant.new))
            if path.suffix == ".py":
                compile(path.read_text(), str(path), "exec")
            jobs[f"m{i}"] = [mutant.killer]
    (workdir / "jobs.json").write_text(json.dumps(jobs))
    driver = Path(__file__).with_name("driver.py")
    done = subprocess.run(
        [sys.executable, str(driver), str(workdir)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    for name, result in found.items():
        assert result.get("file", "").startswith(str(workdir / name)), (name, result)
    return found


def test_killers_are_green_on_the_sound_copy(results):
    """Without a fault all of them pass, so a red one is due to its fault."""
    assert results["sound"]["code"] == GREEN, results["sound"]["output"]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_place_of_the_fault_is_unique(mutant):
    """If the source has changed, the table must follow it."""
    assert (SOURCE / mutant.file).read_text().count(mutant.old) == 1


@pytest.mark.parametrize("index", range(len(MUTANTS)), ids=[m.name for m in MUTANTS])
def test_fault_is_found(results, index):
    """The named test fails (it does not merely crash at import or go uncollected)."""
    result = results[f"m{index}"]
    assert result["code"] == RED, f"survived {MUTANTS[index].killer}:\n{result['output']}"
