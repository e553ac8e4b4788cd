"""`Objective`: the triple (weights, gate map, mask); calling it on a batch gives a `Surrogate`.

    J(theta) = sum_i mu_i M_i G(r)_i A_i,        loss = -J

and, where an objective has them, times factors without gradient (importance weights, token masks).

Reference: *Fibration Policy Optimization*, arXiv 2603.08239, Definition 3.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int8
from torch import Tensor

from .acceptance import acceptance
from .batch import RatioBatch
from .collective import LOCAL, Collective, Match
from .errors import ObjectiveError
from .gates import BudgetClip, Regime
from .gating import GatedRatio, GateMap
from .labels import order_strata
from .layout import Layout
from .lowering import cannot_lower, lower
from .masks import Renormalised, SequenceMask, certainty_of
from .measurement import measure
from .ops.dispatch import REFERENCE, choose, resolve
from .ops.plan import GatePlan, Merge
from .ops.segments import Segments
from .statistics import Statistics
from .stops import BudgetStop, Stopped
from .token_masks import TokenFactor
from .weights import Denominators, Weights

GradientForm = Literal["closed_form", "autograd"]


class _Linear(torch.autograd.Function):
    """A scalar whose gradient with respect to ``log_probs`` is given."""

    @staticmethod
    def forward(ctx: Any, log_probs: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return outer[0].to(gradient.dtype) * gradient, None, None


@dataclass(frozen=True)
class Objective:
    """A trust-region objective in the ratio gating form.

    Args:
        weights: aggregation weights ``mu``.
        gate_map: the ratio gating map ``G``.
        mask: whole trajectories to leave out; multiplies, never renormalises.
        factors: what else multiplies the terms of single tokens, without gradient: importance
            weights, token masks.
        name: what to call it in reports.
        parameters: the arguments it was made with, for reports.
        papers: keys of `fiberpo.citations.PAPERS` that it rests on.
    """

    weights: Weights
    gate_map: GateMap
    mask: SequenceMask | None = None
    name: str = "objective"
    parameters: Mapping[str, Any] = field(default_factory=dict)
    papers: tuple[str, ...] = ()
    factors: tuple[TokenFactor, ...] = ()

    def plan(
        self,
        batch: RatioBatch,
        *,
        denominators: Denominators | None = None,
        collective: Collective = LOCAL,
        mu: Float[Tensor, "..."] | None = None,
    ) -> Plan:
        """What does not depend on the log-probs: contexts, denominators, weights.

        Serves every evaluation on the same tokens (other log-probs, same labels, lengths and
        advantages). All ranks call together.

        Args:
            batch, denominators, collective: as in `__call__`.
            mu: weights that are already known (of a part of a larger batch), ``[N]`` or ``[rows]``.
        """
        if denominators is not None:
            self._check_parts(batch)
        batch = batch.joined(collective)
        layout = self.gate_map.lay_out(batch, collective, warn=mu is None)
        stops = tuple(stop.lay_out(batch, collective) for stop in self.stops)
        if mu is None:
            mu = self.weights.shares(batch, denominators, collective)
        return Plan(self.gate_map, layout, mu, collective, batch, stops)

    def __call__(
        self,
        batch: RatioBatch,
        *,
        denominators: Denominators | None = None,
        collective: Collective = LOCAL,
        plan: Plan | None = None,
        gradient: GradientForm = "closed_form",
        backend: str = "auto",
    ) -> Surrogate:
        """Evaluate on a batch.

        Args:
            batch: all tokens of the optimizer batch (or this rank's part of it).
            denominators: counts of the whole optimizer batch, where ``batch`` is a part of it. Only
                for objectives whose contexts all lie inside the part (token and trajectory gates).
            collective: where the other parts of the batch are; every rank calls together.
            plan: `plan` of the same tokens, in place of the two arguments above.
            gradient: ``"closed_form"`` (O(N), default) or ``"autograd"`` through the gates; equal.
            backend: what evaluates the closed form (`fiberpo.ops.dispatch`): ``"auto"``,
                ``"cpu"``, ``"triton"``, ``"torch"``, or ``"reference"``, the gate classes
                themselves in float64. All but ``"auto"`` serve or raise.

        Returns:
            `Surrogate`; ``loss.backward()`` sends the exact gradient into ``batch.log_probs``.
        """
        if plan is None:
            plan = self.plan(batch, denominators=denominators, collective=collective)
        batch = plan.adopt(batch)
        with torch.no_grad():
            known = self._scale(plan, batch)
        if gradient == "closed_form":
            return self._closed_form(plan, batch, known, backend)
        if gradient != "autograd":
            raise ObjectiveError(f"gradient is {gradient!r}; use 'closed_form' or 'autograd'")
        if plan.collective.size > 1:
            raise ObjectiveError(
                f"gradient='autograd' sees one process, but the batch is spread over "
                f"{plan.collective.size}; use the closed form"
            )
        if backend not in ("auto", REFERENCE):
            raise ObjectiveError(
                f"gradient='autograd' goes through the gate classes, not through {backend!r}"
            )
        gated = self.gate_map(batch, plan.layout)
        weight = batch.spread(known["scale"]) * batch.advantages.double()
        loss, minus = -gated.objective(weight), -gated.pullback(weight)
        return Surrogate(self, batch, loss, minus, plan, **known, _gated=gated)

    def _closed_form(
        self, plan: Plan, batch: RatioBatch, known: dict[str, Any], backend: str
    ) -> Surrogate:
        backend, scale = resolve(backend), known["scale"]
        reasons = [] if backend == REFERENCE else cannot_lower(self.gate_map, plan.layout)
        if reasons and backend != "auto":
            raise ObjectiveError(
                f"backend={backend!r} cannot serve {self.name}: {'; '.join(reasons)}. Use "
                "backend='reference' or 'auto'."
            )
        if reasons or backend == REFERENCE:
            with torch.no_grad():
                gated = self.gate_map(batch, plan.layout)
                weight = batch.spread(scale) * batch.advantages.double()
                value, minus = -gated.objective(weight), -gated.pullback(weight)
            loss = _Linear.apply(batch.log_probs, value, minus.to(batch.log_probs.dtype))
            return Surrogate(self, batch, loss, minus, plan, **known, _gated=gated)
        lowered, layout = plan.lowered, plan.layout
        found = choose(backend, lowered, batch.log_probs).evaluate(
            lowered,
            batch.log_probs.detach().contiguous(),
            batch.old_log_probs.contiguous(),
            plan.of_segments(batch.given_advantages),
            plan.of_segments(scale),
            None if layout.contexts is None else _merge(layout.contexts.match),
        )
        loss = _Linear.apply(batch.log_probs, -found.value, found.gradient)
        return Surrogate(
            self, batch, loss, found.gradient, plan, **known,
            _mean=found.mean, _segment_values=-found.segment_values,
        )  # fmt: skip

    def _scale(self, plan: Plan, batch: RatioBatch) -> dict[str, Any]:
        """``scale``, ``kept`` and ``stopped`` of the `Surrogate`."""
        scale, kept, layouts, stopped = plan.shares, None, iter(plan.stops), []
        if self.mask is not None:
            kept = self.mask(batch)
            if len(scale) == batch.rows:
                scale = scale * batch.of_rows(kept)
            else:
                scale = scale * kept[batch.trajectory]
            if isinstance(self.mask, Renormalised):
                scale = scale * self.mask.scale(plan.mu, kept[batch.trajectory], plan.collective)
        for factor in self.factors:
            if isinstance(factor, BudgetStop):
                stopped.append(factor.stopped(batch, next(layouts)))
                scale = batch.spread(scale) * stopped[-1].kept
            else:
                scale = batch.spread(scale) * factor(batch)
        return {"scale": scale, "kept": kept, "stopped": tuple(stopped)}

    @property
    def stops(self) -> tuple[BudgetStop, ...]:
        """Those of the factors that have budgets of contexts."""
        return tuple(factor for factor in self.factors if isinstance(factor, BudgetStop))

    @property
    def strata(self) -> tuple[str, ...]:
        """Strata above the token that a gate or a stop looks at, coarse to fine."""
        names = [*self.gate_map.gates, *(name for stop in self.stops for name in stop.strata)]
        return order_strata(list(dict.fromkeys(names)))

    @property
    def by_trajectory(self) -> bool:
        """Whether something besides the gates looks at whole trajectories."""
        return self.mask is not None or bool(self.factors)

    def _check_parts(self, batch: RatioBatch) -> None:
        names = [n for n in self.strata if n in batch.labels]
        token = self.gate_map.token
        if isinstance(token, BudgetClip) and token.states in batch.labels:
            names.append(token.states)
        cut = [n for n in names if any(batch.strata([n]).shared)]
        if "trajectory" in batch.labels and (self.by_trajectory or self.weights.by_trajectory):
            cut.append("trajectory")
        if isinstance(self.mask, Renormalised):
            cut.append("the denominator of Renormalised")
        if cut:
            raise ObjectiveError(
                f"denominators say that this batch is a part, but contexts of {cut} may reach into "
                "the other parts, where their drift is not known. Call the objective once on the "
                "whole batch (log-probs without graph) and backpropagate "
                "-(coefficients * log_probs).sum() part by part; fiberpo.exact does that."
            )

    def __str__(self) -> str:
        inside = ", ".join(f"{k}={v!r}" for k, v in self.parameters.items() if v is not None)
        return f"{self.name}({inside})"


def _merge(match: Match) -> Merge | None:
    return None if match is LOCAL else match.merge


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
    """

    gate_map: GateMap
    layout: Layout
    shares: Float[Tensor, "..."]
    collective: Collective
    batch: RatioBatch
    stops: tuple[Layout, ...] = ()

    @cached_property
    def mu(self) -> Float[Tensor, " N"]:
        """Aggregation weight ``mu_i`` of every token, float64."""
        return self.batch.spread(self.shares)

    @cached_property
    def lowered(self) -> GatePlan:
        """For the fused backends."""
        return lower(self.gate_map, self.layout, self.batch)

    def of_segments(self, values: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Values of rows as values of segments; those of tokens as they are."""
        at = self.layout.contexts
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
        scale: ``mu_i M_i`` times the factors of the tokens, ``[rows]`` or ``[N]`` float64.
        kept: what the mask says of each trajectory, or None.
        stopped: what each of `Objective.stops` says.
    """

    objective: Objective
    batch: RatioBatch
    loss: Float[Tensor, ""]
    gradient: Float[Tensor, " N"]
    plan: Plan
    scale: Float[Tensor, "..."]
    kept: Bool[Tensor, " trajectories"] | None = None
    stopped: tuple[Stopped, ...] = ()
    _gated: GatedRatio | None = field(default=None, repr=False)
    _mean: Tensor | None = field(default=None, repr=False)
    _segment_values: Tensor | None = field(default=None, repr=False)

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
        return self.objective.gate_map(self.batch, self.plan.layout, self._mean)

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
        at = self.plan.layout.contexts
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


__all__ = ["Objective", "Plan", "Regime", "Surrogate", "TokenFactor"]
