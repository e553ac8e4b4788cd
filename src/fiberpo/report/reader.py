"""Reading what a training run wrote into its directory, finished or cut short."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fiberpo.errors import DataError

Record = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """What a run directory holds; whatever is missing is empty or None and named in ``notes``."""

    name: str
    train: list[Record]
    evals: list[Record]
    summary: Record | None
    config: str | None
    notes: list[str]


def number(value: object) -> float | None:
    """``value`` as a finite float; None for everything else (null, NaN, text, true)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        converted = float(value)
    except OverflowError:
        return None
    return converted if math.isfinite(converted) else None


FILES = ("metrics.jsonl", "summary.json", "config.yaml")

LARGE = 256 * 1024**2
"""Bytes of ``metrics.jsonl`` beyond which lines of training steps are left out evenly."""


def is_run(run_dir: Path) -> bool:
    """Whether a directory holds any of the files of a run."""
    return any((run_dir / name).is_file() for name in FILES)


def read_run(run_dir: Path) -> Run:
    """Read ``metrics.jsonl``, ``summary.json`` and ``config.yaml`` of a run, finished or not.

    Raises:
        DataError: If the directory does not exist or holds none of the three files, or if a file
            holds something that no run writes.
    """
    if not run_dir.is_dir():
        raise DataError(f"{run_dir}: no such run directory; give the directory a training run made")
    metrics, summary_file, config = (run_dir / name for name in FILES)
    if not is_run(run_dir):
        raise DataError(
            f"{run_dir}: not a run directory, it holds none of metrics.jsonl, summary.json and "
            "config.yaml; give the directory a training run made"
        )
    notes: list[str] = []
    records: list[Record] = []
    if metrics.is_file():
        records, notes = read_metrics(metrics)
        if not records:
            notes.append("metrics.jsonl holds no complete line, so there are no figures.")
    else:
        notes.append("metrics.jsonl is missing, so there are no figures.")
    summary: Record | None = None
    if summary_file.is_file():
        try:
            summary = json.loads(summary_file.read_bytes().decode("utf-8"))
        except (ValueError, RecursionError) as exc:
            notes.append(
                f"summary.json is not complete JSON ({exc}): this report is built from the metrics "
                "alone."
            )
        else:
            _check_summary(summary_file, summary)
    else:
        notes.append(
            "summary.json is missing (the run did not end, or is still going): this report is "
            "built from the metrics alone."
        )
    return Run(
        name=str((summary or {}).get("name") or run_dir.resolve().name),
        train=[r for r in records if r.get("kind") == "train"],
        evals=[r for r in records if r.get("kind") == "eval"],
        summary=summary,
        config=config.read_text(encoding="utf-8", errors="replace") if config.is_file() else None,
        notes=notes,
    )


def read_metrics(path: Path) -> tuple[list[Record], list[str]]:
    """The objects of a JSON-lines file, and notes on what was skipped.

    A last line that is cut short, as a killed program leaves it, is skipped with a note.

    Raises:
        DataError: If any other line is not a JSON object.
    """
    every = math.ceil(path.stat().st_size / LARGE) or 1
    records: list[Record] = []
    torn: tuple[int, bytes, Exception] | None = None
    with path.open("rb") as file:
        for line_number, raw in enumerate(file, 1):
            if not raw.strip():
                continue
            if torn is not None:
                raise _malformed(path, *torn)
            if line_number % every and every > 1 and b'"eval"' not in raw[:40]:
                continue
            try:
                record = json.loads(raw.decode("utf-8"))
            except (ValueError, RecursionError) as exc:
                torn = line_number, raw, exc
                continue
            if not isinstance(record, dict):
                raise DataError(
                    f"{path}:{line_number}: expected a JSON object with the metrics of one step, "
                    f"found {_excerpt(raw)}; remove the line"
                )
            records.append(record)
    notes = []
    if every > 1:
        notes.append(
            f"{path.name} is {path.stat().st_size / 1024**2:.0f} MB large: one in {every} of its "
            "training steps is drawn."
        )
    if torn is not None:
        notes.append(
            f"Line {torn[0]} of {path.name}, the last, is cut short and was skipped "
            "(the run was stopped while it wrote that line)."
        )
    return records, notes


def _malformed(path: Path, line_number: int, raw: bytes, exc: Exception) -> DataError:
    return DataError(
        f"{path}:{line_number}: not valid JSON ({exc}); correct or remove the line: {_excerpt(raw)}"
    )


def _excerpt(raw: bytes) -> str:
    text = raw.decode("utf-8", errors="replace").strip()
    return repr(text if len(text) <= 80 else text[:77] + "...")


def _check_summary(path: Path, summary: Any) -> None:
    if not isinstance(summary, dict):
        raise DataError(f"{path}: expected a JSON object, found {type(summary).__name__}")
    for key in ("heldout_before", "heldout_after", "versions"):
        if not isinstance(summary.get(key), (dict, type(None))):
            raise DataError(f"{path}: {key!r} must be an object or null, not {summary[key]!r:.80}")
    for key in ("strata", "samples"):
        entries = [] if summary.get(key) is None else summary[key]
        if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
            raise DataError(f"{path}: {key!r} must be a list of objects, not {entries!r:.80}")
