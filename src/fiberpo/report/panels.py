"""The charts of the page: one run in detail, or several overlaid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from .. import palette
from .curves import Curve, Panel, lines, numbers, told
from .series import Reduction, RunSeries, smooth
from .sources import Source
from .tables import MINUS, plain_label, short

REGIMES = (("zeroed", "zeroed"), ("rollback", "rollback"), ("pass", "pass"))
CHANNELS = (("positive", "drift_pos", "blue"), ("negative", "drift_neg", "vermillion"))


def metric(
    sources: Sequence[Source],
    title: str,
    keys: Sequence[tuple[str, str, str, Reduction]],
    unit: str = "",
    *,
    percent: bool = False,
    log: bool = False,
    rules: Sequence[tuple[float, str, str]] = (),
) -> Panel | None:
    """Metrics over steps: one run with a curve a metric, or several runs with a dash a metric."""
    curves: list[Curve] = []
    said: list[str] = []
    several = len(sources) > 1
    for source in sources:
        for index, (key, name, color, how) in enumerate(keys):
            steps, values = source.series.per_rollout(key, how, positive=log)
            if not len(steps):
                continue
            smoothed = smooth(values)
            faint = values if smoothed is not values and not several else None
            if several:
                called = source.label if len(keys) == 1 else f"{source.label}, {name}"
                width = 2.0 if index == 0 else 1.1
                curve = Curve(
                    _plain(called), steps, smoothed, source.color, source.dash, width=width
                )
            else:
                called = name
                curve = Curve(name, steps, smoothed, color, faint=faint)
            curves.append(curve)
            said.append(told(called, smoothed, percent))
    text = f"{title}, start to end: {'; '.join(said)}."
    low = None if log else 0.0
    return lines(title, text, curves, unit, log=log, percent=percent, rules=rules, low=low)


def _plain(text: str) -> str:
    """A name for a legend: one line, not too long, and nothing that plotly reads as markup."""
    shown = plain_label(text, 34)
    return shown.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


# --- reward ------------------------------------------------------------------------------------


def reward(sources: Sequence[Source]) -> list[Panel]:
    """Reward per domain: one panel for a single run, else one panel a domain."""
    if len(sources) == 1:
        found = _reward_of_one(sources[0])
        return [] if found is None else [found]
    names = dict.fromkeys(d for source in sources for d in source.series.domains)
    panels = [_reward_of_domain(sources, name) for name in [None, *names]]
    return [panel for panel in panels if panel is not None]


def _reward_curves(
    series: RunSeries, suffix: str, name: str, color: str, dash: str, width: float
) -> list[Curve]:
    at, heldout = series.heldout(f"heldout/reward{suffix}")
    steps, batch = series.per_rollout(f"reward{suffix}")
    curves = []
    if len(steps):
        alone = not len(at)
        light = Curve(name, steps, smooth(batch), color, dash, width, legend=alone)
        curves.append(light if alone else replace(light, opacity=0.45, width=1.2))
    if len(at):
        curves.append(Curve(name, at, heldout, color, dash, width, markers=True))
    return curves


def _reward_of_one(source: Source) -> Panel | None:
    curves: list[Curve] = []
    names = [*((f"/domain={n}", n) for n in source.series.domains), ("", "mean")]
    for index, (suffix, name) in enumerate(names):
        count = len(palette.CYCLE)
        color = "ink" if suffix == "" else palette.NAMES[index % count]
        dash = "solid" if suffix == "" else palette.PLOT_DASHES[index // count % 3]
        width = 2.6 if suffix == "" else 1.5
        curves += _reward_curves(source.series, suffix, _plain(name), color, dash, width)
    return _reward_panel("Reward by domain", curves)


def _reward_of_domain(sources: Sequence[Source], domain: str | None) -> Panel | None:
    suffix = "" if domain is None else f"/domain={domain}"
    curves: list[Curve] = []
    for source in sources:
        curves += _reward_curves(
            source.series, suffix, _plain(source.label), source.color, source.dash, 1.8
        )
    return _reward_panel("Mean over domains" if domain is None else _plain(domain), curves)


def _reward_panel(title: str, curves: Sequence[Curve]) -> Panel | None:
    marked = [c for c in curves if c.markers]
    kind = "held-out reward, first to last evaluation" if marked else "reward of the batches"
    text = "; ".join(told(c.name, c.y) for c in marked or curves)
    low = 0.0 if all(float(np.nanmin(c.y)) >= 0 for c in curves if len(c.y)) else None
    return lines(title, f"{title}, {kind}: {text}.", curves, "reward", low=low)


# --- gates -------------------------------------------------------------------------------------


def regimes(sources: Sequence[Source]) -> list[Panel]:
    """Shares of contexts by regime: stacked for one run, what does not pass for several."""
    names = dict.fromkeys(n for source in sources for n in source.series.stratum_names)
    if len(sources) == 1:
        series = sources[0].series
        return [p for n in names if (p := _stacked(series, n)) is not None]
    return [p for n in names if (p := _not_passing(sources, n)) is not None]


def _stacked(series: RunSeries, stratum: str) -> Panel | None:
    steps, shares = series.regimes(stratum)
    if not len(steps):
        return None
    data = []
    if len(steps) == 1:
        steps = np.add(steps, [-0.5, 0.5])
        shares = {name: np.repeat(share, 2) for name, share in shares.items()}
    for name, color in REGIMES:
        data.append(
            {
                "type": "scatter", "mode": "lines", "stackgroup": "one", "name": name,
                "x": numbers(steps), "y": numbers(shares[name]),
                "line": {"width": 0.5, "color": f"var(--{color})"}, "fillcolor": f"var(--{color})",
            }
        )  # fmt: skip
    top = series.regime_limit
    axis = {"tickformat": ".3~p", "range": [0, top], "tickvals": [0, top / 2, top]}
    layout = {"yaxis": axis, "xaxis": {"title": {"text": "optimizer step"}}, "showlegend": False}
    parts = [f"{name} {100 * shares[name].mean():.1f} %" for name, _ in reversed(REGIMES)]
    name = _plain(stratum)
    text = f"{name} stratum, average over the run: {', '.join(parts)}."
    return Panel(name, text, {"data": data, "layout": layout})


def _not_passing(sources: Sequence[Source], stratum: str) -> Panel | None:
    curves = []
    for source in sources:
        steps, shares = source.series.regimes(stratum)
        if len(steps):
            share = smooth(shares["rollback"] + shares["zeroed"])
            curves.append(Curve(_plain(source.label), steps, share, source.color, source.dash))
    text = "; ".join(told(c.name, c.y, percent=True) for c in curves)
    title = f"{_plain(stratum)}: rolled back or zeroed"
    return lines(title, f"{title}: {text}.", curves, percent=True, low=0.0)


def drift(sources: Sequence[Source]) -> list[Panel]:
    """Drift against budget: both channels of one run, or one channel of several."""
    found: list[Panel | None] = []
    if len(sources) == 1:
        series = sources[0].series
        for name in series.stratum_names:
            found += [_drift_of_one(series, name, c) for c in series.drift_contexts(name)]
    else:
        names = dict.fromkeys(n for source in sources for n in source.series.stratum_names)
        found = [_drift_of_many(sources, n, channel) for n in names for channel in (0, 1)]
    return [panel for panel in found if panel is not None]


def _drift_of_one(series: RunSeries, stratum: str, context: str | None) -> Panel | None:
    curves, rules, said, limits = [], [], [], []
    for index, (name, channel, color) in enumerate(CHANNELS):
        steps, values = series.per_rollout(
            series.drift_key(stratum, channel, context), "max", positive=True
        )
        if len(steps):
            smoothed = smooth(values)
            faint = None if smoothed is values else values
            curves.append(Curve(name, steps, smoothed, color, faint=faint))
            said.append(f"{name} at most {short(float(values.max()))}")
        sign, budgets = f"+{MINUS}"[index], series.budgets(stratum, index, context)
        rules += [(budget, color, "") for budget in budgets]
        if budgets:
            ends = budgets[:: len(budgets) - 1 or 1]
            limits.append(f"{sign}{' to '.join(short(budget) for budget in ends)}")
    title = _plain(stratum) + (f", {_plain(context)}" if context else "")
    note = f"budget {', '.join(limits)}" if limits else "no budget"
    text = f"{title}: 90th percentile of drift, {', '.join(said)}; {note}."
    return lines(
        title, text, curves, "nats per token", log=True, rules=rules, note=note, legend=False
    )


def _drift_of_many(sources: Sequence[Source], stratum: str, index: int) -> Panel | None:
    name, channel, _ = CHANNELS[index]
    curves, rules = [], []
    for source in sources:
        key = source.series.drift_key(stratum, channel)
        steps, values = source.series.per_rollout(key, "max", positive=True)
        if len(steps):
            label = _plain(source.label)
            curves.append(Curve(label, steps, smooth(values), source.color, source.dash))
            budgets = source.series.budgets(stratum, index)
            rules += [(budget, source.color, "") for budget in budgets[:1]]
    title = f"{_plain(stratum)}, {name} channel"
    said = "; ".join(f"{c.name} at most {short(float(c.y.max()))}" for c in curves)
    text = f"{title}: 90th percentile of drift, {said}."
    return lines(title, text, curves, "nats per token", log=True, rules=rules)


def gradient(sources: Sequence[Source]) -> list[Panel]:
    """What the gates keep, reverse and amplify."""
    if len(sources) == 1:
        keys: list[tuple[str, str, str, Reduction]] = [
            ("gate/gradient_kept", "kept", "blue", "mean"),
            ("gate/active", "tokens with an active gate", "ink", "mean"),
            ("gate/gradient_reversed", "reversed", "vermillion", "mean"),
        ]
        _, amplified = sources[0].series.per_rollout("gate/gradient_amplified", "max")
        if (amplified > 0.005).any():
            keys.append(("gate/gradient_amplified", "amplified", "orange", "mean"))
        if _drops_tokens(sources[0]):
            keys.append(("gate/left_out", "tokens left out", "purple", "mean"))
        return _present(
            metric(sources, "Gradient under the gates", keys, percent=True), _stops(sources[0])
        )
    left_out = [source for source in sources if _drops_tokens(source)]
    dropped: list[tuple[str, str, str, Reduction]] = [("gate/left_out", "", "", "mean")]
    return _present(
        metric(sources, "Gradient kept", [("gate/gradient_kept", "", "", "mean")], percent=True),
        metric(sources, "Gate active, of tokens", [("gate/active", "", "", "mean")], percent=True),
        metric(sources, "Tokens left out", dropped, percent=True) if left_out else None,
    )


def _drops_tokens(source: Source) -> bool:
    _, values = source.series.per_rollout("gate/left_out", "max")
    return bool((values > 0).any())


def _stops(source: Source) -> Panel | None:
    """Tokens that each scale stops; a token may be stopped by several."""
    scales = [key.removeprefix("stop/") for key in source.series.keys if key.startswith("stop/")]
    colors = ("vermillion", "orange", "green", "purple")
    shown: list[tuple[str, str, str, Reduction]] = [
        (f"stop/{name}", name, "blue" if name == "token" else colors[i % len(colors)], "mean")
        for i, name in enumerate(scales)
    ]
    return metric([source], "Tokens stopped, by scale", shown, percent=True) if shown else None


def ratios(sources: Sequence[Source]) -> list[Panel]:
    """Both tails of the ratio, KL estimates, effective sample size."""
    one = [(1.0, "muted", "")]
    nats = "nats per token"
    tails: list[tuple[str, str, str, Reduction]] = [
        ("ratio/max", "largest", "vermillion", "max"),
        ("ratio/min", "smallest", "blue", "min"),
    ]
    middle: list[tuple[str, str, str, Reduction]] = [("ratio/mean", "mean", "ink", "mean")]
    several = len(sources) > 1
    kl: list[tuple[str, str, str, Reduction]] = [
        ("kl/k3", "k3", "blue", "mean"), ("kl/k1", "k1", "purple", "mean")
    ]  # fmt: skip
    return _present(
        metric(
            sources, "Policy ratio, both tails", tails if several else [*tails, *middle], "ratio",
            log=True, rules=one,
        ),
        metric(sources, "KL estimates", kl, nats),
        metric(
            sources, "KL of the sampling engine",
            [("kl_rollout/k3", "k3", "blue", "mean"), ("kl_rollout/k1", "k1", "purple", "mean")],
            nats,
        ),
        metric(
            sources, "Effective sample size",
            [("ratio/ess", "effective sample size", "blue", "mean")], percent=True,
        ),
    )  # fmt: skip


def policy(sources: Sequence[Source]) -> list[Panel]:
    """Entropy and length of the answers."""
    length = "completions/mean_length"
    return _present(
        metric(sources, "Entropy", [("entropy", "entropy", "green", "mean")], "nats per token"),
        metric(sources, "Mean answer length", [(length, "length", "purple", "mean")], "tokens"),
    )


def _present(*panels: Panel | None) -> list[Panel]:
    return [panel for panel in panels if panel is not None]


def draw_panels(sources: Sequence[Source]) -> dict[str, list[Panel]]:
    """Every chart the runs have values for, by section of the page."""
    return {
        "reward": reward(sources),
        "regimes": regimes(sources),
        "drift": drift(sources),
        "gate": gradient(sources),
        "ratio": ratios(sources),
        "policy": policy(sources),
    }
