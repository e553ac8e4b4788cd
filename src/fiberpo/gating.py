"""`GateMap`: the one engine. Push drifts up, gate the residuals, reflect them down, recover.

For every stratum ``c`` on the path from a token's leaf context to its root,

    S_c   = sum_{i below c} omega_i d_i / sum_{i below c} omega_i          per channel
    y_i   = sum_{c on the path} g_c(S_c - S_parent(c)) + g_token(d_i - S_leaf)
    log G = recover(y)

with ``S_parent = 0`` for a root, and the residual always taken from the *ungated* aggregate. This
is the fibration gating hierarchy with mass-weighted reflecting kernels, for chains of any depth
and for rooted trees; with no stratum above the token it is PPO.

The gradient is closed form and costs two passes over the tokens: with ``a_i = dJ/dG_i`` and ``D_c``
the adjoint of ``S_c``,

    D_c     = (sum_{i below c} a_i) g'_c - sum_{i below c} a_i g'_{next finer on i's path}
    dJ/dd_j = a_j g'_token(j) + omega_j sum_{c on j's path} D_c / mass_c

Both kinds of context sums are additive over micro-batches and ranks.

Reference: *Fibration Policy Optimization*, arXiv 2603.08239, Definitions 5.1, 6.1, 6.2, 6.4,
Eqs. 6-16, 20, 26-33, App. E.7.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .batch import RatioBatch
from .charts import Chart, SignedLog
from .collective import LOCAL, Collective
from .errors import ObjectiveError, StrataError
from .gates import BudgetClip, Gate, Gated, LogClip, Pass, Site
from .labels import RESERVED
from .layout import ContextLayout, Layout, lay_out
from .strata import Strata

Measure = Literal["trajectory", "token"]


@dataclass(frozen=True)
class GateMap:
    """A ratio gating map ``G``: a chart, one gate per stratum, and the token gate.

    Args:
        chart: `SignedLog` (two channels), `Log` or `Deviation`.
        gates: stratum name -> gate, for every stratum above the token that takes part.
        token: gate of the token's own residual.
        measure: ``"trajectory"`` weighs trajectories equally above the trajectory
            (``omega_i = 1 / T_tau``), ``"token"`` weighs tokens equally (``omega_i = 1``).
        pessimistic: ``G_i A_i -> min(G_i A_i, r_i A_i)``. Ours, not the paper's: the rollback of
            the plain form amplifies a drift that the advantage opposes; this form restores it where
            a trajectory moves as one (a single token in the rollback zone may still be driven on).
        first: gate on each token's drift before anything is pushed up (GMPO clips there).
        detached: ``G`` is a weight without gradient, ``J = sum mu A sg(G) log pi`` (CISPO, TOPR):
            the gradient is that of the policy gradient, weighted. Not a ratio gating map.
    """

    chart: Chart = field(default_factory=SignedLog)
    gates: Mapping[str, Gate] = field(default_factory=dict)
    token: Gate = field(default_factory=Pass)
    measure: Measure = "trajectory"
    pessimistic: bool = False
    first: Gate = field(default_factory=Pass)
    detached: bool = False

    def __post_init__(self) -> None:
        if self.measure not in ("trajectory", "token"):
            raise ObjectiveError(
                f'measure is {self.measure!r}; it is "trajectory" (trajectories weigh equally) or '
                '"token" (tokens weigh equally)'
            )
        reserved = set(self.gates) & RESERVED
        if reserved:
            raise StrataError(
                f"{sorted(reserved)} is not a stratum of contexts; the gate of the token stratum "
                "is the argument `token` (`epsilon` in the recipes)"
            )
        if isinstance(self.token, BudgetClip) and self.gates:
            raise ObjectiveError(
                f"BudgetClip shares a budget between the tokens of a state and stands alone, but "
                f"there are gates at {sorted(self.gates)} above it; leave them out"
            )
        object.__setattr__(self, "gates", MappingProxyType(dict(self.gates)))

    def __reduce__(self) -> tuple[Any, ...]:
        rest = (self.token, self.measure, self.pessimistic, self.first, self.detached)
        return GateMap, (self.chart, dict(self.gates), *rest)

    def lay_out(self, batch: RatioBatch, collective: Collective = LOCAL, **more: bool) -> Layout:
        """What this map needs to know of a batch besides its log-probs (see `layout.lay_out`)."""
        gates = list(self.gates.values())
        return lay_out(
            batch,
            tuple(self.gates),
            measure=self.measure,
            needs_advantage=any(gate.needs_advantage for gate in gates),
            states=self.token.states if isinstance(self.token, BudgetClip) else None,
            collective=collective,
            **more,
        )

    def __call__(
        self,
        batch: RatioBatch,
        layout: Layout | None = None,
        mean: Float[Tensor, "channels C"] | None = None,
    ) -> GatedRatio:
        """Gate all ratios of a batch; differentiable through ``batch.log_probs``.

        Args:
            batch: the tokens.
            layout: `lay_out` of the same tokens, over all ranks; by default of this process alone.
            mean: the aggregates of the contexts where they are known (nothing is exchanged then).

        Raises:
            StrataError: if the batch lacks a stratum, or its labels do not nest.
            BudgetError: if a context has no budget.
        """
        layout = self.lay_out(batch) if layout is None else layout
        log_ratio = batch.log_probs.double() - batch.old_log_probs.double()
        sign = torch.sign(batch.advantages)
        one = torch.ones(1, dtype=torch.float64, device=batch.device)
        first = self.first(self.chart.decompose(log_ratio), Site("token", one, advantage_sign=sign))
        drift, at = first.value, layout.contexts
        if at is None:
            gated_token = self._gate_tokens(drift, sign, layout)
            log_gated = self.chart.recover(gated_token.value)
            return GatedRatio(
                self, batch, layout, log_ratio, first, drift, gated_token.value, log_gated,
                gated_token,
            )  # fmt: skip
        strata = at.strata
        if mean is None:
            sums = strata.push_up(strata.leaf_segments.rows(at.omega * drift))
            mean = at.match.merge(sums) / at.mass
        residual = mean - strata.of_parent(mean)
        gated = self._gate_contexts(residual, at)
        token_drift = drift - strata.at_tokens(mean)
        gated_token = self._gate_tokens(token_drift, sign, layout)
        base = strata.at_tokens(strata.sum_path(gated.value))
        gated_drift = base + gated_token.value
        log_gated = self.chart.recover(gated_drift)
        return GatedRatio(
            self, batch, layout, log_ratio, first, token_drift, gated_drift, log_gated,
            gated_token, mean=mean, residual=residual, gated=gated,
        )  # fmt: skip

    def _gate_contexts(self, residual: Tensor, at: ContextLayout) -> Gated:
        strata, sign = at.strata, at.advantage_sign
        parts = []
        for k, name in enumerate(strata.names):
            here = strata.level(k)
            site = Site(
                stratum=name,
                count=at.count[here],
                names=strata.context_names[k],
                advantage_sign=None if sign is None else sign[here],
            )
            parts.append(self.gates[name](residual[:, here], site))
        return Gated(
            torch.cat([p.value for p in parts], dim=1),
            torch.cat([p.slope for p in parts], dim=1),
            torch.cat([p.regime for p in parts], dim=1),
        )

    def _gate_tokens(self, drift: Tensor, sign: Tensor, layout: Layout) -> Gated:
        total = multiplicity = None
        if isinstance(self.token, BudgetClip):
            total, multiplicity = drift.abs(), torch.ones_like(drift)
            if layout.states is not None:
                states = layout.states.strata
                total = layout.states.match.merge(states.leaf_segments.rows(total))
                total = states.at_tokens(total)
                multiplicity = states.at_tokens(layout.states.count[None])
        one = torch.ones(1, dtype=torch.float64, device=drift.device)
        site = Site("token", one, advantage_sign=sign, total=total, multiplicity=multiplicity)
        return self.token(drift, site)


@dataclass(frozen=True, eq=False)
class GatedRatio:
    """A gated batch: values, pieces of every gate, and the pullback of a gradient.

    Attributes:
        gated_drift: ``[channels, N]`` what the chart recovers the gated ratio from.
        log_gated_ratio: ``[N]`` float64, ``log G(r)_i``; NaN where ``G`` is negative, which some
            gates in the `Deviation` chart make it (SPO, Truly PPO).
        first: the drifts before anything is pushed up.
        token_drift: ``[channels, N]`` residual drift of each token (its input to the token gate).
        token: the gated tokens.
        layout: contexts, masses and counts.
        mean, residual, gated: aggregates ``S_c`` of the contexts, their residual drifts and gated
            residuals, ``[channels, C]``; None where no stratum above the token takes part.
    """

    gate_map: GateMap
    batch: RatioBatch
    layout: Layout
    log_ratio: Float[Tensor, " N"]
    first: Gated
    token_drift: Float[Tensor, "channels N"]
    gated_drift: Float[Tensor, "channels N"]
    log_gated_ratio: Float[Tensor, " N"]
    token: Gated
    mean: Float[Tensor, "channels C"] | None = None
    residual: Float[Tensor, "channels C"] | None = None
    gated: Gated | None = None

    @property
    def strata(self) -> Strata | None:
        """The contexts above the token."""
        return None if self.layout.contexts is None else self.layout.contexts.strata

    def uses_ratio(self) -> Tensor:
        """``[N]`` tokens on which the pessimistic form takes ``r A`` instead of ``G A``."""
        if not self.gate_map.pessimistic:
            return torch.zeros_like(self.log_ratio, dtype=torch.bool)
        lower = self.log_ratio < self.log_gated_ratio
        higher = self.log_ratio > self.log_gated_ratio
        return torch.where(self.batch.advantages >= 0, lower, higher)

    def log_factor(self) -> Float[Tensor, " N"]:
        """Log of what multiplies ``mu_i M_i A_i``: ``log G``, or ``log r`` where pessimistic."""
        return torch.where(self.uses_ratio(), self.log_ratio, self.log_gated_ratio)

    def factor(self, absent: Bool[Tensor, " N"]) -> Float[Tensor, " N"]:
        """``G``, or ``r`` where pessimistic; anything finite where ``absent``."""
        uses_ratio = self.uses_ratio()
        drift = torch.where(absent | uses_ratio, 0.0, self.gated_drift)
        gated = self.gate_map.chart.ratio(drift)
        if not self.gate_map.pessimistic:
            return gated
        taken = torch.where(uses_ratio & ~absent, self.log_ratio, 0.0)
        return torch.where(uses_ratio, taken.exp(), gated)

    def terms(self, weight: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """``weight_i factor_i``; 0 where the weight is 0, whatever the factor.

        Where the map is ``detached``, that times ``log pi``.
        """
        factor = self.factor(weight == 0)
        if self.gate_map.detached:
            return weight * factor.detach() * self.batch.log_probs.double()
        return weight * factor

    def objective(self, weight: Float[Tensor, " N"]) -> Float[Tensor, ""]:
        """``J``, the sum of the `terms`."""
        return self.terms(weight).sum()

    @torch.no_grad()
    def pullback(self, weight: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """``dJ/dl`` of ``J``, the sum of the `terms`, in closed form.

        Args:
            weight: ``mu_i M_i A_i``, float64.
        """
        chart, uses_ratio, absent = self.gate_map.chart, self.uses_ratio(), weight == 0
        if self.gate_map.detached:
            return weight * self.factor(absent)
        # a ratio or a slope may overflow where it is masked: left out, never multiplied by 0
        slope = chart.ratio_slope(torch.where(absent, 0.0, self.log_gated_ratio))
        adjoint = torch.where(uses_ratio, 0.0, weight) * slope
        at_token = torch.where(adjoint == 0, 0.0, adjoint * self.token.slope)
        pulled = at_token
        if self.token.total_slope is not None:
            pulled = pulled + self._pull_states(adjoint * self.token.total_slope)
        if self.layout.contexts is not None:
            pulled = pulled + self._pull_contexts(self.layout.contexts, adjoint, at_token)
        taken = torch.where(uses_ratio & ~absent, self.log_ratio, 0.0)
        direct = torch.where(uses_ratio, weight * taken.exp(), 0.0)
        inward = chart.decompose_slope(self.log_ratio) * self.first.slope
        return direct + torch.where(pulled == 0, 0.0, pulled * inward).sum(0)

    def _pull_contexts(self, at: ContextLayout, adjoint: Tensor, at_token: Tensor) -> Tensor:
        assert self.gated is not None
        strata, leaf = at.strata, at.strata.leaf_segments
        below = strata.push_up(leaf.rows(adjoint)) * self.gated.slope
        finer = strata.add_to_parents(below) + leaf.rows(at_token)
        context_adjoint = at.match.merge(below - finer)
        return at.omega * strata.at_tokens(strata.sum_path(context_adjoint / at.mass))

    def _pull_states(self, shared: Tensor) -> Tensor:
        sign, states = torch.sign(self.token_drift), self.layout.states
        if states is None:
            return shared * sign
        sums = states.match.merge(states.strata.leaf_segments.rows(shared))
        return states.strata.at_tokens(sums) * sign


def open_gates(strata: tuple[str, ...] = ("trajectory",)) -> GateMap:
    """The identity ``G(r) = r`` as a hierarchy of open gates: every residual passes.

    >>> batch = RatioBatch.from_packed(torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0]),
    ...                                torch.tensor([1.0]), [2])
    >>> open_gates()(batch).log_gated_ratio
    tensor([ 0.5000, -1.0000], dtype=torch.float64)
    """
    return GateMap(SignedLog(), {name: Pass() for name in strata}, Pass())


__all__ = ["GateMap", "GatedRatio", "LogClip", "Measure", "open_gates"]
