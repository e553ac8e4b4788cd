"""Figures 2, 3 and 4 of the paper, and all figures as files.

    figure2   the aggregate gate, and the base weight over the plane of drifts
    figure3   three tokens: one moves, all respond
    figure4   ten tokens: the ratios move on a straight line

Every curve is read off the library's gates (`fiberpo.theory.responses`). Figure 1 is in
`fiberpo.theory.fibration`, objectives side by side in `fiberpo.theory.comparison`.

Reference: *Fibration Policy Optimization*, arXiv 2603.08239, Figures 2 to 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator

from .. import palette, recipes
from ..gates import Regime, aggregate_gate
from ..objective import Objective
from .comparison import compare
from .drawing import (
    COLUMN,
    PAGE,
    REGIME_COLORS,
    check_formats,
    color_bar,
    draw_base_map,
    panel_name,
    paper_style,
    regime_handles,
    regime_strips,
    save,
    zero_lines,
)
from .fibration import draw_fibration
from .responses import (
    Array,
    Response,
    base_map,
    crossings,
    one_token,
    response,
    straight,
)

GATE = {"budget": 0.15, "count": 3.0}
"""Figure 2a: C and k of the aggregate gate."""

BASE = recipes.fiberpo((0.20, 0.10), rollback=2)
"""Figure 2b: the base gate has C+ = 0.20, C- = 0.10, k = 2; epsilon plays no part."""

THREE_TOKENS = recipes.fiberpo((0.15, 0.09), 0.025)
"""Figure 3: T = 3, k = T."""

OTHERS = (0.05, -0.06)
"""Figure 3: log ratios of the two tokens that stay; our choice."""

TEN_TOKENS = recipes.fiberpo((0.12, 0.05), 0.04, rollback=32)
"""Figure 4: T = 10, k = 32."""

DEVIATIONS = (0.030, 0.075, -0.012, -0.104, -0.039, -0.118, 0.039, 0.231, -0.044, -0.063)
"""Figure 4: the token with deviation ``d`` has the ratio ``r = 1 + t d``.

A reconstruction: on this line the printed crossings come out to their last digit, on ``l = t d``
they do not (-1.33 and 1.32 in place of -1.19 and 1.24). The deviations add up to 0 but for their
rounding."""

LINE = (-4.25, 4.75)
"""Figure 4: the part of the line that is drawn."""


def gate_curve(low: float = -0.32, high: float = 0.32, points: int = 641) -> tuple[Array, Array]:
    """Figure 2a: drift ``x`` and ``g(x, C, k)``, with the kinks among the points."""
    budget, count = torch.tensor([GATE["budget"], GATE["count"]], dtype=torch.float64)
    kinks = np.outer([-1, 1], [GATE["budget"], GATE["budget"] * (1 + 1 / GATE["count"])]).ravel()
    x = np.sort(np.concatenate([np.linspace(low, high, points), kinks]))
    return x, aggregate_gate(torch.from_numpy(x), budget, count).value.numpy()


def figure2() -> Figure:
    """The aggregate gate (a) and the log base weight over the plane of drifts (b)."""
    with paper_style():
        figure = Figure(figsize=(PAGE, 2.75), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=[1, 1.08])
        _draw_gate(left)
        panel_name(left, "a", "aggregate gate, $C = 0.15$, $k = 3$")
        plane = base_map(BASE, np.linspace(0, 0.40, 321), np.linspace(0, 0.20, 321))
        mesh = draw_base_map(right, plane, names=True)
        panel_name(right, "b", "base weight, $C^+ = 0.20$, $C^- = 0.10$, $k = 2$")
        ticks = [-0.2, -0.1, 0, 0.1, 0.2]
        color_bar(figure, mesh, right, "log base (nats)", ticks=ticks, pad=0.02)
    right.yaxis.set_major_locator(MultipleLocator(0.05))
    right.xaxis.set_major_locator(MultipleLocator(0.1))
    return figure


def _draw_gate(ax: Axes) -> None:
    budget, end = GATE["budget"], GATE["budget"] * (1 + 1 / GATE["count"])
    x, value = gate_curve()
    zero_lines(ax)
    for sign in (-1, 1):
        for low, high, regime in ((budget, end, Regime.ROLLBACK), (end, 0.32, Regime.ZERO)):
            span = sorted((sign * low, sign * high))
            ax.axvspan(*span, color=REGIME_COLORS[regime], alpha=0.16, linewidth=0, zorder=0)
    ax.plot(x, x, color=palette.MUTED, linewidth=0.8, linestyle=(0, (2, 2)), label="identity")
    ax.plot(x, value, color=palette.BLUE, label="$g(x, C, k)$")
    words = {"rollback, slope $-k$": (budget + end) / 2, "zeroed, slope 0": (end + 0.32) / 2}
    for sign in (-1, 1):
        for word, place in words.items():
            ax.text(
                sign * place, -sign * 0.1, word, rotation=90, ha="center", va="center", fontsize=6.5
            )
    ax.text(0.03, -0.07, "pass,\nslope 1", va="center", fontsize=6.5)
    ax.plot([budget, end], [budget, 0], "o", color=palette.BLUE, markersize=3)
    ax.text(budget - 0.005, budget + 0.01, "$C$", ha="right", va="center")
    ax.text(end + 0.006, 0.014, "$(1+1/k)\\,C$", ha="left", va="center", fontsize=6.5)
    ax.set_xlim(-0.32, 0.32)
    ax.set_ylim(-0.2, 0.2)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MultipleLocator(0.1))
    ax.set_xlabel("drift $x$ (nats per token)")
    ax.set_ylabel("gated drift (nats per token)")
    ax.legend(loc="upper left", bbox_to_anchor=(0.31, 1.0))


def figure3() -> Figure:
    """Three tokens: gated ratios and gradient as the log ratio of the first one moves."""
    at = np.linspace(-0.5, 0.8, 2601)
    found = response(THREE_TOKENS, one_token(at, OTHERS))
    with paper_style():
        figure = Figure(figsize=(COLUMN, 4.6), layout="constrained")
        value, slope, strips = figure.subplots(3, 1, sharex=True, height_ratios=[1, 1, 0.5])
        zero_lines(value)
        zero_lines(slope)
        value.plot(at, at, color=palette.MUTED, linewidth=0.8, linestyle=(0, (2, 2)))
        value.annotate("$\\log r_1$", (0.19, 0.19), (-5, 0), textcoords="offset points", ha="right")
        value.plot(at, found.log_base, color=palette.INK, linewidth=0.8, label="base")
        stays = (f"token {i + 2}, $\\ell = {x:+.2f}$" for i, x in enumerate(OTHERS))
        for i, name in enumerate(("token 1, moves", *stays)):
            look: Any = {"color": palette.CYCLE[i], "linestyle": palette.DASHES[i]}
            value.plot(at, found.log_gated_ratio[:, i], label=name, **look)
            slope.plot(at, found.gradient[:, i], **look)
        value.set_ylim(-0.16, 0.23)
        value.set_ylabel("$\\log G$ (nats)")
        figure.legend(*value.get_legend_handles_labels(), loc="outside upper center", ncols=2)
        panel_name(value, "a", "gated ratios, $T = 3$")
        slope.set_ylabel("$(\\partial J/\\partial\\ell_j)\\,/\\,\\mu_j$")
        panel_name(slope, "b", "gradient, $A = 1$")
        rows = {"$S^+$": found.regimes["trajectory"][0], "$S^-$": found.regimes["trajectory"][1]}
        for i in range(3):
            rows[f"token {i + 1}"] = np.where(found.clipped[:, i], Regime.ZERO, Regime.PASS)
        regime_strips(strips, at, rows)
        panel_name(strips, "c", "regimes of the gates")
        strips.set_xlabel("$\\ell_1 = \\log r_1$ (nats)")
        strips.set_xlim(at[0], at[-1])
        figure.legend(handles=regime_handles(), loc="outside lower center", ncols=3)
    return figure


def figure4() -> Figure:
    """Ten tokens whose ratios move on a straight line: drifts, gated ratios, regimes."""
    at = np.linspace(*LINE, 1801)
    found, meets = along_line(at), figure4_crossings()
    with paper_style():
        figure = Figure(figsize=(PAGE, 4.4), layout="constrained")
        (fan, gated), (drift, strips) = figure.subplots(2, 2, sharex=True)
        for ax in (fan, gated, drift):
            zero_lines(ax)
        for i, d in enumerate(DEVIATIONS):
            look: Any = {"color": palette.BLUE if d > 0 else palette.VERMILLION, "alpha": 0.75}
            fan.plot(at, found.log_ratio[:, i], linewidth=1.0, **look)
            gated.plot(at, found.log_gated_ratio[:, i], linewidth=0.8, **look)
        gated.plot(at, found.log_base, color=palette.INK, label="base")
        fan.set_ylim(-1.05, 0.85)
        fan.set_ylabel("$\\log r_i$ (nats)")
        panel_name(fan, "a", "ratios $r_i = 1 + t\\,d_i$, $T = 10$")
        gated.set_ylabel("$\\log G_i$ (nats)")
        panel_name(gated, "b", "base (black) and gated ratios, $k = 32$")
        for channel, (sign, color) in enumerate((("+", palette.BLUE), ("-", palette.VERMILLION))):
            _draw_channel(drift, at, found, channel, sign, color, meets[f"C{sign}"])
        drift.set_ylim(0, 0.2)
        drift.set_ylabel("drift (nats per token)")
        drift.set_xlabel("$t$")
        drift.legend(loc="upper center", ncols=2)
        panel_name(drift, "c", "drifts and budgets")
        rows = {"$S^+$": found.regimes["trajectory"][0], "$S^-$": found.regimes["trajectory"][1]}
        for i in np.argsort(DEVIATIONS)[::-1]:
            label = f"$d = {DEVIATIONS[i]:+.3f}$"
            rows[label] = np.where(found.clipped[:, i], Regime.ZERO, Regime.PASS)
        regime_strips(strips, at, rows)
        for t in meets["epsilon"]:  # the largest deviation, the first row of tokens
            strips.text(
                t + 0.08 * np.sign(t), 2.53, f"${t:.2f}$", color="white", va="center",
                ha="left" if t > 0 else "right", fontsize=6.5,
            )  # fmt: skip
        strips.tick_params(axis="y", labelsize=6)
        strips.set_xlabel("$t$")
        strips.set_xlim(*LINE)
        panel_name(strips, "d", "regimes of the gates")
        figure.legend(handles=regime_handles(), loc="outside lower right", ncols=3)
    return figure


def _draw_channel(
    ax: Axes, at: Array, found: Response, channel: int, sign: str, color: str, meets: Array
) -> None:
    """One drift, its budget, and where the two meet."""
    ax.plot(at, found.drift["trajectory"][channel], color=color, label=f"$S^{sign}$")
    budget = along_line(meets).drift["trajectory"][channel]
    ax.axhline(budget[0], color=color, linestyle=palette.BUDGET_DASH, linewidth=0.8)
    ax.text(LINE[1], budget[0], f" $C^{sign}$", color=color, va="center", clip_on=False)
    ax.plot(meets, budget, "o", color=color, markersize=3.5)
    for t, height in zip(meets, budget, strict=True):
        inward = -np.sign(t)
        ax.annotate(
            f"${t:.2f}$", (t, height), (2 * inward, 4), textcoords="offset points",
            ha="left" if inward > 0 else "right", fontsize=6, color=color,
        )  # fmt: skip


def along_line(at: Array) -> Response:
    """Figure 4's objective on its path."""
    return response(TEN_TOKENS, straight(at, DEVIATIONS))


def figure4_crossings() -> dict[str, Array]:
    """Positions at which the gates of Figure 4 begin to act, by bisection on their regimes.

    Returns:
        ``"C+"`` and ``"C-"``: where a channel of the base leaves its budget; ``"epsilon"``: where
        the first token is clipped on its own residual.

    >>> {name: t.round(2).tolist() for name, t in figure4_crossings().items()}
    {'C+': [-3.61, 4.11], 'C-': [-1.19, 1.24], 'epsilon': [-0.2, 0.21]}
    """
    return {
        "C+": crossings(lambda t: along_line(t).regimes["trajectory"][0] > 0, *LINE),
        "C-": crossings(lambda t: along_line(t).regimes["trajectory"][1] > 0, *LINE),
        "epsilon": crossings(lambda t: along_line(t).local_regime > 0, *LINE),
    }


def write_figures(
    folder: Path,
    objectives: Sequence[Objective] | None = None,
    formats: Sequence[str] = ("png", "svg"),
) -> list[Path]:
    """Draw Figures 1 to 4 and the comparison into a folder; returns the files written.

    Args:
        folder: made if it is not there; files of the same names are replaced.
        objectives: what to compare; `comparison.default_objectives` if None.
        formats: of ``png``, ``svg``, ``pdf``.

    Raises:
        ConfigError: for an unknown format, or a folder that cannot be made.
        ObjectiveError: for more objectives than fit side by side.
    """
    check_formats(formats)
    figures = {
        "objectives": compare(objectives),
        "figure1": draw_fibration(),
        "figure2": figure2(),
        "figure3": figure3(),
        "figure4": figure4(),
    }
    return [
        path for name, figure in figures.items() for path in save(figure, folder, name, formats)
    ]
