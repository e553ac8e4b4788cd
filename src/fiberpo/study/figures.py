"""Charts of a study's page: curves over seeds, and paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from .. import palette
from ..report.curves import Figure, Panel, log_ticks, numbers
from ..report.tables import MINUS, short
from .measures import DOMAIN, REWARD
from .statistics import ALL, interval, number

ROW = 34
"""Height of a row of a forest plot, in pixels."""
COLORS = {"better": "green", "worse": "vermillion"}


@dataclass(frozen=True)
class Look:
    """How an arm is drawn, in every chart of the page."""

    color: str
    dash: str


def looks(arms: Sequence[str]) -> dict[str, Look]:
    """A fixed colour for each arm; dashes tell those apart that share one."""
    count = len(palette.NAMES)
    return {
        arm: Look(palette.NAMES[i % count], palette.PLOT_DASHES[i // count % 3])
        for i, arm in enumerate(arms)
    }


@dataclass(frozen=True)
class Spread:
    """A metric over the evaluations of an arm: places, and median and ends over the seeds."""

    tokens: np.ndarray
    steps: np.ndarray
    median: np.ndarray
    low: np.ndarray
    high: np.ndarray
    seeds: int


def spread(lines: pd.DataFrame, key: str) -> Spread | None:
    """Median, lowest and highest seed at every evaluation; None where there are no values.

    Seeds sample different numbers of tokens: an evaluation stands at their mean.
    """
    known = lines[lines[key].notna()]
    if known.empty:
        return None
    by_step = known.groupby("step")
    values = by_step[key].agg(["median", "min", "max"])
    median, low, high = (values[name].to_numpy(float) for name in ("median", "min", "max"))
    tokens, steps = by_step["tokens"].mean().to_numpy(float), values.index.to_numpy(float)
    return Spread(tokens, steps, median, low, high, known["seed"].nunique())


def curves(
    table: pd.DataFrame,
    key: str,
    title: str,
    arms: Mapping[str, Look],
    unit: str,
    *,
    log: bool = False,
    zero: bool = True,
) -> Panel | None:
    """A metric in one setting: a line an arm (median over seeds) in a band (all seeds).

    ``figure["updates"]`` holds the places of every trace in updates; those of the traces
    themselves are tokens, and the page changes between both.

    Args:
        table: evaluations of the finished cells of the setting.
        log: a logarithmic axis.
        zero: the axis reaches down to 0.
    """
    if key not in table:
        return None
    bands: list[tuple[Figure, list[float | None]]] = []
    lines: list[tuple[Figure, list[float | None]]] = []
    said, seen = [], []
    for arm, look in arms.items():
        found = spread(table[table["arm"] == arm], key)
        if found is None or (log and not (found.low > 0).all()):
            continue
        tokens, steps = numbers(found.tokens), numbers(found.steps)
        trace = {"type": "scatter", "mode": "lines", "name": arm, "showlegend": False}
        if found.seeds > 1:
            band = {
                **trace, "x": tokens + tokens[::-1], "hoverinfo": "skip",
                "y": numbers(found.high) + numbers(found.low)[::-1], "fill": "toself",
                "fillcolor": f"var(--{look.color}) 0.12", "line": {"width": 0},
                "meta": {"arm": arm, "band": True},
            }  # fmt: skip
            bands.append((band, steps + steps[::-1]))
        line = {
            **trace, "mode": "lines+markers", "x": tokens, "y": numbers(found.median),
            "customdata": numbers_of(found), "marker": {"size": 4}, "meta": {"arm": arm},
            "line": {"color": f"var(--{look.color})", "dash": look.dash, "width": 1.8},
            "hovertemplate": "%{y:.3~g} (%{customdata[0]:.3~g} to %{customdata[1]:.3~g})",
        }  # fmt: skip
        lines.append((line, steps))
        seen += [found.low, found.high]
        said.append(f"{arm} {short(found.median[0])} to {short(found.median[-1])}")
    if not lines:
        return None
    traces, updates = zip(*bands, *lines, strict=True)
    values = np.concatenate(seen)
    axis: Figure = {"title": {"text": unit}}
    if log:
        low, high = float(values.min()), float(values.max())
        ticks = log_ticks(low / 1.26, high * 1.41)
        axis |= {
            "type": "log", "tickvals": ticks, "ticktext": [short(tick) for tick in ticks],
            "range": [np.log10(low) - 0.1, np.log10(high) + 0.15],
        }  # fmt: skip
    elif zero and values.min() >= 0:
        axis["rangemode"] = "tozero"
    layout = {
        "yaxis": axis,
        "xaxis": {"rangemode": "tozero", "exponentformat": "SI"},
        "showlegend": False,
    }
    figure = {"data": [*traces], "layout": layout, "updates": [*updates]}
    text = f"{title}, median over seeds, first to last evaluation: {'; '.join(said)}."
    return Panel(title, text, figure)


def numbers_of(found: Spread) -> list[list[float | None]]:
    """Ends of the band at every place, for the label under the pointer."""
    return [list(pair) for pair in zip(numbers(found.low), numbers(found.high), strict=True)]


def learning(table: pd.DataFrame, arms: Mapping[str, Look]) -> dict[str, Panel]:
    """Held-out reward in one setting: the mean (under ``""``), and every domain it has."""
    prefix = REWARD + DOMAIN
    domains = [name[len(prefix) :] for name in table.columns if name.startswith(prefix)]
    found = {"": curves(table, REWARD, "Mean over domains", arms, "held-out reward", zero=False)}
    for name in domains:
        found[name] = curves(table, prefix + name, name, arms, "held-out reward", zero=False)
    return {name: panel for name, panel in found.items() if panel is not None}


def further(table: pd.DataFrame, arms: Mapping[str, Look]) -> list[Panel]:
    """What else is measured, in one setting."""
    charts: list[tuple[str, str, str, dict[str, Any]]] = [
        ("entropy", "Entropy", "nats per token", {}),
        ("ratio/mean", "Mean policy ratio", "ratio", {"zero": False}),
        ("grad_norm", "Gradient norm", "before clipping", {"log": True}),
        ("completions/mean_length", "Answer length", "tokens", {}),
        ("gate/gradient_kept", "Gradient kept by the gates", "share", {}),
        ("kl/k3", "KL estimate k3", "nats per token", {}),
    ]
    for name in strata(table):
        for channel, sign in (("drift_pos", "positive"), ("drift_neg", "negative")):
            key = f"gate/{name}/{channel}/p90"
            charts.append((key, f"Drift, {name}, {sign}", "90th percentile, nats", {}))
    panels = [curves(table, key, title, arms, unit, **more) for key, title, unit, more in charts]
    return [panel for panel in panels if panel is not None]


def strata(table: pd.DataFrame) -> list[str]:
    """Strata of which the drift was measured, in the order of the columns."""
    end = "/drift_pos/p90"
    return [key[5 : -len(end)] for key in table if key.startswith("gate/") and key.endswith(end)]


def forest(rows: pd.DataFrame, span: tuple[float, float]) -> Panel | None:
    """Paired differences of one measure in one setting: a row a pair, with its interval.

    Args:
        rows: of `fiberpo.study.statistics.compare`.
        span: ends of the axis, the same for all settings.
    """
    found = rows[rows["n"] > 0].to_dict("records")
    if not found:
        return None
    places = [*range(len(found), 0, -1)]
    traces: list[Figure] = [{
        "type": "scatter", "mode": "markers", "hoverinfo": "skip",
        "x": numbers(np.concatenate([row["differences"] for row in found])),
        "y": [y - 0.28 for row, y in zip(found, places, strict=True) for _ in row["differences"]],
        "marker": {"color": "var(--muted) 0.6", "size": 4},
    }]  # fmt: skip
    for row, y in zip(found, places, strict=True):
        color = f"var(--{COLORS.get(row['verdict'], 'grey')})"
        ends = interval(row["low"], row["high"], "+")
        label = f"{row['a']} - {row['b']}<br>{number(row['difference'], '+')} {ends}"
        if ends:
            traces.append({
                "type": "scatter", "mode": "lines", "x": [row["low"], row["high"]], "y": [y, y],
                "line": {"color": color, "width": 3}, "hoverinfo": "skip",
            })  # fmt: skip
        traces.append({
            "type": "scatter", "mode": "markers", "x": [row["difference"]], "y": [y],
            "marker": {"color": color, "size": 9}, "hovertemplate": f"{label}<extra></extra>",
        })  # fmt: skip
    ticks = [f"{row['a']}<br>{MINUS} {row['b']}" for row in found]
    layout = {
        "showlegend": False, "height": 60 + ROW * len(found) + 10,
        "xaxis": {"range": [*span], "showgrid": True, "nticks": 5, "tickangle": 0,
                  "title": {"text": "difference"}},
        "yaxis": {"tickvals": places, "ticktext": ticks, "range": [0.4, len(found) + 0.6],
                  "showgrid": False},
        "shapes": [{"type": "line", "x0": 0, "x1": 0, "y0": 0, "y1": 1, "yref": "paper",
                    "line": {"color": "var(--muted)", "width": 1}}],
    }  # fmt: skip
    setting = found[0]["setting"]
    said = "; ".join(
        f"{r['a']} - {r['b']} {number(r['difference'], '+')} ({r['verdict']})" for r in found
    )
    title = "All settings together" if setting == ALL else str(setting)
    return Panel(title, f"{title}, paired differences: {said}.", {"data": traces, "layout": layout})


def span_of(rows: pd.DataFrame) -> tuple[float, float]:
    """Ends of an axis that holds every interval and every seed's difference, and 0."""
    ends = [rows["low"].to_numpy(float), rows["high"].to_numpy(float)]
    seen = np.concatenate([*ends, *rows["differences"], [0.0]])
    low, high = float(np.nanmin(seen)), float(np.nanmax(seen))
    room = 0.05 * (high - low) or 0.05
    return low - room, high + room
