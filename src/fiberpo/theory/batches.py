"""Random batches for the claims that compare the equations here with the library's engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from ..batch import RatioBatch
from .claims import Array, Indices


@dataclass(frozen=True, eq=False)
class Case:
    """Tokens of a batch as arrays.

    Attributes:
        log_ratio, advantage: ``[N]``.
        lengths: tokens of each trajectory.
        labels: per trajectory or per token.
    """

    log_ratio: Array
    advantage: Array
    lengths: Indices
    labels: Mapping[str, Indices] = field(default_factory=dict)

    @property
    def trajectory(self) -> Indices:
        """``[N]`` trajectory of every token."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    @property
    def measure(self) -> Array:
        """``omega_i = 1 / T_tau``."""
        return 1.0 / self.lengths[self.trajectory]

    @property
    def trajectory_mean(self) -> Array:
        """``mu_i = 1 / (|Tj| T_tau)``."""
        return self.measure / len(self.lengths)

    def split(self, values: Array) -> list[Array]:
        """Token values by trajectory."""
        return np.split(values, np.cumsum(self.lengths)[:-1])

    def at_tokens(self, label: str) -> Indices:
        """A label above the trajectory, one entry a token."""
        return self.labels[label][self.trajectory]

    def batch(self, *, grad: bool = False) -> RatioBatch:
        """The same for the engine, in float64; the old log-probs are 0."""
        log_probs = torch.tensor(self.log_ratio, dtype=torch.float64, requires_grad=grad)
        return RatioBatch.from_packed(
            log_probs,
            torch.zeros(len(log_probs), dtype=torch.float64),
            torch.tensor(self.advantage, dtype=torch.float64),
            torch.tensor(self.lengths),
            labels={name: torch.tensor(ids) for name, ids in self.labels.items()},
            token_labels=[name for name in self.labels if name in ("state", "turn")],
        )


def random_case(
    rng: np.random.Generator, *, scale: float = 0.15, trajectories: int = 8, longest: int = 5
) -> Case:
    """Two domains of two groups each, turns of one or two tokens, lengths of 3 to ``longest``.

    Trajectories drift as a whole by ``scale`` and their tokens by half of it, in nats.
    """
    lengths = rng.integers(3, longest + 1, trajectories)
    tokens = int(lengths.sum())
    drift = np.repeat(rng.normal(0, scale, trajectories), lengths)
    group = rng.permutation(np.append(np.arange(4), rng.integers(0, 4, trajectories - 4)))
    steps = np.concatenate([np.arange(n) for n in lengths])
    return Case(
        drift + rng.normal(0, scale / 2, tokens),
        rng.normal(size=tokens),
        lengths,
        {"domain": group // 2, "group": group, "turn": steps // 2},
    )


def single(log_ratio: Array, advantage: float = 1.0) -> Case:
    """One trajectory with a constant advantage."""
    count = len(log_ratio)
    return Case(log_ratio, np.full(count, advantage), np.array([count]))


def directed(rng: np.random.Generator, plus: float, minus: float, length: int) -> Array:
    """Log ratios of one trajectory with ``S+ = plus`` and ``S- = minus``; ``length >= 2``."""
    count = int(rng.integers(1, length))  # tokens of the positive sign
    up, down = rng.dirichlet(np.full(count, 3.0)), rng.dirichlet(np.full(length - count, 3.0))
    ell = np.concatenate([length * plus * up, -length * minus * down])
    return rng.permutation(ell)


__all__ = ["Case", "directed", "random_case", "single"]
