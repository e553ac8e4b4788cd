"""Tabular problems: sampled states with multiplicities and advantages; Markov decision processes.

Reference: *Fibration Policy Optimization*, arXiv 2603.08239, App. D (sampled problems), Thm 2.1;
*Trust Region Policy Optimization*, arXiv 1502.05477 (the improvement bound).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import TheoryError
from .claims import Array


@dataclass(frozen=True, eq=False)
class State:
    """One sampled state.

    Args:
        multiplicity: ``n_{s,a} > 0``, how often each action was sampled (integers in the papers).
        advantage: ``A_{s,a}``.

    Raises:
        TheoryError: for shapes that differ, no action, or a multiplicity that is not > 0.
    """

    multiplicity: Array
    advantage: Array

    def __post_init__(self) -> None:
        n = np.asarray(self.multiplicity, dtype=np.float64)
        a = np.asarray(self.advantage, dtype=np.float64)
        if n.ndim != 1 or not len(n) or n.shape != a.shape:
            raise TheoryError(
                f"a state has multiplicities of shape {n.shape} and advantages of shape {a.shape}; "
                "give one number of each per sampled action"
            )
        if not (n > 0).all():
            raise TheoryError(f"multiplicities are {n.tolist()}; a sampled pair has n > 0")
        object.__setattr__(self, "multiplicity", n)
        object.__setattr__(self, "advantage", a)

    @property
    def total(self) -> float:
        """``T_s = sum_a n_{s,a}``."""
        return float(self.multiplicity.sum())

    def mean(self, values: Array) -> float:
        """``(1 / T_s) sum_a n_{s,a} values_a``: the mean over the sampled tokens."""
        return float(self.multiplicity @ values) / self.total

    def project(self, deviation: Array) -> Array:
        """The nearest deviation with ``sum_a n_{s,a} Delta_{s,a} = 0`` (probability constraint)."""
        return deviation - self.mean(deviation)

    def deviation(self, values: Array) -> float:
        """``TV_s = (1 / T_s) sum_a n_{s,a} |values_a|``, without the factor 1/2."""
        return self.mean(np.abs(values))

    def centred(self) -> State:
        """The same state with ``sum_a n_{s,a} A_{s,a} = 0``."""
        return State(self.multiplicity, self.project(self.advantage))


@dataclass(frozen=True, eq=False)
class Problem:
    """A sampled problem: states and a discount in (0, 1)."""

    states: tuple[State, ...]
    gamma: float

    def __post_init__(self) -> None:
        if not 0 < self.gamma < 1:
            raise TheoryError(f"gamma is {self.gamma}; it must be in (0, 1)")
        if not self.states:
            raise TheoryError("a problem needs at least one state")

    @property
    def total(self) -> float:
        """Sampled tokens of all states."""
        return sum(state.total for state in self.states)

    @property
    def advantage_bound(self) -> float:
        """``||A||_inf``."""
        return max(float(np.abs(state.advantage).max()) for state in self.states)

    def mean(self, values: Sequence[float]) -> float:
        """Mean of one number a state, weighed by ``T_s``."""
        weighted = (s.total * v for s, v in zip(self.states, values, strict=True))
        return sum(weighted) / self.total


def random_problem(
    rng: np.random.Generator, *, states: int = 2, actions: int = 3, most: int = 5
) -> Problem:
    """Integer multiplicities in 1..most, centred advantages, 2..actions actions a state."""
    made = []
    for _ in range(states):
        count = int(rng.integers(2, actions + 1))
        n = rng.integers(1, most + 1, count).astype(np.float64)
        made.append(State(n, rng.normal(size=count)).centred())
    return Problem(tuple(made), float(rng.uniform(0.2, 0.95)))


@dataclass(frozen=True, eq=False)
class MDP:
    """A finite Markov decision process.

    Args:
        transition: ``[S, A, S]``, rows sum to 1.
        reward: ``[S, A]``.
        start: ``[S]``, sums to 1.
        gamma: discount in (0, 1).
    """

    transition: Array
    reward: Array
    start: Array
    gamma: float

    def value(self, policy: Array) -> Array:
        """``V(s)`` of a policy ``[S, A]``."""
        chain = np.einsum("sa,sat->st", policy, self.transition)
        gain = (policy * self.reward).sum(1)
        return np.linalg.solve(np.eye(len(gain)) - self.gamma * chain, gain)

    def performance(self, policy: Array) -> float:
        """``eta = E[sum_t gamma^t R_t]``."""
        return float(self.start @ self.value(policy))

    def advantage(self, policy: Array) -> Array:
        """``A(s, a) = Q(s, a) - V(s)``."""
        value = self.value(policy)
        return self.reward + self.gamma * self.transition @ value - value[:, None]

    def visitation(self, policy: Array) -> Array:
        """Discounted state frequencies ``sum_t gamma^t P(s_t = s)``; they sum to 1/(1 - gamma)."""
        chain = np.einsum("sa,sat->st", policy, self.transition)
        return np.linalg.solve((np.eye(len(chain)) - self.gamma * chain).T, self.start)

    def surrogate(self, new: Array, old: Array) -> float:
        """``sum_s d(s) sum_a new(a|s) A_old(s, a)``: the linear improvement."""
        return float(self.visitation(old) @ (new * self.advantage(old)).sum(1))

    def population(self, policy: Array) -> Problem:
        """Every pair with multiplicity ``d(s) pi(a|s)``: the sampled problem of infinitely many."""
        frequency, advantage = self.visitation(policy), self.advantage(policy)
        pairs = zip(frequency, policy, advantage, strict=True)
        return Problem(tuple(State(d * row, a) for d, row, a in pairs), self.gamma)


def random_mdp(rng: np.random.Generator, states: int, actions: int, gamma: float) -> MDP:
    """Dirichlet transitions and start, normal rewards."""
    return MDP(
        rng.dirichlet(np.ones(states), size=(states, actions)),
        rng.normal(size=(states, actions)),
        rng.dirichlet(np.ones(states)),
        gamma,
    )


__all__ = ["MDP", "Problem", "State", "random_mdp", "random_problem"]
