"""Token masks: which single tokens may contribute, as factors of 0 or 1 without gradient.

A token is dropped only where its gradient would carry it further away, ``A (r - 1) > 0``. Dropped
tokens stay in every denominator. The divergences are *binary*: between the two-point distributions
"this token or any other" under the anchor (``p_old``) and the current policy (``p``)::

    tv   |p - p_old|
    kl   p_old log(p_old / p) + (1 - p_old) log((1 - p_old) / (1 - p))

Both are lower bounds of the divergence over the whole vocabulary. A log-prob above 0 (rounding)
counts as 0.

References: *Rethinking the Trust Region in LLM Reinforcement Learning*, arXiv 2602.04879; *Beyond
Uniform Token-Level Trust Region in LLM Reinforcement Learning*, arXiv 2606.10968.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .batch import RatioBatch
from .budgets import check_positive
from .errors import ObjectiveError


@runtime_checkable
class TokenFactor(Protocol):
    """A factor on the term of every token; its gradient is not taken."""

    def __call__(self, batch: RatioBatch) -> Float[Tensor, " N"]:
        """``[N]`` float64, >= 0; 0 leaves a token out."""
        ...


def _check(divergence: str) -> None:
    if divergence not in ("tv", "kl"):
        raise ObjectiveError(
            f'divergence is {divergence!r}; it is "tv" (|p - p_old|) or "kl" (binary KL, nats)'
        )


def binary_divergence(batch: RatioBatch, divergence: str) -> Float[Tensor, " N"]:
    """Binary TV or KL(old, current) of every token, float64.

    >>> p = torch.tensor([0.5, 0.5]).log()
    >>> batch = RatioBatch.from_packed(p, torch.tensor([0.25, 0.5]).log(), torch.ones(1), [2])
    >>> binary_divergence(batch, "tv").round(decimals=6)
    tensor([0.2500, 0.0000], dtype=torch.float64)
    """
    _check(divergence)
    new = batch.log_probs.detach().double().clamp(max=0)
    old = batch.old_log_probs.double().clamp(max=0)
    if divergence == "tv":
        return (new.exp() - old.exp()).abs()
    rest, old_rest = torch.expm1(new).abs(), torch.expm1(old).abs()
    others = torch.where(old_rest == 0, 0.0, old_rest * (old_rest / rest).log())
    return torch.where(new == old, 0.0, old.exp() * (old - new) + others)


def _returns(batch: RatioBatch) -> Bool[Tensor, " N"]:
    """Where the gradient brings the token back, or does nothing: ``A (r - 1) <= 0``."""
    return torch.sign(batch.advantages) * torch.sign(batch.log_ratio.detach()) <= 0


@dataclass(frozen=True)
class DivergenceMask:
    """Keeps a token where ``A (r - 1) <= 0`` or its binary divergence is at most ``delta``.

    Args:
        delta: > 0, a difference of probabilities for ``"tv"``, nats for ``"kl"``; ``inf`` keeps
            everything.
        divergence: ``"tv"`` or ``"kl"``.
    """

    delta: float
    divergence: str = "tv"

    def __post_init__(self) -> None:
        _check(self.divergence)
        if self.delta != math.inf:
            check_positive("delta", self.delta)

    def __call__(self, batch: RatioBatch) -> Float[Tensor, " N"]:
        """1 where a token is kept, 0 elsewhere."""
        near = binary_divergence(batch, self.divergence) <= self.delta
        return (near | _returns(batch)).double()


@dataclass(frozen=True)
class PrefixMask:
    """Keeps a token where ``A (r - 1) <= 0`` or its weighted divergence fits what the prefix left.

    With the divergence ``D_t`` of the ``t``-th of ``T`` loss tokens of a trajectory::

        w_t = 1 - (1 - w_min) (t - 1) / (T - 1)          Z_t = w_t D_t
        keep where  Z_t <= min(delta, delta + delta_b sum_{s < t} w_s - sum_{s < t} Z_s)

    Args:
        delta: bound on one token, > 0; a difference of probabilities for ``"tv"``, nats for
            ``"kl"``.
        w_min: weight of the last token, in (0, 1].
        delta_b: mean divergence that a prefix may have without narrowing the bound, > 0.
        divergence: ``"tv"`` or ``"kl"``.
    """

    delta: float
    w_min: float
    delta_b: float
    divergence: str = "tv"

    def __post_init__(self) -> None:
        _check(self.divergence)
        check_positive("delta", self.delta)
        check_positive("delta_b", self.delta_b)
        if self.w_min != 1:
            check_positive("w_min", self.w_min, below=1.0)

    def __call__(self, batch: RatioBatch) -> Float[Tensor, " N"]:
        """1 where a token is kept, 0 elsewhere.

        Raises:
            ObjectiveError: if rows may be pieces of trajectories: a piece does not know its prefix.
        """
        if "trajectory" in batch.labels:
            raise ObjectiveError(
                "a prefix mask adds up each trajectory from its first token, but "
                'labels["trajectory"] says that rows may be pieces of one. Pass whole trajectories '
                "without that label, or use a mask of single tokens (recipes.dppo)"
            )
        lengths = batch.lengths
        start = lengths.cumsum(0) - lengths
        position = torch.arange(len(batch), device=batch.device) - start[batch.row]
        last = (lengths[batch.row] - 1).clamp(min=1)
        weight = 1 - (1 - self.w_min) * position.double() / last
        size = weight * binary_divergence(batch, self.divergence)
        room = _before(self.delta_b * weight - size, lengths.tolist())
        near = size <= self.delta + room.clamp(max=0)
        return (near | _returns(batch)).double()


def _before(values: Tensor, lengths: list[int]) -> Tensor:
    """Sum of what comes before each token in its row, each row by itself."""
    return torch.cat([values[:0], *(row.cumsum(0) - row for row in values.split(lengths))])
