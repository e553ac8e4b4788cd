"""What is measured on a gated batch (the statistics behind `Surrogate.metrics`)."""

from __future__ import annotations

import torch
from torch import Tensor

from .batch import RatioBatch
from .charts import SignedLog
from .gates import Regime
from .gating import GatedRatio
from .statistics import Histogram, Moments, Statistics

MOST_DOMAINS = 64
"""Metrics per domain are kept for at most this many domains."""


@torch.no_grad()
def measure(
    batch: RatioBatch, gated: GatedRatio, weight: Tensor, coefficients: Tensor
) -> Statistics:
    """All statistics of one objective call.

    ``gate/<stratum>/{pass,rollback,zeroed}_frac`` are fractions of contexts (of tokens at the token
    stratum), each context counted once by the worst regime of its channels; ``gate/active`` is the
    fraction of tokens on whose path some gate does not pass. ``gate/gradient_*`` compare the
    coefficients with those of the ungated objective ``mu A r``, weighed by their size.
    """
    means: dict[str, Moments] = {}
    drifts: dict[str, tuple[Moments, Histogram]] = {}
    active = _worst(gated.token.regime) > 0
    if gated.strata is not None and gated.gated is not None and gated.residual is not None:
        strata = gated.strata
        worst = _worst(gated.gated.regime)
        blocked = strata.sum_path((worst > 0).double()[None])
        active = active | (strata.at_tokens(blocked)[0] > 0)
        for k, name in enumerate(strata.names):
            here = strata.level(k)
            _fractions(means, f"gate/{name}", worst[here])
            _drifts(drifts, f"gate/{name}", gated.residual[:, here])
            for domain, mine in _contexts_by_domain(batch, gated, k).items():
                suffix = f"/domain={domain}"
                _fractions(means, f"gate/{name}", worst[here][mine], suffix)
                _drifts(drifts, f"gate/{name}", gated.residual[:, here][:, mine], suffix)
    _fractions(means, "gate/token", _worst(gated.token.regime))
    _drifts(drifts, "gate/token", _own_channel(gated))
    means["gate/active"] = Moments.of(active)
    log_ratio = gated.log_ratio
    tokens = {"": torch.ones_like(active), **_tokens_by_domain(batch)}
    for domain, mine in tokens.items():
        suffix = f"/domain={domain}" if domain else ""
        _divergences(means, "kl", log_ratio[mine], suffix)
        if domain:
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


def _fractions(means: dict[str, Moments], name: str, worst: Tensor, suffix: str = "") -> None:
    for regime, word in (
        (Regime.PASS, "pass"), (Regime.ROLLBACK, "rollback"), (Regime.ZERO, "zeroed")
    ):  # fmt: skip
        means[f"{name}/{word}_frac{suffix}"] = Moments.of(worst == regime)


def _drifts(
    drifts: dict[str, tuple[Moments, Histogram]], name: str, residual: Tensor, suffix: str = ""
) -> None:
    """Both channels; a chart with one channel is split by the sign of the drift."""
    if residual.shape[0] == 2:
        channels = {"pos": residual[0], "neg": residual[1]}
    else:
        drift = residual[0]
        channels = {"pos": drift[drift >= 0], "neg": -drift[drift < 0]}
    for channel, drift in channels.items():
        key = f"{name}/drift_{channel}"
        drifts[key + suffix] = (Moments.of(drift.abs()), Histogram.of(drift))


def _divergences(means: dict[str, Moments], name: str, log_ratio: Tensor, suffix: str) -> None:
    means[f"{name}/k1{suffix}"] = Moments.of(-log_ratio)
    means[f"{name}/k3{suffix}"] = Moments.of(torch.expm1(log_ratio) - log_ratio)


def _domain_masks(batch: RatioBatch, per_token: bool) -> dict[str, Tensor]:
    label = batch.labels.get("domain")
    if label is None or label.per_token or not 1 < label.count <= MOST_DOMAINS:
        return {}
    codes = label.codes[batch.trajectory] if per_token else label.codes
    return {label.value(i): codes == i for i in range(label.count)}


def _tokens_by_domain(batch: RatioBatch) -> dict[str, Tensor]:
    return _domain_masks(batch, per_token=True)


def _contexts_by_domain(batch: RatioBatch, gated: GatedRatio, k: int) -> dict[str, Tensor]:
    """Which contexts of a stratum lie in which domain (of the first token below them)."""
    masks = _tokens_by_domain(batch)
    assert gated.strata is not None
    strata = gated.strata
    found = {}
    for domain, tokens in masks.items():
        at_leaf = strata.leaf_segments.sum(tokens.double())[None]
        found[domain] = strata.push_up(at_leaf)[0, strata.level(k)] > 0
    return found


def _compare(plain: Tensor, coefficients: Tensor) -> Tensor:
    """Mass of ``plain``, and how much of it is kept, reversed and exceeded."""
    size, same = plain.abs(), plain * coefficients > 0
    kept = torch.where(same, torch.minimum(size, coefficients.abs()), 0.0)
    turned = torch.where(plain * coefficients < 0, coefficients.abs(), 0.0)
    beyond = torch.where(same, (coefficients.abs() - size).clamp(min=0), 0.0)
    return torch.stack([size.sum(), kept.sum(), turned.sum(), beyond.sum()])
