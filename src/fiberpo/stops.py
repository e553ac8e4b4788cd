"""`BudgetStop`: no token goes further out while any scale above it is out of its budget.

The aggregates are those of FiberPO, ``S+_c`` and ``S-_c`` (means of ``max(+-log r, 0)`` below the
context ``c``), but nothing is projected, rolled back or zeroed: a token is stopped, or it is not::

    M_i = 0  where not A_i l_i < 0, and
                 A_i > 0: l_i > e+   or S+_c > C+_c for some c on the path of i
                 A_i < 0: l_i < -e-  or S-_c > C-_c for some c on the path of i
    M_i = 1  elsewhere

A token whose gradient brings it back (``A_i l_i < 0``) is never stopped, whatever its contexts do.
``M`` is a factor without gradient. At ``r = 1`` every ``S`` is 0 and ``M = 1``.

Why a stop: the slope of the gate of a context ``c`` multiplies the sum of ``mu_i A_i G_i`` below
``c``. With advantages that are centred in each prompt group that sum is 0 at first order for every
group and every domain, so a gate there has next to no force, however far its context has drifted
(``fiberpo lab --only "no force"``). A stop does not depend on that sum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .batch import RatioBatch
from .budgets import Budget, BudgetLike, check_positive
from .collective import LOCAL, Collective
from .errors import ObjectiveError
from .labels import order_strata
from .layout import ContextLayout, Layout, lay_out

MEASURES = ("trajectory", "token")


@dataclass(frozen=True, eq=False)
class Stopped:
    """What a `BudgetStop` says of a batch.

    Attributes:
        stop: the budgets.
        batch: the tokens.
        layout: the contexts.
        mean, beyond: ``[2, C]`` drifts ``S+-`` of the contexts, and which are out of their budget;
            None without a stratum.
    """

    stop: BudgetStop
    batch: RatioBatch
    layout: Layout
    mean: Float[Tensor, "2 C"] | None = None
    beyond: Bool[Tensor, "2 C"] | None = None

    @cached_property
    def kept(self) -> Float[Tensor, " N"]:
        """``M``: 1 where a token is kept, 0 where some scale stops it.

        With one limit on ``sign(A) l`` for each segment and side: that of the token, or 0 where a
        context on the path is out of its budget.
        """
        batch, at = self.batch, self.layout.contexts
        own = torch.tensor(self.stop.epsilon, dtype=torch.float64, device=batch.device)
        limit = torch.nextafter(own, own.new_tensor(float("inf")))[:, None]  # epsilon itself passes
        lengths, given = batch.lengths, batch.given_advantages
        if at is not None and self.beyond is not None:
            lengths = at.strata.segment_lengths
            given = at.strata.of_rows(given) if batch.by_row else given
            over = at.strata.sum_path(self.beyond.double()) > 0
            limit = torch.where(over[:, at.strata.segment_leaf], self.stop.outward_from, limit)
        limit = limit.expand(2, len(lengths))
        if not batch.by_row:
            limit = torch.repeat_interleave(limit, lengths, dim=1)
        sign = torch.sign(given).double()
        limit = torch.where(sign > 0, limit[0], torch.where(sign < 0, limit[1], float("inf")))
        if batch.by_row:
            sign, limit = (torch.repeat_interleave(x, lengths) for x in (sign, limit))
        return (sign * _log_ratio(batch) < limit).double()

    @cached_property
    def far(self) -> Bool[Tensor, " N"]:
        """``[N]`` tokens beyond epsilon, whatever their advantage."""
        log_ratio, (above, below) = _log_ratio(self.batch), self.stop.epsilon
        return (log_ratio > above) | (log_ratio < -below)

    @cached_property
    def tokens(self) -> Mapping[str, Bool[Tensor, " N"]]:
        """Scale, coarse to fine and ``"token"`` last -> ``[N]`` tokens that it stops."""
        log_ratio, advantages = _log_ratio(self.batch), self.batch.advantages
        up, found = advantages > 0, {}
        outward = torch.sign(advantages) * log_ratio >= self.stop.outward_from
        outward = outward & (advantages != 0)
        if self.layout.contexts is not None and self.beyond is not None:
            for k, name in enumerate(self.layout.contexts.strata.names):
                positive, negative = _at_tokens(self.beyond, self.layout.contexts, k)
                found[name] = outward & torch.where(up, positive, negative)
        own = torch.where(up, log_ratio > self.stop.epsilon[0], log_ratio < -self.stop.epsilon[1])
        return {**found, "token": outward & own}


@dataclass(frozen=True)
class BudgetStop:
    """Stops a token that goes outward where a scale on its path is out of its budget.

    Args:
        budgets: stratum -> budget ``(C+, C-)`` in nats per token, or per context name; may be
            empty. Strata as in `recipes.fiberpo_domain`.
        epsilon: ``(e+, e-)`` of the token's own log ratio, nats; ``inf`` leaves a side open.
        measure: ``"trajectory"``: trajectories weigh equally in the aggregates above them;
            ``"token"``: tokens do.

    Raises:
        BudgetError, ObjectiveError: for impossible arguments.
    """

    budgets: Mapping[str, Budget]
    epsilon: tuple[float, float]
    measure: str = "trajectory"

    outward_from: ClassVar[float] = 0.0
    """``sign(A) l`` from which on a context out of its budget stops a token."""

    def __init__(
        self,
        budgets: Mapping[str, BudgetLike],
        epsilon: Sequence[float],
        measure: str = "trajectory",
    ) -> None:
        if measure not in MEASURES:
            raise ObjectiveError(f'measure is {measure!r}; it is "trajectory" or "token"')
        if isinstance(epsilon, str) or len(epsilon) != 2:
            raise ObjectiveError(
                f"epsilon is {epsilon!r}; it is a number or a pair (above, below), in nats"
            )
        for number in epsilon:
            if number != float("inf"):
                check_positive("epsilon", number)
        strata = order_strata(list(budgets))
        found = {name: Budget.parse(budgets[name]) for name in strata}
        object.__setattr__(self, "budgets", found)
        object.__setattr__(self, "epsilon", (float(epsilon[0]), float(epsilon[1])))
        object.__setattr__(self, "measure", measure)

    @property
    def strata(self) -> tuple[str, ...]:
        """Strata above the token that have a budget, coarse to fine."""
        return tuple(self.budgets)

    def lay_out(self, batch: RatioBatch, collective: Collective = LOCAL) -> Layout:
        """The contexts, over all ranks (see `layout.lay_out`).

        A context that is the only child of its parent has a drift of its own: nothing to warn of.
        """
        return lay_out(
            batch, self.strata, measure=self.measure, needs_advantage=False, states=None,
            collective=collective, warn=False,
        )  # fmt: skip

    def __call__(self, batch: RatioBatch, layout: Layout | None = None) -> Float[Tensor, " N"]:
        """1 where a token is kept, 0 where it is stopped; arguments as in `stopped`."""
        return self.stopped(batch, layout).kept

    @torch.no_grad()
    def stopped(self, batch: RatioBatch, layout: Layout | None = None) -> Stopped:
        """Which tokens each scale stops.

        Args:
            batch: the tokens.
            layout: `lay_out` of the same tokens, over all ranks (which call together); by default
                of this process alone.
        """
        layout = self.lay_out(batch) if layout is None else layout
        if layout.contexts is None:
            return Stopped(self, batch, layout)
        mean = self._drifts(_log_ratio(batch), layout.contexts)
        return self.judged(batch, layout, mean)

    def judged(
        self, batch: RatioBatch, layout: Layout, mean: Float[Tensor, "2 C"] | None
    ) -> Stopped:
        """As `stopped`, where the drifts ``S+-`` are known."""
        if layout.contexts is None or mean is None:
            return Stopped(self, batch, layout)
        return Stopped(self, batch, layout, mean, mean > self.limits(layout.contexts))

    def _drifts(self, log_ratio: Tensor, at: ContextLayout) -> Tensor:
        """``[2, C]``: ``S+`` and ``S-`` of the contexts, over all ranks."""
        lengths = at.strata.segment_lengths
        sums = [
            torch.segment_reduce(side.clamp(min=0), "sum", lengths=lengths, unsafe=True)
            for side in (log_ratio, -log_ratio)
        ]
        return (
            at.match.merge(at.strata.push_segments(at.segment_omega * torch.stack(sums))) / at.mass
        )

    def limits(self, at: ContextLayout) -> Float[Tensor, "2 C"]:
        """Budgets of the contexts.

        Raises:
            BudgetError: if a context has none.
        """
        strata, parts = at.strata, []
        for k, name in enumerate(strata.names):
            size = strata.bounds[k + 1] - strata.bounds[k]
            parts.append(self.budgets[name].resolve(name, strata.context_names[k], size))
        return torch.cat(parts, dim=1).to(at.mass.device)


def _log_ratio(batch: RatioBatch) -> Tensor:
    """``[N]`` float64; exact for float32 log-probs, as in the fused backends."""
    return batch.log_probs.detach().double() - batch.old_log_probs.double()


def _at_tokens(beyond: Tensor, at: ContextLayout, k: int) -> Tensor:
    """``[2, N]``: of the contexts of stratum ``k``, at the tokens below them."""
    strata = at.strata
    mine = torch.zeros_like(at.mass.expand(2, -1))
    mine[:, strata.level(k)] = beyond[:, strata.level(k)].double()
    return strata.at_tokens(strata.sum_path(mine)) > 0
