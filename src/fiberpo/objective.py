"""`Objective`: the triple (weights, gate map, mask); calling it on a batch gives a `Surrogate`.

    J(theta) = sum_i mu_i M_i G(r)_i A_i,        loss = -J

and, where an objective has them, times factors without gradient (importance weights, token masks).

Reference: *Fibration Policy Optimization*, arXiv 2603.08239, Definition 3.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int8
from torch import Tensor

from .acceptance import acceptance
from .batch import RatioBatch
from .collective import LOCAL, Collective
from .errors import ObjectiveError
from .gates import BudgetClip, Regime
from .gating import GatedRatio, GateMap
from .layout import Layout
from .masks import Renormalised, SequenceMask, certainty_of
from .measurement import measure
from .statistics import Statistics
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


@runtime_checkable
class TokenFactor(Protocol):
    """A factor on the term of every token; its gradient is not taken."""

    def __call__(self, batch: RatioBatch) -> Float[Tensor, " N"]:
        """``[N]`` float64, >= 0; 0 leaves a token out."""
        ...


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
        mu: Float[Tensor, " N"] | None = None,
    ) -> Plan:
        """What does not depend on the log-probs: contexts, denominators, weights.

        Serves every evaluation on the same tokens (other log-probs, same labels, lengths and
        advantages). All ranks call together.

        Args:
            batch, denominators, collective: as in `__call__`.
            mu: weights that are already known (of a part of a larger batch).
        """
        if denominators is not None:
            self._check_parts(batch)
        batch = batch.joined(collective)
        layout = self.gate_map.lay_out(batch, collective, warn=mu is None)
        if mu is None:
            mu = self.weights(batch, denominators, collective)
        return Plan(layout, mu, collective, batch)

    def __call__(
        self,
        batch: RatioBatch,
        *,
        denominators: Denominators | None = None,
        collective: Collective = LOCAL,
        plan: Plan | None = None,
        gradient: GradientForm = "closed_form",
    ) -> Surrogate:
        """Evaluate on a batch.

        Args:
            batch: all tokens of the optimizer batch (or this rank's part of it).
            denominators: counts of the whole optimizer batch, where ``batch`` is a part of it. Only
                for objectives whose contexts all lie inside the part (token and trajectory gates).
            collective: where the other parts of the batch are; every rank calls together.
            plan: `plan` of the same tokens, in place of the two arguments above.
            gradient: ``"closed_form"`` (O(N), default) or ``"autograd"`` through the gates; equal.

        Returns:
            `Surrogate`; ``loss.backward()`` sends the exact gradient into ``batch.log_probs``.
        """
        if plan is None:
            plan = self.plan(batch, denominators=denominators, collective=collective)
        batch = plan.adopt(batch)
        with torch.no_grad():
            weight, kept = plan.mu * batch.advantages.double(), None
            if self.mask is not None:
                kept = self.mask(batch)
                weight = weight * kept[batch.trajectory]
                if isinstance(self.mask, Renormalised):
                    weight *= self.mask.scale(plan.mu, kept[batch.trajectory], plan.collective)
            for factor in self.factors:
                weight = weight * factor(batch)
        if gradient == "autograd":
            if plan.collective.size > 1:
                raise ObjectiveError(
                    f"gradient='autograd' sees one process, but the batch is spread over "
                    f"{plan.collective.size}; use the closed form"
                )
            gated = self.gate_map(batch, plan.layout)
            loss = -gated.objective(weight)
            coefficients = gated.pullback(weight)
        elif gradient == "closed_form":
            with torch.no_grad():
                gated = self.gate_map(batch, plan.layout)
                value = -gated.objective(weight)
                coefficients = gated.pullback(weight)
            loss = _Linear.apply(batch.log_probs, value, -coefficients.to(batch.log_probs.dtype))
        else:
            raise ObjectiveError(f"gradient is {gradient!r}; use 'closed_form' or 'autograd'")
        return Surrogate(self, batch, loss, coefficients, gated, weight, kept)

    @property
    def by_trajectory(self) -> bool:
        """Whether something besides the gates looks at whole trajectories."""
        return self.mask is not None or bool(self.factors)

    def _check_parts(self, batch: RatioBatch) -> None:
        names = [n for n in self.gate_map.gates if n in batch.labels]
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


@dataclass(frozen=True, eq=False)
class Plan:
    """Contexts and weights of the tokens of one optimizer batch (see `Objective.plan`).

    Attributes:
        layout: contexts, masses and counts over all ranks.
        mu: ``[N]`` float64 aggregation weights ``mu_i``.
        collective: the ranks.
        batch: the tokens.
    """

    layout: Layout
    mu: Float[Tensor, " N"]
    collective: Collective
    batch: RatioBatch

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
        coefficients: ``[N]`` float64, ``dJ/d log_probs`` without graph. The backward of
            ``-(coefficients * log_probs).sum()`` is the exact gradient of the loss.
        gated: the gated batch with all pieces.
        weight: ``[N]`` float64, ``mu_i M_i A_i``, times the factors of the tokens.
        kept: what the mask says of each trajectory, or None.
    """

    objective: Objective
    batch: RatioBatch
    loss: Float[Tensor, ""]
    coefficients: Float[Tensor, " N"]
    gated: GatedRatio
    weight: Float[Tensor, " N"]
    kept: Bool[Tensor, " trajectories"] | None = None

    @property
    def log_gated_ratio(self) -> Float[Tensor, " N"]:
        """``log G(r)_i``, float64."""
        return self.gated.log_gated_ratio

    @property
    def values(self) -> Float[Tensor, " N"]:
        """``[N]`` float64, each token's share ``-mu_i M_i G_i A_i`` of the loss."""
        return -self.gated.terms(self.weight)

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
        found = measure(self.batch, self.gated, self.weight, self.coefficients)
        if self.kept is None:
            return found
        more = acceptance(self.batch, self.kept, certainty_of(self.objective.mask, self.batch))
        return replace(found, means={**found.means, **more})

    def metrics(self) -> dict[str, float]:
        """Flat dictionary of floats (see the table in ``docs/metrics.md``)."""
        return self.statistics.compute()


__all__ = ["Objective", "Plan", "Regime", "Surrogate", "TokenFactor"]
