"""Sequence masks: which whole trajectories may contribute at all.

``M(tau)`` in {0, 1} multiplies the terms of a trajectory and never renormalises: the denominators
stay those of all trajectories.

Reference: *Trust Region Masking*, arXiv 2512.23075 (mask on the divergence between the policy that
sampled and the policy being trained).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .batch import RatioBatch
from .budgets import check_positive
from .errors import ObjectiveError


@runtime_checkable
class SequenceMask(Protocol):
    """Keeps or drops whole trajectories."""

    def __call__(self, batch: RatioBatch) -> Bool[Tensor, " trajectories"]:
        """True where a trajectory is kept."""
        ...


def _rollout_log_ratio(batch: RatioBatch) -> Float[Tensor, " N"]:
    if batch.rollout_log_probs is None:
        raise ObjectiveError(
            "a divergence mask compares the current policy with the one that sampled: pass "
            "rollout_log_probs to the batch (the log-probs that the generation engine returned)"
        )
    return (batch.log_probs.detach() - batch.rollout_log_probs).double()


class _Combined:
    def __and__(self, other: SequenceMask) -> Both:
        """Keep what both keep."""
        return Both(self, other)  # type: ignore[arg-type]


@dataclass(frozen=True)
class MaxDivergence(_Combined):
    """``M = 1[max_t (log rho_t)^2 / 2 <= delta]``, the k2 estimate of the largest token KL.

    ``rho = pi_theta / pi_rollout``; ``delta`` > 0 in nats (0.05 in the paper's experiments). An
    estimate from the sampled tokens alone, so it certifies nothing.
    """

    delta: float

    def __post_init__(self) -> None:
        check_positive("delta", self.delta)

    def __call__(self, batch: RatioBatch) -> Bool[Tensor, " trajectories"]:
        """True where no token exceeds ``delta``."""
        beyond = (_rollout_log_ratio(batch).square() / 2 > self.delta).double()
        return batch.per_trajectory(beyond) == 0


@dataclass(frozen=True)
class MeanDivergence(_Combined):
    """``M = 1[mean_t (rho_t - 1 - log rho_t) <= delta]``, the k3 estimate of the mean token KL.

    ``delta`` > 0 in nats per token (0.001 in the paper's experiments).
    """

    delta: float

    def __post_init__(self) -> None:
        check_positive("delta", self.delta)

    def __call__(self, batch: RatioBatch) -> Bool[Tensor, " trajectories"]:
        """True where the mean does not exceed ``delta``."""
        log_rho = _rollout_log_ratio(batch)
        k3 = torch.expm1(log_rho) - log_rho
        return batch.per_trajectory(k3) / batch.trajectory_lengths <= self.delta


@dataclass(frozen=True)
class Both(_Combined):
    """Logical AND of two masks, written ``a & b``."""

    first: SequenceMask
    second: SequenceMask

    def __call__(self, batch: RatioBatch) -> Bool[Tensor, " trajectories"]:
        """True where both keep."""
        return self.first(batch) & self.second(batch)
