"""What may be put into a bound: lengths, divergences and reward ranges, checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import BoundError

LONGEST = 10_000_000
"""Tokens; the sums hold one float64 a token."""

SLACK = 1e-9
"""Relative rounding that is forgiven where two given divergences are compared."""


NO_MAXIMUM = "neither tv_max nor kl_max is given; at least one is needed"


def check_length(length: int) -> int:
    """``T`` as an int in 1 to `LONGEST`, or a `BoundError` that quotes it."""
    if isinstance(length, bool) or not isinstance(length, Integral):
        raise BoundError(f"length is {length!r}; it must be a whole number of tokens")
    if not 1 <= length <= LONGEST:
        raise BoundError(f"length is {length}; a sequence has 1 to {LONGEST} tokens")
    return int(length)


def check_number(name: str, value: float) -> float:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise BoundError(f"{name} is {value!r}; it must be a finite number")
    return float(value)


def check_kl(name: str, value: float) -> float:
    """A KL divergence in nats, >= 0."""
    number = check_number(name, value)
    if number < 0:
        raise BoundError(f"{name} is {number:g}; a KL divergence is never negative (in nats)")
    return number


def check_tv(name: str, value: float) -> float:
    """A total variation, 0 to 1."""
    number = check_number(name, value)
    if not 0 <= number <= 1:
        raise BoundError(
            f"{name} is {number:g}; a total variation, half the sum of absolute differences, "
            "lies between 0 and 1"
        )
    return number


def check_factor(factor: float) -> float:
    """4 or 2."""
    if factor not in (2, 4):
        raise BoundError(f"factor is {factor!r}; 4 (the paper) and 2 (tighter) are proved")
    return float(factor)


def check_sequence(kind: str, length: int, largest: float, sequence: float) -> None:
    """``kl_seq`` or ``tv_seq`` against ``T`` times the largest of a token."""
    if sequence > length * largest * (1 + SLACK):
        raise BoundError(
            f"{kind}_seq is {sequence:g}, but {length} tokens of at most {kind}_max = {largest:g} "
            f"make {length * largest:g} at most: the two contradict each other"
        )


def check_means(
    mean_tv: ArrayLike, tv_max: float | None, length: int | None = None
) -> NDArray[np.float64]:
    """Mean TV of each position, ``[T]``, none above ``tv_max``."""
    means = np.asarray(mean_tv, dtype=np.float64)
    if means.ndim != 1 or length not in (None, len(means)):
        tokens = "T" if length is None else length
        raise BoundError(
            f"mean_tv has shape {means.shape}; it is one number a position, [{tokens}]"
        )
    check_length(len(means))
    bad = ~((means >= 0) & (means <= 1))
    if bad.any():
        t = int(bad.argmax())
        raise BoundError(f"mean_tv[{t}] is {means[t]:g}; a total variation lies between 0 and 1")
    if tv_max is not None and means.max() > tv_max * (1 + SLACK):
        t = int(means.argmax())
        raise BoundError(
            f"mean_tv[{t}] is {means[t]:g}, above tv_max = {tv_max:g}: a mean cannot exceed the "
            "largest"
        )
    return means


def check_rewards(reward_range: Sequence[float]) -> float:
    """The width ``b - a`` of a reward range ``(a, b)``, > 0."""
    if len(reward_range) != 2:
        raise BoundError(f"reward_range is {reward_range!r}; it is a pair (lowest, highest)")
    low, high = (check_number("reward_range", value) for value in reward_range)
    if not low < high:
        raise BoundError(f"reward_range is ({low:g}, {high:g}); the lowest comes first")
    return high - low
