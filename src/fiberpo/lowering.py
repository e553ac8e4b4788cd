"""From gate maps to plans: what the fused backends of `fiberpo.ops` read.

A gate or chart of the library carries its own `lowered` form. One that does not (yours, say) is
evaluated by the gate classes themselves, backend ``"reference"``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .batch import RatioBatch
from .collective import LOCAL
from .gates import AggregateGate, Gate, Pass, Site, Zero
from .gating import GateMap
from .layout import ContextLayout, Layout
from .ops.plan import OPEN, ChartCode, Contexts, GateCode, GatePlan, LoweredGate, States
from .stops import BudgetStop
from .token_masks import TokenFactor


def cannot_lower(gate_map: GateMap, layout: Layout) -> list[str]:
    """Reasons why a gate map has no plan; empty if it has one."""
    parts: dict[str, Any] = {
        "chart": gate_map.chart, "first gate": gate_map.first, "token gate": gate_map.token,
        **{f"gate of {name}": gate for name, gate in gate_map.gates.items()},
    }  # fmt: skip
    reasons = [
        f"the {place} {type(part).__name__} has no `lowered` form"
        for place, part in parts.items()
        if not hasattr(part, "lowered")
    ]
    if layout.states is not None and layout.states.match is not LOCAL:
        reasons.append("states are shared with other ranks")
    return reasons


def fused_stop(gate_map: GateMap, factors: Sequence[TokenFactor]) -> BudgetStop | None:
    """The stop that the backends evaluate themselves: the only one, where nothing is gated."""
    stops = [factor for factor in factors if isinstance(factor, BudgetStop)]
    plain = isinstance(gate_map.token, Zero) and isinstance(gate_map.first, Pass)
    if gate_map.gates or not (plain and gate_map.detached) or gate_map.pessimistic:
        return None
    return stops[0] if [type(stop) for stop in stops] == [BudgetStop] else None


def lower_stop(stop: BudgetStop, layout: Layout, batch: RatioBatch) -> GatePlan:
    """The plan of a stop over a gate map that gates nothing; ``layout`` is that of the stop.

    Raises:
        BudgetError: if a context has no budget.
    """
    at, contexts = layout.contexts, None
    if at is not None:
        gates = [LoweredGate(GateCode.STOP)] * len(at.strata.names)
        contexts = _lowered(at, gates, stop.limits(at), torch.ones_like(at.mass))
    beyond = tuple(math.nextafter(e, math.inf) for e in stop.epsilon)  # epsilon itself passes
    token = LoweredGate(GateCode.STOP, beyond)
    return _plan(ChartCode.SIGNED_LOG, OPEN, token, at, contexts, batch, detached=True)


def lower(gate_map: GateMap, layout: Layout, batch: RatioBatch) -> GatePlan:
    """The plan of a gate map on the tokens of a batch; see `cannot_lower`.

    Raises:
        BudgetError: if a context has no budget.
    """
    at, states = layout.contexts, None
    if layout.states is not None:
        states = States(layout.states.strata.leaf, layout.states.count)
    return _plan(
        gate_map.chart.lowered,  # type: ignore[attr-defined]
        _at_tokens(gate_map.first, batch),
        _at_tokens(gate_map.token, batch),
        at,
        None if at is None else _contexts(gate_map, at),
        batch,
        states=states,
        pessimistic=gate_map.pessimistic,
        detached=gate_map.detached,
    )


def _plan(
    chart: ChartCode,
    first: LoweredGate,
    token: LoweredGate,
    at: ContextLayout | None,
    contexts: Contexts | None,
    batch: RatioBatch,
    *,
    detached: bool,
    pessimistic: bool = False,
    states: States | None = None,
) -> GatePlan:
    lengths = batch.lengths if at is None else at.strata.segment_lengths
    if at is None:
        omega = torch.ones(len(lengths), dtype=torch.float64, device=batch.device)
    else:
        omega = at.segment_omega
    return GatePlan(
        chart=chart, first=first, token=token, pessimistic=pessimistic, detached=detached,
        starts=torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]), omega=omega,
        contexts=contexts, states=states, longest=int(lengths.max()) if len(lengths) else 0,
    )  # fmt: skip


def _at_tokens(gate: Gate, batch: RatioBatch) -> LoweredGate:
    found: LoweredGate = gate.lowered()  # type: ignore[attr-defined]
    if not isinstance(gate, AggregateGate):
        return found
    one = torch.ones(1, dtype=torch.float64, device=batch.device)
    pairs, slope = gate.numbers(Site("token", one), 1)
    return replace(found, numbers=(*pairs[:, 0].tolist(), float(slope)))


def _contexts(gate_map: GateMap, at: ContextLayout) -> Contexts:
    strata = at.strata
    budget = torch.full((2, len(strata)), math.inf, dtype=torch.float64, device=at.mass.device)
    slope, gates = torch.ones_like(at.mass), []
    for k, name in enumerate(strata.names):
        gate, here = gate_map.gates[name], strata.level(k)
        gates.append(gate.lowered())  # type: ignore[attr-defined]
        if gates[-1].code is GateCode.AGGREGATE:
            assert isinstance(gate, AggregateGate)
            site = Site(name, at.count[here], strata.context_names[k])
            budget[:, here], slope[here] = gate.numbers(site, len(at.count[here]))
    return _lowered(at, gates, budget, slope)


def _lowered(
    at: ContextLayout, gates: Sequence[LoweredGate], budget: Tensor, slope: Tensor
) -> Contexts:
    strata = at.strata
    sign = torch.zeros_like(at.mass) if at.advantage_sign is None else at.advantage_sign
    return Contexts(
        leaf=strata.segment_leaf, parent=strata.parent, bounds=strata.bounds, gates=tuple(gates),
        mass=at.mass, count=at.count, budget=budget, slope=slope, sign=sign,
        row_leaf=_row_leaf(strata.segment_row, strata.segment_leaf, strata.bounds),
    )  # fmt: skip


def _row_leaf(row: Tensor | None, leaf: Tensor, bounds: tuple[int, ...]) -> bool:
    first, last = bounds[-2:]
    if row is not None or last - first != len(leaf):
        return False
    return torch.equal(leaf, torch.arange(first, last, device=leaf.device))
