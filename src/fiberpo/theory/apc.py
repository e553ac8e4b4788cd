"""APC-Obj in its three forms, its regimes, the retraction, and its exact maximum.

    token form       G_i = 1 + clip(r_i - 1, B_i),  B_i = T_s delta - sum_{j != i, same s} |r_j - 1|
    pair form        B_{s,a} = T_s (delta - TV_s) + |Delta_{s,a}|        (own copies counted)
    soft threshold   sign(Delta) max(|Delta| - lambda_s, 0),  lambda_s = T_s max(TV_s - delta, 0)

``clip(a, B) = clip(a, -max(B, 0), max(B, 0))``; ``TV_s`` without the factor 1/2.

Reference: *Fibration Policy Optimization*, arXiv 2603.08239, Definitions 3.2 and D.4, Lemma D.9,
Eqs. 61-63.
"""

from __future__ import annotations

import enum
import itertools
import math
from collections.abc import Sequence

import numpy as np

from .claims import Array
from .linear import Row, maximise
from .tabular import Problem, State
from .tvtrpo import largest_gain_lp


class StateRegime(enum.Enum):
    """What is left of the budget of a state for one of its tokens (Eqs. 61-63)."""

    P = "the state's consumption fits its budget"
    R = "overdrawn, but the others alone do not exhaust it"
    Z = "the others alone exhaust it"


def clip(x: Array, bound: Array) -> Array:
    """``clip(a, B) = clip(a, -max(B, 0), max(B, 0))``."""
    size = np.maximum(bound, 0.0)
    return np.clip(x, -size, size)


def token_form(deviation: Array, delta: float) -> Array:
    """Gated deviations of all tokens of one state; each sees what the *others* consume.

    >>> (token_form(np.array([0.3125, -0.0625]), 0.15).round(4) + 0.0).tolist()
    [0.2375, 0.0]
    """
    size = np.abs(deviation)
    out = np.empty_like(deviation)
    for i in range(len(deviation)):
        others = math.fsum(size[j] for j in range(len(deviation)) if j != i)
        out[i] = clip(deviation[i : i + 1], np.array([len(deviation) * delta - others]))[0]
    return out


def pair_form(state: State, deviation: Array, delta: float) -> Array:
    """Gated deviations of the distinct actions of a state, ``n_{s,a}`` copies of each."""
    left = state.total * (delta - state.deviation(deviation))
    return clip(deviation, left + np.abs(deviation))


def soft_threshold(state: State, deviation: Array, delta: float) -> Array:
    """``sign(Delta) max(|Delta| - lambda_s, 0)``."""
    threshold = state.total * max(state.deviation(deviation) - delta, 0.0)
    return np.sign(deviation) * np.maximum(np.abs(deviation) - threshold, 0.0)


def retraction(state: State, deviation: Array, delta: float) -> Array:
    """``G(u)`` made to fulfil the probability constraint again (Lemma D.9)."""
    return state.project(pair_form(state, deviation, delta))


def regimes(state: State, deviation: Array, delta: float) -> list[StateRegime]:
    """Regime of a token of each action."""
    budget, size = state.total * delta, np.abs(deviation)
    consumed = float(state.multiplicity @ size)
    if consumed <= budget:
        return [StateRegime.P] * len(size)
    return [StateRegime.R if consumed - x < budget else StateRegime.Z for x in size]


def objective(problem: Problem, deviations: Sequence[Array], delta: float) -> float:
    """``mean over the sampled tokens of G(Delta) A``."""
    pairs = zip(problem.states, deviations, strict=True)
    return problem.mean([s.mean(s.advantage * pair_form(s, d, delta)) for s, d in pairs])


def best_inside(
    state: State, delta: float, *, lowest: float = -math.inf, constrained: bool = True
) -> tuple[float, Array]:
    """The maximum over ``TV_s <= delta``, where the gate passes: a linear program."""
    return largest_gain_lp(state, delta, lowest=lowest, constrained=constrained)


def best_beyond(
    state: State,
    delta: float,
    *,
    excess: float = 0.0,
    lowest: float = -math.inf,
    constrained: bool = True,
) -> tuple[float, Array]:
    """The maximum over ``TV_s >= (1 + excess) delta``, exactly.

    There the objective is linear on each piece given by the signs of the deviations and by which of
    them exceed ``lambda_s``: one linear program a piece, ``4^actions`` of them.

    Args:
        excess: how far outside the ball to stay, as a fraction of ``delta``.
        lowest: lower bound on every deviation (-1 is ``r >= 0``).
        constrained: with the probability constraint.

    Returns:
        The supremum, ``inf`` included, and where it is (NaN where it is nowhere).
    """
    n, count = state.multiplicity, len(state.multiplicity)
    equal: list[Row] = [(n, 0.0)] if constrained else []
    best, where = -math.inf, np.full(count, np.nan)
    for signs in itertools.product((1.0, -1.0), repeat=count):
        s = np.array(signs)
        # |Delta_a| = s_a Delta_a and lambda = (n s) @ Delta - T delta on this orthant
        ball: Row = (-n * s, -state.total * delta * (1 + excess))
        limits = [
            ((lowest if s_a < 0 else 0.0), (None if s_a > 0 else 0.0)) for s_a in signs
        ]  # the sign of each deviation
        bounds = [(None if low == -math.inf else low, high) for low, high in limits]
        for pattern in itertools.product((True, False), repeat=count):
            rows: list[Row] = [ball]
            value, offset = np.zeros(count), 0.0
            for a, active in enumerate(pattern):
                over = s[a] * np.eye(count)[a] - n * s  # |Delta_a| - lambda, less T delta
                rows.append(
                    (-over, state.total * delta) if active else (over, -state.total * delta)
                )
                if active:
                    weight = n[a] * state.advantage[a] * s[a] / state.total
                    value, offset = value + weight * over, offset + weight * state.total * delta
            found = maximise(value, at_most=rows, equal=equal, bounds=bounds)
            if found is not None and found[0] + offset > best:
                best, where = found[0] + offset, found[1]
    return best, where


def maximise_state(
    state: State, delta: float, *, lowest: float = -math.inf, constrained: bool = True
) -> tuple[float, Array]:
    """The maximum of APC-Obj over the deviations of one state, exactly.

    Where nothing outside the ball is better by 1e-9 the maximizer inside is taken.
    """
    inside = best_inside(state, delta, lowest=lowest, constrained=constrained)
    beyond = best_beyond(state, delta, lowest=lowest, constrained=constrained)
    return beyond if beyond[0] > inside[0] + 1e-9 else inside


def solve(
    problem: Problem, delta: float, *, lowest: float = -math.inf, constrained: bool = True
) -> list[Array]:
    """The update of APC-Obj with radius ``delta``: it separates over the states."""
    return [
        maximise_state(s, delta, lowest=lowest, constrained=constrained)[1] for s in problem.states
    ]


__all__ = [
    "StateRegime", "best_beyond", "best_inside", "clip", "maximise_state", "objective",
    "pair_form", "regimes", "retraction", "soft_threshold", "solve", "token_form",
]  # fmt: skip
