"""Corrections for an engine that samples from another distribution than the trainer scores.

Three policies: ``pi_rollout`` sampled (the engine's own log-probs), ``pi_old`` is the same policy
scored by the trainer, ``pi_theta`` is being trained. The full importance weight of a token is

    pi_theta / pi_rollout = r * rho          r = pi_theta / pi_old,      rho = pi_old / pi_rollout

The gates look at ``r``. What is left is the mismatch ``rho``, which does not change while a rollout
is used: a factor without gradient (`TokenFactor`), or a mask. Truncating ``r`` here as well would
count it twice. Off-policy sequence masking alone compares with ``pi_theta``, by its definition.

    >>> import fiberpo
    >>> objective = corrected(fiberpo.recipes.grpo(), factors=[TruncatedIS(2.0)])
    >>> objective.parameters["factors"]
    (TruncatedIS(limit=2.0, level='token'),)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .batch import RatioBatch
from .budgets import check_positive
from .errors import ConfigError, ObjectiveError
from .masks import (
    Both,
    Combinable,
    MaxDivergence,
    MeanDivergence,
    Renormalised,
    SequenceMask,
    rollout_log_ratio,
)
from .objective import Objective, TokenFactor


def mismatch(batch: RatioBatch, level: str = "token") -> Float[Tensor, " N"]:
    """``log rho = log pi_old - log pi_rollout``, float64.

    Args:
        batch: with ``rollout_log_probs``.
        level: ``"token"``; ``"sequence"``: the sum over the token's trajectory; ``"geometric"``:
            the mean over it.

    Raises:
        ObjectiveError: where the batch has no ``rollout_log_probs``.
    """
    if batch.rollout_log_probs is None:
        raise ObjectiveError(
            "a correction compares the trainer's score of the sampled tokens with the engine's: "
            "pass rollout_log_probs to the batch (the log-probs that the engine returned)"
        )
    log_rho = (batch.old_log_probs - batch.rollout_log_probs).double()
    if level == "token":
        return log_rho
    total = batch.per_trajectory(log_rho)
    if level == "geometric":
        total = total / batch.trajectory_lengths
    return total[batch.trajectory]


def _check_level(level: str) -> None:
    if level not in ("token", "sequence", "geometric"):
        raise ObjectiveError(f"level is {level!r}; it is 'token', 'sequence' or 'geometric'")


def _check_band(low: float, high: float) -> None:
    if low != 0:
        check_positive("low", low)
    if check_positive("high", high) <= low:
        raise ObjectiveError(f"the band is {low:g} to {high:g}; low must be below high")


@dataclass(frozen=True)
class TruncatedIS:
    """``min(rho, limit)``: truncated importance sampling.

    Args:
        limit: ``C`` > 0, a ratio.
        level: whose ratio: the token's own; of its trajectory, ``prod rho``; or the geometric mean
            over it. The last two are the same for all tokens of a trajectory.

    Reference: *Your Efficient RL Framework Secretly Brings You Off-Policy RL Training*.
    """

    limit: float = 2.0
    level: str = "token"

    papers: ClassVar[tuple[str, ...]] = ("tis",)

    def __post_init__(self) -> None:
        check_positive("limit", self.limit)
        _check_level(self.level)

    def __call__(self, batch: RatioBatch) -> Float[Tensor, " N"]:
        """``[N]`` in (0, limit]."""
        return mismatch(batch, self.level).exp().clamp(max=self.limit)


@dataclass(frozen=True)
class MaskedIS:
    """``rho 1[low <= rho <= high]``: masked importance sampling.

    Args:
        low, high: ratios; ``low`` may be 0.
        level: as in `TruncatedIS`.

    Reference: *When Speed Kills Stability: Demystifying RL Collapse from the Training-Inference
    Mismatch*.
    """

    low: float = 0.0
    high: float = 2.0
    level: str = "token"

    papers: ClassVar[tuple[str, ...]] = ("mis",)

    def __post_init__(self) -> None:
        _check_band(self.low, self.high)
        _check_level(self.level)

    def __call__(self, batch: RatioBatch) -> Float[Tensor, " N"]:
        """``[N]``, 0 outside of the band."""
        rho = mismatch(batch, self.level).exp()
        return torch.where((rho >= self.low) & (rho <= self.high), rho, 0.0)


@dataclass(frozen=True)
class IcePop:
    """``rho 1[low <= rho <= high]`` of the token itself: `MaskedIS` with the paper's band.

    Args:
        low, high: ratios.

    Reference: *Every Step Evolves: Scaling Reinforcement Learning for Trillion-Scale Thinking
    Model*, arXiv 2510.18855.
    """

    low: float = 0.5
    high: float = 5.0

    papers: ClassVar[tuple[str, ...]] = ("icepop",)

    def __post_init__(self) -> None:
        _check_band(self.low, self.high)

    def __call__(self, batch: RatioBatch) -> Float[Tensor, " N"]:
        """``[N]``, 0 outside of the band."""
        return MaskedIS(self.low, self.high)(batch)


@dataclass(frozen=True)
class GeometricMask(Combinable):
    """``M = 1[low <= exp(mean_t log rho_t) <= high]``: does not grow with the length.

    Args:
        low, high: ratios; ``low`` may be 0.

    Reference: *When Speed Kills Stability: Demystifying RL Collapse from the Training-Inference
    Mismatch*.
    """

    low: float
    high: float

    papers: ClassVar[tuple[str, ...]] = ("mis",)

    def __post_init__(self) -> None:
        _check_band(self.low, self.high)

    def __call__(self, batch: RatioBatch) -> Bool[Tensor, " trajectories"]:
        """True where the mean lies in the band."""
        mean = (batch.per_trajectory(mismatch(batch)) / batch.trajectory_lengths).exp()
        return (mean >= self.low) & (mean <= self.high)


@dataclass(frozen=True)
class OPSM(Combinable):
    """Off-policy sequence masking: ``M = 0`` where ``A < 0`` and the drift exceeds ``delta``.

    The drift is ``mean_t (log pi_rollout - log pi_theta)``, against the current policy; ``A`` the
    sum of the advantages over the trajectory, so that a sequence is dropped as a whole.

    Args:
        delta: > 0, nats per token.

    Reference: *DeepSeek-V3.2: Pushing the Frontier of Open Large Language Models*,
    arXiv 2512.02556.
    """

    delta: float

    papers: ClassVar[tuple[str, ...]] = ("opsm",)

    def __post_init__(self) -> None:
        check_positive("delta", self.delta)

    def __call__(self, batch: RatioBatch) -> Bool[Tensor, " trajectories"]:
        """False where the sequence was bad and is off-policy."""
        drift = -batch.per_trajectory(rollout_log_ratio(batch)) / batch.trajectory_lengths
        bad = batch.per_trajectory(batch.advantages.double()) < 0
        return ~(bad & (drift > self.delta))


FACTORS: Mapping[str, type] = {"tis": TruncatedIS, "masked_is": MaskedIS, "icepop": IcePop}
MASKS: Mapping[str, type] = {"geometric_mask": GeometricMask, "opsm": OPSM}


def corrected(
    objective: Objective,
    *,
    mask: SequenceMask | None = None,
    factors: Sequence[TokenFactor] = (),
) -> Objective:
    """The objective with a further mask (both must keep) and further factors.

    Raises:
        ObjectiveError: if one of two masks is `Renormalised`.
    """
    found = objective.mask
    if mask is not None:
        found = mask if found is None else Both(found, mask)
    every = (*objective.factors, *factors)
    shown = {**objective.parameters, "mask": found, "factors": every or None}
    return dataclasses.replace(objective, mask=found, factors=every, parameters=shown)


def from_name(objective: Objective, name: str, **parameters: Any) -> Objective:
    """The objective with a correction by its name: a key of `FACTORS` or `MASKS`.

    Raises:
        ObjectiveError: for an unknown name or unknown parameters.
    """
    made = FACTORS.get(name) or MASKS.get(name)
    if made is None:
        raise ObjectiveError(
            f"unknown correction {name!r}; there are {', '.join([*FACTORS, *MASKS])}"
        )
    known = [f.name for f in dataclasses.fields(made)]
    needed = [f.name for f in dataclasses.fields(made) if f.default is dataclasses.MISSING]
    if not set(needed) <= set(parameters) <= set(known):
        raise ObjectiveError(
            f"the correction {name!r} takes {', '.join(known)}"
            + (f" and needs {', '.join(needed)}" if needed else "")
            + f", not {sorted(parameters)}"
        )
    part = made(**parameters)
    return (
        corrected(objective, factors=[part]) if name in FACTORS else corrected(objective, mask=part)
    )


def masked(
    objective: Objective,
    *,
    mask_max: float | None = None,
    mask_mean: float | None = None,
    correction: str | None = None,
    correction_kwargs: Mapping[str, Any] | str | None = None,
) -> Objective:
    """The objective with what the settings of a trainer ask for.

    Args:
        objective: any.
        mask_max, mask_mean: thresholds of `MaxDivergence` (k2) and `MeanDivergence` (k3), nats.
        correction, correction_kwargs: name and parameters, as for `from_name`.

    Raises:
        ConfigError: for parameters without a correction, or that are no dictionary.
        BudgetError, ObjectiveError: for thresholds out of range and unknown names.
    """
    if mask_max is not None:
        objective = corrected(objective, mask=MaxDivergence(mask_max))
    if mask_mean is not None:
        objective = corrected(objective, mask=MeanDivergence(mask_mean))
    if correction_kwargs and not (correction and isinstance(correction_kwargs, Mapping)):
        raise ConfigError(
            f"correction_kwargs is {correction_kwargs!r} with correction = {correction!r}; it is "
            "a dictionary with the parameters of a correction"
        )
    if correction is not None:
        objective = from_name(objective, correction, **dict(correction_kwargs or {}))
    return objective


def needs_engine(objective: Objective) -> list[str]:
    """Parts that do nothing where the engine's log-probs are the trainer's own (``rho = 1``)."""

    def names(part: Any) -> list[str]:
        if isinstance(part, Both):
            return [*names(part.first), *names(part.second)]
        if isinstance(part, Renormalised):
            return names(part.mask)
        kinds = (TruncatedIS, MaskedIS, IcePop, GeometricMask)
        return [type(part).__name__] if isinstance(part, kinds) else []

    return [name for part in (objective.mask, *objective.factors) for name in names(part)]


__all__ = [
    "OPSM", "GeometricMask", "IcePop", "MaskedIS", "TruncatedIS", "corrected", "from_name",
    "masked", "mismatch", "needs_engine",
]  # fmt: skip
