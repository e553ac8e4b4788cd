"""The panels of the overview image.

Each ``draw_`` function draws into given axes and returns whether the run has values for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from matplotlib.axes import Axes

from fiberpo import palette
from fiberpo.report import style
from fiberpo.report.series import Array, Reduction, RunSeries, smooth
from fiberpo.report.style import Label
from fiberpo.report.tables import plain_label

Draw = Callable[[Axes, RunSeries], bool]

# Largest departures at the bottom, where their height can be read off the axis.
REGIMES = (("zeroed", palette.ZEROED), ("rollback", palette.ROLLBACK), ("pass", palette.PASS))


def draw_reward(ax: Axes, run: RunSeries) -> bool:
    """Reward per domain and their mean: held-out with markers, batches light."""
    ends: list[Label] = []
    curves = [(f"/domain={name}", plain_label(name, 16)) for name in run.domains]
    for index, (suffix, name) in enumerate([*curves, ("", "mean")]):
        overall = suffix == ""
        color = palette.INK if overall else palette.CYCLE[index % len(palette.CYCLE)]
        dash = "-" if overall else palette.DASHES[index // len(palette.CYCLE) % len(palette.DASHES)]
        steps, batch = run.per_rollout(f"reward{suffix}")
        at, heldout = run.heldout(f"heldout/reward{suffix}")
        if len(steps):
            width = 1.4 if overall else 1.1
            style.line(ax, steps, smooth(batch), color, alpha=0.45, linewidth=width, linestyle=dash)
            last = smooth(batch)[-1]
        if len(at):
            ax.plot(
                at,
                heldout,
                color=color,
                marker="D" if overall else "o",
                markersize=(5 if overall else 4.5) if len(at) <= 25 else 2.2,
                linewidth=1.9 if overall else 1.2,
                linestyle=dash,
                markeredgecolor="none",
                clip_on=False,
                zorder=4 if overall else 3,
            )
            last = heldout[-1]
        if len(steps) or len(at):
            ends.append((float(last), name, color))
    if not ends:
        return False
    low, high = ax.get_ylim()
    if low >= -0.06 and high <= 1.06:
        ax.set_ylim(0, 1)
    style.step_axis(ax, run)
    ax.set_ylabel("reward")
    style.end_labels(ax, ends, size=8.5 if len(ends) <= 8 else 7)
    return True


def draw_regimes(ax: Axes, run: RunSeries, stratum: str) -> bool:
    """Shares of a stratum's contexts in each regime, stacked."""
    steps, shares = run.regimes(stratum)
    if not len(steps):
        return False
    stack = [shares[name] for name, _ in REGIMES]
    if len(steps) == 1:
        steps, stack = np.add(steps, [-0.5, 0.5]), [np.repeat(share, 2) for share in stack]
    names, colors = zip(*REGIMES, strict=True)
    ax.stackplot(steps, stack, colors=colors, labels=names, linewidth=0)
    ax.grid(False)
    style.percent_axis(ax, run.regime_limit)
    style.step_axis(ax, run)
    return True


def draw_curves(
    ax: Axes, run: RunSeries, curves: Sequence[tuple[str, str, str]], unit: str = ""
) -> bool:
    """Curves given as (metric, label, colour); a single curve goes without its label."""
    percent = unit == "%"
    ends: list[Label] = []
    drawn: list[Array] = []
    for key, name, color in curves:
        steps, values = run.per_rollout(key)
        if len(steps):
            drawn.append(values)
            ends.append((style.smooth_line(ax, steps, values, color), name, color))
    if not ends:
        return False
    low, high = float(min(v.min() for v in drawn)), float(max(v.max() for v in drawn))
    if percent:
        style.percent_axis(ax)
        ax.set_ylim(min(-0.02, low), max(1.03, high))
    else:
        low, high = min(low, 0.0), max(high, 0.0)
        room = 0.06 * (high - low) or 1.0
        ax.set_ylim(low - room if low < 0 else 0.0, high + room)
        if low < 0:
            ax.axhline(0.0, color=palette.MUTED, linewidth=0.8, zorder=1)
        style.number_axis(ax)
        ax.set_ylabel(unit)
    style.step_axis(ax, run)
    if len(curves) > 1:
        style.end_labels(ax, ends)
    return True


def draw_gate(ax: Axes, run: RunSeries) -> bool:
    """Shares of the gradient that the gates keep and reverse, and amplify where they do."""
    curves = [
        ("gate/gradient_kept", "kept", palette.BLUE),
        ("gate/active", "gate active", palette.INK),
        ("gate/gradient_reversed", "reversed", palette.VERMILLION),
    ]
    _, amplified = run.per_rollout("gate/gradient_amplified", "max")
    if (amplified > 0.005).any():
        curves.append(("gate/gradient_amplified", "amplified", palette.ORANGE))
    return draw_curves(ax, run, curves, "%")


def draw_ratio(ax: Axes, run: RunSeries) -> bool:
    """Range and mean of the token ratio."""
    ends: list[Label] = []
    drawn: dict[str, tuple[Array, Array]] = {}
    kinds: tuple[Reduction, ...] = ("max", "mean", "min")
    for how in kinds:
        color, width = (palette.INK, 1.6) if how == "mean" else (palette.BLUE, 0.8)
        steps, values = run.per_rollout(f"ratio/{how}", how, positive=True)
        if len(steps):
            drawn[how] = steps, values
            style.line(ax, steps, values, color, linewidth=width)
            ends.append((float(smooth(values)[-1]), how, color))
    if not ends:
        return False
    low, high = drawn.get("min"), drawn.get("max")
    if low and high and np.array_equal(low[0], high[0]):
        ax.fill_between(low[0], low[1], high[1], color=palette.BLUE, alpha=0.13, linewidth=0)
    style.log_axis(ax)
    ax.axhline(1.0, color=palette.MUTED, linewidth=0.8, zorder=1)
    style.step_axis(ax, run)
    ax.set_ylabel("ratio")
    style.end_labels(ax, ends)
    return True


def _curves(unit: str, *curves: tuple[str, str, str]) -> Draw:
    return partial(draw_curves, curves=curves, unit=unit)


_K1, _K3 = ("kl/k1", "k1", palette.PURPLE), ("kl/k3", "k3", palette.BLUE)
_LENGTH = ("completions/mean_length", "length", palette.PURPLE)

GATE: tuple[str, Draw] = ("Gradient under the gates", draw_gate)
RATIO: tuple[str, Draw] = ("Policy ratio per token", draw_ratio)
KL = ("KL estimates", _curves("nats per token", _K1, _K3))
ENTROPY = ("Entropy", _curves("nats per token", ("entropy", "entropy", palette.GREEN)))
LENGTH = ("Mean answer length", _curves("tokens", _LENGTH))
