"""Any objectives side by side: how one token and a whole trajectory answer, and the base weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .. import palette
from ..errors import ObjectiveError
from ..objective import Objective
from ..recipes import fiberpo, from_name, grpo, gspo, parse_call
from .drawing import PAGE, color_bar, draw_base_map, paper_style, plain, zero_lines
from .responses import Array, Response, base_map, one_token, response, together

TOKENS = 4
"""Tokens of the trajectory that is drawn; all but the moving one stay at 0."""

REACH = 0.7
"""Log ratios from ``-REACH`` to ``REACH``, nats."""

MOST = 6
"""Columns that fit side by side."""

SIGNS: tuple[tuple[float, str, Any], ...] = (
    (1.0, palette.BLUE, "-"),
    (-1.0, palette.VERMILLION, (0, (3, 1.5))),
)


def default_objectives() -> list[Objective]:
    """GRPO, GSPO, FiberPO as printed and in the pessimistic form, each as the recipe has it."""
    return [grpo(), gspo(), fiberpo(), fiberpo(pessimistic=True)]


def parse_objective(text: str) -> Objective:
    """An objective from its name, or written as the call that makes it.

    ``dr_grpo`` may go without its length: a constant weight does not show in these pictures.

    Raises:
        ObjectiveError: for an unknown name or parameter, or for text that is no such call.

    >>> parse_objective("gspo(epsilon=0.02)").parameters["epsilon"]
    0.02
    >>> parse_objective("grpo").name
    'grpo'
    """
    name, parameters = parse_call(text)
    if name == "dr_grpo":
        parameters.setdefault("length", TOKENS)
    return from_name(name, **parameters)


def positions() -> Array:
    """Log ratios of the token, or of all tokens, that moves."""
    return np.linspace(-REACH, REACH, 1401)


def responses_of(objective: Objective, *, alone: bool) -> dict[float, Response]:
    """Responses for both signs of the advantage; ``alone``: one token moves, else all do.

    >>> sorted(responses_of(grpo(), alone=True))
    [-1.0, 1.0]
    """
    still = np.zeros(TOKENS)
    path = one_token(positions(), still[1:]) if alone else together(positions(), still)
    return {sign: response(objective, path, advantage=sign) for sign, _, _ in SIGNS}


def compare(objectives: Sequence[Objective] | None = None) -> Figure:
    """One column an objective: response of a token, of a trajectory, and the base weight.

    Rows: ``log G`` of one token that moves while the others stay, and its gradient ``(dJ/dl)/mu``;
    the same with all tokens moving; ``log base`` over the plane of drifts, for ``A = 1``. Where the
    pessimistic form takes the ratio, the log of the ratio is drawn.

    Args:
        objectives: at most `MOST`; GRPO, GSPO, FiberPO and its pessimistic form by default.

    Raises:
        ObjectiveError: for none, or too many.
    """
    chosen = default_objectives() if objectives is None else list(objectives)
    if not 1 <= len(chosen) <= MOST:
        raise ObjectiveError(f"{len(chosen)} objectives; 1 to {MOST} fit side by side")
    plus, minus = np.linspace(0, 0.3, 321), np.linspace(0, 0.15, 321)
    with paper_style():
        figure = Figure(figsize=(max(PAGE / 4 * len(chosen), 3.0), 7.6), layout="constrained")
        grid = figure.subplots(5, len(chosen), sharex="row", sharey="row", squeeze=False)
        tallest = max(len(_parameters(objective)) for objective in chosen)
        for column, objective in zip(grid.T, chosen, strict=True):
            _name(column[0], objective, tallest)
            _draw_responses(column[:2], objective, alone=True)
            _draw_responses(column[2:4], objective, alone=False)
            plane = base_map(objective, plus, minus, tokens=TOKENS)
            mesh = draw_base_map(column[4], plane)
        slope = "$(\\partial J/\\partial\\ell)\\,/\\,\\mu$"
        names = ("$\\log G$", slope, "$\\log G$", slope, "$S^-$")
        for ax, name in zip(grid[:, 0], names, strict=True):
            ax.set_ylabel(name)
        for ax in grid[:, 1:].flat:
            ax.set_ylabel("")
        for row, name in ((1, "$\\log r$, one of 4 tokens"), (3, "$\\log r$, all 4 tokens")):
            for ax in grid[row]:
                ax.set_xlabel(name)
        for ax in (*grid[0], *grid[2]):
            ax.tick_params(labelbottom=False)
        ticks = [-0.2, 0, 0.2]
        color_bar(figure, mesh, grid[4].tolist(), "log base", ticks=ticks, pad=0.01)
        figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def _draw_responses(axes: Sequence[Axes], objective: Objective, *, alone: bool) -> None:
    """``log G`` above, gradient below, for both signs of the advantage."""
    value, slope = axes
    at = positions()
    ungated: Any = {"color": palette.MUTED, "linewidth": 0.7, "linestyle": (0, (1, 1.5))}
    for ax in axes:
        zero_lines(ax)
    value.plot(at, at, label="ungated", **ungated)
    for sign, color, dash in SIGNS:
        found = responses_of(objective, alone=alone)[sign]
        value.plot(
            at, found.log_factor[:, 0], color=color, linestyle=dash, label=f"$A = {sign:+.0f}$"
        )
        slope.plot(at, sign * np.exp(at), **ungated)
        slope.plot(at, found.gradient[:, 0], color=color, linestyle=dash)
    value.set_ylim(-REACH, REACH)
    value.set_xlim(-REACH, REACH)
    slope.set_xlim(-REACH, REACH)


def _name(ax: Axes, objective: Objective, lines: int) -> None:
    """Name and parameters above the axes, with room for as many lines as the longest column has."""
    form = ", pessimistic" if objective.gate_map.pessimistic else ""
    ax.set_title(plain(objective.name) + form, fontsize=7, pad=6 + 8 * lines)
    ax.annotate(
        "\n".join(_parameters(objective)), (0, 1), (0, 4 + 8 * lines), fontsize=6, va="top",
        xycoords="axes fraction", textcoords="offset points", linespacing=1.15,
    )  # fmt: skip


def _parameters(objective: Objective) -> list[str]:
    """The parameters that are numbers or pairs, one a line."""
    given = dict(objective.parameters)
    given |= given.pop("budgets", None) or {}
    return [
        plain(f"{name} {value}", limit=34)
        for name, value in given.items()
        if isinstance(value, (int, float, tuple, list)) and not isinstance(value, bool)
    ]
