"""What is measured of a cell of a study, from the table of its held-out evaluations.

`DEFINITIONS` says what every measure is; the page and the tables show the same text.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy.integrate import trapezoid

from ..errors import DataError
from ..report.series import Array

if TYPE_CHECKING:
    from .design import Study

REWARD, DOMAIN = "heldout/reward", "/domain="
CELL = ["setting", "arm", "seed"]
_ABOUT = ("study", "family", "objective", "digest", "cell_seconds")
_NEEDED = (*CELL, "study", "family", "status", "error", "step", "tokens", REWARD)
_AT_END = ("entropy", "ratio/mean", "completions/mean_length", "grad_norm")
_DRIFT = re.compile(r"gate/[^/]+/drift_(pos|neg)/p90$")


DEFINITIONS = {
    "before": "held-out reward before training, mean over domains",
    "final": "mean of the last two evaluations after training began (of the only one, if one)",
    "best": "highest evaluation after training began",
    "auc": "mean held-out reward after training began: the trapezoid over the completion tokens "
    "sampled so far, divided by the tokens it spans",
    "auc_updates": "the same over optimizer steps",
    "weakest": "final of the domain whose final is lowest",
    "damage": "sum over domains of max(0, before - final)",
    "collapsed": "domains whose final is below half of their reward before training; a cell "
    "collapses where it is at least one",
    "entropy": "mean over the updates before the last evaluation, in nats per token",
    "ratio/mean": "mean policy ratio, over the same updates",
    "completions/mean_length": "mean answer length in tokens, over the same updates",
    "grad_norm": "mean gradient norm before clipping, over the same updates",
    "grad_norm/max": "largest gradient norm of the run",
    "grad_norm/growth": "mean gradient norm of the last third of the stretches between "
    "evaluations, divided by that of the first third",
}
"""Measures of a cell. The first seven (without ``weakest``) and ``collapsed`` also stand for every
domain, as ``final/domain=NAME``, so do those of the last updates that are logged by domain. The
drifts (``gate/STRATUM/drift_pos/p90``, ``drift_neg``) are means over the run."""


def arranged(measures: pd.DataFrame, study: Study) -> pd.DataFrame:
    """Cells in the order of the study.

    Raises:
        DataError: for a cell of no setting or arm of the study.
    """
    for kind, known in (("setting", study.settings), ("arm", study.arms)):
        for name in measures[kind]:
            if name not in known:
                raise DataError(
                    f"the table has the {kind} {name!r}, the study has {', '.join(known)}; it is "
                    "the table of another study, or of an older state of this one"
                )
    places = {"setting": list(study.settings), "arm": list(study.arms)}
    return measures.sort_values(
        CELL, key=lambda c: c.map(places[c.name].index) if c.name in places else c
    ).reset_index(drop=True)


def cell_measures(table: pd.DataFrame) -> pd.DataFrame:
    """One row a cell, with every measure of `DEFINITIONS`.

    A failed cell, and one whose evaluations are incomplete, keep their row: ``status`` is
    ``failed`` or ``incomplete``, ``note`` says why, and every measure is NaN.

    Args:
        table: one row a held-out evaluation of a cell (``results.parquet``).

    Raises:
        DataError: for a table without the needed columns, or with an evaluation twice.
    """
    missing = [name for name in _NEEDED if name not in table.columns]
    if missing:
        raise DataError(
            f"the table has no column {missing[0]!r}; it is not the results.parquet of a study"
        )
    twice = table[table.duplicated([*CELL, "step"])]
    if len(twice):
        first = twice.iloc[0]
        raise DataError(
            f"step {first['step']} of cell {first['setting']}, {first['arm']}, seed "
            f"{first['seed']} is in the table twice; keep one of them"
        )
    prefix = REWARD + DOMAIN
    domains = [name[len(prefix) :] for name in table.columns if name.startswith(prefix)]
    finished = table[table["status"] == "finished"]
    expected = finished.groupby(["setting", "arm"])["step"].agg(lambda s: set(s.dropna()))
    rows = []
    for (setting, arm, seed), lines in table.groupby(CELL, sort=False):
        lines = lines.sort_values("step")
        note = _reason(lines, domains, expected.get((setting, arm), set()))
        status = "finished" if not note else "incomplete"
        status = "failed" if (lines["status"] == "failed").any() else status
        about = {key: lines[key].iloc[0] for key in _ABOUT if key in lines}
        cell = {"setting": setting, "arm": arm, "seed": int(seed), "status": status, "note": note}
        rows.append({**about, **cell, **({} if note else _measured(lines, domains))})
    measures = pd.DataFrame(rows)
    for name in ("final", "auc", "weakest", "damage", "collapsed"):
        if name not in measures:
            measures[name] = np.nan
    return measures


def _reason(lines: pd.DataFrame, domains: list[str], expected: set[float]) -> str:
    """Why a cell has no measures; empty if it has."""
    if (lines["status"] != "finished").any():
        return str(lines["error"].iloc[-1]) or "failed without a message"
    steps = set(lines["step"])
    if 0 not in steps:
        return "no evaluation before training"
    if len(steps) < 2:
        return "no evaluation after training began"
    if missing := sorted(expected - steps):
        return f"no evaluation at step {missing[0]:g}, which other seeds have"
    for key in (REWARD, *(REWARD + DOMAIN + name for name in domains)):
        gaps = lines[key].isna()
        if gaps.any() and (key == REWARD or not gaps.all()):
            return f"no {key} at step {lines['step'][gaps].iloc[0]:g}"
    return ""


def _measured(lines: pd.DataFrame, domains: list[str]) -> dict[str, Any]:
    tokens, steps = (lines[name].to_numpy(float) for name in ("tokens", "step"))
    found: dict[str, Any] = {
        "evaluations": len(lines) - 1, "steps": steps[-1], "tokens": tokens[-1],
        **curve_measures(lines[REWARD].to_numpy(float), tokens, steps),
    }  # fmt: skip
    own: dict[str, dict[str, float]] = {}
    for name in domains:
        rewards = lines[REWARD + DOMAIN + name].to_numpy(float)
        if not np.isnan(rewards).any():
            own[name] = curve_measures(rewards, tokens, steps)
    for name, values in own.items():
        found |= {f"{key}{DOMAIN}{name}": value for key, value in values.items()}
    parts = own or {"": found}
    weakest = min(parts, key=lambda name: parts[name]["final"])
    found |= {
        "weakest": parts[weakest]["final"], "weakest_domain": weakest,
        "damage": sum(values["damage"] for values in parts.values()),
        "collapsed": sum(values["collapsed"] for values in parts.values()),
    }  # fmt: skip
    trained = lines.iloc[1:]
    for key in (str(name) for name in trained.columns):
        if key.split(DOMAIN)[0] in _AT_END:
            found[key] = trained[key].iloc[-1]
        elif _DRIFT.match(key):
            found[key] = trained[key].mean()
    if "grad_norm" in trained:
        norms = trained["grad_norm"].to_numpy(float)
        third = max(1, len(norms) // 3)
        start = norms[:third].mean()
        found["grad_norm/growth"] = norms[-third:].mean() / start if start > 0 else np.nan
    if "grad_norm/max" in trained:
        found["grad_norm/max"] = trained["grad_norm/max"].max()
    return found


def curve_measures(rewards: Array, tokens: Array, steps: Array) -> dict[str, float]:
    """Measures of one held-out curve, whose first point is before training.

    >>> found = curve_measures(*(np.array(v, float) for v in ([.5, .4, .6], [0, 9, 19], [0, 2, 4])))
    >>> {name: round(float(value), 3) for name, value in found.items()}
    {'before': 0.5, 'final': 0.5, 'best': 0.6, 'auc': 0.5, 'auc_updates': 0.5, 'damage': 0.0,
     'collapsed': 0.0}
    """
    before, trained = rewards[0], rewards[1:]
    final = trained[-2:].mean()
    return {
        "before": before,
        "final": final,
        "best": trained.max(),
        "auc": _mean_over(trained, tokens[1:]),
        "auc_updates": _mean_over(trained, steps[1:]),
        "damage": max(0.0, before - final),
        "collapsed": float(final < before / 2),
    }


def _mean_over(values: Array, place: Array) -> float:
    """Trapezoid of values over their places, divided by the width; the mean where there is none."""
    width = place[-1] - place[0]
    return float(trapezoid(values, place) / width if width > 0 else values.mean())
