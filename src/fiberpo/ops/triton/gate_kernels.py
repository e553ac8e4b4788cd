"""Device functions: the gates of `fiberpo.ops.plan`, value and slope, codes fixed when compiled."""

from __future__ import annotations

import triton
import triton.language as tl

PASS = tl.constexpr(0)
ZERO = tl.constexpr(1)
CLIP = tl.constexpr(2)
AGGREGATE = tl.constexpr(3)
SOFT = tl.constexpr(4)
QUADRATIC = tl.constexpr(5)
ROLLBACK = tl.constexpr(6)
TAPER = tl.constexpr(7)
BUDGET = tl.constexpr(8)
STOP = tl.constexpr(9)


@triton.jit
def aggregate(x, budget, slope):
    """``g(x, C, k)``, Eq. 10."""
    size = tl.abs(x)
    passing = size <= budget
    rolling = size < (1.0 + 1.0 / slope) * budget
    height = (slope + 1.0) * tl.where(budget == float("inf"), 0.0, budget)
    rolled = tl.where(x < 0, -height, height) - slope * x
    value = tl.where(passing, x, tl.where(rolling, rolled, 0.0))
    return value, tl.where(passing, 1.0, tl.where(rolling, -slope, 0.0))


@triton.jit
def plain_gate(
    x,
    advantage,
    count,
    n0,
    n1,
    n2,
    n3,
    CODE: tl.constexpr,
    VALUE: tl.constexpr,
    SLOPE: tl.constexpr,
):
    """Every gate but `AGGREGATE`; ``BUDGET`` of tokens that are states of their own.

    Comparisons are float64; values and slopes come in the dtypes ``VALUE`` and ``SLOPE``.
    """
    one = tl.full(x.shape, 1.0, tl.float64)
    value = x.to(VALUE)
    slope = tl.full(x.shape, 1.0, SLOPE)
    if CODE == ZERO:
        value = tl.zeros(x.shape, VALUE)
        slope = tl.zeros(x.shape, SLOPE)
    elif CODE == CLIP:
        low = tl.where(advantage < 0, n0, n2)
        high = tl.where(advantage < 0, n1, n3)
        slope = tl.where((x < low) | (x > high), 0.0, slope)
        value = tl.minimum(tl.maximum(value, low.to(VALUE)), high.to(VALUE))
    elif CODE == SOFT:
        tau = tl.where(advantage > 0, n0, n1)
        small = tl.exp(-tl.abs(tau * x))  # the exponent is never positive: nothing overflows
        near = 1.0 / (1.0 + small)
        value = (4.0 / tau * tl.where(x >= 0, near, small * near) - 1.0).to(VALUE)
        slope = (4.0 * small * near * near).to(SLOPE)
    elif CODE == QUADRATIC:
        bend = tl.where(advantage > 0, 1.0, tl.where(advantage < 0, -1.0, 0.0)) / n0
        bent = tl.where(bend == 0.0, 0.0, bend * x)
        value = (x * (1.0 - 0.5 * bent)).to(VALUE)
        slope = (one - bent).to(SLOPE)
    elif CODE == ROLLBACK:
        beyond = tl.where(advantage < 0, x < -n0, x > n0)
        turn = tl.where(advantage < 0, -(1.0 + n1) * n0, (1.0 + n1) * n0)
        value = (tl.where(beyond, turn - n1 * x, x)).to(VALUE)
        slope = (tl.where(beyond, -n1, one)).to(SLOPE)
    elif CODE == TAPER:
        passing = (advantage < 0) & (x <= 0)
        value = (tl.where(passing, count * x, 0.0)).to(VALUE)
        slope = (tl.where(passing, count * one, 0.0)).to(SLOPE)
    elif CODE == BUDGET:
        value = (tl.where(x > n0, n0, tl.where(x < -n0, -n0, x))).to(VALUE)
        slope = (tl.where(tl.abs(x) > n0, 0.0, one)).to(SLOPE)
    return value, slope


@triton.jit
def token_gate(
    x, side, advantage, numbers, CODE: tl.constexpr, VALUE: tl.constexpr, SLOPE: tl.constexpr
):
    """The gate of a token; ``numbers`` points at four float64, ``side`` says which budget."""
    n0 = tl.load(numbers)
    n1 = tl.load(numbers + 1)
    n2 = tl.load(numbers + 2)
    if CODE == AGGREGATE:
        value, slope = aggregate(x, tl.where(side, n0, n1), n2)
        value = value.to(VALUE)
        slope = slope.to(SLOPE)
    else:
        n3 = tl.load(numbers + 3)
        value, slope = plain_gate(x, advantage, 1.0, n0, n1, n2, n3, CODE, VALUE, SLOPE)
    return value, slope


@triton.jit
def context_gate(
    x, c, mask, budget, slope, sign, count, numbers, contexts,
    CODE: tl.constexpr, CHANNEL: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    """The gate of contexts ``c``; ``numbers`` points at the four float64 of their stratum.

    ``x`` is the drift, of `STOP` the aggregate itself.
    """
    if CODE == STOP:
        value = (x > tl.load(budget + CHANNEL * contexts + c, mask=mask, other=0.0)).to(tl.float64)
        passed = tl.zeros(x.shape, tl.float64)
    elif CODE == AGGREGATE:
        k = tl.load(slope + c, mask=mask, other=1.0)
        if ONE:
            plus = tl.load(budget + c, mask=mask, other=0.0)
            minus = tl.load(budget + contexts + c, mask=mask, other=0.0)
            value, passed = aggregate(x, tl.where(x >= 0, plus, minus), k)
        else:
            bound = tl.load(budget + CHANNEL * contexts + c, mask=mask, other=0.0)
            value, passed = aggregate(x, bound, k)
    else:
        n0 = tl.load(numbers)
        n1 = tl.load(numbers + 1)
        n2 = tl.load(numbers + 2)
        n3 = tl.load(numbers + 3)
        advantage = tl.load(sign + c, mask=mask, other=0.0)
        below = tl.load(count + c, mask=mask, other=1.0)
        value, passed = plain_gate(
            x, advantage, below, n0, n1, n2, n3, CODE, tl.float64, tl.float64
        )
    return value, passed


__all__ = ["aggregate", "context_gate", "plain_gate", "token_gate"]
