"""Figure 1: the fibration of a batch. Contexts are the base, the tokens of a trajectory its fiber.

Reference: *Fibration Policy Optimization*, arXiv 2603.08239, Figure 1 and Section 6.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from .. import palette
from ..batch import RatioBatch
from ..errors import ShapeError
from ..gates import Regime, Zero
from ..gating import GatedRatio
from ..objective import Objective
from ..recipes import fiberpo_domain
from ..strata import Strata
from .drawing import DRIFT_MAP, PAGE, REGIME_COLORS, color_bar, paper_style, plain, regime_handles
from .responses import Array

MOST_TRAJECTORIES = 64
"""Columns that can still be told apart on a page."""

MOST_NAMES = 16
"""Contexts of one stratum that are named; up to six have their drifts written beside them."""

BUDGETS = {"domain": (0.02, 0.015), "group": (0.04, 0.03), "trajectory": (0.12, 0.05)}
"""Budgets of the objective that Figure 1 is drawn with: those of ``fiberpo train``."""


NO_CONTEXT = Strata.NO_PARENT


@dataclass(frozen=True)
class Node:
    """A context above the tokens.

    Attributes:
        stratum, name: its stratum and the caller's id for it.
        level: 0 for the coarsest stratum.
        x: mean column of its trajectories.
        parent: index of the node above it, or None.
        tokens: tokens below it.
        residual: ``[channels]`` drift less that of its parent, nats per token.
        regimes: ``[channels]`` `Regime`.
    """

    stratum: str
    name: str
    level: int
    x: float
    parent: int | None
    tokens: int
    residual: tuple[float, ...]
    regimes: tuple[Regime, ...]


@dataclass(frozen=True, eq=False)
class Fibration:
    """What Figure 1 shows of a batch, ready to be drawn.

    Attributes:
        levels: strata above the fibers, coarse to fine.
        nodes: contexts of these strata; parents before children.
        columns: ``[trajectories]`` trajectory drawn in each column.
        above: ``[trajectories]`` index of the node that each column hangs on, -1 for none.
        log_ratio: ``[longest, trajectories]`` nats, one fiber a column, NaN below its end.
        clipped: ``[longest, trajectories]`` tokens whose own residual the token gate clips.
    """

    levels: tuple[str, ...]
    nodes: tuple[Node, ...]
    columns: NDArray[np.int64]
    above: NDArray[np.int64]
    log_ratio: Array
    clipped: NDArray[np.bool_]


def sample_batch() -> RatioBatch:
    """A batch of the embedded model in training: 16 answers to 4 prompts of 2 domains.

    The last of four updates on one rollout, recorded by ``examples/record_batch.py``.

    >>> sample_batch().trajectories
    16
    """
    stored = json.loads(files("fiberpo").joinpath("assets").joinpath("batch.json").read_text())
    return RatioBatch.from_packed(
        torch.tensor(stored["log_probs"], dtype=torch.float64),
        torch.tensor(stored["old_log_probs"], dtype=torch.float64),
        torch.tensor(stored["advantages"], dtype=torch.float64),
        stored["lengths"],
        labels={"domain": stored["domain"], "group": stored["group"]},
    )


def fibration(batch: RatioBatch, objective: Objective) -> Fibration:
    """The contexts that an objective gates in a batch, their regimes, and the fibers below.

    Strata below the trajectory (turns) are not drawn as contexts of their own.

    Raises:
        ShapeError: for more than `MOST_TRAJECTORIES` trajectories.
        StrataError: if the batch lacks a stratum that the objective gates.
    """
    if batch.trajectories > MOST_TRAJECTORIES:
        raise ShapeError(
            f"{batch.trajectories} trajectories do not fit on a page; draw at most "
            f"{MOST_TRAJECTORIES}: a batch of a few groups of each domain"
        )
    with torch.no_grad():
        gated = objective(batch).gated
    lengths = batch.lengths.tolist()
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).tolist()
    levels, paths = _paths(gated, starts)
    columns = sorted(range(batch.trajectories), key=lambda t: (paths[t], t))
    nodes = _nodes(gated, levels, [paths[t] for t in columns])
    flat, regimes = gated.log_ratio.cpu().numpy(), gated.token.regime.cpu().numpy()
    own = np.where(flat >= 0, 0, len(regimes) - 1)
    beyond = np.take_along_axis(regimes, own[None], axis=0)[0] != Regime.PASS
    if isinstance(objective.gate_map.token, Zero):  # removes the component by construction
        beyond[:] = False
    log_ratio = np.full((max(lengths), batch.trajectories), np.nan)
    clipped = np.zeros(log_ratio.shape, dtype=bool)
    for x, t in enumerate(columns):
        tokens = slice(starts[t], starts[t] + lengths[t])
        log_ratio[: lengths[t], x] = flat[tokens]
        clipped[: lengths[t], x] = beyond[tokens]
    above = [max(paths[t], default=NO_CONTEXT) for t in columns]
    return Fibration(levels, nodes, np.array(columns), np.array(above), log_ratio, clipped)


def _paths(gated: GatedRatio, starts: list[int]) -> tuple[tuple[str, ...], list[tuple[int, ...]]]:
    """The strata above the fibers, and each trajectory's context in every one of them."""
    strata = gated.strata
    if strata is None:
        return (), [()] * len(starts)
    labels = gated.batch.labels
    levels = tuple(n for n in strata.names if n == "trajectory" or not labels[n].per_token)
    parent, paths = strata.parent.tolist(), []
    for start in starts:
        path, context = [NO_CONTEXT] * len(strata.names), int(strata.leaf[start])
        while context != NO_CONTEXT:
            path[int(strata.stratum[context])] = context
            context = parent[context]
        paths.append(tuple(path[: len(levels)]))
    return levels, paths


def _nodes(
    gated: GatedRatio, levels: tuple[str, ...], paths: list[tuple[int, ...]]
) -> tuple[Node, ...]:
    """All contexts of the levels; a node's index is its context's."""
    at = gated.layout.contexts
    if at is None or gated.gated is None:
        return ()
    assert gated.residual is not None
    strata, nodes = at.strata, []
    for level, stratum in enumerate(levels):
        here = strata.level(level)
        for context in range(here.start, here.stop):
            above = int(strata.parent[context])
            nodes.append(
                Node(
                    stratum=stratum,
                    name=strata.context_names[level](context - here.start),
                    level=level,
                    x=float(np.mean([x for x, path in enumerate(paths) if context in path])),
                    parent=None if above == NO_CONTEXT else above,
                    tokens=int(at.count[context]),
                    residual=tuple(gated.residual[:, context].tolist()),
                    regimes=tuple(Regime(int(r)) for r in gated.gated.regime[:, context]),
                )
            )
    return tuple(nodes)


# --- drawing ------------------------------------------------------------------------------------


def draw_fibration(batch: RatioBatch | None = None, objective: Objective | None = None) -> Figure:
    """Figure 1: contexts as nodes, their regimes as colours, the fibers below their trajectories.

    The area of a node is its token count; its left half is the regime of the positive channel, its
    right half that of the negative one. Tokens are coloured by ``log r``; a frame marks a token
    whose own residual is clipped.

    Args:
        batch: any batch of at most `MOST_TRAJECTORIES` trajectories; `sample_batch` by default.
        objective: whose gates to show; FiberPO-Domain with `BUDGETS` by default.
    """
    batch = sample_batch() if batch is None else batch
    objective = fiberpo_domain(BUDGETS, epsilon=0.2) if objective is None else objective
    found = fibration(batch, objective)
    with paper_style():
        above = 0.75 * len(found.levels)  # inches for the contexts
        figure = Figure(figsize=(PAGE, 2.5 + above), layout="constrained")
        if found.nodes:
            top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[above, 2])
            _draw_nodes(top, found)
        else:
            bottom = figure.subplots()
        mesh = _draw_fibers(bottom, found)
        color_bar(figure, mesh, bottom, "$\\log r$ (nats)", pad=0.01, extend="both", aspect=12)
        framed = Line2D(
            [], [], marker="s", linestyle="", markerfacecolor="none",
            markeredgecolor=palette.INK, markersize=5, label="token: clipped",
        )  # fmt: skip
        halves = any(len(node.regimes) == 2 for node in found.nodes)
        figure.legend(
            handles=[*regime_handles("zeroed"), framed] if found.nodes else [framed],
            loc="outside lower center", ncols=4, title_fontsize=7,
            title="context: left half $S^+$, right half $S^-$, area its tokens" if halves else None,
        )  # fmt: skip
    return figure


def _draw_nodes(ax: Axes, found: Fibration) -> None:
    """The contexts, coarse ones above, joined to their parents and to the fibers."""
    foot = 0.45 - len(found.levels)
    levels = [[n for n in found.nodes if n.level == k] for k in range(len(found.levels))]
    # points for the root of a token: no two of a stratum shall touch in 430 points of width
    scale = min(
        24 / max(n.tokens for n in found.nodes) ** 0.5,
        *(360 / len(level) / max(n.tokens for n in level) ** 0.5 for level in levels),
    )
    line: Any = {"color": palette.GREY, "linewidth": 0.7, "zorder": 1}
    for node in found.nodes:
        if node.parent is not None:
            above = found.nodes[node.parent]
            ax.plot([above.x, node.x], [-above.level, -node.level], **line)
    for x, context in enumerate(found.above):
        if context != NO_CONTEXT:
            node = found.nodes[context]
            ax.plot([node.x, x], [-node.level, foot], **line)
    for node in found.nodes:
        size, crowd = scale * node.tokens**0.5, len(levels[node.level])
        halves = [REGIME_COLORS[r] for r in node.regimes]
        ax.plot(
            node.x, -node.level, "o", fillstyle="left", markersize=size, markerfacecolor=halves[0],
            markerfacecoloralt=halves[-1], markeredgecolor=palette.INK, markeredgewidth=0.6,
        )  # fmt: skip
        if node.stratum != "trajectory" and crowd <= MOST_NAMES:
            words = [plain(node.name), *(_drifts(node) if crowd <= 6 else ())]
            ax.annotate(
                "\n".join(words), (node.x, -node.level), (size / 2 + 3, 0), fontsize=6.5,
                textcoords="offset points", va="center",
                bbox={"facecolor": "white", "linewidth": 0, "pad": 0.5},
            )  # fmt: skip
    ax.set_ylim(foot, 0.4)
    ax.set_yticks([-k for k in range(len(found.levels))], found.levels)
    ax.tick_params(length=0, labelbottom=False)
    for side in ("left", "bottom"):
        ax.spines[side].set_visible(False)


def _drifts(node: Node) -> list[str]:
    channels = ("^+", "^-") if len(node.residual) == 2 else ("",)
    return [f"$x{c} = {x:+.3f}$" for c, x in zip(channels, node.residual, strict=True)]


def _draw_fibers(ax: Axes, found: Fibration) -> QuadMesh:
    """One column a trajectory, its tokens from top to bottom."""
    longest, columns = found.log_ratio.shape
    size = np.abs(found.log_ratio[~np.isnan(found.log_ratio)])
    limit = max(0.1, float(np.quantile(size, 0.98)))
    edges = np.arange(columns)[:, None] + np.array([-0.3, 0.3])
    norm = TwoSlopeNorm(0.0, -limit, limit)
    for x in range(columns):
        fiber = found.log_ratio[:, x : x + 1]
        fiber = fiber[~np.isnan(fiber[:, 0])]
        rows = np.arange(len(fiber) + 1)
        mesh = ax.pcolormesh(
            edges[x], rows, fiber, cmap=DRIFT_MAP, norm=norm, edgecolors="white", linewidth=0.3
        )
        for row in np.flatnonzero(found.clipped[: len(fiber), x]):
            ax.add_patch(
                Rectangle(
                    (x - 0.3, float(row)), 0.6, 1, fill=False, edgecolor=palette.INK, linewidth=0.8
                )
            )
    ax.set_xlim(-0.8, columns - 0.2)
    ax.set_ylim(longest + 0.2, -0.2)
    ax.yaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    ax.set_ylabel("token of the trajectory")
    ax.set_xticks([])
    ax.spines["bottom"].set_visible(False)
    return mesh
