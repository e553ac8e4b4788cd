"""`BudgetStop`: no token goes further out while any scale above it is out of its budget.

The aggregates are those of FiberPO, ``S+_c`` and ``S-_c`` (means of ``max(+-log r, 0)`` below the
context ``c``), but nothing is projected, rolled back or zeroed: a token is stopped, or it is not::

    M_i = 0  where not A_i l_i < 0, and
                 A_i > 0: l_i > e+   or S+_c > C+_c for some c on the path of i
                 A_i < 0: l_i < -e-  or S-_c > C-_c for some c on the path of i
    M_i = 1  elsewhere

A token whose gradient brings it back (``A_i l_i < 0``) is never stopped, whatever its contexts do.
``M`` is a factor without gradient. At ``r = 1`` every ``S`` is 0 and ``M = 1``.

Why a stop: the gates of a hierarchy act on the derivative with respect to ``S_c``, which is the sum
of ``mu_i A_i G_i`` below ``c``. With advantages that are centred in each prompt group that sum is
0 at first order for every group and every domain, so a gate there has next to no force, however far
its context has drifted. A stop does not depend on that sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .batch import RatioBatch
from .budgets import Budget, BudgetLike, check_positive
from .charts import SignedLog
from .collective import LOCAL, Collective
from .errors import ObjectiveError
from .labels import order_strata
from .layout import ContextLayout, Layout, lay_out
from .statistics import Moments

MEASURES = ("trajectory", "token")


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

    def __init__(
        self,
        budgets: Mapping[str, BudgetLike],
        epsilon: tuple[float, float],
        measure: str = "trajectory",
    ) -> None:
        if measure not in MEASURES:
            raise ObjectiveError(f'measure is {measure!r}; it is "trajectory" or "token"')
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

    def lay_out(self, batch: RatioBatch, collective: Collective = LOCAL, **more: bool) -> Layout:
        """The contexts, over all ranks (see `layout.lay_out`)."""
        return lay_out(
            batch, self.strata, measure=self.measure, needs_advantage=False, states=None,
            collective=collective, **more,
        )  # fmt: skip

    def __call__(self, batch: RatioBatch, layout: Layout | None = None) -> Float[Tensor, " N"]:
        """1 where a token is kept, 0 where it is stopped.

        Args:
            batch: the tokens.
            layout: `lay_out` of the same tokens, over all ranks; by default of this process alone.
        """
        stopped = self.stopped(batch, layout).values()
        return (~torch.stack(list(stopped)).any(0)).double()

    @torch.no_grad()
    def stopped(
        self, batch: RatioBatch, layout: Layout | None = None
    ) -> dict[str, Bool[Tensor, " N"]]:
        """Which tokens each scale stops, coarse to fine, ``"token"`` last."""
        layout = self.lay_out(batch) if layout is None else layout
        log_ratio, up = batch.log_ratio.detach().double(), batch.advantages > 0
        outward, found = self._outward(batch.advantages, log_ratio), {}
        if layout.contexts is not None:
            beyond = self._beyond(log_ratio, layout.contexts)
            for k, name in enumerate(self.strata):
                positive, negative = self._at_tokens(beyond, layout.contexts, k)
                found[name] = outward & torch.where(up, positive, negative)
        above, below = self.epsilon
        own = torch.where(up, log_ratio > above, log_ratio < -below)
        return {**found, "token": outward & own}

    def _outward(self, advantages: Tensor, log_ratio: Tensor) -> Tensor:
        """``[N]``: where the gradient does not bring the token back."""
        return (advantages != 0) & ~(advantages * log_ratio < 0)

    def _aggregates(self, log_ratio: Tensor, at: ContextLayout) -> Tensor:
        """``[2, C]``: ``S+`` and ``S-`` of the contexts, over all ranks."""
        drift = at.omega * SignedLog().decompose(log_ratio)
        sums = at.strata.push_up(at.strata.leaf_segments.rows(drift))
        return at.match.merge(sums) / at.mass

    def _beyond(self, log_ratio: Tensor, at: ContextLayout) -> Tensor:
        """``[2, C]``: channels of the contexts that are out of their budget."""
        strata, mean = at.strata, self._aggregates(log_ratio, at)
        parts = []
        for k, name in enumerate(strata.names):
            here = strata.level(k)
            size = here.stop - here.start
            budget = self.budgets[name].resolve(name, strata.context_names[k], size)
            parts.append(mean[:, here] > budget.to(mean.device))
        return torch.cat(parts, dim=1)

    def _at_tokens(self, beyond: Tensor, at: ContextLayout, k: int) -> Tensor:
        """``[2, N]``: of the contexts of stratum ``k``, at the tokens below them."""
        strata = at.strata
        mine = torch.zeros_like(beyond, dtype=torch.float64)
        mine[:, strata.level(k)] = beyond[:, strata.level(k)].double()
        return strata.at_tokens(strata.sum_path(mine)) > 0

    def measured(self, batch: RatioBatch, layout: Layout | None = None) -> dict[str, Moments]:
        """``stop/<scale>``: fraction of the tokens that each scale stops."""
        stopped = self.stopped(batch, layout)
        return {f"stop/{name}": Moments.of(tokens) for name, tokens in stopped.items()}
