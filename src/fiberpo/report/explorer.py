"""What the regime explorer starts from, and the table of the most gated trajectories."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..recipes import RECOMMENDED_BUDGET
from .recorded import Recorded, Row
from .sources import Source
from .tables import DASH, format_difference, format_drift, format_percent

EXAMPLE_TEXT = [*"6+2=8;5+3=8#88", "</s>"]
EXAMPLE_LOG_RATIO = [
    0.02, 0.0, 0.31, -0.01, 0.12, 0.0, -0.22, 0.0, 0.05, -0.03, 0.41, 0.09, 0.18, -0.06, 0.01,
]  # fmt: skip
"""A trajectory that nobody recorded, to show what the controls do."""

SHOWN_TOKENS = 400
"""Tokens of a trajectory that the table shows."""

SHOWN_ROWS = 8
"""Rows of the table; the explorer can show the others."""

FAINT, STRONG = 12, 43
"""Percent of colour of the smallest change, and how much more the largest has."""

FALLBACK = {"strata": [{"name": "trajectory", "budget": list(RECOMMENDED_BUDGET),
                        "rollback": None}], "epsilon": 0.04, "pessimistic": False}  # fmt: skip


@dataclass(frozen=True)
class Token:
    """A token as the table shows it: what was done to it, and how much of the largest change."""

    text: str
    kind: str
    share: int
    title: str


@dataclass(frozen=True)
class Gated:
    """One row of the table of the most gated trajectories."""

    where: str
    step: str
    length: str
    reward: str
    advantage: str
    drift: str
    change: str
    kept: str
    gates: str
    prompt: str | None
    tokens: list[Token]
    more: int
    target: str


def scale_of(sources: Sequence[Source]) -> float:
    """The change of a log ratio that gets the full colour: the 98th percentile of what is shown."""
    sizes = [
        abs(x)
        for source in sources
        if source.recorded is not None
        for row in source.recorded.gated
        for x in row["change"]
        if x
    ]
    return float(np.quantile(sizes, 0.98)) if sizes else 0.2


def gated_rows(recorded: Recorded, run: int, scale: float) -> list[Gated]:
    """The table of one run, the most gated first."""
    rows = recorded.gated[:SHOWN_ROWS]
    return [_gated(row, recorded, f"{run},{i}", scale) for i, row in enumerate(rows)]


def _gated(row: Row, recorded: Recorded, target: str, scale: float) -> Gated:
    leaf = row["leaf"] if isinstance(row["leaf"], int) else row["leaf"][0]
    context = row["contexts"][leaf]
    advantage = row["a"] if not isinstance(row["a"], list) else None
    acting = [
        f"{recorded.settings['strata'][c['s']]['name']} {word}"
        for c in row["contexts"]
        if (word := ("", "rolled back", "zeroed")[max(c["r"])])
    ]
    gates = ", ".join(dict.fromkeys(acting)) or "token only"
    if row["masked"]:
        gates = "left out by a mask" if not row["stopped"] else "stopped"
    return Gated(
        where=", ".join(str(v) if k == "domain" else f"{k} {v}" for k, v in row["labels"].items())
        or f"row {row['row']}",
        step=str(row["step"]),
        length=str(row["length"]),
        reward=DASH if row["reward"] is None else format_drift(row["reward"]),
        advantage="varies" if advantage is None else format_difference(advantage),
        drift=f"{format_drift(context['p'])} / {format_drift(context['m'])}",
        change=format_drift(row["mean_change"]),
        kept=format_percent(row["kept"]),
        gates=gates if recorded.own or row["masked"] else DASH,
        prompt=row["prompt"],
        tokens=_tokens(row, scale),
        more=row["length"] - min(len(row["l"]), SHOWN_TOKENS),
        target=target,
    )


def _tokens(row: Row, scale: float) -> list[Token]:
    texts = row["text"] or [f"·{i + 1}" for i in range(len(row["l"]))]
    found: list[Token] = []
    for text, log_ratio, change in zip(texts, row["l"], row["change"], strict=False):
        if len(found) == SHOWN_TOKENS:
            break
        if change is None:
            kind, share, gated = "lower", FAINT + STRONG, "gated ratio not positive"
        else:
            size = abs(change)
            kind = "" if size < 5e-7 else "lower" if change < 0 else "higher"
            share = round(FAINT + STRONG * min(1.0, size / scale))
            gated = f"gated {format_drift((log_ratio or 0.0) + change)}"
        title = f"log ratio {format_drift(log_ratio)}, {gated}"
        found.append(Token(str(text).replace("\n", "↵"), kind, share, title))
    return found


def explorer_data(source: Source) -> dict[str, Any]:
    """Strata, budgets, trajectories and points for the page's own script."""
    recorded = source.recorded
    if recorded is None or not (recorded.gated or recorded.others):
        return _without_recording(source)
    rows = [*recorded.gated, *recorded.others]
    count = len(recorded.gated)
    groups = [
        {"label": "most gated first", "items": list(range(count))},
        {"label": "taken at random", "items": list(range(count, len(rows)))},
    ]
    return {
        **recorded.settings,
        "source": "Trajectories of the run's recording, with its own drifts at every stratum.",
        "trajectories": [_trajectory(row) for row in rows],
        "groups": [group for group in groups if group["items"]],
        "points": recorded.points,
        "points_name": "recorded contexts",
    }


def _trajectory(row: Row) -> dict[str, Any]:
    kept = {k: row[k] for k in ("l", "a", "text", "contexts", "leaf")}
    labels = ", ".join(str(v) for v in row["labels"].values())
    title = f"step {row['step']}, row {row['row']}{f' ({labels[:40]})' if labels else ''}, "
    return {**kept, "title": f"{title}{row['length']} tokens"}


def _without_recording(source: Source) -> dict[str, Any]:
    """The run's budgets and drifts, with an example in place of its trajectories."""
    form = _form_of_metrics(source)
    strata = form["strata"]
    ratios = EXAMPLE_LOG_RATIO
    home = next((i for i, s in enumerate(strata) if s["name"] == "trajectory"), len(strata) - 1)
    points = []
    for stratum in strata:
        pairs = [
            source.series.per_rollout(f"gate/{stratum['name']}/{channel}/p90", "max")[1].tolist()
            for channel in ("drift_pos", "drift_neg")
        ]
        points.append([[float(f"{x:.4g}") for x in p] for p in zip(*pairs, strict=False)])
    example = {
        "title": f"built-in example, {len(ratios)} tokens",
        "l": ratios, "a": 1.0, "text": EXAMPLE_TEXT, "leaf": 0,
        "contexts": [
            {
                "s": home, "name": "(example)", "up": -1, "k": len(ratios),
                "p": sum(max(x, 0.0) for x in ratios) / len(ratios),
                "m": sum(max(-x, 0.0) for x in ratios) / len(ratios),
                "c": strata[home]["budget"],
            }
        ],
    }  # fmt: skip
    return {
        **form,
        "source": (
            "This run has no recording, so the trajectory is a built-in example and the points of "
            "the map are the 90th percentiles of the run's drifts, one a rollout. "
            "fiberpo train --record keeps the tokens of the run."
        ),
        "trajectories": [example],
        "groups": [{"label": "no recording", "items": [0]}],
        "points": points,
        "points_name": "p90 of each rollout",
    }


def _form_of_metrics(source: Source) -> dict[str, Any]:
    """Budgets and epsilon of a run of FiberPO from its summary; those of the paper otherwise."""
    if not str(source.summary.get("objective") or "").startswith("fiberpo"):
        return FALLBACK
    rows = source.series.strata
    pairs = {row.stratum: [c.budget for c in row.channels] for row in reversed(rows)}
    epsilon = (pairs.pop("token", None) or [None])[0] or FALLBACK["epsilon"]
    strata = [
        {"name": name, "budget": pair, "rollback": None}
        for name, pair in reversed(list(pairs.items()))
        if any(pair)
    ]
    return {
        "strata": strata or FALLBACK["strata"],
        "epsilon": epsilon,
        "pessimistic": "pessimistic=True" in str(source.summary["objective"]),
    }


def as_script(value: Any) -> str:
    """JSON that may stand inside a script element, whatever text it holds.

    >>> as_script("</script>")
    '"\\\\u003c/script\\\\u003e"'
    """
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
