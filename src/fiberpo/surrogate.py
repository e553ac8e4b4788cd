"""What an objective makes of a batch: `Plan`, before any log-prob is known, and `Surrogate`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int8
from torch import Tensor

from .acceptance import acceptance
from .batch import RatioBatch
from .collective import Collective
from .errors import ObjectiveError
from .gating import GatedRatio, GateMap
from .layout import Layout
from .lowering import lower, lower_stop
from .masks import certainty_of
from .measurement import measure
from .ops.plan import GatePlan
from .ops.segments import Segments
from .statistics import Statistics
from .stops import BudgetStop, Stopped

if TYPE_CHECKING:
    from .objective import Objective


@dataclass(frozen=True, eq=False)
class Plan:
    """Contexts and weights of the tokens of one optimizer batch (see `Objective.plan`).

    Attributes:
        gate_map: whose contexts.
        layout: contexts, masses and counts over all ranks.
        shares: aggregation weight of a token, ``[rows]`` or ``[N]`` float64; see `mu`.
        collective: the ranks.
        batch: the tokens.
        stops: contexts of each of `Objective.stops`.
        fused: the only one of them, where the backends evaluate it (`lowering.fused_stop`).
    """

    gate_map: GateMap
    layout: Layout
    shares: Float[Tensor, "..."]
    collective: Collective
    batch: RatioBatch
    stops: tuple[Layout, ...] = ()
    fused: BudgetStop | None = None

    @cached_property
    def mu(self) -> Float[Tensor, " N"]:
        """Aggregation weight ``mu_i`` of every token, float64."""
        return self.batch.spread(self.shares)

    @cached_property
    def lowered(self) -> GatePlan:
        """For the fused backends."""
        if self.fused is not None:
            return lower_stop(self.fused, self.lowered_layout, self.batch)
        return lower(self.gate_map, self.layout, self.batch)

    @property
    def lowered_layout(self) -> Layout:
        """The contexts of `lowered`."""
        return self.layout if self.fused is None else self.stops[0]

    def of_segments(self, values: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Values of rows as values of segments; those of tokens as they are."""
        at = self.lowered_layout.contexts
        by_row = at is not None and len(values) == self.batch.rows
        return at.strata.of_rows(values) if at is not None and by_row else values

    def adopt(self, batch: RatioBatch) -> RatioBatch:
        """``batch``, known to have the tokens of this plan.

        Raises:
            ObjectiveError: if it has other tokens.
        """
        mine = self.batch.lengths
        if batch.lengths is mine or torch.equal(batch.lengths, mine):
            return batch.joined_like(self.batch)
        raise ObjectiveError(
            f"the plan was made for {len(self.batch)} tokens in {self.batch.rows} rows, the batch "
            f"has {len(batch)} in {batch.rows}; make a new plan for other tokens"
        )


@dataclass(frozen=True, eq=False)
class Surrogate:
    """What an objective says about a batch.

    Attributes:
        loss: scalar to minimise, ``-J`` (of this rank's tokens, over the global denominators).
        gradient: ``[N]``, ``d loss / d log_probs`` without graph, in the dtype of the log-probs
            (float64 from the reference).
        plan: contexts and aggregation weights.
        kept: what the mask says of each trajectory, or None.
    """

    objective: Objective
    batch: RatioBatch
    loss: Float[Tensor, ""]
    gradient: Float[Tensor, " N"]
    plan: Plan
    _scale: Float[Tensor, "..."] = field(repr=False)
    kept: Bool[Tensor, " trajectories"] | None = None
    _stopped: tuple[Stopped, ...] = field(default=(), repr=False)
    _gated: GatedRatio | None = field(default=None, repr=False)
    _mean: Tensor | None = field(default=None, repr=False)
    _segment_values: Tensor | None = field(default=None, repr=False)

    @property
    def _fused(self) -> bool:
        """Whether a backend evaluated a stop: `_mean` is then of its contexts."""
        return self.plan.fused is not None and not self._stopped

    @cached_property
    @torch.no_grad()
    def stopped(self) -> tuple[Stopped, ...]:
        """What each of `Objective.stops` says."""
        if self.plan.fused is None or not self._fused:
            return self._stopped
        return (self.plan.fused.judged(self.batch, self.plan.stops[0], self._mean),)

    @cached_property
    def scale(self) -> Float[Tensor, "..."]:
        """``mu_i M_i`` times the factors of the tokens, ``[rows]`` or ``[N]`` float64."""
        if not self._fused:
            return self._scale
        return self.batch.spread(self._scale) * self.stopped[0].kept

    @cached_property
    def coefficients(self) -> Float[Tensor, " N"]:
        """``dJ/d log_probs`` without graph, float64.

        The backward of ``-(coefficients * log_probs).sum()`` is the exact gradient of the loss.
        """
        return 0.0 - self.gradient.double()  # never -0.0

    @cached_property
    def weight(self) -> Float[Tensor, " N"]:
        """``mu_i M_i A_i`` times the factors of the tokens, float64."""
        return self.batch.spread(self.scale) * self.batch.advantages.double()

    @cached_property
    @torch.no_grad()
    def gated(self) -> GatedRatio:
        """The gated batch with all pieces; evaluated when it is first looked at."""
        if self._gated is not None:
            return self._gated
        mean = None if self._fused else self._mean
        return self.objective.gate_map(self.batch, self.plan.layout, mean)

    @property
    def log_gated_ratio(self) -> Float[Tensor, " N"]:
        """``log G(r)_i``, float64."""
        return self.gated.log_gated_ratio

    @property
    def values(self) -> Float[Tensor, " N"]:
        """``[N]`` float64, each token's share ``-mu_i M_i G_i A_i`` of the loss."""
        return -self.gated.terms(self.weight)

    def loss_of_rows(self) -> Float[Tensor, " rows"]:
        """Each row's share of the loss, float64."""
        if self._segment_values is None:
            return Segments(self.batch.row, self.batch.rows).sum(self.values)
        at = self.plan.lowered_layout.contexts
        if at is None or at.strata.segment_row is None:
            return self._segment_values
        return Segments(at.strata.segment_row, self.batch.rows).sum(self._segment_values)

    @cached_property
    def regimes(self) -> dict[str, Int8[Tensor, "channels contexts"]]:
        """Per stratum, coarse to fine and ``"token"`` last: `Regime` of every channel and context.

        >>> import fiberpo
        >>> batch = fiberpo.RatioBatch.from_packed(
        ...     torch.tensor([-0.5, -1.0]), torch.tensor([-1.0, -1.0]), torch.ones(1), [2])
        >>> out = fiberpo.recipes.fiberpo(budget=(0.12, 0.05), epsilon=0.04)(batch)
        >>> [fiberpo.Regime(int(r)).name for r in out.regimes["trajectory"][:, 0]]
        ['ZERO', 'PASS']
        """
        found = {}
        if self.gated.strata is not None and self.gated.gated is not None:
            for k, name in enumerate(self.gated.strata.names):
                found[name] = self.gated.gated.regime[:, self.gated.strata.level(k)]
        found["token"] = self.gated.token.regime
        return found

    @cached_property
    def statistics(self) -> Statistics:
        """Mergeable statistics of this call, as tensors."""
        found = measure(self.batch, self.gated, self.weight, self.coefficients, self.stopped)
        if self.kept is None:
            return found
        certainty = certainty_of(self.objective.mask, self.batch)
        more = acceptance(self.batch, self.kept, certainty)
        return replace(found, means={**found.means, **more})

    def metrics(self) -> dict[str, float]:
        """Flat dictionary of floats (see the table in ``docs/metrics.md``)."""
        return self.statistics.compute()
