"""A language small enough to enumerate: two policies over a few contexts, with an end token.

Used to compare divergences in their definition with what samples estimate.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .claims import Array, Indices

END = 0
"""The token that ends a trajectory."""


@dataclass(frozen=True, eq=False)
class Walks:
    """Tokens of trajectories: all possible ones with their probability, or a sample.

    Attributes:
        state, action, trajectory: ``[N]`` per token.
        probability: ``[trajectories]``, sums to 1; ``1 / count`` for a sample.
    """

    state: Indices
    action: Indices
    trajectory: Indices
    probability: Array

    @property
    def lengths(self) -> Array:
        """Tokens of each trajectory."""
        return np.bincount(self.trajectory, minlength=len(self.probability)).astype(np.float64)


@dataclass(frozen=True, eq=False)
class Language:
    """Two policies over the same contexts.

    Args:
        old, new: ``[states, vocabulary]`` token probabilities; trajectories come from ``old``.
        following: ``[states, vocabulary]`` the context after each token.
        horizon: longest trajectory, in tokens.
    """

    old: Array
    new: Array
    following: Indices
    horizon: int

    @property
    def ratio(self) -> Array:
        """``new / old``; 1 where neither has mass."""
        return np.divide(self.new, self.old, out=np.ones_like(self.old), where=self.old > 0)

    def enumerate(self) -> Walks:
        """Every trajectory with its probability under ``old``."""
        state: list[int] = []
        action: list[int] = []
        trajectory: list[int] = []
        probability: list[float] = []
        open_ends: list[tuple[list[int], list[int], int, float]] = [([], [], 0, 1.0)]
        while open_ends:
            states, actions, here, mass = open_ends.pop()
            for token, p in enumerate(self.old[here]):
                if p == 0:
                    continue
                path = ([*states, here], [*actions, token])
                if token == END or len(path[0]) == self.horizon:
                    state += path[0]
                    action += path[1]
                    trajectory += [len(probability)] * len(path[0])
                    probability.append(mass * p)
                else:
                    open_ends.append((*path, int(self.following[here, token]), mass * p))
        return Walks(np.array(state), np.array(action), np.array(trajectory), np.array(probability))

    def sample(self, count: int, rng: np.random.Generator) -> Walks:
        """``count`` independent trajectories from ``old``."""
        cumulative = self.old.cumsum(1)
        here, alive = np.zeros(count, dtype=np.int64), np.arange(count)
        parts = []
        for _ in range(self.horizon):
            draws = rng.random(len(alive))[:, None] > cumulative[here]
            token = np.minimum(draws.sum(1), self.old.shape[1] - 1)
            parts.append((here, token, alive))
            going = token != END
            here, alive = self.following[here, token][going], alive[going]
        state, action, trajectory = (np.concatenate(p) for p in zip(*parts, strict=True))
        order = np.argsort(trajectory, kind="stable")
        return Walks(
            state[order], action[order], trajectory[order], np.full(count, 1 / count)
        )  # fmt: skip


def random_language(
    rng: np.random.Generator, *, states: int = 3, vocabulary: int = 3, horizon: int = 4
) -> Language:
    """Dirichlet policies; ``new`` is ``old`` with normal noise on its logits."""
    old = rng.dirichlet(np.full(vocabulary, 3.0), size=states)
    logits = np.log(old) + rng.uniform(0.1, 0.6) * rng.normal(size=old.shape)
    new = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    following = rng.integers(0, states, size=old.shape)
    return Language(old, new, following, horizon)


__all__ = ["END", "Language", "Walks", "random_language"]
