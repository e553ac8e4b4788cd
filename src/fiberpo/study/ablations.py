"""Objectives that differ from ours in one decision, for the study of ablations.

Not recipes: each is there to show what a decision is worth. In a grid they are named
``fiberpo.study.ablations:FUNCTION``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..batch import RatioBatch
from ..budgets import BudgetLike
from ..building import build
from ..charts import Log, SignedLog
from ..gates import AggregateGate, Gate, Gated, LogClip, Pass, Site, Zero
from ..gating import GatedRatio, GateMap
from ..labels import order_strata
from ..layout import ContextLayout, Layout
from ..objective import Objective
from ..stops import BudgetStop

Budgets = Mapping[str, BudgetLike]


def _gates(budgets: Budgets) -> dict[str, Gate]:
    return {name: AggregateGate(budgets[name]) for name in order_strata(list(budgets))}


def single_mean(budgets: Budgets, epsilon: float, pessimistic: bool = False) -> Objective:
    """FiberPO-Domain on the signed mean of ``log r`` in place of the two channels."""
    gate_map = GateMap(Log(), _gates(budgets), LogClip(epsilon), pessimistic=pessimistic)
    return build("single_mean", gate_map, "trajectory_mean", None, ("fiberpo",), locals())


@dataclass(frozen=True)
class _Plain:
    """A gate that no fused backend serves."""

    gate: LogClip
    needs_advantage = False

    def __call__(self, drift: Tensor, site: Site) -> Gated:
        return self.gate(drift, site)


class _ByAutograd(GatedRatio):
    """A gated batch whose gradient is taken through `GatedResidual.drift`."""

    def pullback(self, weight: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """``dJ/dl``."""
        assert isinstance(self.gate_map, GatedResidual)
        assert self.layout.contexts is not None
        with torch.enable_grad():
            log_ratio = self.log_ratio.detach().requires_grad_()
            log_gated = self.gate_map.drift(log_ratio, self.layout.contexts)
            factor = torch.where(
                self.uses_ratio(), log_ratio, self.gate_map.chart.recover(log_gated)
            )
            (found,) = torch.autograd.grad((weight * factor.exp()).sum(), log_ratio)
        return found


@dataclass(frozen=True)
class GatedResidual(GateMap):
    """Each residual taken from the *gated* aggregate above it: what the paper does not do.

    ``b_c = b_parent(c) + g_c(S_c - b_parent(c))``, ``log G = recover(b_leaf + clip(d - b_leaf))``.
    """

    def drift(self, log_ratio: Float[Tensor, " N"], at: ContextLayout) -> Tensor:
        """The gated drift ``[channels, N]``, differentiable."""
        strata, drift = at.strata, self.chart.decompose(log_ratio)
        mean = strata.push_up(strata.leaf_segments.rows(at.omega * drift)) / at.mass
        base = torch.zeros_like(mean)
        for k in range(len(strata.names)):
            here, above = strata.level(k), strata.of_parent(base)
            gated = above + self._gate_contexts(mean - above, at).value
            base = torch.cat([base[:, : here.start], gated[:, here], base[:, here.stop :]], dim=1)
        leaf = strata.at_tokens(base)
        one = torch.ones(1, dtype=torch.float64, device=drift.device)
        return leaf + self.token(drift - leaf, Site("token", one)).value

    def __call__(
        self, batch: RatioBatch, layout: Layout | None = None, mean: Tensor | None = None
    ) -> GatedRatio:
        """As `GateMap`, with the other residuals."""
        right = super().__call__(batch, layout, mean)
        assert right.layout.contexts is not None
        drift = self.drift(right.log_ratio, right.layout.contexts)
        known = {f.name: getattr(right, f.name) for f in fields(right)}
        changed = {"gated_drift": drift, "log_gated_ratio": self.chart.recover(drift)}
        return _ByAutograd(**{**known, **changed})


def gated_residual(budgets: Budgets, epsilon: float, pessimistic: bool = False) -> Objective:
    """FiberPO-Domain with residuals from the gated aggregates."""
    token = _Plain(LogClip(epsilon))
    gate_map = GatedResidual(SignedLog(), _gates(budgets), token, pessimistic=pessimistic)
    shown = {"budgets": budgets, "epsilon": epsilon, "pessimistic": pessimistic}
    return build("gated_residual", gate_map, "trajectory_mean", None, ("fiberpo",), shown)


class _NetStop(BudgetStop):
    """FiberStop on the signed mean of ``log r`` in place of the two channels."""

    def _drifts(self, log_ratio: Tensor, at: ContextLayout) -> Tensor:
        positive, negative = super()._drifts(log_ratio, at)
        return torch.stack([positive - negative, negative - positive])


class _EveryStop(BudgetStop):
    """FiberStop that stops the gradients that bring a token back, too."""

    outward_from = float("-inf")


def _stop(name: str, stop: BudgetStop, ratio: bool, shown: dict[str, Any]) -> Objective:
    gate_map = GateMap(Log(), {}, Pass() if ratio else Zero(), detached=not ratio)
    return build(name, gate_map, "trajectory_mean", None, ("fiberpo",), shown, (stop,))


def stop_net(budgets: Budgets, epsilon: float) -> Objective:
    """FiberStop on net drifts: the signed mean in place of the two channels."""
    return _stop("stop_net", _NetStop(budgets, (epsilon, epsilon)), False, locals())


def stop_every(budgets: Budgets, epsilon: float) -> Objective:
    """FiberStop without the exception for gradients that bring a token back."""
    return _stop("stop_every", _EveryStop(budgets, (epsilon, epsilon)), False, locals())


def stop_ratio(budgets: Budgets, epsilon: float) -> Objective:
    """FiberStop with the ratio as the slope, ``J = sum mu M r A``, in place of 1."""
    return _stop("stop_ratio", BudgetStop(budgets, (epsilon, epsilon)), True, locals())
