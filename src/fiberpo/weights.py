"""Aggregation weights ``mu_i``: given from outside, never recomputed by a gate or a mask.

Every denominator is that of the whole optimizer batch over all micro-batches and ranks, counted
once. A trajectory without loss tokens does not exist here: it is in no denominator.

Reference: *Fibration Policy Optimization*, arXiv 2603.08239, Definition 3.1 and App. C.4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from .batch import RatioBatch
from .budgets import check_positive
from .collective import LOCAL, Collective
from .errors import ObjectiveError

Kind = Literal["token_mean", "trajectory_mean", "trajectory_sum", "constant", "stratum_mean"]

ALIASES = {
    "token-mean": "token_mean",
    "seq-mean-token-mean": "trajectory_mean",
    "seq-mean-token-sum": "trajectory_sum",
    "seq-mean-token-sum-norm": "constant",
}
"""Names of the same weights in other libraries."""


@dataclass(frozen=True)
class Denominators:
    """Counts of a whole optimizer batch, for when an objective is called on a part of it.

    Attributes:
        tokens: loss tokens.
        trajectories: trajectories with at least one loss token.

    Example:
        >>> whole = RatioBatch.from_packed(torch.zeros(3), torch.zeros(3), torch.ones(2), [2, 1])
        >>> Denominators.of(whole)
        Denominators(tokens=3.0, trajectories=2.0)
    """

    tokens: float
    trajectories: float

    @classmethod
    def of(cls, batch: RatioBatch, collective: Collective = LOCAL) -> Denominators:
        """The counts of one batch, over all ranks that hold parts of it."""
        return cls(*_counts(batch, collective).tolist())


@dataclass(frozen=True)
class Weights:
    """Aggregation weights.

    ==================  ===========================  =========================================
    constructor         ``mu_i``                     used by
    ==================  ===========================  =========================================
    `token_mean`        ``1 / N``                    PPO, DAPO, APC-Obj
    `trajectory_mean`   ``1 / (trajectories T_i)``   GRPO, GSPO, FiberPO, FiberPO-Domain
    `trajectory_sum`    ``1 / trajectories``         (verl's ``seq-mean-token-sum``)
    `constant` (L)      ``1 / (trajectories L)``     Dr. GRPO
    `stratum_mean`      ``1 / (contexts T_context)`` mean over groups, domains, ... of token means
    ==================  ===========================  =========================================
    """

    kind: Kind
    length: float | None = None
    stratum: str | None = None

    @property
    def by_trajectory(self) -> bool:
        """Whether the weight of a token depends on the length of its trajectory."""
        return self.kind == "trajectory_mean"

    @classmethod
    def token_mean(cls) -> Weights:
        """Every token weighs the same: ``1 / N``."""
        return cls("token_mean")

    @classmethod
    def trajectory_mean(cls) -> Weights:
        """Every trajectory weighs the same, spread evenly over its tokens."""
        return cls("trajectory_mean")

    @classmethod
    def trajectory_sum(cls) -> Weights:
        """``1 / trajectories`` for every token: long trajectories weigh more."""
        return cls("trajectory_sum")

    @classmethod
    def constant(cls, length: float) -> Weights:
        """``1 / (trajectories * length)``: a constant in place of each trajectory's length."""
        return cls("constant", length=check_positive("length", length))

    @classmethod
    def stratum_mean(cls, stratum: str) -> Weights:
        """Every context of a stratum weighs the same, spread evenly over its tokens."""
        return cls("stratum_mean", stratum=stratum)

    @classmethod
    def group_mean(cls) -> Weights:
        """`stratum_mean` of ``group``."""
        return cls.stratum_mean("group")

    @classmethod
    def domain_mean(cls) -> Weights:
        """`stratum_mean` of ``domain``."""
        return cls.stratum_mean("domain")

    @classmethod
    def parse(cls, value: Weights | str, length: float | None = None) -> Weights:
        """Weights from their name, or from the name another library gives them.

        >>> Weights.parse("seq-mean-token-mean") == Weights.trajectory_mean()
        True

        Raises:
            ObjectiveError: for an unknown name, or ``constant`` without a length.
        """
        if isinstance(value, Weights):
            return value
        if not isinstance(value, str):
            raise ObjectiveError(f"weights is {value!r}; pass a name or a Weights")
        name = ALIASES.get(value, value)
        if name in ("token_mean", "trajectory_mean", "trajectory_sum"):
            return cls(name)  # type: ignore[arg-type]
        if name == "constant":
            if length is None:
                raise ObjectiveError(f"weights {value!r} need a length: Weights.constant(length)")
            return cls.constant(length)
        if name.endswith("_mean") and len(name) > len("_mean"):
            return cls.stratum_mean(name.removesuffix("_mean"))
        raise ObjectiveError(
            f"unknown weights {value!r}; use token_mean, trajectory_mean, trajectory_sum, "
            f"constant, group_mean, domain_mean, or one of {sorted(ALIASES)}"
        )

    def __call__(
        self,
        batch: RatioBatch,
        denominators: Denominators | None = None,
        collective: Collective = LOCAL,
    ) -> Float[Tensor, " N"]:
        """``mu_i`` of every token, float64. Arguments as in `shares`."""
        return batch.spread(self.shares(batch, denominators, collective))

    def shares(
        self,
        batch: RatioBatch,
        denominators: Denominators | None = None,
        collective: Collective = LOCAL,
    ) -> Float[Tensor, "..."]:
        """``mu`` of a token of each row, ``[rows]``, or, where it differs in a row, ``[N]``.

        Args:
            batch: the tokens.
            denominators: counts of the whole optimizer batch where ``batch`` is a part of it.
            collective: sums counts over the ranks that hold the other parts.
        """
        device = batch.device
        if self.kind == "stratum_mean":
            return self._stratum_mean(batch, denominators, collective)
        if denominators is None:
            tokens, trajectories = _counts(batch, collective)
        else:
            whole = torch.tensor([denominators.tokens, denominators.trajectories])
            tokens, trajectories = whole.double().to(device)
        one = torch.ones(batch.rows, dtype=torch.float64, device=device)
        if self.kind == "token_mean":
            return one / tokens
        if self.kind == "trajectory_sum":
            return one / trajectories
        if self.kind == "constant":
            return one / (trajectories * self.length)
        return 1.0 / (trajectories * batch.of_rows(batch.trajectory_lengths))

    def _stratum_mean(
        self, batch: RatioBatch, denominators: Denominators | None, collective: Collective
    ) -> Tensor:
        assert self.stratum is not None
        if denominators is not None:
            raise ObjectiveError(
                f"{self.stratum}_mean cannot be taken on a part of a batch from token and "
                "trajectory counts alone; pass the whole batch, or a collective"
            )
        strata = batch.strata([self.stratum])
        lengths = strata.segment_lengths.double()
        count = strata.push_segments(lengths[None])
        if collective.size > 1:
            count = collective.match(strata).merge(count)
        share = 1.0 / count[0][strata.segment_leaf]
        # a context has shares that add up to 1 over all ranks, so their sum counts the contexts
        share = share / collective.total((share * lengths).sum())
        if strata.segment_row is None:
            return share
        return torch.repeat_interleave(share, strata.segment_lengths)


def _counts(batch: RatioBatch, collective: Collective) -> Float[Tensor, "2"]:
    """Tokens and trajectories over all ranks."""
    share = batch.trajectory_share
    return collective.total(torch.stack([torch.full_like(share, len(batch)), share]))
