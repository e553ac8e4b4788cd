"""Sequence masks: which whole trajectories may contribute at all.

``M(tau)`` in {0, 1} multiplies the terms of a trajectory and never renormalises: the denominators
stay those of all trajectories (`Renormalised` is the other one, by name).

The masks of *Trust Region Masking* (arXiv 2512.23075) bound the divergence between the policy that
sampled and the policy being trained, ``rho = pi_theta / pi_rollout``. What they know of it differs,
and they say so (`Certainty`): the exact KL of the full vocabulary certifies the threshold at every
sampled context of a trajectory that is kept; an estimate from the sampled tokens certifies nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .batch import RatioBatch
from .bound_inputs import NO_MAXIMUM, check_kl, check_tv
from .budgets import check_positive
from .collective import Collective
from .divergence import Certainty, k2, k3
from .errors import ObjectiveError
from .length_neutral import keep_length_neutral


@runtime_checkable
class SequenceMask(Protocol):
    """Keeps or drops whole trajectories.

    A mask may also have ``certainty(batch) -> Certainty``; without it, it counts as estimated.
    """

    def __call__(self, batch: RatioBatch) -> Bool[Tensor, " trajectories"]:
        """True where a trajectory is kept."""
        ...


def certainty_of(mask: SequenceMask | None, batch: RatioBatch) -> Certainty:
    """What a mask knows of its divergence on a batch."""
    ask = getattr(mask, "certainty", None)
    return Certainty.ESTIMATED if ask is None else ask(batch)


def rollout_log_ratio(batch: RatioBatch) -> Float[Tensor, " N"]:
    """``log rho = log pi_theta - log pi_rollout`` of every token, float64, no gradient.

    Raises:
        ObjectiveError: where the batch has no ``rollout_log_probs``.
    """
    if batch.rollout_log_probs is None:
        raise ObjectiveError(
            "a divergence mask compares the current policy with the one that sampled: pass "
            "rollout_log_probs to the batch (the log-probs that the generation engine returned)"
        )
    return (batch.log_probs.detach() - batch.rollout_log_probs).double()


class Combinable:
    """A mask that ``&`` combines with others."""

    papers: ClassVar[tuple[str, ...]] = ("trm",)

    def __and__(self, other: SequenceMask) -> Both:
        """Keep what both keep."""
        return Both(self, other)  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Divergence(Combinable):
    delta: float
    estimator: str = "k2"

    def __post_init__(self) -> None:
        check_positive("delta", self.delta)
        if self.estimator not in ("k2", "k3", "kl"):
            raise ObjectiveError(
                f"estimator is {self.estimator!r}; 'k2' and 'k3' estimate from the sampled tokens "
                "(k1 has a sign and cancels), 'kl' takes the token_divergence of the batch"
            )

    def _tokens(self, batch: RatioBatch) -> Float[Tensor, " N"]:
        if self.estimator != "kl":
            return (k2 if self.estimator == "k2" else k3)(rollout_log_ratio(batch))
        if batch.token_divergence is None:
            raise ObjectiveError(
                "estimator='kl' needs the KL at every token: pass token_divergence to the batch "
                "(fiberpo.divergence.full_divergence or top_k_divergence)"
            )
        return batch.token_divergence.values.double()

    def certainty(self, batch: RatioBatch) -> Certainty:
        """That of the batch's ``token_divergence`` for ``"kl"``, else estimated."""
        if self.estimator == "kl" and batch.token_divergence is not None:
            return batch.token_divergence.certainty
        return Certainty.ESTIMATED


@dataclass(frozen=True)
class MaxDivergence(_Divergence):
    """``M = 1[max_t d_t <= delta]``, ``d_t`` the divergence at token t.

    Args:
        delta: > 0, nats (0.05 in the paper's experiments).
        estimator: ``"k2"``: ``d = (log rho)^2 / 2``, or ``"k3"``: ``d = rho - 1 - log rho``, both
            from the sampled tokens alone; ``"kl"``: the batch's ``token_divergence``.
    """

    estimator: str = "k2"

    def __call__(self, batch: RatioBatch) -> Bool[Tensor, " trajectories"]:
        """True where no token exceeds ``delta``."""
        return batch.per_trajectory((self._tokens(batch) > self.delta).double()) == 0


@dataclass(frozen=True)
class MeanDivergence(_Divergence):
    """``M = 1[mean_t d_t <= delta]``, ``d_t`` the divergence at token t.

    Args:
        delta: > 0, nats per token (0.001 in the paper's experiments).
        estimator: as in `MaxDivergence`.
    """

    estimator: str = "k3"

    def __call__(self, batch: RatioBatch) -> Bool[Tensor, " trajectories"]:
        """True where the mean does not exceed ``delta``."""
        total = batch.per_trajectory(self._tokens(batch))
        return total / batch.trajectory_lengths <= self.delta


@dataclass(frozen=True)
class LengthNeutral(Combinable):
    """``M = 1[W / sum_t w_t <= threshold]``, ``W = sum_t |rho_t - 1| w_t``: no bias by length.

    ``w_t = min(1, (T-t) tv_max, sqrt((T-t) kl_max / 2))``: a token counts by how much can still
    follow. An estimate from the sampled tokens. A trajectory of one token is kept.

    Args:
        threshold: > 0; a mean of ``|rho - 1|``, whose expectation is twice a total variation.
        tv_max, kl_max: one or both; > 0, of the weights.
    """

    threshold: float
    tv_max: float | None = None
    kl_max: float | None = None

    def __post_init__(self) -> None:
        check_positive("threshold", self.threshold)
        if self.tv_max is None and self.kl_max is None:
            raise ObjectiveError(NO_MAXIMUM)
        if self.tv_max is not None:
            check_tv("tv_max", self.tv_max)
        if self.kl_max is not None:
            check_kl("kl_max", self.kl_max)

    def __call__(self, batch: RatioBatch) -> Bool[Tensor, " trajectories"]:
        """True where the weighted mean does not exceed ``threshold``.

        Raises:
            ObjectiveError: for trajectories in pieces, whose order is not known.
        """
        pieces = batch.labels.get("trajectory")
        if pieces is not None and (pieces.count < batch.rows or batch.pieces.width):
            raise ObjectiveError(
                "LengthNeutral weighs a token by its place in the trajectory, but rows with the "
                "same trajectory id are pieces in no known order. Join the pieces, or use "
                "MeanDivergence, which needs no order."
            )
        kept = keep_length_neutral(
            rollout_log_ratio(batch), batch.lengths, self.threshold,
            tv_max=self.tv_max, kl_max=self.kl_max,
        )  # fmt: skip
        return kept if pieces is None else kept[pieces.codes.argsort()]


@dataclass(frozen=True)
class Both(Combinable):
    """Logical AND of two masks, written ``a & b``; as certain as the less certain one."""

    first: SequenceMask
    second: SequenceMask

    def __post_init__(self) -> None:
        if isinstance(self.first, Renormalised) or isinstance(self.second, Renormalised):
            raise ObjectiveError("Renormalised goes around the whole: Renormalised(a & b)")

    def __call__(self, batch: RatioBatch) -> Bool[Tensor, " trajectories"]:
        """True where both keep."""
        return self.first(batch) & self.second(batch)

    def certainty(self, batch: RatioBatch) -> Certainty:
        """What is known of both thresholds together: the weaker `Certainty`."""
        return certainty_of(self.first, batch) & certainty_of(self.second, batch)

    @property
    def papers(self) -> tuple[str, ...]:  # type: ignore[override]
        """Those of both masks."""
        found = [*getattr(self.first, "papers", ()), *getattr(self.second, "papers", ())]
        return tuple(dict.fromkeys(found))


@dataclass(frozen=True)
class Renormalised:
    """The other denominator: ``mu`` of what the mask keeps is scaled to the sum of all ``mu``.

    Not Trust Region Masking, whose denominator stays that of all trajectories: here a step is as
    long as if nothing had been masked, and the more a batch is masked the more the rest counts.
    Where nothing is kept the loss is 0.
    """

    mask: SequenceMask

    def __call__(self, batch: RatioBatch) -> Bool[Tensor, " trajectories"]:
        """What the mask says."""
        return self.mask(batch)

    def certainty(self, batch: RatioBatch) -> Certainty:
        """That of the mask."""
        return certainty_of(self.mask, batch)

    @property
    def papers(self) -> tuple[str, ...]:
        """Those of the mask."""
        return tuple(getattr(self.mask, "papers", ()))

    def scale(
        self, mu: Float[Tensor, " N"], kept: Bool[Tensor, " N"], collective: Collective
    ) -> Float[Tensor, ""]:
        """``sum mu / sum over what is kept of mu``, over all ranks; 0 where nothing is kept."""
        whole, rest = collective.total(torch.stack([mu.sum(), (mu * kept).sum()]))
        return torch.where(rest > 0, whole / rest, 0.0)
