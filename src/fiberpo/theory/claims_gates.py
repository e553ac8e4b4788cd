"""Claims on the atomic gates (FiberPO, Eqs. 10 and 12)."""

from __future__ import annotations

import numpy as np
import torch

from ..gates import aggregate_gate as engine_gate
from ..gates import log_clip as engine_clip
from . import gates
from .claims import Array, Claim, Finding, Verdict, judge


def _draw(rng: np.random.Generator, count: int) -> tuple[Array, Array, Array]:
    """Drifts over all three pieces, budgets, token counts."""
    budget, k = rng.uniform(0.01, 0.5, count), rng.integers(1, 200, count).astype(np.float64)
    inside = rng.uniform(0, 1, count) * budget
    zone = (1 + rng.uniform(0, 1, count) / k) * budget
    beyond = (1 + 1 / k) * budget * rng.uniform(1, 3, count)
    x = np.choose(rng.integers(0, 3, count), [inside, zone, beyond])
    return x * rng.choice([-1.0, 1.0], count), budget, k


def aggregate(rng: np.random.Generator) -> Finding:
    """Odd, continuous at both corners, slopes 1, -k, 0; and the library's gate."""
    tried, step = 3000, 1e-9
    x, budget, k = _draw(rng, tried)
    value = gates.aggregate_gate(x, budget, k)
    worst = float(np.abs(value + gates.aggregate_gate(-x, budget, k)).max())
    for corner in (budget, (1 + 1 / k) * budget):
        jump = gates.aggregate_gate(corner * (1 + step), budget, k) - gates.aggregate_gate(
            corner * (1 - step), budget, k
        )
        worst = max(worst, float((np.abs(jump) / ((k + 1) * 2 * step * corner)).max()) - 1 - 1e-6)
    theirs = engine_gate(torch.tensor(x), torch.tensor(budget), torch.tensor(k))
    worst = max(worst, float(np.abs(theirs.value.numpy() - value).max()))
    slope = gates.aggregate_slope(x, budget, k)
    worst = max(worst, float(np.abs(theirs.slope.numpy() - slope).max()))
    # the slope is that of the values, by differences inside a piece
    up, down = x * (1 + 1e-7), x * (1 - 1e-7)
    smooth = gates.aggregate_slope(up, budget, k) == gates.aggregate_slope(down, budget, k)
    rise = gates.aggregate_gate(up, budget, k) - gates.aggregate_gate(down, budget, k)
    error = np.abs(rise / (2e-7 * np.where(x == 0, 1, x)) - slope) / (1 + k)
    worst = max(worst, float(error[smooth].max()) - 1e-6)
    exact = engine_gate(torch.tensor([0.25]), torch.tensor([0.25]), torch.tensor([4.0]))
    worst = max(worst, float(exact.regime[0]))  # |x| = C passes
    return judge(
        tried, max(worst, 0.0), 1e-12, note="odd, continuous, slopes 1, -k, 0; |x| = C passes"
    )


def compact(rng: np.random.Generator) -> Finding:
    """``clip(x, +-max((k + 1) C - k |x|, 0))`` against the three pieces."""
    tried = 3000
    x, budget, k = _draw(rng, tried)
    gap = gates.aggregate_gate_compact(x, budget, k) - gates.aggregate_gate(x, budget, k)
    return judge(tried, float(np.abs(gap).max()), 1e-12)


def compact_gradient(rng: np.random.Generator) -> Finding:
    """Autograd of the compact form, away from the corners and at ``|x| = C``."""
    tried = 500
    x, budget, k = _draw(rng, tried)
    near = np.minimum(np.abs(np.abs(x) - budget), np.abs(np.abs(x) - (1 + 1 / k) * budget))
    found, _ = _autograd(x, budget, k)
    error = np.abs(found - gates.aggregate_slope(x, budget, k))
    at_minimum, at_clamp = (
        slope[0] for slope in _autograd(*map(np.array, ([0.25], [0.25], [4.0])))
    )
    broken = None
    if abs(at_minimum - 1) > 0.1:
        broken = (
            f"at |x| = C, k = 4, its slope is {at_minimum:g} by minimum/maximum, {at_clamp:g} by "
            "clamp; Eq. 10 says 1"
        )
    worst = float(error[near > 1e-9].max())
    return judge(tried, worst, 1e-12, broken=broken, note="away from the corners")


def _autograd(x: Array, budget: Array, k: Array) -> tuple[Array, Array]:
    """Slopes of the compact form in its two usual spellings."""
    slopes = []
    for clamp in (False, True):
        point = torch.tensor(x, requires_grad=True)
        c, n = torch.tensor(budget), torch.tensor(k)
        bound = ((n + 1) * c - n * point.abs()).clamp(min=0)
        value = (
            torch.clamp(point, -bound, bound)
            if clamp
            else torch.maximum(torch.minimum(point, bound), -bound)
        )
        value.sum().backward()
        assert point.grad is not None
        slopes.append(point.grad.numpy())
    return slopes[0], slopes[1]


def log_clip(rng: np.random.Generator) -> Finding:
    """``exp(clip(log x))`` is a clip of the ratio to ``[exp(-e), exp(e)]``."""
    tried, epsilon = 1000, 0.04
    x = rng.normal(0, 0.1, tried)
    mine = gates.log_clip(x, epsilon)
    worst = float(np.abs(np.exp(mine) - np.clip(np.exp(x), *np.exp([-epsilon, epsilon]))).max())
    theirs = engine_clip(torch.tensor(x), epsilon)
    worst = max(worst, float(np.abs(theirs.value.numpy() - mine).max()))
    edge = engine_clip(torch.tensor([epsilon, -epsilon], dtype=torch.float64), epsilon)
    worst = max(worst, float(edge.regime.max()))  # |u| = epsilon is unsaturated
    return judge(tried, worst, 1e-12, note="|u| = epsilon is unsaturated")


def zone(rng: np.random.Generator) -> Finding:
    """Where the slope is negative, on a fine grid; the share of drifts that land there."""
    worst, tried, budget, reach = 0.0, 0, 0.12, 0.3
    shares = {}
    for k in (1, 10, 32, 100, 1000):
        x = np.linspace(0, reach, 3_000_001)
        rolling = x[gates.aggregate_slope(x, budget, float(k)) < 0]
        width = float(rolling[-1] - rolling[0])
        worst = max(worst, abs(width - budget / k))
        shares[k] = len(rolling) / len(x)
        tried += 1
    note = (
        f"of drifts spread over 0 to {reach}, {100 * shares[10]:.1f} % roll back at T = 10, "
        f"{100 * shares[1000]:.2f} % at T = 1000: there hardly a step lands in the zone"
    )
    return judge(tried, worst, 1e-6, note=note)


CLAIMS = (
    Claim(
        "aggregate gate", "FiberPO, Eq. 10",
        "The gate is odd and continuous, with three pieces: pass, roll back with slope -k, zero.",
        aggregate, Verdict.HOLDS,
    ),
    Claim(
        "compact form of the gate", "FiberPO, Eq. 10",
        "g(x, C, k) = clip(x, +-max((k + 1) C - k |x|, 0)).",
        compact, Verdict.HOLDS,
    ),
    Claim(
        "gradient of the compact form", "FiberPO, Eq. 10",
        "Differentiating the compact form gives the slope of the gate.",
        compact_gradient, Verdict.CONDITIONAL,
    ),
    Claim(
        "log clip", "FiberPO, Eq. 12",
        "clip(log r, +-e) clips the ratio to [exp(-e), exp(e)].",
        log_clip, Verdict.HOLDS,
    ),
    Claim(
        "rollback zone", "FiberPO, Eq. 10 and Def 5.1",
        "The zone in which a drift is rolled back is C / k wide, k = T.",
        zone, Verdict.HOLDS,
    ),
)  # fmt: skip
