"""The single charts of a run as SVG text, to be inlined into an HTML page.

Colours are written as CSS custom properties (``var(--ink)``), so that the page decides between its
light and dark variants, and text stays text.

Each ``draw_`` function draws into given axes and returns a sentence on what it drew, or None where
the run has no values for it; the overview image shares them.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fiberpo import palette
from fiberpo.report import style
from fiberpo.report.series import Array, Reduction, RunSeries, smooth
from fiberpo.report.style import Label
from fiberpo.report.tables import MINUS

Draw = Callable[[Axes, RunSeries], str | None]

# Largest departures at the bottom, where their height can be read off the axis.
REGIMES = (("zeroed", palette.ZEROED), ("rollback", palette.ROLLBACK), ("pass", palette.PASS))
CHANNELS = (("positive", "drift_pos", palette.BLUE), ("negative", "drift_neg", palette.VERMILLION))


@dataclass(frozen=True)
class Chart:
    """One drawn panel: the SVG element and a sentence that says what it shows."""

    title: str
    svg: str
    description: str


def draw_reward(ax: Axes, run: RunSeries) -> str | None:
    """Reward per domain and their mean: held-out with markers, batches light."""
    ends: list[Label] = []
    told: list[str] = []
    curves = [(f"/domain={name}", style.plain_label(name, 16)) for name in run.domains]
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
            told.append(f"{name} {heldout[0]:.2f} to {last:.2f}")
        if len(steps) or len(at):
            ends.append((float(last), name, color))
    if not ends:
        return None
    low, high = ax.get_ylim()
    if low >= -0.06 and high <= 1.06:
        ax.set_ylim(0, 1)
    style.step_axis(ax, run)
    ax.set_ylabel("reward")
    style.end_labels(ax, ends, size=8.5 if len(ends) <= 8 else 7)
    if told:
        return "Held-out reward, first to last evaluation: " + "; ".join(told) + "."
    return "Batch reward over optimizer steps; no held-out evaluation is recorded."


def draw_regimes(ax: Axes, run: RunSeries, stratum: str) -> str | None:
    """Shares of a stratum's contexts in each regime, stacked."""
    steps, shares = run.regimes(stratum)
    if not len(steps):
        return None
    stack = [shares[name] for name, _ in REGIMES]
    if len(steps) == 1:
        steps, stack = np.add(steps, [-0.5, 0.5]), [np.repeat(share, 2) for share in stack]
    names, colors = zip(*REGIMES, strict=True)
    ax.stackplot(steps, stack, colors=colors, labels=names, linewidth=0)
    ax.grid(False)
    style.percent_axis(ax, run.regime_limit)
    style.step_axis(ax, run)
    parts = [f"{name} {100 * shares[name].mean():.1f} %" for name in reversed(names)]
    return f"{style.plain_label(stratum)} stratum, average over the run: {', '.join(parts)}."


def draw_drift(ax: Axes, run: RunSeries, stratum: str, context: str | None = None) -> str | None:
    """Drift of both channels of a stratum, or of one of its contexts, and their budgets."""
    ends: list[Label] = []
    told: list[str] = []
    labels: list[Label] = []
    peaks: list[float] = []
    for name, channel, color in CHANNELS:
        key = run.drift_key(stratum, channel, context)
        steps, drift = run.per_rollout(key, "max", positive=True)
        if len(steps):
            ends.append((style.smooth_line(ax, steps, drift, color), name, color))
            peaks.append(float(drift.max()))
            told.append(f"{name} at most {style.short(peaks[-1])}")
    if not told:
        return None
    for index, (_, _, color) in enumerate(CHANNELS):
        sign, budgets = f"+{MINUS}"[index], run.budgets(stratum, index, context)
        for budget in budgets:
            ax.axhline(budget, color=color, linestyle=palette.BUDGET_DASH, linewidth=1.0, alpha=0.9)
        if budgets:
            text = f"budget {sign} {style.short(budgets[0])}"
            if len(budgets) > 1:
                text = f"budgets {sign} {style.short(budgets[0])} to {style.short(budgets[-1])}"
            labels.append((budgets[-1], text, color))
            peaks.append(budgets[-1])
    visible = [y for curve in ax.lines for y in np.asarray(curve.get_ydata(), float) if y > 0]
    ax.set_ylim(max(min(visible), max(peaks) * 1e-3) / 1.3, max(peaks) * 1.5)
    style.log_axis(ax)
    style.step_axis(ax, run)
    ax.set_ylabel("nats per token")
    style.end_labels(ax, [*ends, *labels], size=8)
    where = style.plain_label(stratum) + (f" ({style.plain_label(context)})" if context else "")
    limits = "".join(f"{', ' if i else '; '}{text}" for i, (_, text, _) in enumerate(labels))
    return f"{where}: 90th percentile of drift, {', '.join(told)}{limits}."


def draw_curves(
    ax: Axes, run: RunSeries, curves: Sequence[tuple[str, str, str]], unit: str = ""
) -> str | None:
    """Curves given as (metric, label, colour); a single curve goes without its label."""
    percent = unit == "%"
    ends: list[Label] = []
    told: list[str] = []
    drawn: list[Array] = []
    for key, name, color in curves:
        steps, values = run.per_rollout(key)
        if len(steps):
            drawn.append(values)
            ends.append((style.smooth_line(ax, steps, values, color), name, color))
            first, last = smooth(values)[[0, -1]].tolist()
            shown = [f"{100 * v:.1f} %" if percent else style.short(v) for v in (first, last)]
            told.append(f"{name} {shown[0]} to {shown[1]}")
    if not ends:
        return None
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
    return "Start to end of the run: " + "; ".join(told) + "."


def draw_gate(ax: Axes, run: RunSeries) -> str | None:
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


def draw_ratio(ax: Axes, run: RunSeries) -> str | None:
    """Range and mean of the token ratio."""
    told: list[str] = []
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
            told.append(f"{how} {style.short(float(getattr(values, how)()))}")
    if not ends:
        return None
    low, high = drawn.get("min"), drawn.get("max")
    if low and high and np.array_equal(low[0], high[0]):
        ax.fill_between(low[0], low[1], high[1], color=palette.BLUE, alpha=0.13, linewidth=0)
    style.log_axis(ax)
    ax.axhline(1.0, color=palette.MUTED, linewidth=0.8, zorder=1)
    style.step_axis(ax, run)
    ax.set_ylabel("ratio")
    style.end_labels(ax, ends)
    return "Token ratio over the run: " + ", ".join(told) + "."


def _curves(unit: str, *curves: tuple[str, str, str]) -> Draw:
    return partial(draw_curves, curves=curves, unit=unit)


_K1, _K3 = ("kl/k1", "k1", palette.PURPLE), ("kl/k3", "k3", palette.BLUE)
_LENGTH = ("completions/mean_length", "length", palette.PURPLE)

GATE: tuple[str, Draw] = ("Gradient under the gates", draw_gate)
RATIO: tuple[str, Draw] = ("Policy ratio per token", draw_ratio)
KL = ("KL estimates", _curves("nats per token", _K1, _K3))
SIZE = ("Effective sample size", _curves("%", ("ratio/ess", "effective sample size", palette.BLUE)))
ENTROPY = ("Entropy", _curves("nats per token", ("entropy", "entropy", palette.GREEN)))
LENGTH = ("Mean answer length", _curves("tokens", _LENGTH))


def draw_charts(run: RunSeries) -> dict[str, list[Chart]]:
    """Every chart the run has values for, by figure.

    The figures are ``reward``, ``regimes`` (one chart per stratum), ``drift`` (one per stratum,
    or per context where budgets differ by context), ``gate``, ``ratio`` (ratio, KL estimates and
    effective sample size) and ``policy`` (entropy and answer length); a figure without values is
    an empty list.
    """
    regimes: list[tuple[str, Draw]] = []
    drift: list[tuple[str, Draw]] = []
    for name in run.stratum_names:
        regimes.append((style.plain_label(name), partial(draw_regimes, stratum=name)))
        for context in run.drift_contexts(name):
            title = style.plain_label(name) + (f", {style.plain_label(context)}" if context else "")
            drift.append((title, partial(draw_drift, stratum=name, context=context)))
    plans: dict[str, tuple[float, list[tuple[str, Draw]]]] = {
        "reward": (3.3, [("Reward by domain", draw_reward)]),
        "regimes": (1.75, regimes),
        "drift": (2.4, drift),
        "gate": (2.4, [GATE]),
        "ratio": (2.4, [RATIO, KL, SIZE]),
        "policy": (2.2, [ENTROPY, LENGTH]),
    }
    charts: dict[str, list[Chart]] = {key: [] for key in plans}
    with style.report_style():
        for key, (height, panels) in plans.items():
            for index, (title, draw) in enumerate(panels):
                figure = Figure(figsize=(4.9, height))
                description = draw(figure.add_subplot(), run)
                if description is not None:
                    charts[key].append(Chart(title, _svg(figure, f"{key}{index}"), description))
    return charts


def _svg(figure: Figure, name: str) -> str:
    """The figure as an SVG element for inlining: own ids, CSS colours, nothing external."""
    buffer = io.StringIO()
    metadata = {"Creator": None, "Date": None, "Format": None, "Type": None}
    figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    text = buffer.getvalue()
    head, end, body = text[text.index("<svg") :].strip().partition(">")
    view_box = re.search(r'viewBox="[^"]*"', head)
    assert view_box is not None
    body = re.sub(r"<metadata>.*?</metadata>\s*", "", body, flags=re.DOTALL)
    body = body.replace("xlink:href=", "href=")
    body = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", body)
    body = re.sub(r"font: ([^;\"]*?px) [^;\"]*", r"font: \1 var(--sans)", body)
    for variable, (drawn, _, _) in style.CSS_COLORS.items():
        body = re.sub(rf"{drawn}\b", f"var(--{variable})", body, flags=re.IGNORECASE)
    return f'<svg {view_box.group(0)} aria-hidden="true" focusable="false"{end}{body}'
