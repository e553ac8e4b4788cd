"""The overview of a run: one PNG with six panels."""

from __future__ import annotations

import io

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from matplotlib.layout_engine import ConstrainedLayoutEngine

from fiberpo import palette
from fiberpo.report import style
from fiberpo.report.figures import (
    ENTROPY,
    GATE,
    KL,
    LENGTH,
    RATIO,
    Draw,
    draw_regimes,
    draw_reward,
)
from fiberpo.report.series import RunSeries
from fiberpo.report.style import Label
from fiberpo.report.tables import plain_label


def overview_png(run: RunSeries, title: str, subtitle: str = "") -> bytes:
    """The six-panel overview of the run, as the bytes of a PNG file."""
    with style.report_style():
        layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08, wspace=0.02, hspace=0.05)
        figure = Figure(figsize=(14, 7.6), dpi=130, facecolor="white", layout=layout)
        title, subtitle = plain_label(title, 120), plain_label(subtitle, 200)
        figure.suptitle(title, x=0.012, ha="left", fontsize=12.5, fontweight="bold")
        figure.supxlabel(subtitle, x=0.012, ha="left", fontsize=9, color=palette.MUTED)
        grid = figure.add_gridspec(2, 3)
        reward = ("Reward: held-out (markers), batch (light)", draw_reward)
        _panels(figure, grid[0, 0], run, reward)
        _regimes(figure, grid[0, 1], run)
        _panels(figure, grid[0, 2], run, ("Drift p90 of the larger channel", _draw_drift))
        _panels(figure, grid[1, 0], run, GATE)
        _panels(figure, grid[1, 1], run, RATIO, KL)
        _panels(figure, grid[1, 2], run, ENTROPY, LENGTH)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", facecolor="white")
    return buffer.getvalue()


def _panels(figure: Figure, cell: SubplotSpec, run: RunSeries, *panels: tuple[str, Draw]) -> None:
    """Panels one below the other in a cell; the step axis is named below the last."""
    count = len(panels)
    rows = _rows(figure, cell, count) if count > 1 else [figure.add_subplot(cell)]
    for ax, (heading, draw) in zip(rows, panels, strict=True):
        if not draw(ax, run):
            _empty(ax, "not recorded")
        elif ax is not rows[-1]:
            ax.set_xlabel("")
        ax.set_title(heading)


def _rows(figure: Figure, cell: SubplotSpec, count: int) -> list[Axes]:
    grid = cell.subgridspec(count, 1, hspace=0.08)
    return [figure.add_subplot(grid[row, 0]) for row in range(count)]


def _empty(ax: Axes, text: str) -> None:
    ax.clear()
    ax.set_axis_off()
    ax.text(0.5, 0.5, text, ha="center", va="center", color=palette.MUTED, transform=ax.transAxes)


def _regimes(figure: Figure, cell: SubplotSpec, run: RunSeries) -> None:
    strata = [name for name in run.stratum_names if len(run.regimes(name)[0])][:5]
    rows = _rows(figure, cell, max(len(strata), 1))
    if not strata:
        _empty(rows[0], "no gate metrics recorded")
        rows[0].set_title("Gate regimes")
        return
    for ax, stratum in zip(rows, strata, strict=True):
        draw_regimes(ax, run, stratum)
        ax.set_yticks([0, run.regime_limit])
        style.edge_label(ax, plain_label(stratum, 14), 0.5)
        if ax is not rows[-1]:
            ax.set_xlabel("")
            ax.tick_params(labelbottom=False)
    rows[0].set_title("Gate regimes, share of contexts", pad=18)
    handles, labels = rows[0].get_legend_handles_labels()
    rows[0].legend(
        handles[::-1],
        labels[::-1],
        loc="lower left",
        bbox_to_anchor=(-0.01, 0.98),
        ncols=3,
        handlelength=1.0,
        columnspacing=1.2,
        borderaxespad=0.1,
    )


def _draw_drift(ax: Axes, run: RunSeries) -> bool:
    """All strata in one panel: the larger of the two channels' drifts, relative to its budget."""
    ends: list[Label] = []
    peaks: list[float] = []
    for index, stratum in enumerate(run.stratum_names):
        steps, drift = run.relative_drift(stratum)
        if len(steps):
            color = palette.CYCLE[index % len(palette.CYCLE)]
            last = style.smooth_line(ax, steps, drift, color)
            ends.append((last, plain_label(stratum, 14), color))
            peaks.append(float(drift.max()))
    if not ends:
        return False
    if run.any_budget:
        ax.axhline(1.0, color=palette.INK, linewidth=1.0, linestyle=palette.BUDGET_DASH)
        ends.append((1.0, "budget", palette.INK))
        peaks.append(1.0)
    low, _ = ax.get_ylim()
    ax.set_ylim(max(low, max(peaks) * 1e-3), max(peaks) * 1.3)
    style.log_axis(ax)
    style.step_axis(ax, run)
    ax.set_ylabel("share of budget" if run.any_budget else "nats per token")
    style.end_labels(ax, ends, size=8)
    return True
