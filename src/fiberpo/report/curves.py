"""Curves over optimizer steps as data for plotly.

Colours are names of the page's style sheet (``var(--blue)``, ``var(--blue) 0.3`` with opacity), so
that the page decides between its light and dark variants.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .series import Array
from .tables import short

Figure = dict[str, Any]


@dataclass(frozen=True)
class Panel:
    """One chart: what plotly draws, a sentence that says what it shows, a line below its title."""

    title: str
    description: str
    figure: Figure
    note: str = ""


@dataclass(frozen=True)
class Curve:
    """A curve by name and colour; ``faint`` is drawn light below it, ``markers`` on top."""

    name: str
    x: Array
    y: Array
    color: str
    dash: str = "solid"
    width: float = 2.0
    faint: Array | None = None
    markers: bool = False
    legend: bool = True
    opacity: float = 1.0


def numbers(values: Array) -> list[float | None]:
    """Values for JSON, with six significant digits; None where there is none."""
    return [float(f"{v:.6g}") if np.isfinite(v) else None for v in values.tolist()]


def _trace(curve: Curve) -> Figure:
    mode = "lines+markers" if curve.markers or len(curve.x) == 1 else "lines"
    return {
        "type": "scatter",
        "mode": mode,
        "name": curve.name,
        "legendgroup": curve.name,
        "showlegend": curve.legend,
        "x": numbers(curve.x),
        "y": numbers(curve.y),
        "opacity": curve.opacity,
        "line": {"color": f"var(--{curve.color})", "dash": curve.dash, "width": curve.width},
        "marker": {"size": 6 if len(curve.x) <= 25 else 3},
    }


def lines(
    title: str,
    description: str,
    curves: Sequence[Curve],
    unit: str = "",
    *,
    log: bool = False,
    percent: bool = False,
    rules: Sequence[tuple[float, str, str]] = (),
    low: float | None = None,
    note: str = "",
    legend: bool = True,
) -> Panel | None:
    """A chart of curves over optimizer steps; None without any.

    Args:
        rules: horizontal lines: height, colour, name in the legend.
        low: the axis reaches down to this at least.
        note: a line below the title.
        legend: False where the page has a legend of its own.
    """
    drawn = [c for c in curves if len(c.x)]
    if not drawn:
        return None
    traces: list[Figure] = []
    for curve in drawn:
        if curve.faint is not None:
            traces.append(
                {
                    "type": "scatter", "mode": "lines", "hoverinfo": "skip", "showlegend": False,
                    "legendgroup": curve.name, "x": numbers(curve.x), "y": numbers(curve.faint),
                    "line": {"color": f"var(--{curve.color}) 0.3", "width": 1},
                }
            )  # fmt: skip
        traces.append(_trace(curve))
    span = [min(float(c.x.min()) for c in drawn), max(float(c.x.max()) for c in drawn)]
    for height, color, name in rules:
        traces.append(
            {
                "type": "scatter", "mode": "lines", "name": name, "x": span,
                "y": [height, height], "showlegend": bool(name),
                "line": {"color": f"var(--{color})", "dash": "dash", "width": 1.2},
            }
        )  # fmt: skip
    axis: Figure = {"title": {"text": unit}}
    values = np.concatenate([c.y for c in drawn])
    if log:
        seen = np.concatenate([values, *(c.faint for c in drawn if c.faint is not None)])
        positive = seen[seen > 0]
        heights = [height for height, _, _ in rules]
        if not len(positive):
            return None
        top = max(float(positive.max()), *heights, 0.0)
        bottom = max(float(positive.min()), top * 1e-4)
        bottom = min(bottom, *heights) if heights else bottom
        ticks = log_ticks(bottom / 1.26, top * 1.41)
        axis |= {
            "type": "log", "range": [np.log10(bottom) - 0.1, np.log10(top) + 0.15],
            "tickvals": ticks, "ticktext": [short(tick) for tick in ticks],
        }  # fmt: skip
    elif percent:
        axis |= {"tickformat": ".3~p", "rangemode": "tozero"}
    if low is not None and not log:
        axis["range"] = _range(values, low)
    layout: Figure = {"yaxis": axis, "xaxis": {"title": {"text": "optimizer step"}}}
    if not legend:
        layout["showlegend"] = False
    return Panel(title, description, {"data": traces, "layout": layout}, note)


def _range(values: Array, low: float) -> list[float]:
    finite = values[np.isfinite(values)]
    bottom, top = min(low, float(finite.min())), max(low, float(finite.max()))
    room = 0.06 * (top - bottom) or 1.0
    return [bottom - room if bottom < 0 else bottom, top + room]


def told(name: str, values: Array, percent: bool = False) -> str:
    """``kept 99.9 % to 93.2 %``: first and last of a curve."""
    first, last = values[[0, -1]].tolist()
    shown = [f"{100 * v:.1f} %" if percent else short(v) for v in (first, last)]
    return f"{name} {shown[0]} to {shown[1]}"


def log_ticks(low: float, high: float) -> list[float]:
    """Three to six round values on a logarithmic axis.

    >>> [short(tick) for tick in log_ticks(0.004, 0.5)]
    ['0.01', '0.03', '0.1', '0.3']
    """
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for digits in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), (1, 1.2, 1.5, 1.8, 2, 2.5)):
        ticks = [d * 10.0**k for k in decades for d in digits if low <= d * 10.0**k <= high]
        if len(ticks) >= 3:
            break
    return ticks[:: math.ceil(len(ticks) / 6) or 1]
