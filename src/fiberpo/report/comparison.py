"""Several runs side by side: outcome, and what differs in their settings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .reader import number
from .sources import Source
from .tables import (
    DASH,
    RewardRow,
    format_difference,
    format_percent,
    format_reward,
    format_seconds,
    heldout_table,
)

_UNIMPORTANT = frozenset({"name", "output"})
_ABSENT = object()


@dataclass(frozen=True)
class Outcome:
    """One run of the comparison: a cell a column of `COLUMNS`."""

    label: str
    color: str
    dash: str
    cells: tuple[str, ...]


COLUMNS = (
    "objective", "seed", "steps", "held-out before", "after", "difference", "gradient kept",
    "gate active", "duration",
)  # fmt: skip


def outcomes(sources: Sequence[Source]) -> list[Outcome]:
    """What came of each run."""
    return [
        Outcome(source.label, source.color, source.dash, tuple(_cells(source)))
        for source in sources
    ]


def _cells(source: Source) -> list[str]:
    summary, mean = source.summary, mean_reward(source)
    objective = str(summary.get("objective") or source.config.get("objective") or DASH)
    steps = number(summary.get("steps"))
    seconds = number(summary.get("seconds"))
    return [
        objective.partition("(")[0],
        DASH if summary.get("seed") is None else str(summary["seed"]),
        DASH if steps is None else f"{steps:g}",
        format_reward(mean.before),
        format_reward(mean.after),
        format_difference(mean.difference),
        _average(source, "gate/gradient_kept"),
        _average(source, "gate/active"),
        DASH if seconds is None else format_seconds(seconds),
    ]


def mean_reward(source: Source) -> RewardRow:
    """Held-out reward before and after, mean over domains."""
    return heldout_table(source.run).mean


def _average(source: Source, key: str) -> str:
    _, values = source.series.per_rollout(key)
    return format_percent(float(np.mean(values)) if len(values) else None)


def differences(sources: Sequence[Source]) -> list[tuple[str, list[str]]]:
    """Settings that are not the same in all runs that have them: name, and the value in each."""
    configs = [source.config for source in sources]
    rows = []
    for section in sorted({name for config in configs for name in config} - _UNIMPORTANT):
        # a recording, or an older version, may lack a setting as a whole: that is no difference
        flats = [flat({section: c[section]}) if section in c else None for c in configs]
        for name in dict.fromkeys(name for found in flats if found for name in found):
            values = [_ABSENT if found is None else found.get(name) for found in flats]
            known = [value for value in values if value is not _ABSENT]
            if any(value != known[0] for value in known):
                rows.append((name, [as_text(value) for value in values]))
    return rows


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names; empty ones are left out."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{key}.")
        elif value != {}:
            found[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return found


def as_text(value: Any) -> str:
    """A value of a setting on at most 80 characters."""
    if value is _ABSENT or value is None:
        return DASH
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:79] + "…"
