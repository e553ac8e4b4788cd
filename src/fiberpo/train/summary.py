"""``summary.json``: what a run was and what came of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .. import __version__
from ..gates import AggregateGate, BudgetClip, Gate, LogClip, RatioClip
from ..objective import Objective
from ..statistics import Statistics
from .heldout import Heldout
from .sources import Row

QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


def strata_table(objective: Objective, statistics: Statistics | None) -> list[dict[str, Any]]:
    """One row per stratum (and per named context): budget, drift quantiles, regimes of the run."""
    if statistics is None:
        return []
    rows = []
    gates = {**objective.gate_map.gates, "token": objective.gate_map.token}
    for stratum, gate in gates.items():
        for context, budget in _budgets(gate):
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
        values = statistics.quantiles(key, tuple(QUANTILES.values()))
        row[channel] = dict(zip(QUANTILES, values, strict=True))
        row[channel]["max"] = float(statistics.drifts[key][0].values[4])
        row[channel] = {k: v if math.isfinite(v) else None for k, v in row[channel].items()}
    for word in ("pass", "rollback", "zeroed"):
        row[word] = fraction(word)
    return row


def _budgets(gate: Gate) -> list[tuple[str, list[float] | None]]:
    """Context name -> (positive, negative) in nats, as far as the gate has one."""
    if isinstance(gate, AggregateGate):
        named = [(name, list(pair)) for name, pair in gate.budget.named]
        others = [] if gate.budget.others is None else [("all", list(gate.budget.others))]
        return [*others, *named]
    if isinstance(gate, LogClip):
        return [("all", [gate.epsilon, gate.epsilon])]
    if isinstance(gate, RatioClip):
        high = gate.epsilon if gate.epsilon_high is None else gate.epsilon_high
        return [("all", [math.log1p(high), -math.log1p(-gate.epsilon)])]
    if isinstance(gate, BudgetClip):
        return [("all", [gate.radius, gate.radius])]
    return [("all", None)]


def samples(
    rows: Mapping[str, Sequence[Row]],
    before: Mapping[str, Sequence[Sequence[Any]]],
    after: Heldout | None,
    each: int = 2,
) -> list[dict[str, Any]]:
    """Answers to the same held-out prompts before and after, ``each`` of every domain."""
    found = []
    for domain, prompts in rows.items():
        for i, row in enumerate(prompts[:each]):
            prompt = row["prompt"]
            text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
            late = after.answers[domain][i] if after is not None else (None, None)
            found.append(
                {
                    "domain": domain, "prompt": text, "answer": row.get("answer"),
                    "before": before[domain][i][0], "reward_before": before[domain][i][1],
                    "after": late[0], "reward_after": late[1],
                }
            )  # fmt: skip
    return found


def versions() -> dict[str, str]:
    """Versions of what took part."""
    from importlib.metadata import version

    return {"fiberpo": __version__, **{p: version(p) for p in ("torch", "transformers", "trl")}}
