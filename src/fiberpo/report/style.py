"""Axes and labels of the overview image."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from fiberpo.palette import RC
from fiberpo.report.curves import log_ticks
from fiberpo.report.series import Array, RunSeries, smooth
from fiberpo.report.tables import short

Label = tuple[float, str, str]
"""Height in data coordinates, text and colour of a label at the right edge."""


@contextmanager
def report_style() -> Iterator[None]:
    """The settings of the report's figures, for the time of a ``with`` block."""
    with matplotlib.rc_context(RC), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Gg]lyph.*")
        yield


# --- axes --------------------------------------------------------------------------------------


def step_axis(ax: Axes, run: RunSeries) -> None:
    """Optimizer steps of the whole run from left to right."""
    low, high = run.span
    ax.set_xlim(low, high + 0.01 * (high - low))
    ax.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, steps=[1, 2, 5, 10]))
    ax.set_xlabel("optimizer step")


def number_axis(ax: Axes) -> None:
    """A few round values from bottom to top, on the limits that are set."""
    ax.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: short(v)))


def log_axis(ax: Axes) -> None:
    """A logarithmic axis with three to six round values, on the limits that are set."""
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    ax.yaxis.set_major_locator(FixedLocator(log_ticks(low, high)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: short(v)))
    ax.yaxis.set_minor_locator(NullLocator())


def percent_axis(ax: Axes, top: float = 1.0) -> None:
    """Shares from none to ``top``, with a value in the middle."""
    ax.set_ylim(0, top)
    ax.set_yticks([0, top / 2, top])
    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:.3g} %"))


# --- curves and their labels -------------------------------------------------------------------


def line(ax: Axes, x: Array, y: Array, color: str, **kwargs: Any) -> None:
    """A curve, as a marker where it has a single point."""
    ax.plot(x, y, color=color, marker="o" if len(x) == 1 else None, markersize=3.5, **kwargs)


def smooth_line(ax: Axes, x: Array, y: Array, color: str) -> float:
    """The curve, light, and its moving average; returns the last value of the average."""
    smoothed = smooth(y)
    if smoothed is not y:
        ax.plot(x, y, color=color, alpha=0.3, linewidth=0.8)
    line(ax, x, smoothed, color)
    return float(smoothed[-1])


def edge_label(ax: Axes, text: str, height: float, **kwargs: Any) -> None:
    """Text right of the axes, at a share of their height."""
    ax.annotate(
        text,
        xy=(1.0, height),
        xycoords="axes fraction",
        xytext=(5, 0),
        textcoords="offset points",
        va="center",
        annotation_clip=False,
        **kwargs,
    )


def end_labels(ax: Axes, labels: Sequence[Label], size: float = 8.5) -> None:
    """Names at the right edge, each at the height of its curve's end, pushed apart."""
    ax.apply_aspect()
    points = ax.bbox.height * 72 / ax.figure.dpi
    gap = 1.25 * size / max(points * 0.9, 1.0)
    to_axes = ax.transData + ax.transAxes.inverted()
    heights = [float(to_axes.transform((0.0, y))[1]) for y, _, _ in labels]
    order = np.argsort(heights, kind="stable").tolist()
    placed = _spread([min(max(heights[i], 0.0), 1.0) for i in order], gap)
    for i, height in zip(order, placed, strict=True):
        _, text, color = labels[i]
        edge_label(ax, text, height, color=color, fontsize=size)


def _spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Positions at least ``gap`` apart, as near as possible to the (ascending) wanted ones."""
    # Labels that touch form a block whose centre is the mean of what its members want.
    blocks: list[tuple[float, int]] = []
    for value in wanted:
        centre, size = value, 1
        while blocks and blocks[-1][0] + gap * (blocks[-1][1] + size) / 2 > centre:
            other, count = blocks.pop()
            centre = (other * count + centre * size) / (count + size)
            size += count
        blocks.append((centre, size))
    positions = [
        centre + gap * (index - (size - 1) / 2) for centre, size in blocks for index in range(size)
    ]
    ceiling = 1.02
    for index in range(len(positions) - 1, -1, -1):
        positions[index] = min(positions[index], ceiling)
        ceiling = positions[index] - gap
    return positions
