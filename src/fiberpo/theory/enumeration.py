"""Every sequence of a tiny vocabulary: exact values, divergences and the worst rewards.

A policy over ``V`` words and ``T`` tokens is one table a position, a row for each context: that of
position t = 0 .. T-1 is ``[V^t, V]``. Sequences are numbered in base ``V``, first token first, and
arrays over them are ``[V^T]``. A sequence that ends early is one of ``T`` tokens whose rest both
policies say with probability 1.

Reference: *Trust Region Masking for Long-Horizon LLM Reinforcement Learning*, arXiv 2512.23075.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import BoundError
from .bounds import Bounds, bounds

Array = NDArray[np.float64]

MOST = 100_000
"""Sequences that are enumerated at most."""


def _softmax(logits: Array) -> Array:
    weights = np.exp(logits - logits.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True)


@dataclass(frozen=True, eq=False)
class Policy:
    """A policy as tables: ``tables[t]`` is ``[V^t, V]``, rows sum to 1.

    Raises:
        BoundError: for tables of another shape or rows that are no distributions.

    >>> coin = Policy((np.array([[0.5, 0.5]]), np.array([[0.9, 0.1], [0.5, 0.5]])))
    >>> coin.sequences.tolist()
    [0.45, 0.05, 0.25, 0.25]
    """

    tables: tuple[Array, ...]

    def __post_init__(self) -> None:
        if not self.tables:
            raise BoundError("a policy without tables; it has one for each of its T >= 1 tokens")
        words = self.tables[0].shape[-1]
        if words ** len(self.tables) > MOST:
            raise BoundError(
                f"{words} words and {len(self.tables)} tokens make more than {MOST} sequences"
            )
        for t, table in enumerate(self.tables):
            if table.shape != (words**t, words):
                raise BoundError(
                    f"tables[{t}] has shape {table.shape}; for {words} words it is "
                    f"{(words**t, words)}, a row for each context"
                )
            off = ~((table >= 0).all(1) & (abs(table.sum(1) - 1) <= 1e-9))
            if off.any():
                row = int(off.argmax())
                raise BoundError(
                    f"tables[{t}][{row}] is {table[row].tolist()}; a distribution is >= 0 and sums "
                    "to 1"
                )

    @classmethod
    def from_logits(cls, logits: Sequence[Array]) -> Policy:
        """Softmax of each row."""
        return cls(tuple(_softmax(rows) for rows in logits))

    @classmethod
    def random(
        cls, rng: np.random.Generator, words: int, length: int, spread: float = 1.0
    ) -> Policy:
        """Independent normal logits of standard deviation ``spread``."""
        return cls.from_logits(random_logits(rng, words, length, spread))

    @property
    def words(self) -> int:
        """``V``."""
        return self.tables[0].shape[1]

    @property
    def length(self) -> int:
        """``T``."""
        return len(self.tables)

    @cached_property
    def prefixes(self) -> tuple[Array, ...]:
        """Probabilities of all prefixes of 0, 1, .. ``T`` tokens: ``[V^t]`` each."""
        out = [np.ones(1)]
        for table in self.tables:
            out.append((out[-1][:, None] * table).ravel())
        return tuple(out)

    @property
    def sequences(self) -> Array:
        """Probabilities of all sequences, ``[V^T]``."""
        return self.prefixes[-1]


def random_logits(
    rng: np.random.Generator, words: int, length: int, spread: float = 1.0
) -> list[Array]:
    """Tables of normal numbers, ``[V^t, V]`` for each position."""
    return [spread * rng.standard_normal((words**t, words)) for t in range(length)]


@dataclass(frozen=True, eq=False)
class Pair:
    """The policy that sampled and the policy being trained, with everything exact.

    Where ``roll`` says a word with probability 0, ``theta`` must too: no ratio exists there.

    Raises:
        BoundError: for policies of different shape, or words that only ``theta`` says.
    """

    roll: Policy
    theta: Policy

    def __post_init__(self) -> None:
        shapes = [(p.words, p.length) for p in (self.roll, self.theta)]
        if shapes[0] != shapes[1]:
            raise BoundError(f"policies of (words, length) {shapes[0]} and {shapes[1]}")
        if bool((self.theta.sequences[self.roll.sequences == 0] > 0).any()):
            raise BoundError("theta says a sequence that roll never samples: its ratio is infinite")

    @cached_property
    def ratios(self) -> Array:
        """``rho_t`` of every sequence, ``[T, V^T]``; 1 in contexts that are never reached."""
        out = []
        words, length = self.roll.words, self.roll.length
        for t, (p, q) in enumerate(zip(self.roll.tables, self.theta.tables, strict=True)):
            ratio = np.divide(q, p, out=np.ones_like(p), where=p > 0)
            out.append(np.repeat(ratio.ravel(), words ** (length - t - 1)))
        return np.stack(out)

    def gain(self, rewards: Array) -> float:
        """``J(theta) - J(roll)``, from the probabilities of the sequences."""
        return float(((self.theta.sequences - self.roll.sequences) * rewards).sum())

    def surrogate(self, rewards: Array) -> float:
        """``L' = E_roll[R sum_t (rho_t - 1)]``."""
        return float((self.roll.sequences * rewards * (self.ratios - 1).sum(0)).sum())

    def error(self, rewards: Array) -> float:
        """``J(theta) - J(roll) - L'``."""
        return self.gain(rewards) - self.surrogate(rewards)

    def error_by_identity(self, rewards: Array) -> float:
        """``-E_roll[R sum_t (rho_t - 1)(1 - prod_{j>t} rho_j)]``, the same number another way."""
        after = np.ones(self.ratios.shape[1])
        total = np.zeros_like(after)
        for ratio in self.ratios[::-1]:
            total += (ratio - 1) * (1 - after)
            after = after * ratio
        return -float((self.roll.sequences * rewards * total).sum())

    @cached_property
    def error_coefficients(self) -> Array:
        """``k(y)`` with ``Error = sum_y k(y) R(y)``, ``[V^T]``; they sum to 0."""
        return (
            self.theta.sequences
            - self.roll.sequences
            - self.roll.sequences * (self.ratios - 1).sum(0)
        )

    def worst_rewards(self) -> tuple[Array, Array]:
        """Rewards in [0, 1] with the largest and the smallest error: 1 by the sign of ``k``."""
        k = self.error_coefficients
        return (k > 0).astype(np.float64), (k < 0).astype(np.float64)

    @cached_property
    def worst_error(self) -> float:
        """``max |Error|`` over all rewards in [0, 1]; the same in both directions."""
        return float(self.error_coefficients.clip(min=0).sum())

    @cached_property
    def reached(self) -> tuple[NDArray[np.bool_], ...]:
        """Contexts of each position that ``roll`` reaches, ``[V^t]``."""
        return tuple(prefix > 0 for prefix in self.roll.prefixes[:-1])

    @cached_property
    def token_tv(self) -> tuple[Array, ...]:
        """``TV(c)`` of every context, ``[V^t]`` for each position."""
        tables = zip(self.roll.tables, self.theta.tables, strict=True)
        return tuple(np.minimum(abs(p - q).sum(1) / 2, 1.0) for p, q in tables)

    @cached_property
    def token_kl(self) -> tuple[Array, ...]:
        """``KL(roll || theta)`` of every context, nats, ``[V^t]``; inf where a word is lost."""
        out = []
        for p, q in zip(self.roll.tables, self.theta.tables, strict=True):
            with np.errstate(divide="ignore", invalid="ignore"):
                terms = np.where(p > 0, p * np.log(p / q), 0.0)
            out.append(terms.sum(1).clip(min=0))
        return tuple(out)

    def _largest(self, values: tuple[Array, ...], seen: Sequence[NDArray[np.bool_]]) -> float:
        return max(float(v[s].max()) for v, s in zip(values, seen, strict=True) if s.any())

    @property
    def tv_max(self) -> float:
        """Largest TV over the contexts that are reached."""
        return self._largest(self.token_tv, self.reached)

    @property
    def kl_max(self) -> float:
        """Largest KL over the contexts that are reached, nats."""
        return self._largest(self.token_kl, self.reached)

    @property
    def mean_tv(self) -> Array:
        """``E_roll TV(c_t)``, ``[T]``."""
        prefixes = self.roll.prefixes[:-1]
        return np.array([float(p @ v) for p, v in zip(prefixes, self.token_tv, strict=True)])

    @property
    def kl_seq(self) -> float:
        """``sum_t E_roll KL(c_t)``, nats."""
        pairs = zip(self.roll.prefixes[:-1], self.token_kl, strict=True)
        return sum(float(p[p > 0] @ v[p > 0]) for p, v in pairs)

    @property
    def prefix_tv(self) -> Array:
        """TV of the distributions of the first 0, 1, .. ``T`` tokens, ``[T + 1]``."""
        prefixes = zip(self.roll.prefixes, self.theta.prefixes, strict=True)
        return np.array([min(1.0, float(abs(p - q).sum()) / 2) for p, q in prefixes])

    @property
    def tv_seq(self) -> float:
        """TV of the distributions of whole sequences."""
        return float(self.prefix_tv[-1])

    def bounds(self, **options: Any) -> Bounds:
        """All bounds, from the exact divergences; ``options`` go to `bounds`.

        An infinite KL is left out, and with it the bounds that need it.
        """
        finite = math.isfinite(self.kl_max)
        given: dict[str, Any] = {
            "kl_max": self.kl_max if finite else None, "kl_seq": self.kl_seq if finite else None,
            "tv_max": self.tv_max, "tv_seq": self.tv_seq, "mean_tv": self.mean_tv,
        }  # fmt: skip
        return bounds(self.roll.length, **{**given, **options})

    def seen_by(self, sampled: NDArray[np.int64]) -> tuple[NDArray[np.bool_], ...]:
        """Contexts of each position that the sampled sequences pass through, ``[V^t]``."""
        words, length = self.roll.words, self.roll.length
        out = []
        for t in range(length):
            seen = np.zeros(words**t, dtype=np.bool_)
            seen[sampled // words ** (length - t)] = True
            out.append(seen)
        return tuple(out)

    def sampled_maxima(self, sampled: NDArray[np.int64]) -> tuple[float, float]:
        """Exact TV and KL, but the largest only over the contexts of ``sampled`` sequences."""
        seen = self.seen_by(sampled)
        return self._largest(self.token_tv, seen), self._largest(self.token_kl, seen)


def climb(
    score: Callable[[Pair], float],
    rng: np.random.Generator,
    words: int,
    length: int,
    *,
    steps: int = 300,
    spread: float = 1.0,
    step: float = 0.5,
) -> tuple[float, Pair]:
    """A pair of policies with a high score: random logits, then moves that are kept if better.

    Each move shifts one position's logits of one policy. Larger and smaller moves alternate.
    """
    logits = [random_logits(rng, words, length, spread) for _ in range(2)]
    best_pair = Pair(*(Policy.from_logits(each) for each in logits))
    best = score(best_pair)
    for i in range(steps):
        moved = [[table.copy() for table in each] for each in logits]
        table = moved[rng.integers(2)][rng.integers(length)]
        table += step * 10.0 ** -(i % 3) * rng.standard_normal(table.shape)
        pair = Pair(*(Policy.from_logits(each) for each in moved))
        value = score(pair)
        if value > best:
            best, best_pair, logits = value, pair, moved
    return best, best_pair
