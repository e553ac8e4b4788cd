"""Atomic gates: what happens to one drift, as value, slope and three-valued regime.

The functions are the equations; the dataclasses of the same name bind their parameters and are
what a `GateMap` holds, one per stratum.

Reference: *Fibration Policy Optimization*, arXiv 2603.08239, Eqs. 10 and 12, App. C.4.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from .budgets import Budget, BudgetLike, check_positive
from .errors import BudgetError, ObjectiveError
from .labels import ContextNames
from .ops.plan import OPEN, GateCode, LoweredGate


class Regime(enum.IntEnum):
    """What a gate does to a drift: its slope is 1, negative, or 0."""

    PASS = 0
    ROLLBACK = 1
    ZERO = 2


@dataclass(frozen=True, eq=False)
class Gated:
    """A gated drift. ``value`` is differentiable; ``slope`` and ``regime`` are its pieces.

    Attributes:
        value: gated drift, same shape and unit as the input.
        slope: ``d value / d input`` (the one-sided derivative of the piece the input lies in).
        regime: `Regime` as int8.
        total_slope: ``d value / d total`` for a gate that shares a total (`BudgetClip`).
    """

    value: Float[Tensor, "..."]
    slope: Float[Tensor, "..."]
    regime: Int8[Tensor, "..."]
    total_slope: Float[Tensor, "..."] | None = None


@dataclass(frozen=True, eq=False)
class Site:
    """Where a gate stands: everything but the drift that it may look at.

    Attributes:
        stratum: name of the stratum.
        count: token count below each context (``[contexts]``), or 1 at tokens.
        names: what the contexts are called (for budgets per context name).
        advantage_sign: sign (-1, 0, 1) of the advantage summed below each context, or None.
        total, multiplicity: for `BudgetClip`, sum of ``|drift|`` and number of tokens in the
            state of each token.
    """

    stratum: str
    count: Tensor
    names: ContextNames = field(default_factory=ContextNames)
    advantage_sign: Tensor | None = None
    total: Tensor | None = None
    multiplicity: Tensor | None = None


@runtime_checkable
class Gate(Protocol):
    """A gate takes drifts ``[channels, contexts]`` (or ``[channels, N]`` at the token stratum)."""

    @property
    def needs_advantage(self) -> bool:
        """Whether the gate looks at the sign of the advantage."""
        ...

    def __call__(self, drift: Tensor, site: Site) -> Gated:
        """Gate every channel."""
        ...


def _regime(rollback: Tensor | None, zero: Tensor) -> Tensor:
    regime = torch.where(zero, Regime.ZERO.value, Regime.PASS.value)
    if rollback is not None:
        regime = torch.where(rollback, Regime.ROLLBACK.value, regime)
    return regime.to(torch.int8)


def aggregate_gate(drift: Tensor, budget: Tensor, count: Tensor) -> Gated:
    """Aggregate gate ``g(x, C, k)`` (Eq. 10): pass, roll back, zero.

    ``g = x`` where ``|x| <= C`` (slope 1); ``sign(x) (k + 1) C - k x`` where
    ``C < |x| < (1 + 1/k) C`` (slope ``-k``); ``0`` beyond (slope 0). Odd in ``x`` and continuous.

    Args:
        drift: ``x``, nats per token (or any unit shared with the budget).
        budget: ``C > 0``, same unit; broadcast against ``drift``. ``inf`` leaves the gate open.
        count: ``k >= 1``, token count below the context (or the rollback slope chosen instead).

    Example:
        >>> x = torch.tensor([0.125, 0.375, 0.75])
        >>> gated = aggregate_gate(x, torch.tensor(0.25), torch.tensor(1.0))
        >>> gated.value.tolist(), gated.slope.tolist(), gated.regime.tolist()
        ([0.125, 0.125, 0.0], [1.0, -1.0, 0.0], [0, 1, 2])
    """
    size = drift.abs()
    passing = size <= budget
    rolling = ~passing & (size < (1 + 1 / count) * budget)
    finite = torch.where(torch.isinf(budget), torch.zeros_like(budget), budget)
    rolled = torch.sign(drift.detach()) * (count + 1) * finite - count * drift
    value = torch.where(passing, drift, torch.where(rolling, rolled, torch.zeros_like(drift)))
    one = torch.ones_like(value)
    slope = torch.where(passing, one, torch.where(rolling, -count * one, 0 * one))
    return Gated(value, slope, _regime(rolling, ~passing & ~rolling))


def log_clip(drift: Tensor, epsilon: Tensor | float) -> Gated:
    """Log clip (Eq. 12): ``clip(x, -epsilon, +epsilon)``; ``|x| == epsilon`` is not saturated.

    >>> log_clip(torch.tensor([0.01, -0.3]), 0.04).value
    tensor([ 0.0100, -0.0400])
    """
    saturated = drift.abs() > epsilon
    value = torch.where(saturated, torch.sign(drift.detach()) * epsilon, drift)
    return Gated(value, (~saturated).to(value.dtype), _regime(None, saturated))


def ratio_clip(drift: Tensor, low: Tensor | float, high: Tensor | float) -> Gated:
    """Clip of a log ratio to ``[low, high]``; at a bound itself it is not saturated."""
    low = torch.as_tensor(low, dtype=drift.dtype, device=drift.device)
    high = torch.as_tensor(high, dtype=drift.dtype, device=drift.device)
    below, above = drift < low, drift > high
    value = torch.where(below, low, torch.where(above, high, drift))
    saturated = below | above
    return Gated(value, (~saturated).to(value.dtype), _regime(None, saturated))


def budget_clip(drift: Tensor, total: Tensor, multiplicity: Tensor, radius: float) -> Gated:
    """Clip of APC-Obj: ``clip(x_i, B_i)``, ``B_i = T_s radius - sum_{j != i, same s} |x_j|``.

    ``clip(a, B) = clip(a, -max(B, 0), max(B, 0))``. Regimes are Eqs. 61-63 of the paper: PASS where
    the state's consumption fits its budget, ROLLBACK where it is overdrawn but the others alone do
    not exhaust it (the value then falls as the others rise), ZERO where the others exhaust it.

    Args:
        drift: ``x_i = r_i - 1``.
        total: sum of ``|x_j|`` over all tokens of the state, ``i`` included.
        multiplicity: ``T_s``, sampled tokens of the state.
        radius: ``delta > 0``, in the same unit as ``x``.
    """
    bound = multiplicity * radius - (total - drift.abs())
    size = torch.clamp(bound, min=0)
    exhausted = bound <= 0
    passing = ~exhausted & (drift.abs() <= size)
    sign = torch.sign(drift.detach())
    value = torch.where(passing, drift, sign * size)
    # while overdrawn the bound itself moves: +|x_i| directly, -total through the state
    rolling = ~passing & ~exhausted
    slope = (~exhausted).to(value.dtype)
    total_slope = torch.where(rolling, -sign, torch.zeros_like(sign))
    return Gated(value, slope, _regime(rolling, exhausted), total_slope)


@dataclass(frozen=True)
class Pass:
    """The identity: the neutral element of gates."""

    needs_advantage = False

    def lowered(self) -> LoweredGate:
        """For the fused backends."""
        return OPEN

    def __call__(self, drift: Tensor, site: Site) -> Gated:
        """``value = drift``."""
        one = torch.ones_like(drift)
        return Gated(drift, one, _regime(None, torch.zeros_like(drift, dtype=torch.bool)))


@dataclass(frozen=True)
class Zero:
    """The zero map: removes a stratum's own component."""

    needs_advantage = False

    def lowered(self) -> LoweredGate:
        """For the fused backends."""
        return LoweredGate(GateCode.ZERO)

    def __call__(self, drift: Tensor, site: Site) -> Gated:
        """``value = 0``."""
        zero = torch.zeros_like(drift)
        return Gated(zero, zero.detach(), _regime(None, torch.ones_like(drift, dtype=torch.bool)))


@dataclass(frozen=True)
class AggregateGate:
    """`aggregate_gate` with a budget per channel and context.

    Args:
        budget: `Budget` or what `Budget.parse` takes: ``(positive, negative)`` in nats per token,
            or a mapping from context name to such a pair (``"*"`` for all others).
        rollback: ``"tokens"`` for ``k`` = token count of the context, or a number > 0. The rollback
            zone is ``C / k`` wide: at a thousand tokens no finite step lands in it.
    """

    budget: Budget
    rollback: Literal["tokens"] | float = "tokens"
    needs_advantage = False

    def __init__(self, budget: BudgetLike, rollback: Literal["tokens"] | float = "tokens") -> None:
        if isinstance(rollback, str):
            if rollback != "tokens":
                raise BudgetError(f'rollback is {rollback!r}; it is "tokens" or a number > 0')
        else:
            check_positive("rollback", rollback)
        object.__setattr__(self, "budget", Budget.parse(budget))
        object.__setattr__(self, "rollback", rollback)

    def __call__(self, drift: Tensor, site: Site) -> Gated:
        """Gate each channel with its own budget; a single channel by the sign of its drift."""
        pairs, count = self.numbers(site, drift.shape[-1])
        if drift.shape[0] == 2:
            return aggregate_gate(drift, pairs, count)
        return aggregate_gate(drift, torch.where(drift >= 0, pairs[:1], pairs[1:]), count)

    def numbers(self, site: Site, contexts: int) -> tuple[Tensor, Tensor]:
        """Budgets ``[2, contexts]`` and ``k`` ``[contexts]`` at a site."""
        pairs = self.budget.resolve(site.stratum, site.names, contexts).to(site.count.device)
        if isinstance(self.rollback, str):
            return pairs, site.count
        return pairs, torch.full_like(site.count, self.rollback)

    def lowered(self) -> LoweredGate:
        """For the fused backends; the numbers are those of `numbers`."""
        return LoweredGate(GateCode.AGGREGATE)


@dataclass(frozen=True)
class LogClip:
    """`log_clip` with half-width ``epsilon`` > 0, in nats."""

    epsilon: float
    needs_advantage = False

    def __post_init__(self) -> None:
        check_positive("epsilon", self.epsilon)

    def __call__(self, drift: Tensor, site: Site) -> Gated:
        """Clip every channel."""
        return log_clip(drift, self.epsilon)

    def lowered(self) -> LoweredGate:
        """For the fused backends."""
        return LoweredGate(GateCode.CLIP, (-self.epsilon, self.epsilon) * 2)


@dataclass(frozen=True)
class RatioClip:
    """Clip of a ratio to ``[1 - epsilon, 1 + epsilon_high]`` (drift: its log, `Log` chart).

    Args:
        epsilon: offset below 1, in (0, 1).
        epsilon_high: offset above 1, > 0; ``epsilon`` if None.
        sign_aware: clip only from the side that the sign of the advantage names, which is
            ``G A = min(r A, clip(r) A)``. Without it the plain form (Remark C.5).
        dual_clip: where ``A < 0`` also ``G <= dual_clip`` (> 1); sign-aware form only.
    """

    epsilon: float
    epsilon_high: float | None = None
    sign_aware: bool = True
    dual_clip: float | None = None

    def __post_init__(self) -> None:
        check_positive("epsilon", self.epsilon, below=1.0)
        if self.epsilon_high is not None:
            check_positive("epsilon_high", self.epsilon_high)
        if self.dual_clip is not None:
            if not self.sign_aware:
                raise ObjectiveError(
                    f"dual_clip = {self.dual_clip} bounds the side that the plain form already "
                    "clips; use sign_aware=True with it"
                )
            check_positive("dual_clip", self.dual_clip, above=1.0)

    @property
    def needs_advantage(self) -> bool:
        """Only the sign-aware form looks at the sign of the advantage."""
        return self.sign_aware

    def __call__(self, drift: Tensor, site: Site) -> Gated:
        """Clip the log ratio."""
        low_negative, high_negative, low, high = self.lowered().numbers
        if not self.sign_aware:
            return ratio_clip(drift, low, high)
        if site.advantage_sign is None:
            raise ObjectiveError("a sign-aware clip needs the sign of the advantages")
        negative, bound = site.advantage_sign < 0, torch.zeros_like(drift)
        lower = torch.where(negative, bound + low_negative, low)
        return ratio_clip(drift, lower, torch.where(negative, bound + high_negative, high))

    def lowered(self) -> LoweredGate:
        """For the fused backends."""
        low, high = math.log1p(-self.epsilon), math.log1p(self.epsilon_high or self.epsilon)
        if not self.sign_aware:
            return LoweredGate(GateCode.CLIP, (low, high, low, high))
        top = math.inf if self.dual_clip is None else math.log(self.dual_clip)
        return LoweredGate(GateCode.CLIP, (low, top, -math.inf, high))


@dataclass(frozen=True)
class BudgetClip:
    """`budget_clip` over the tokens that share a state.

    Args:
        radius: ``delta`` > 0, in units of ``|r - 1|`` averaged over the state (no factor 1/2).
        states: token label that names the state of each token; a batch without that label treats
            every token as its own state, which is the usual case for language models.
    """

    radius: float
    states: str = "state"
    needs_advantage = False

    def __post_init__(self) -> None:
        check_positive("radius", self.radius)

    def __call__(self, drift: Tensor, site: Site) -> Gated:
        """Clip each token by what the others of its state leave over."""
        if site.total is None or site.multiplicity is None:
            raise ObjectiveError("BudgetClip stands at the token stratum only")
        return budget_clip(drift, site.total, site.multiplicity, self.radius)

    def lowered(self) -> LoweredGate:
        """For the fused backends."""
        return LoweredGate(GateCode.BUDGET, (self.radius,))
