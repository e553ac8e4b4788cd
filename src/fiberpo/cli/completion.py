"""What the shell offers at the tab key; light, since it runs at every press.

``fiberpo --install-completion`` sets it up for bash, zsh, fish and PowerShell.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

OBJECTIVES = (
    "ppo", "grpo", "dr_grpo", "dapo", "gspo", "apc", "fiberpo", "fiberpo_domain", "fiberstop",
    "cispo", "sapo", "gmpo", "dppo", "cppo", "spo", "topr", "truly_ppo",
)  # fmt: skip
"""Names of `fiberpo.recipes.RECIPES`, which would load torch."""

RUN_FILES = ("metrics.jsonl", "summary.json", "config.yaml", "manifest.json", "recording")
"""What makes a directory a run or a recording."""


def complete_objective(incomplete: str) -> list[str]:
    """Objectives that begin so.

    >>> complete_objective("fiber")
    ['fiberpo', 'fiberpo_domain', 'fiberstop']
    """
    return [name for name in OBJECTIVES if name.startswith(incomplete)]


def complete_run(incomplete: str) -> list[str]:
    """Directories that begin so: runs and recordings, and those that may hold some.

    With nothing typed, the runs below ``runs/`` come first.
    """
    if not incomplete and (found := [p for p in _inside(Path("runs"), "") if _is_run(p)]):
        return [str(path) for path in found]
    typed = Path(incomplete or ".")
    whole = incomplete.endswith("/") or not incomplete
    folder, start = (typed, "") if whole else (typed.parent, typed.name)
    return [str(path) if _is_run(path) else f"{path}/" for path in _inside(folder, start)]


def complete_study(incomplete: str) -> list[str]:
    """Shipped studies that begin so.

    >>> complete_study("se")
    ['search']
    """
    folder = files("fiberpo") / "assets" / "studies"
    names = (entry.name.removesuffix(".yaml") for entry in folder.iterdir())
    return sorted(name for name in names if name.startswith(incomplete))


def _inside(folder: Path, start: str) -> list[Path]:
    try:
        found = [p for p in folder.iterdir() if p.name.startswith(start) and p.is_dir()]
    except OSError:
        return []
    return sorted(p for p in found if start.startswith(".") or not p.name.startswith("."))


def _is_run(path: Path) -> bool:
    return any((path / name).exists() for name in RUN_FILES)
