"""What is measured on a gated batch (the statistics behind `Surrogate.metrics`)."""

from __future__ import annotations

import torch
from torch import Tensor

from .batch import RatioBatch
from .charts import SignedLog
from .gates import Regime, Zero
from .gating import GatedRatio
from .statistics import Histogram, Moments, Statistics
from .strata import Strata

MOST_DOMAINS = 64
"""Metrics per domain are kept for at most this many domains."""


@torch.no_grad()
def measure(
    batch: RatioBatch, gated: GatedRatio, weight: Tensor, coefficients: Tensor
) -> Statistics:
    """All statistics of one objective call.

    ``gate/<stratum>/{pass,rollback,zeroed}_frac`` are fractions of contexts (of tokens at the token
    stratum), each context counted once by the worst regime of its channels; ``gate/active`` is the
    fraction of tokens on whose path some gate does not pass (`Zero`, which removes a component by
    construction, does not count). ``gate/left_out`` is the fraction of tokens that a mask or a
    factor of 0 takes away from an advantage. ``gate/gradient_*`` compare the coefficients with
    those of the ungated objective ``mu A r`` on the tokens that are left, weighed by their size.
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
        share = _share(gated)
        for k, name in enumerate(strata.names):
            here = torch.zeros(len(strata), dtype=torch.bool, device=worst.device)
            here[strata.level(k)] = True
            for suffix, mine in {"": here, **_contexts_by_domain(batch, strata, here)}.items():
                _fractions(means, f"gate/{name}", worst[mine], suffix, share[mine])
                _drifts(drifts, f"gate/{name}", gated.residual[:, mine], suffix, share[mine])
    _fractions(means, "gate/token", _worst(gated.token.regime))
    _drifts(drifts, "gate/token", _own_channel(gated))
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


def _share(gated: GatedRatio) -> Tensor:
    """Part of each context's tokens that this rank holds; 1 in a single process."""
    at = gated.layout.contexts
    assert at is not None
    ones = torch.ones_like(gated.log_ratio)
    return at.strata.push_up(at.strata.leaf_segments.sum(ones)[None])[0] / at.count


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
