"""Other methods of the field as recipes, in the form ``J = sum_i mu_i M_i G_i A_i`` or beside it.

A *ratio gating map* (Def. 3.1) is a function of the ratios alone whose gradient is taken. SAPO,
GMPO, SPO and Truly PPO are such maps. CISPO and TOPR take no gradient of their weight; DPPO and
CPPO multiply the ungated ratio by a mask without gradient. On policy (``r = 1``) the gradient of
each is that of the policy gradient, ``mu A`` (GMPO: with ``A`` averaged over the trajectory).

``old_log_probs`` of the batch are the anchor of every ratio and divergence. Where a paper anchors
at the policy that sampled (DPPO, CPPO, TOPR), pass its log-probs there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from .building import Aggregation, build
from .charts import Deviation, Log
from .gates import Pass, Zero
from .gating import GateMap
from .masks import SequenceMask
from .objective import Objective
from .peer_gates import (
    QuadraticGate,
    RollbackClip,
    SignedLogClip,
    SoftGate,
    Taper,
    WeightClip,
)
from .token_masks import DivergenceMask, PrefixMask


def cispo(
    epsilon_low: float | None = None,
    epsilon_high: float = 4.0,
    *,
    weights: Aggregation = "token_mean",
    mask: SequenceMask | None = None,
) -> Objective:
    """CISPO: ``J = sum mu sg(clip(r, 1 - epsilon_low, 1 + epsilon_high)) A log pi``.

    Not a ratio gating map: the weight is clipped, its gradient is not taken (``sg``), so that a
    clipped token goes on learning with the weight of the bound. The value of the loss is no
    surrogate of the return; its gradient is what counts.

    Args:
        epsilon_low: offset below 1, in (0, 1); None (the paper) leaves that side open.
        epsilon_high: offset above 1, > 0. 4.0 is a weight of at most 5, the ``eps_max`` of ScaleRL.
        weights: aggregation weights, ``1 / N`` by default.
        mask: sequence mask.

    References:
        MiniMax-M1, arXiv 2506.13585; The Art of Scaling Reinforcement Learning Compute for LLMs,
        arXiv 2510.13786.
    """
    gate_map = GateMap(Log(), {}, WeightClip(epsilon_low, epsilon_high), detached=True)
    return build("cispo", gate_map, weights, mask, ("cispo", "scale_rl"), locals())


def sapo(
    tau_pos: float = 1.0,
    tau_neg: float = 1.05,
    *,
    weights: Aggregation = "trajectory_mean",
    mask: SequenceMask | None = None,
) -> Objective:
    """SAPO: ``G = (4 / tau) sigmoid(tau (r - 1))``.

    A ratio gating map of the token, smooth: ``dG/dr = 4 sigmoid (1 - sigmoid)`` is 1 at ``r = 1``
    and falls off on both sides. ``G(1) = 2 / tau`` is not 1: the loss is offset, its gradient not.

    Args:
        tau_pos: temperature where ``A > 0``, > 0; the half-width of the gate is about ``1.8 / tau``
            in units of ``r - 1``.
        tau_neg: temperature elsewhere; larger, so that negative advantages fade sooner.
        weights, mask: as in `cispo`; ``1 / (trajectories T)`` by default.

    References:
        Soft Adaptive Policy Optimization, arXiv 2511.20347.
    """
    gate_map = GateMap(Deviation(), {}, SoftGate(tau_pos, tau_neg))
    return build("sapo", gate_map, weights, mask, ("sapo",), locals())


def gmpo(
    epsilon: float = 0.4,
    epsilon_high: float | None = None,
    *,
    weights: Aggregation = "trajectory_mean",
    mask: SequenceMask | None = None,
) -> Objective:
    """GMPO: every token carries ``exp(mean of clip(log r) over its trajectory)``.

    A ratio gating map: each token's log ratio is clipped first, from the side that the sign of its
    advantage names, then the trajectory's mean passes and the token's own component is removed.

    Args:
        epsilon: half-width of the clip below 0, nats, > 0 (0.4 in the paper).
        epsilon_high: above 0, nats; ``epsilon`` if None.
        weights, mask: as in `cispo`; ``1 / (trajectories T)`` by default.

    References:
        Geometric-Mean Policy Optimization, arXiv 2507.20673.
    """
    gate_map = GateMap(
        Log(), {"trajectory": Pass()}, Zero(), first=SignedLogClip(epsilon, epsilon_high)
    )
    return build("gmpo", gate_map, weights, mask, ("gmpo",), locals())


def dppo(
    delta: float | None = None,
    divergence: str = "tv",
    *,
    weights: Aggregation = "token_mean",
    mask: SequenceMask | None = None,
) -> Objective:
    """DPPO: ``G = r``, and tokens are dropped where ``A (r - 1) > 0`` and ``D > delta``.

    ``D`` is the binary TV ``|p - p_old|`` or the binary KL(old, current). Not a ratio gating map:
    the mask looks at probabilities, not only at their ratio, and has no gradient.

    Args:
        delta: radius > 0, a difference of probabilities for ``"tv"``, nats for ``"kl"``; 0.15 and
            0.05 if None; ``inf`` drops nothing.
        divergence: ``"tv"`` or ``"kl"``.
        weights, mask: as in `cispo`; ``1 / N`` by default. Dropped tokens stay in it.

    References:
        Rethinking the Trust Region in LLM Reinforcement Learning, arXiv 2602.04879.
    """
    if delta is None:
        delta = 0.05 if divergence == "kl" else 0.15
    factors = (DivergenceMask(delta, divergence),)
    return build("dppo", GateMap(Log(), {}, Pass()), weights, mask, ("dppo",), locals(), factors)


def cppo(
    delta: float = 0.15,
    w_min: float = 0.8,
    delta_b: float = 0.015,
    divergence: str = "tv",
    *,
    weights: Aggregation = "token_mean",
    mask: SequenceMask | None = None,
) -> Objective:
    """CPPO: DPPO with tighter bounds for early tokens, and narrower ones after a drifted prefix.

    With ``w_t = 1 - (1 - w_min)(t - 1)/(T - 1)`` and ``Z_t = w_t D_t`` a token is kept where
    ``A (r - 1) <= 0`` or ``Z_t <= min(delta, delta + delta_b sum_{s<t} w_s - sum_{s<t} Z_s)``.
    Not a ratio gating map, as `dppo`. Needs whole trajectories: labels that name pieces are
    refused.

    Args:
        delta: bound on one token, > 0; a difference of probabilities for ``"tv"``, nats for
            ``"kl"``.
        w_min: weight of the last token, in (0, 1]; the first one has 1.
        delta_b: mean divergence of a prefix that costs nothing, > 0, same unit as ``delta``.
        divergence, weights, mask: as in `dppo`.

    References:
        Beyond Uniform Token-Level Trust Region in LLM Reinforcement Learning, arXiv 2606.10968.
    """
    factors = (PrefixMask(delta, w_min, delta_b, divergence),)
    return build("cppo", GateMap(Log(), {}, Pass()), weights, mask, ("cppo",), locals(), factors)


def spo(
    epsilon: float = 0.2,
    *,
    weights: Aggregation = "token_mean",
    mask: SequenceMask | None = None,
) -> Objective:
    """SPO: ``G A = r A - |A| (r - 1)^2 / (2 epsilon)``.

    A ratio gating map that looks at the sign of the advantage: ``G = r - sign(A) (r - 1)^2 /
    (2 epsilon)``, of slope ``1 - sign(A) (r - 1) / epsilon``: 0 at the bound that PPO clips at and
    negative beyond, without limit. For ``A > 0`` and large ratios ``G`` is negative.

    Args:
        epsilon: offset from 1 at which the gradient vanishes, > 0.
        weights, mask: as in `cispo`.

    References:
        Simple Policy Optimization, arXiv 2401.16025.
    """
    gate_map = GateMap(Deviation(), {}, QuadraticGate(epsilon))
    return build("spo", gate_map, weights, mask, ("spo",), locals())


def topr(
    *,
    weights: Aggregation = "trajectory_sum",
    mask: SequenceMask | None = None,
) -> Objective:
    """TOPR: ``J = sum mu sg(w) A log pi``, ``w = 1`` where ``A >= 0``, else ``clip(s, 0, 1)``.

    ``s = exp(sum of log r over the trajectory)``, the ratio of the whole answer's probabilities, as
    in the paper: the sum, not the mean that GSPO takes. The sign is that of the advantages summed
    over the trajectory. Not a ratio gating map: the weight has no gradient, and rewarded answers
    have none at all. It has no parameter.

    Args:
        weights, mask: as in `cispo`; ``1 / trajectories`` by default: the log-prob of an answer is
            the sum over its tokens.

    References:
        Tapered Off-Policy REINFORCE, arXiv 2503.14286.
    """
    gate_map = GateMap(Log(), {"trajectory": Taper()}, Zero(), detached=True)
    return build("topr", gate_map, weights, mask, ("topr",), locals())


def truly_ppo(
    epsilon: float = 0.2,
    alpha: float = 0.3,
    *,
    weights: Aggregation = "token_mean",
    mask: SequenceMask | None = None,
) -> Objective:
    """Truly PPO, rollback form: PPO whose slope beyond its band is ``-alpha`` instead of 0.

    ``G A = min(r A, F(r) A)``, ``F = r`` inside ``[1 - epsilon, 1 + epsilon]``, above it
    ``(1 + alpha)(1 + epsilon) - alpha r``, below it ``(1 + alpha)(1 - epsilon) - alpha r``. A ratio
    gating map of the token. For ``A > 0`` and ``r > (1 + 1/alpha)(1 + epsilon)`` it is negative.

    This is PPO-RB of the paper. Its other form rolls back where a KL divergence over the whole
    vocabulary exceeds a bound, which sampled tokens do not tell.

    Args:
        epsilon: offset from 1, in (0, 1).
        alpha: slope of the rollback, > 0 (0.3 is usual).
        weights, mask: as in `cispo`.

    References:
        Truly Proximal Policy Optimization, arXiv 1903.07940.
    """
    gate_map = GateMap(Deviation(), {}, RollbackClip(epsilon, alpha))
    return build("truly_ppo", gate_map, weights, mask, ("truly_ppo",), locals())


PEERS: Mapping[str, Callable[..., Objective]] = {
    "cispo": cispo,
    "sapo": sapo,
    "gmpo": gmpo,
    "dppo": dppo,
    "cppo": cppo,
    "spo": spo,
    "topr": topr,
    "truly_ppo": truly_ppo,
}
"""By name; `recipes.RECIPES` holds them too."""
