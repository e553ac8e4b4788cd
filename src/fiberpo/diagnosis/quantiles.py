"""Observed drifts of contexts, and the budget that gates a given share of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

LIMIT = 2_000_000
"""Most contexts (or tokens) that are kept of a stratum; beyond it every second one goes."""

SLACK = 0.01
"""How far in rank a budget may move to become a shorter number, as a part of the gated contexts."""


@dataclass(eq=False)
class Sample:
    """Residual drifts ``[2, n]`` (positive and negative channel) with the domain of each.

    Above `LIMIT`, every second, fourth, ... is kept: memory stays bounded, and quantiles of what is
    kept are those of the whole to about ``1 / sqrt(LIMIT)``.
    """

    limit: int = LIMIT
    seen: int = 0
    acting: int = 0
    _stride: int = 1
    _parts: list[tuple[Array, NDArray[np.int64]]] = field(default_factory=list)

    def add(self, drift: Array, domain: NDArray[np.int64], acting: int) -> None:
        """More contexts; ``acting`` of them can have a residual (are no only child)."""
        take = slice((-self.seen) % self._stride, None, self._stride)
        self.seen += drift.shape[1]
        self.acting += acting
        self._parts.append((np.abs(drift[:, take]), domain[take]))
        if sum(len(d) for _, d in self._parts) > self.limit:
            values, where = self.values()
            self._stride *= 2
            self._parts = [(values[:, ::2], where[::2])]

    def values(self) -> tuple[Array, NDArray[np.int64]]:
        """``[2, n]`` sizes of the drifts that are kept, and their domains ``[n]``."""
        if not self._parts:
            return np.zeros((2, 0)), np.zeros(0, np.int64)
        drift = np.concatenate([d for d, _ in self._parts], axis=1)
        domain = np.concatenate([d for _, d in self._parts])
        self._parts = [(drift, domain)]
        return drift, domain


def gated_share(drift: Array, pair: tuple[float, float]) -> float:
    """Share of contexts whose gate leaves PASS: the drift of a channel exceeds its budget."""
    return float(((drift[0] > pair[0]) | (drift[1] > pair[1])).mean())


def budget_at(drift: Array, activity: float) -> tuple[float, float] | None:
    """The budget pair ``(C+, C-)`` that gates the share ``activity`` of the contexts.

    Both channels stand at the same quantile of their own drift, the one at which the share of
    contexts beyond either of them is ``activity``. Where that gives ``C- > C+`` (against the
    recommendation of the paper), both are the same number, at the quantile of the larger drift.
    None where less than that share of the contexts has a drift at all.

    Args:
        drift: ``[2, n]`` sizes of the drifts, n >= 1.
        activity: in (0, 1).

    >>> budget_at(np.array([[0.04, 0.03, 0.02, 0.01], [0.0, 0.0, 0.0, 0.0]]), 0.25)
    (0.03, 0.03)
    """
    count = drift.shape[1]
    gated = min(max(round(activity * count), 1), count)
    size = np.sort(drift.max(0))
    if size[count - gated] == 0:
        return None
    slack = int(SLACK * gated)
    ordered = np.sort(drift, axis=1)
    ranks = [np.searchsorted(ordered[c], drift[c], side="right") for c in range(2)]
    # number of contexts at or below the budget of each channel; 0: none is let through
    level = int(np.sort(np.maximum(*ranks))[count - gated - 1]) if gated < count else 0
    # a rank may stand for one context a channel: one channel, or both, may have to go lower
    below = max(level - 1, 0)
    places = ((level, level), (below, level), (level, below), (below, below))
    beyond = [int(((ranks[0] > at[0]) | (ranks[1] > at[1])).sum()) for at in places]
    levels = places[min(range(4), key=lambda i: (abs(beyond[i] - gated), -beyond[i]))]
    pair = tuple(_between(ordered[c], levels[c], slack) for c in range(2))
    if pair[1] <= pair[0] and all(math.isfinite(x) for x in pair):
        return pair[0], pair[1]
    both = _between(size, count - gated, slack)
    return both, both


def clip_at(drift: Array, activity: float) -> float | None:
    """The half-width that saturates the share ``activity`` of the tokens in either channel."""
    pair = budget_at(np.stack([drift.max(0)] * 2), activity)
    return None if pair is None else pair[0]


def _between(ordered: Array, level: int, slack: int) -> float:
    """A short number > 0 that is at least ``level`` (give or take ``slack``) of the values."""
    count = len(ordered)
    at = float(ordered[level - 1]) if level else 0.0
    low = float(ordered[level - 1 - slack]) if level > slack else 0.0
    above = ordered[np.searchsorted(ordered, at, side="right") :]
    high = float(above[min(slack, len(above) - 1)]) if len(above) else math.inf
    if math.isinf(high):
        high = 2 * at if at else math.inf
    if not count or math.isinf(high):
        return math.inf
    if not at:
        at = low = high / 2
    for digits in range(2, 17):
        step = 10.0 ** (math.floor(math.log10(at)) - digits + 1)
        for candidate in (round(at / step), math.ceil(at / step)):
            found = float(f"{candidate * step:.{digits}g}")
            if low <= found < high and found > 0:
                return found
    return at
