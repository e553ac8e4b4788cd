"""What is measured on a gated batch (the statistics behind `Surrogate.metrics`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .batch import RatioBatch
from .charts import SignedLog
from .gates import Regime, Zero
from .gating import GatedRatio
from .layout import ContextLayout
from .statistics import Histogram, Moments, Statistics
from .stops import Stopped
from .strata import Strata

MOST_DOMAINS = 64
"""Metrics per domain are kept for at most this many domains."""


@torch.no_grad()
def measure(
    batch: RatioBatch,
    gated: GatedRatio,
    weight: Tensor,
    coefficients: Tensor,
    stops: Sequence[Stopped] = (),
) -> Statistics:
    """All statistics of one objective call.

    ``gate/<stratum>/{pass,rollback,zeroed}_frac`` are fractions of contexts (of tokens at the token
    stratum), each context counted once by the worst regime of its channels; ``gate/active`` is the
    fraction of tokens on whose path some gate does not pass (`Zero`, which removes a component by
    construction, does not count). ``gate/left_out`` is the fraction of tokens that a mask or a
    factor of 0 takes away from an advantage. ``gate/gradient_*`` compare the coefficients with
    those of the ungated objective ``mu A r`` on the tokens that are left, weighed by their size.
    ``stop/<scale>`` are fractions of tokens; where no gate stands at a scale, ``gate/<scale>/...``
    is of the stop there: pass is within budget, zeroed is out of it, the drift is the context's
    own.
    """
    means: dict[str, Moments] = {}
    drifts: dict[str, tuple[Moments, Histogram]] = {}
    gates = gated.gate_map.gates
    active = _worst(gated.token.regime) > 0
    if isinstance(gated.gate_map.token, Zero):
        active = torch.zeros_like(active)
    active = active | (_worst(gated.first.regime) > 0)
    if gated.strata is not None and gated.gated is not None and gated.residual is not None:
        strata = gated.strata
        worst = _worst(gated.gated.regime)
        counts = torch.tensor([not isinstance(gates[name], Zero) for name in strata.names])
        acting = (worst > 0) & counts.to(worst.device)[strata.stratum]
        blocked = strata.sum_path(acting.double()[None])
        active = active | (strata.at_tokens(blocked)[0] > 0)
        assert gated.layout.contexts is not None
        for name in strata.names:
            _contexts(means, drifts, batch, gated.layout.contexts, name, worst, gated.residual)
    _fractions(means, "gate/token", _worst(gated.token.regime))
    _drifts(drifts, "gate/token", _own_channel(gated))
    _stops(means, drifts, batch, gated, stops)
    means["gate/active"] = Moments.of(active)
    means["gate/left_out"] = Moments.of((weight == 0) & (batch.advantages != 0))
    log_ratio = gated.log_ratio
    for suffix, mine in {"": torch.ones_like(active), **_tokens_by_domain(batch)}.items():
        _divergences(means, "kl", log_ratio[mine], suffix)
        if suffix:
            means[f"gate/active{suffix}"] = Moments.of(active[mine])
            means[f"ratio/mean{suffix}"] = Moments.of(log_ratio[mine].exp())
        if batch.rollout_log_probs is not None:
            # k1 and k3 of KL(rollout || current), from the sampled tokens
            log_rho = (batch.log_probs.detach() - batch.rollout_log_probs).double()
            _divergences(means, "kl_rollout", log_rho[mine], suffix)
    plain = weight * log_ratio.exp()
    return Statistics(means, drifts, Moments.of(log_ratio.exp()), _compare(plain, coefficients))


def _worst(regime: Tensor) -> Tensor:
    """Per context: the worst regime over channels (zero before rollback before pass)."""
    return regime.max(dim=0).values


def _own_channel(gated: GatedRatio) -> Tensor:
    """Residual drift of each token in the channel of its own sign, as [channels, N]."""
    if isinstance(gated.gate_map.chart, SignedLog):
        return torch.where(gated.log_ratio >= 0, gated.token_drift[0], -gated.token_drift[1])[None]
    return gated.token_drift


def _stops(
    means: dict[str, Moments],
    drifts: dict[str, tuple[Moments, Histogram]],
    batch: RatioBatch,
    gated: GatedRatio,
    stops: Sequence[Stopped],
) -> None:
    tokens: dict[str, Tensor] = {}
    for stop in stops:
        for name, mine in stop.tokens.items():
            tokens[name] = tokens[name] | mine if name in tokens else mine
        if isinstance(gated.gate_map.token, Zero):
            _fractions(means, "gate/token", Regime.ZERO * stop.far)
        at = stop.layout.contexts
        if at is not None and stop.mean is not None and stop.beyond is not None:
            worst = Regime.ZERO * stop.beyond.any(0)
            for name in at.strata.names:
                if name not in gated.gate_map.gates:
                    _contexts(means, drifts, batch, at, name, worst, stop.mean)
    for name, mine in tokens.items():
        means[f"stop/{name}"] = Moments.of(mine)


def _contexts(
    means: dict[str, Moments],
    drifts: dict[str, tuple[Moments, Histogram]],
    batch: RatioBatch,
    at: ContextLayout,
    name: str,
    worst: Tensor,
    drift: Tensor,
) -> None:
    """Fractions and drifts of one stratum, ``worst`` and ``drift`` being of all contexts."""
    strata, share = at.strata, _share(at)
    here = torch.zeros(len(strata), dtype=torch.bool, device=worst.device)
    here[strata.level(strata.names.index(name))] = True
    for suffix, mine in {"": here, **_contexts_by_domain(batch, strata, here)}.items():
        _fractions(means, f"gate/{name}", worst[mine], suffix, share[mine])
        _drifts(drifts, f"gate/{name}", drift[:, mine], suffix, share[mine])


def _share(at: ContextLayout) -> Tensor:
    """Part of each context's tokens that this rank holds; 1 in a single process."""
    return at.strata.push_segments(at.strata.segment_lengths.double()[None])[0] / at.count


def _fractions(
    means: dict[str, Moments],
    name: str,
    worst: Tensor,
    suffix: str = "",
    share: Tensor | None = None,
) -> None:
    for regime, word in (
        (Regime.PASS, "pass"), (Regime.ROLLBACK, "rollback"), (Regime.ZERO, "zeroed")
    ):  # fmt: skip
        means[f"{name}/{word}_frac{suffix}"] = Moments.of(worst == regime, share)


def _drifts(
    drifts: dict[str, tuple[Moments, Histogram]],
    name: str,
    residual: Tensor,
    suffix: str = "",
    share: Tensor | None = None,
) -> None:
    """Both channels; a chart with one channel is split by the sign of the drift."""
    share = torch.ones_like(residual[0]) if share is None else share
    up = residual[0] >= 0
    channels = {"pos": (residual[0], share), "neg": (residual[-1], share)}
    if residual.shape[0] == 1:
        channels = {"pos": (residual[0][up], share[up]), "neg": (residual[0][~up], share[~up])}
    for channel, (drift, part) in channels.items():
        key = f"{name}/drift_{channel}{suffix}"
        drifts[key] = (Moments.of(drift.abs(), part), Histogram.of(drift, part))


def _divergences(means: dict[str, Moments], name: str, log_ratio: Tensor, suffix: str) -> None:
    means[f"{name}/k1{suffix}"] = Moments.of(-log_ratio)
    means[f"{name}/k3{suffix}"] = Moments.of(torch.expm1(log_ratio) - log_ratio)


def _tokens_by_domain(batch: RatioBatch) -> dict[str, Tensor]:
    """Metric suffix -> tokens, for each domain."""
    label = batch.labels.get("domain")
    if label is None or label.per_token or not label.count <= MOST_DOMAINS:
        return {}
    codes = label.codes[batch.row]
    return {f"/domain={label.value(i)}": codes == i for i in range(label.count)}


def _contexts_by_domain(batch: RatioBatch, strata: Strata, here: Tensor) -> dict[str, Tensor]:
    """Metric suffix -> those of the contexts ``here`` that hold a token of the domain."""
    found = {}
    for suffix, tokens in _tokens_by_domain(batch).items():
        at_leaf = strata.leaf_segments.sum(tokens.double())[None]
        found[suffix] = here & (strata.push_up(at_leaf)[0] > 0)
    return found


def _compare(plain: Tensor, coefficients: Tensor) -> Tensor:
    """Mass of ``plain``, and how much of it is kept, reversed and exceeded."""
    size, same = plain.abs(), plain * coefficients > 0
    kept = torch.where(same, torch.minimum(size, coefficients.abs()), 0.0)
    turned = torch.where(plain * coefficients < 0, coefficients.abs(), 0.0)
    beyond = torch.where(same, (coefficients.abs() - size).clamp(min=0), 0.0)
    return torch.stack([size.sum(), kept.sum(), turned.sum(), beyond.sum()])
