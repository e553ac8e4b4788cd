"""Statistics of a study: paired comparisons over seeds, counts of collapse, best trials.

Two arms are compared on the seeds that both finished: same seed, same data and initialisation
(`scipy.stats.ttest_rel`, `scipy.stats.false_discovery_control`); `METHOD` is what the page says.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from ..report.series import Array

MEASURES: Mapping[str, int] = {"final": 1, "auc": 1, "weakest": 1, "damage": -1}
"""Measures that are compared: 1 where more is better, -1 where less is."""
ALL = "all settings"
LEVEL = 0.95
METHOD = (
    "Differences are paired over the seeds that both arms finished, with 95 % t intervals; all "
    "settings together means that each seed is first averaged over the settings. p values are "
    "adjusted over all comparisons of the study by the method of Benjamini and Hochberg. The "
    "verdict says whether the interval, which is not adjusted, leaves out 0; damage is better "
    "where it is less."
)
NONE = "-"
_SAME = 1e-12


def compare(
    measures: pd.DataFrame,
    pairs: Iterable[tuple[str, str]],
    names: Sequence[str] = tuple(MEASURES),
) -> pd.DataFrame:
    """Paired differences ``a - b``: a row for each pair, setting and measure.

    With several settings there is a row for all of them together: every seed is first averaged
    over the settings in which both arms have two common seeds or more, then paired; seeds that lack
    one of these are left out.

    Args:
        measures: of `cell_measures`.
        pairs: names of two arms each.
        names: measures, of `MEASURES`.

    Returns:
        Columns ``setting, a, b, measure, n, seeds, differences, mean_a, mean_b, difference, low,
        high, p, p_adjusted, wins, ties, losses, verdict, note``. Without an interval (fewer than
        two common seeds, or the same difference on every seed) ``low`` and ``high`` are NaN and
        ``note`` says so; ``p`` is then NaN and there is no verdict, but 1 where both arms are equal
        on every seed. ``note`` also says which seeds are left out.
    """
    settings = list(dict.fromkeys(measures["setting"]))
    rows = []
    for a, b in pairs:
        for name in names:
            values = {
                (setting, arm): _by_seed(measures, setting, arm, name)
                for setting in settings
                for arm in (a, b)
            }
            both = [s for s in settings if len(_common(values[s, a], values[s, b])) > 1]
            for setting in settings:
                here = set(measures.loc[measures["setting"] == setting, "arm"])
                if {a, b} <= here:
                    left = _left_out(measures, setting, a, b)
                    row = _paired(values[setting, a], values[setting, b], name, left)
                    rows.append({"setting": setting, "a": a, "b": b, "measure": name, **row})
            if len(both) > 1:
                row = _over_all(values, both, a, b, name)
                lost = [s for s in settings if s not in both]
                row["note"] = "; ".join(
                    filter(None, [row["note"], f"without {', '.join(lost)}" if lost else ""])
                )
                rows.append({"setting": ALL, "a": a, "b": b, "measure": name, **row})
    columns = [
        "setting", "a", "b", "measure", "n", "seeds", "differences", "mean_a", "mean_b",
        "difference", "low", "high", "p", "p_adjusted", "wins", "ties", "losses", "verdict", "note",
    ]  # fmt: skip
    found = pd.DataFrame(rows, columns=columns)
    found["p_adjusted"] = adjusted(found["p"].to_numpy(float))
    return found


def _by_seed(measures: pd.DataFrame, setting: str, arm: str, name: str) -> pd.Series:
    own = measures[(measures["setting"] == setting) & (measures["arm"] == arm)]
    return own.set_index("seed")[name].dropna().astype(float).sort_index()


def _common(first: pd.Series, second: pd.Series) -> list[int]:
    return sorted(set(first.index) & set(second.index))


def _left_out(measures: pd.DataFrame, setting: str, a: str, b: str) -> str:
    """The seeds that only one of both arms has, or that did not come to an end, with the reason."""
    own = measures[(measures["setting"] == setting) & measures["arm"].isin((a, b))]
    reasons = []
    for seed, cells in own.groupby("seed"):
        status = dict(zip(cells["arm"], cells["status"], strict=True))
        bad = [f"{arm} {status.get(arm, 'not run')}" for arm in (a, b)
               if status.get(arm) != "finished"]  # fmt: skip
        if bad:
            reasons.append(f"seed {seed} left out: {', '.join(bad)}")
    return "; ".join(reasons)


def _over_all(
    values: Mapping[tuple[str, str], pd.Series], settings: list[str], a: str, b: str, name: str
) -> dict[str, Any]:
    """The comparison of the seeds' means over the settings."""
    first, second = (
        pd.concat([values[s, arm] for s in settings], axis=1).mean(axis=1, skipna=False).dropna()
        for arm in (a, b)
    )
    seen = {seed for s in settings for seed in (*values[s, a].index, *values[s, b].index)}
    lost = sorted(seen - set(_common(first, second)))
    plural = "s" if len(lost) > 1 else ""
    left = f"seed{plural} {', '.join(map(str, lost))} not in all settings" if lost else ""
    return _paired(first, second, name, left)


def _paired(first: pd.Series, second: pd.Series, name: str, left: str) -> dict[str, Any]:
    seeds = _common(first, second)
    x, y = first.loc[seeds].to_numpy(float), second.loc[seeds].to_numpy(float)
    differences = x - y
    better = MEASURES[name] * differences
    low, high, p, reason = _interval(x, y)
    side = MEASURES[name] * (int(low > 0) - int(high < 0))  # a NaN is neither
    verdict = {1: "better", 0: "no difference shown", -1: "worse"}[side]
    return {
        "n": len(seeds), "seeds": seeds, "differences": differences.tolist(),
        "mean_a": _mean(x), "mean_b": _mean(y), "difference": _mean(differences),
        "low": low, "high": high, "p": p,
        "wins": int((better > _SAME).sum()), "ties": int((np.abs(better) <= _SAME).sum()),
        "losses": int((better < -_SAME).sum()),
        "verdict": "no verdict" if np.isnan(p) else verdict,
        "note": "; ".join(filter(None, [reason, left])),
    }  # fmt: skip


def _mean(values: Array) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _interval(x: Array, y: Array) -> tuple[float, float, float, str]:
    """Ends of the interval, p value, and why there is none."""
    nothing = float("nan"), float("nan"), float("nan")
    if len(x) < 2:
        return *nothing, f"no interval: {len(x)} common seed{'' if len(x) == 1 else 's'}"
    if np.ptp(x - y) <= _SAME:
        equal = bool(np.abs(x - y).max() <= _SAME)
        return (
            *nothing[:2],
            1.0 if equal else nothing[2],
            (f"no interval: {'equal' if equal else 'the same difference'} on every seed"),
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of nearly equal differences
        test = stats.ttest_rel(x, y)
        ends = test.confidence_interval(LEVEL)
    return float(ends.low), float(ends.high), float(test.pvalue), ""


def adjusted(p: Array) -> Array:
    """p values adjusted by Benjamini and Hochberg; NaN stays NaN and does not count.

    >>> adjusted(np.array([0.01, np.nan, 0.04, 0.5]))
    array([0.03, nan, 0.06, 0.5 ])
    """
    known = ~np.isnan(p)
    found = np.full(len(p), np.nan)
    if known.any():
        found[known] = stats.false_discovery_control(p[known], method="bh")
    return found


# --- one arm -------------------------------------------------------------------------------------


def summaries(measures: pd.DataFrame, name: str = "final") -> pd.DataFrame:
    """Spread of a measure over the seeds of every arm and setting, and their counts.

    Returns:
        Columns ``setting, arm, cells, n, unfinished, median, lowest, highest, mean, low, high``;
        ``low`` and ``high`` are the 95 % t interval of the mean, NaN with fewer than two seeds or
        none of them apart.
    """
    rows = []
    for (setting, arm), cells in measures.groupby(["setting", "arm"], sort=False):
        values = cells[name].dropna().to_numpy(float)
        low, high, _, _ = _interval(values, np.zeros_like(values))
        ends = (np.median(values), values.min(), values.max()) if len(values) else (np.nan,) * 3
        rows.append({
            "setting": setting, "arm": arm, "cells": len(cells), "n": len(values),
            "unfinished": int((cells["status"] != "finished").sum()),
            "median": ends[0], "lowest": ends[1], "highest": ends[2],
            "mean": _mean(values), "low": low, "high": high,
        })  # fmt: skip
    return pd.DataFrame(rows)


def collapses(measures: pd.DataFrame) -> pd.DataFrame:
    """Cells with at least one collapsed domain, by setting and arm, and over all settings.

    Returns:
        Columns ``setting, arm, collapsed, n, share, low, high``: ``n`` counts finished cells, and
        the 95 % interval of the share is Wilson's (`scipy.stats.binomtest`).
    """
    own = measures[measures["status"] == "finished"]
    rows = []
    settings = list(dict.fromkeys(measures["setting"]))
    for setting in [*settings, *([ALL] if len(settings) > 1 else [])]:
        for arm in dict.fromkeys(measures["arm"]):
            chosen = (own["arm"] == arm) & ((own["setting"] == setting) | (setting == ALL))
            n, k = int(chosen.sum()), int((own.loc[chosen, "collapsed"] > 0).sum())
            if n:
                ends = stats.binomtest(k, n).proportion_ci(LEVEL, method="wilson")
                rows.append({
                    "setting": setting, "arm": arm, "collapsed": k, "n": n, "share": k / n,
                    "low": float(ends.low), "high": float(ends.high),
                })  # fmt: skip
    columns = ["setting", "arm", "collapsed", "n", "share", "low", "high"]
    return pd.DataFrame(rows, columns=columns)


def best_trials(measures: pd.DataFrame) -> pd.DataFrame:
    """The best trial of every family of several arms: highest mean ``auc`` over its seeds.

    Over all settings, the mean of the settings' means. Only trials with the most finished cells
    of their family are ranked: one that fails on hard seeds has no advantage of it.

    Returns:
        Columns ``setting, family, arm, auc, n, trials, unranked``, the last with the names of the
        trials that were not ranked.
    """
    rows = []
    settings = list(dict.fromkeys(measures["setting"]))
    for family, own in measures.groupby("family", sort=False):
        arms = list(dict.fromkeys(own["arm"]))
        if len(arms) < 2:
            continue
        means = own.groupby(["setting", "arm"], sort=False)["auc"].agg(["mean", "count"])
        for setting in [*settings, *([ALL] if len(settings) > 1 else [])]:
            if setting == ALL:
                found = means.groupby(level="arm", sort=False).agg({"mean": "mean", "count": "sum"})
            elif setting in means.index.get_level_values("setting"):
                found = means.loc[setting]
            else:
                continue
            ranked = found[found["count"] == found["count"].max()]
            if not ranked["count"].max():
                continue
            best = ranked["mean"].idxmax()
            rows.append({
                "setting": setting, "family": family, "arm": best,
                "auc": float(ranked["mean"][best]), "n": int(ranked["count"][best]),
                "trials": len(found), "unranked": [a for a in found.index if a not in ranked.index],
            })  # fmt: skip
    columns = ["setting", "family", "arm", "auc", "n", "trials", "unranked"]
    return pd.DataFrame(rows, columns=columns)


# --- in words ------------------------------------------------------------------------------------


def number(value: float, sign: str = "") -> str:
    """Three decimals; a dash where there is none.

    >>> number(0.1234), number(0.1, "+"), number(-1e-9), number(float("nan"))
    ('0.123', '+0.100', '0.000', '-')
    """
    return NONE if np.isnan(value) else f"{round(value, 3) + 0.0:{sign}.3f}"


def interval(low: float, high: float, sign: str = "") -> str:
    """``[low, high]``; empty where there is none."""
    return "" if np.isnan(low) else f"[{number(low, sign)}, {number(high, sign)}]"


def sentence(row: Mapping[str, Any], verdict: bool = True) -> str:
    """One comparison in plain words.

    >>> sentence({"a": "fiberpo", "b": "grpo", "setting": "hot", "measure": "final", "n": 5,
    ...     "difference": -0.12, "low": -0.17, "high": -0.06, "verdict": "worse", "note": ""})
    'fiberpo - grpo, setting hot, final: -0.120 [-0.170, -0.060], 5 seeds: worse'
    """
    place = row["setting"] if row["setting"] == ALL else f"setting {row['setting']}"
    text = f"{row['a']} - {row['b']}, {place}, {row['measure']}: "
    count = f"{row['n']} seed{'' if row['n'] == 1 else 's'}"
    if not row["n"]:
        text += "no common seed"
    else:
        found = f"{number(row['difference'], '+')} {interval(row['low'], row['high'], '+')}"
        text += f"{found.strip()}, {count}"
    text += f": {row['verdict']}" if verdict else ""
    return f"{text} ({row['note']})" if row["note"] else text
