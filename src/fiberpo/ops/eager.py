"""Plans evaluated with torch operations, in float64: on any device, for any plan.

What the fused backends are compared with, and what serves where neither of them can.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .plan import ChartCode, Contexts, Evaluation, GateCode, GatePlan, LoweredGate, Merge, States
from .segments import Segments

name = "torch"


def unsupported(plan: GatePlan, log_probs: Tensor) -> list[str]:
    """Nothing is."""
    return []


def gate(
    gate: LoweredGate,
    drift: Tensor,
    advantage: Tensor,
    budget: Tensor | None = None,
    slope: Tensor | float = 1.0,
    count: Tensor | float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Value and slope of a gate (the table of `fiberpo.ops.plan`).

    Args:
        drift: ``[channels, ...]`` float64.
        advantage: of which the sign is looked at.
        budget: ``[2, ...]`` of an aggregate gate, with its ``slope`` k.
        count: tokens of each context (`GateCode.TAPER`).
    """
    one, zero, x = torch.ones_like(drift), torch.zeros_like(drift), drift
    numbers, code = gate.numbers, gate.code
    if code is GateCode.PASS:
        return x, one
    if code is GateCode.ZERO:
        return zero, zero
    if code is GateCode.CLIP:
        low = torch.where(advantage < 0, zero[:1] + numbers[0], numbers[2])
        high = torch.where(advantage < 0, zero[:1] + numbers[1], numbers[3])
        outside = (x < low) | (x > high)
        return torch.minimum(torch.maximum(x, low), high), torch.where(outside, zero, one)
    if code is GateCode.AGGREGATE:
        assert budget is not None
        if x.shape[0] == 1:
            budget = torch.where(x >= 0, budget[:1], budget[1:])
        size = x.abs()
        passing = size <= budget
        rolling = ~passing & (size < (1 + 1 / torch.as_tensor(slope)) * budget)
        finite = torch.where(torch.isinf(budget), 0.0, budget)
        rolled = torch.sign(x) * (slope + 1) * finite - slope * x
        value = torch.where(passing, x, torch.where(rolling, rolled, zero))
        return value, torch.where(passing, one, torch.where(rolling, -slope * one, zero))
    if code is GateCode.SOFT:
        tau = torch.where(advantage > 0, zero[:1] + numbers[0], numbers[1])
        up, down = torch.sigmoid(tau * x), torch.sigmoid(-tau * x)
        return 4 / tau * up - 1, 4 * up * down
    if code is GateCode.QUADRATIC:
        bend = torch.sign(advantage).to(x.dtype) / numbers[0]
        bent = torch.where(bend == 0, zero, bend * x)
        return x * (1 - bent / 2), 1 - bent
    if code is GateCode.ROLLBACK:
        epsilon, alpha = numbers
        negative = advantage < 0
        beyond = torch.where(negative, x < -epsilon, x > epsilon)
        turn = torch.where(negative, zero[:1] - (1 + alpha) * epsilon, (1 + alpha) * epsilon)
        return torch.where(beyond, turn - alpha * x, x), torch.where(beyond, -alpha * one, one)
    if code is GateCode.STOP:
        return zero if budget is None else (x > budget).to(x.dtype), zero
    assert code is GateCode.TAPER, code
    passing = (advantage < 0) & (x <= 0)
    return torch.where(passing, count * x, zero), torch.where(passing, count * one, zero)


@dataclass(frozen=True, eq=False)
class _Sums:
    """Sums and spreads over the forest, in a fixed order."""

    at: Contexts
    segment: Tensor

    def up(self, tokens: Tensor) -> Tensor:
        """``[rows, N]`` -> sums over everything below each context."""
        sums = self.own(tokens)
        for k in range(len(self.at.gates) - 1, 0, -1):
            here = slice(self.at.bounds[k], self.at.bounds[k + 1])
            sums = sums + self._to_parents(sums[:, here], here)
        return sums

    def own(self, tokens: Tensor) -> Tensor:
        """Sums over the tokens whose leaf a context is."""
        segments = Segments(self.segment, self.at.leaf.shape[0]).rows(tokens)
        return Segments(self.at.leaf, len(self.at)).rows(segments)

    def children(self, values: Tensor) -> Tensor:
        """Sums over the children of each context."""
        return self._to_parents(values, slice(0, len(self.at)))

    def _to_parents(self, values: Tensor, here: slice) -> Tensor:
        above = self.at.parent[here]
        slot = torch.where(above < 0, len(self.at), above)
        return Segments(slot, len(self.at) + 1).rows(values)[:, :-1]

    def of_parent(self, values: Tensor) -> Tensor:
        """Of each context's parent; 0 for a root."""
        above = self.at.parent
        return torch.where(above < 0, 0.0, values[:, above.clamp(min=0)])

    def path(self, values: Tensor) -> Tensor:
        """Sum from each context up to its root."""
        done = values.clone()
        for k in range(1, len(self.at.gates)):
            here = slice(self.at.bounds[k], self.at.bounds[k + 1])
            above = self.at.parent[here]
            done[:, here] += torch.where(above < 0, 0.0, done[:, above.clamp(min=0)])
        return done

    def at_tokens(self, values: Tensor) -> Tensor:
        """Of each token's leaf."""
        return values[:, self.at.leaf[self.segment]]


def _no_merge(sums: Tensor) -> Tensor:
    return sums


def _gate_of_tokens(
    lowered: LoweredGate, drift: Tensor, advantage: Tensor
) -> tuple[Tensor, Tensor]:
    if lowered.code is not GateCode.AGGREGATE:
        return gate(lowered, drift, advantage)
    positive, negative, slope = lowered.numbers
    return gate(lowered, drift, advantage, drift.new_tensor([[positive], [negative]]), slope)


def _token_gate(
    plan: GatePlan, drift: Tensor, advantage: Tensor, merge: Merge
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Value, slope, and slope with respect to the total of the state."""
    if plan.token.code is not GateCode.BUDGET:
        return *_gate_of_tokens(plan.token, drift, advantage), None
    (radius,) = plan.token.numbers
    size = drift.abs()
    if plan.states is None:
        total, multiplicity = size, torch.ones_like(size)
    else:
        index = plan.states.index
        total = merge(Segments(index, len(plan.states.multiplicity)).rows(size))[:, index]
        multiplicity = plan.states.multiplicity[index]
    bound = multiplicity * radius - (total - size)
    exhausted, passing = bound <= 0, (bound > 0) & (size <= bound)
    sign = torch.sign(drift)
    value = torch.where(passing, drift, torch.where(exhausted, 0.0, sign * bound))
    shared = torch.where(passing | exhausted, 0.0, -sign)
    return value, torch.where(exhausted, 0.0, torch.ones_like(drift)), shared


def _kept(token: LoweredGate, ratio: Tensor, advantage: Tensor, beyond: Tensor | float) -> Tensor:
    """Tokens that `GateCode.STOP` keeps; ``beyond`` counts ``[2, N]`` contexts out of budget."""
    above, below = torch.as_tensor(beyond, device=ratio.device).expand(2, len(ratio))
    own = (ratio.new_full((), number) for number in token.numbers)
    plus, minus = (torch.where(b == 0, e, 0.0) for b, e in zip((above, below), own, strict=True))
    return torch.sign(advantage) * ratio < torch.where(advantage > 0, plus, minus)


def _pull_states(shared: Tensor, drift: Tensor, states: States | None, merge: Merge) -> Tensor:
    sign = torch.sign(drift)
    if states is None:
        return shared * sign
    return (
        merge(Segments(states.index, len(states.multiplicity)).rows(shared))[:, states.index] * sign
    )


def evaluate(
    plan: GatePlan,
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    scale: Tensor,
    merge: Merge | None = None,
    merge_states: Merge | None = None,
) -> Evaluation:
    """As `fiberpo.ops.plan.Backend.evaluate`."""
    merge, merge_states = merge or _no_merge, merge_states or _no_merge
    tokens = log_probs.shape[0]
    spread = plan.starts.diff()
    segment = torch.repeat_interleave(spread, output_size=tokens)
    advantage = advantages.double()
    advantage = advantage if len(advantage) == tokens else advantage[segment]
    weight = (scale if len(scale) == tokens else scale[segment]) * advantage
    absent = weight == 0
    ratio = log_probs.double() - old_log_probs.double()
    positive = (ratio >= 0).to(ratio.dtype)
    if plan.chart is ChartCode.LOG:
        drift, inward = ratio[None], torch.ones_like(ratio)[None]
    elif plan.chart is ChartCode.SIGNED_LOG:
        drift = torch.stack([ratio.clamp(min=0), (-ratio).clamp(min=0)])
        inward = torch.stack([positive, positive - 1])
    else:
        drift, inward = torch.expm1(ratio)[None], ratio.exp()[None]
    if plan.first.code is not GateCode.PASS:
        drift, slope = _gate_of_tokens(plan.first, drift, advantage)
        inward = torch.where(slope == 0, 0.0, inward * slope)

    at, mean = plan.contexts, None
    above: Tensor | float = 0.0
    if at is None:
        value, slope, shared = _token_gate(plan, drift, advantage, merge_states)
        token_drift = drift
    else:
        sums = _Sums(at, segment)
        mean = merge(sums.up(plan.omega[segment] * drift)) / at.mass
        residual = mean - sums.of_parent(mean)
        parts = []
        for k, lowered in enumerate(at.gates):
            here = slice(at.bounds[k], at.bounds[k + 1])
            numbers = (at.sign[here], at.budget[:, here], at.slope[here], at.count[here])
            seen = mean if lowered.code is GateCode.STOP else residual
            parts.append(gate(lowered, seen[:, here], *numbers))
        gated = torch.cat([part[0] for part in parts], dim=1)
        context_slope = torch.cat([part[1] for part in parts], dim=1)
        token_drift = drift - sums.at_tokens(mean)
        value, slope, shared = _token_gate(plan, token_drift, advantage, merge_states)
        above = sums.at_tokens(sums.path(gated))
    if plan.token.code is GateCode.STOP:
        weight = torch.where(_kept(plan.token, ratio, advantage, above), weight, 0.0)
        absent = weight == 0
    elif at is not None:
        value = value + above

    if plan.chart is ChartCode.DEVIATION:
        log_gated = torch.log1p(value[0])
        plain = 1 + torch.where(absent, 0.0, value[0])
    else:
        log_gated = value[0] - value[1] if plan.chart.channels == 2 else value[0]
        plain = torch.where(absent, 0.0, log_gated).exp()
    uses_ratio = torch.zeros_like(absent)
    if plan.pessimistic:
        lower, higher = ratio < log_gated, ratio > log_gated
        uses_ratio = torch.where(advantage >= 0, lower, higher) & ~absent
    direct = torch.where(uses_ratio, torch.where(uses_ratio, ratio, 0.0).exp(), plain)
    terms = torch.where(absent, 0.0, weight * direct)
    if plan.detached:
        values = torch.where(absent, 0.0, terms * log_probs.double())
        return _answer(plan, segment, values, terms.to(log_probs.dtype), mean)

    if plan.chart is ChartCode.DEVIATION:
        outer = torch.ones_like(plain)[None]
    else:
        outer = torch.stack([plain, -plain]) if plan.chart.channels == 2 else plain[None]
    adjoint = torch.where(uses_ratio | absent, 0.0, weight * outer)
    own = torch.where(adjoint == 0, 0.0, adjoint * slope)
    pulled = own
    if shared is not None:
        pulled = pulled + _pull_states(adjoint * shared, token_drift, plan.states, merge_states)
    if at is not None:
        below = sums.up(adjoint) * context_slope
        context_adjoint = merge(below - sums.children(below) - sums.own(own))
        reflected = sums.path(context_adjoint / at.mass)
        pulled = pulled + plan.omega[segment] * sums.at_tokens(reflected)
    inner = torch.where(pulled == 0, 0.0, pulled * inward).sum(0)
    coefficients = torch.where(uses_ratio, terms, 0.0) + inner
    return _answer(plan, segment, terms, coefficients.to(log_probs.dtype), mean)


def _answer(
    plan: GatePlan, segment: Tensor, values: Tensor, coefficients: Tensor, mean: Tensor | None
) -> Evaluation:
    by_segment = Segments(segment, plan.segments).sum(values)
    return Evaluation(by_segment.sum(), by_segment, -coefficients, mean)


__all__ = ["evaluate", "gate", "name", "unsupported"]
