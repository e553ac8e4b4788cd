"""The command line. Commands are few; everything heavy is imported inside them."""

from __future__ import annotations

import os
import sys

from ..errors import FiberPOError
from .app import app
from .options import budgets_from, objective_kwargs
from .theory import bounds, figures, lab
from .training import train, warmstart

# threads that wait actively slow each other down several times over on few cores; to have an effect
# this must stand before the first import of torch
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def main() -> None:
    """Entry point of ``fiberpo``; user mistakes end without a traceback, with exit code 2."""
    try:
        app()
    except FiberPOError as error:
        print(f"fiberpo: {error}", file=sys.stderr)
        sys.exit(2)
    except ModuleNotFoundError as error:
        print(
            f"fiberpo: {error.name} is not installed. The command line needs the extras: "
            "pip install 'fiberpo[trl,report,lab]'",
            file=sys.stderr,
        )
        sys.exit(2)


__all__ = [
    "app", "bounds", "budgets_from", "figures", "lab", "main", "objective_kwargs", "train",
    "warmstart",
]  # fmt: skip
