"""The table of strata: budget, drift quantiles and regimes of a run, from merged statistics."""

from __future__ import annotations

import math
from typing import Any

from ..diagnosis.limits import limits
from ..objective import Objective
from ..statistics import Statistics

LEVELS = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


def strata_table(objective: Objective, statistics: Statistics | None) -> list[dict[str, Any]]:
    """One row per stratum (and per named context): budget, drift quantiles, regimes of the run.

    Of a stop, ``pass`` is within budget and ``zeroed`` is out of it.
    """
    if statistics is None:
        return []
    rows = []
    for stratum, known in limits(objective).items():
        for context, budget in known:
            suffix = "" if context == "all" else f"/domain={context}"
            if f"gate/{stratum}/pass_frac{suffix}" in statistics.means:
                rows.append(_row(statistics, stratum, context, suffix, budget))
    return rows


def _row(
    statistics: Statistics, stratum: str, context: str, suffix: str, budget: list[float] | None
) -> dict[str, Any]:
    def fraction(word: str) -> float:
        count, total, *_ = statistics.means[f"gate/{stratum}/{word}_frac{suffix}"].values.tolist()
        return total / count

    row: dict[str, Any] = {"stratum": stratum, "context": context, "budget": budget}
    for channel in ("drift_pos", "drift_neg"):
        key = f"gate/{stratum}/{channel}{suffix}"
        if key not in statistics.drifts:
            continue
        values = statistics.quantiles(key, tuple(LEVELS.values()))
        row[channel] = dict(zip(LEVELS, values, strict=True))
        row[channel]["max"] = float(statistics.drifts[key][0].values[4])
        row[channel] = {k: v if math.isfinite(v) else None for k, v in row[channel].items()}
    for word in ("pass", "rollback", "zeroed"):
        row[word] = fraction(word)
    return row
