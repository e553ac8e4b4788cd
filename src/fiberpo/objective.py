"""`Objective`: the triple (weights, gate map, mask); calling it on a batch gives a `Surrogate`.

    J(theta) = sum_i mu_i M_i G(r)_i A_i,        loss = -J

and, where an objective has them, times factors without gradient (importance weights, token masks).

Reference: *Fibration Policy Optimization*, arXiv 2603.08239, Definition 3.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from .batch import RatioBatch
from .collective import LOCAL, Collective
from .errors import ObjectiveError
from .gates import BudgetClip, Regime
from .gating import GateMap
from .labels import order_strata
from .lowering import cannot_lower, fused_stop
from .masks import Renormalised, SequenceMask
from .ops.dispatch import REFERENCE, choose, resolve
from .stops import BudgetStop, Stopped
from .surrogate import Plan, Surrogate
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
        return Plan(self.gate_map, layout, mu, collective, batch, stops, self._fused_stop)

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
            plan: `plan` of this objective for the same tokens, in place of the two arguments above.
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
        if plan.gate_map is not self.gate_map or plan.fused is not self._fused_stop:
            raise ObjectiveError(
                f"the plan has the gates and stops of another objective than this {self.name}; "
                "make a plan of this one"
            )
        if gradient == "closed_form":
            return self._closed_form(plan, batch, backend)
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
        scale, kept, stopped = self._scale(plan, batch)
        gated = self.gate_map(batch, plan.layout)
        weight = batch.spread(scale) * batch.advantages.double()
        loss, minus = -gated.objective(weight), -gated.pullback(weight)
        return Surrogate(self, batch, loss, minus, plan, scale, kept, stopped, _gated=gated)

    def _closed_form(self, plan: Plan, batch: RatioBatch, backend: str) -> Surrogate:
        backend = resolve(backend)
        reasons = [] if backend == REFERENCE else cannot_lower(self.gate_map, plan.layout)
        if reasons and backend != "auto":
            raise ObjectiveError(
                f"backend={backend!r} cannot serve {self.name}: {'; '.join(reasons)}. Use "
                "backend='reference' or 'auto'."
            )
        if reasons or backend == REFERENCE:
            scale, kept, stopped = self._scale(plan, batch)
            with torch.no_grad():
                gated = self.gate_map(batch, plan.layout)
                weight = batch.spread(scale) * batch.advantages.double()
                value, minus = -gated.objective(weight), -gated.pullback(weight)
            loss = _Linear.apply(batch.log_probs, value, minus.to(batch.log_probs.dtype))
            return Surrogate(self, batch, loss, minus, plan, scale, kept, stopped, _gated=gated)
        lowered, at = plan.lowered, plan.lowered_layout.contexts
        scale, kept, stopped = self._scale(plan, batch, fused=plan.fused is not None)
        found = choose(backend, lowered, batch.log_probs).evaluate(
            lowered,
            batch.log_probs.detach().contiguous(),
            batch.old_log_probs.contiguous(),
            plan.of_segments(batch.given_advantages),
            plan.of_segments(scale),
            None if at is None or at.match is LOCAL else at.match.merge,
        )
        loss = _Linear.apply(batch.log_probs, -found.value, found.gradient)
        return Surrogate(
            self, batch, loss, found.gradient, plan, scale, kept, stopped,
            _mean=found.mean, _segment_values=-found.segment_values,
        )  # fmt: skip

    @torch.no_grad()
    def _scale(
        self, plan: Plan, batch: RatioBatch, *, fused: bool = False
    ) -> tuple[Tensor, Tensor | None, tuple[Stopped, ...]]:
        """``mu_i M_i`` times all factors, but for a ``fused`` stop; what mask and stops say."""
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
                if fused:
                    continue
                stopped.append(factor.stopped(batch, next(layouts)))
                scale = batch.spread(scale) * stopped[-1].kept
            else:
                scale = batch.spread(scale) * factor(batch)
        return scale, kept, tuple(stopped)

    @property
    def _fused_stop(self) -> BudgetStop | None:
        return fused_stop(self.gate_map, self.factors)

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


__all__ = ["Objective", "Plan", "Regime", "Surrogate", "TokenFactor"]
