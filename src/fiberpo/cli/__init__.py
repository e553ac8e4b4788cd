"""The command line. Commands are few; everything heavy is imported inside them.

Exit codes: 0 fine; 1 a check found something; 2 the input is wrong; 130 interrupted; 141 the
reader of the output went away.
"""

from __future__ import annotations

import os
import sys

from ..errors import FiberPOError
from .app import app
from .options import budgets_from, objective_kwargs
from .recordings import doctor, replay, suggest
from .reporting import report
from .study import study
from .theory import bounds, figures, lab
from .training import train, warmstart

# threads that wait actively slow each other down several times over on few cores; to have an effect
# this must stand before the first import of torch
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

WRONG_INPUT, BROKEN_PIPE = 2, 141


def main() -> None:
    """Entry point of ``fiberpo``; user mistakes end without a traceback, with exit code 2."""
    code = _run()
    try:
        sys.stdout.flush()
    except OSError:
        code = BROKEN_PIPE
    if code == BROKEN_PIPE:
        # the interpreter flushes once more at its end, and must not fail on it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def _run() -> int:
    """Run the command of ``sys.argv``; its exit code."""
    try:
        app()
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):
            return BROKEN_PIPE
        if isinstance(end.code, int) or end.code is None:
            return end.code or 0
        return _say(str(end.code))
    except FiberPOError as error:
        return _say(str(error))
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.startswith("fiberpo"):
            raise
        return _say(
            f"{error.name} is not installed. The command line needs the extras: "
            "pip install 'fiberpo[trl,report,lab,study]'"
        )
    except OSError as error:
        if error.filename is None:
            raise
        return _say(f"{error.filename}: {error.strerror}")
    return 0


def _say(message: str) -> int:
    print(f"fiberpo: {message}", file=sys.stderr)
    return WRONG_INPUT


__all__ = [
    "app", "bounds", "budgets_from", "doctor", "figures", "lab", "main", "objective_kwargs",
    "replay", "report", "study", "suggest", "train", "warmstart",
]  # fmt: skip
