"""The length-neutral form of a sequence mask.

    W = sum_t |rho_t - 1| w_t      w_t = min(1, (T-t) eps, sqrt((T-t) delta/2))
    keep iff  W / sum_t w_t <= threshold

The terms are those of the adaptive bound: a ratio counts by how much can still follow. The weighted
mean does not grow with the length, where a maximum does. The last token has ``w_T = 0``.

Reference: *Trust Region Masking for Long-Horizon LLM Reinforcement Learning*, arXiv 2512.23075.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .bound_inputs import NO_MAXIMUM, check_kl, check_number, check_tv
from .errors import BoundError
from .ops.segments import Segments


def future_weights(
    lengths: Int[Tensor, " trajectories"],
    *,
    tv_max: float | None = None,
    kl_max: float | None = None,
) -> Float[Tensor, " N"]:
    """``w_t`` of every token, packed, float64; the term of what is not given is left out.

    >>> future_weights(torch.tensor([3, 1]), tv_max=0.3).tolist()
    [0.6, 0.3, 0.0, 0.0]
    """
    if tv_max is None and kl_max is None:
        raise BoundError(NO_MAXIMUM)
    ends = torch.repeat_interleave(lengths.cumsum(0), lengths)
    remaining = (ends - 1 - torch.arange(len(ends), device=lengths.device)).double()
    out = torch.ones_like(remaining)
    if tv_max is not None:
        out = torch.minimum(out, remaining * check_tv("tv_max", tv_max))
    if kl_max is not None:
        out = torch.minimum(out, (remaining * (check_kl("kl_max", kl_max) / 2)).sqrt())
    return out


def keep_length_neutral(
    log_rho: Float[Tensor, " N"],
    lengths: Int[Tensor, " trajectories"],
    threshold: float,
    *,
    tv_max: float | None = None,
    kl_max: float | None = None,
) -> Bool[Tensor, " trajectories"]:
    """True where the weighted mean of ``|rho - 1|`` is at most ``threshold``.

    Args:
        log_rho: ``log pi_theta / pi_rollout`` of the tokens, trajectory after trajectory, nats.
        lengths: tokens of each trajectory, >= 1.
        threshold: > 0; a mean of ``|rho - 1|``, whose expectation is twice a total variation.
        tv_max, kl_max: eps and delta of the weights, one or both.

    Returns:
        A trajectory of one token, or whose weights are all 0, is kept. One with an infinite ratio
        on a token of positive weight is not.

    >>> log_rho = torch.tensor([0.0, 0.0, 9.0, 0.5, 0.0, 0.0])
    >>> keep_length_neutral(log_rho, torch.tensor([3, 3]), 0.1, tv_max=0.3).tolist()
    [True, False]
    """
    if check_number("threshold", threshold) <= 0:
        raise BoundError(f"threshold is {threshold:g}; it must be > 0")
    if int(lengths.sum()) != len(log_rho):
        raise BoundError(f"lengths add up to {int(lengths.sum())}, but log_rho has {len(log_rho)}")
    weights = future_weights(lengths, tv_max=tv_max, kl_max=kl_max)
    distance = torch.expm1(log_rho.double()).abs()
    trajectory = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    by_trajectory = Segments(trajectory, len(lengths))
    total = by_trajectory.sum(torch.where(weights > 0, distance * weights, 0.0))
    return total <= threshold * by_trajectory.sum(weights)


__all__ = ["future_weights", "keep_length_neutral"]
