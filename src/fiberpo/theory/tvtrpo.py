"""Sample-based TV-TRPO, solved exactly: in closed form, and by linear programs as a check.

Over ratio deviations ``Delta = r - 1`` with ``sum_a n_{s,a} Delta_{s,a} = 0`` in every state,

    maximise   1/(1 - gamma) mean_s (1/T_s) sum_a n Delta A  -  penalty (max_s TV_s)^2
    penalty =  4 gamma ||A||_inf / (1 - gamma)^2,     TV_s = (1/T_s) sum_a n |Delta|  (no 1/2)

with states weighed by ``T_s``. ``M(s)`` is the largest gain at ``TV_s = 1``, ``M`` its mean; then
``Delta* = t* Delta_hat`` with ``t* = (1 - gamma) M / (8 gamma ||A||_inf)``.

Reference: *Fibration Policy Optimization*, arXiv 2603.08239, Definition D.1, Theorem D.3, Eq. 76.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..errors import TheoryError
from .claims import Array
from .linear import Row, maximise
from .tabular import Problem, State

TIE = 1e-12
"""Advantages closer than this count as equal."""


def penalty(problem: Problem) -> float:
    """``4 gamma ||A||_inf / (1 - gamma)^2``."""
    return 4 * problem.gamma * problem.advantage_bound / (1 - problem.gamma) ** 2


def objective(problem: Problem, deviations: Sequence[Array]) -> float:
    """The penalised surrogate at one deviation vector a state (Definition D.1)."""
    pairs = list(zip(problem.states, deviations, strict=True))
    gain = problem.mean([s.mean(d * s.advantage) for s, d in pairs]) / (1 - problem.gamma)
    return gain - penalty(problem) * max(s.deviation(d) for s, d in pairs) ** 2


def largest_gain(state: State) -> float:
    """``M(s) = (max_a A - min_a A) / 2``: mass 1/2 goes from the worst to the best action."""
    return float(state.advantage.max() - state.advantage.min()) / 2


def direction(state: State) -> Array:
    """``Delta_hat``: the deviation with ``TV_s = 1`` that gains ``M(s)``.

    ``T_s / (2 n)`` onto the best action and off the worst. Among several best or worst ones it is
    spread evenly over their tokens, which has the smallest norm over the sampled tokens; where all
    advantages are equal nothing is gained and it is 0.
    """
    a, n = state.advantage, state.multiplicity
    out = np.zeros_like(a)
    if a.max() - a.min() <= TIE:
        return out
    best, worst = a >= a.max() - TIE, a <= a.min() + TIE
    out[best] = state.total / (2 * n[best].sum())
    out[worst] = -state.total / (2 * n[worst].sum())
    return out


def gain(problem: Problem) -> float:
    """``M``, the mean of ``M(s)`` weighed by ``T_s``."""
    return problem.mean([largest_gain(state) for state in problem.states])


def radius(problem: Problem) -> float:
    """``t* = (1 - gamma) M / (8 gamma ||A||_inf)``; 0 where nothing can be gained."""
    if problem.advantage_bound == 0:
        return 0.0
    return (1 - problem.gamma) * gain(problem) / (8 * problem.gamma * problem.advantage_bound)


def largest_radius(gamma: float) -> float:
    """``(1 - gamma) / (8 gamma)``: TRPO's radius, in units of TV without the 1/2 (Eq. 76).

    >>> round(largest_radius(0.99), 6)
    0.001263
    """
    return (1 - gamma) / (8 * gamma)


def solve(problem: Problem) -> list[Array]:
    """``Delta* = t* Delta_hat``, in closed form (Theorem D.3)."""
    t = radius(problem)
    return [t * direction(state) for state in problem.states]


def largest_gain_lp(
    state: State, radius: float = 1.0, *, lowest: float = -math.inf, constrained: bool = True
) -> tuple[float, Array]:
    """Largest ``(1/T_s) sum_a n Delta A`` with ``TV_s <= radius``, as a linear program.

    Args:
        radius: bound on ``TV_s``, without the 1/2.
        lowest: lower bound on every ``Delta`` (-1 is ``r >= 0``), at most 0.
        constrained: with the probability constraint ``sum_a n Delta = 0``.

    Returns:
        The gain and a maximizing ``Delta``.
    """
    share, count = state.multiplicity / state.total, len(state.advantage)
    split = np.concatenate([np.eye(count), -np.eye(count)], axis=1)  # Delta = up - down
    equal: list[Row] = [(share @ split, 0.0)] if constrained else []
    down = None if math.isinf(lowest) else -lowest
    found = maximise(
        (share * state.advantage) @ split,
        at_most=[(np.concatenate([share, share]), radius)],
        equal=equal,
        bounds=[(0.0, None)] * count + [(0.0, down)] * count,
    )
    if found is None:
        raise TheoryError(f"no deviation fits TV_s <= {radius} and Delta >= {lowest}")
    return found[0], split @ found[1]


def solve_numerically(
    problem: Problem, *, lowest: float = -math.inf, constrained: bool = True
) -> list[Array]:
    """The maximizer without the closed form: linear programs inside a search over ``max_s TV_s``.

    Arguments as in `largest_gain_lp`. The search is over a concave function of one number.
    """

    def best(t: float) -> list[tuple[float, Array]]:
        return [
            largest_gain_lp(s, t, lowest=lowest, constrained=constrained) for s in problem.states
        ]

    def value(t: float) -> float:
        linear = problem.mean([found for found, _ in best(t)]) / (1 - problem.gamma)
        return linear - penalty(problem) * t**2

    low, high = 0.0, 2 * largest_radius(problem.gamma)  # no gain per unit of TV exceeds ||A||
    section = (math.sqrt(5) - 1) / 2
    left, right = high - section * (high - low), low + section * (high - low)
    at_left, at_right = value(left), value(right)
    while high - low > 1e-9 * largest_radius(problem.gamma):
        if at_left < at_right:
            low, left, at_left = left, right, at_right
            right = low + section * (high - low)
            at_right = value(right)
        else:
            high, right, at_right = right, left, at_left
            left = high - section * (high - low)
            at_left = value(left)
    return [found for _, found in best((low + high) / 2)]


__all__ = [
    "direction", "gain", "largest_gain", "largest_gain_lp", "largest_radius", "objective",
    "penalty", "radius", "solve", "solve_numerically",
]  # fmt: skip
