"""Divergences between two policies: four aggregates of a per-state one, in three forms each.

    per state                 D(s)
    average                   E over tokens         sum_tau p sum_t D(s_t) / sum_tau p T_tau
    maximum                   max_s D(s)
    trajectory-normalized     E over trajectories   sum_tau p (1/T_tau) sum_t D(s_t)

    definition                TV: (1/2) sum_a |new - old|          KL: sum_a old log(old / new)
    ratio form                    (1/2) E_old |r - 1|                  E_old [-log r]
    Monte-Carlo form              mean of (1/2) |r_i - 1|              mean of -log r_i

The aggregates take one value a token, so that a form is a way to fill in that value. With
``half=False`` the total variation has no 1/2: the convention of the first paper, twice as large.

Reference: *Fibration Policy Optimization*, arXiv 2603.08239, App. A.3.
"""

from __future__ import annotations

import numpy as np

from .claims import Array, Indices
from .language import Walks


def total_variation(new: Array, old: Array, *, half: bool = True) -> Array:
    """``(1/2) sum_a |new - old|`` of every row, in [0, 1] (in [0, 2] without the half).

    >>> float(total_variation(np.array([0.7, 0.3]), np.array([0.5, 0.5])).round(12))
    0.2
    """
    return np.abs(new - old).sum(-1) * (0.5 if half else 1.0)


def kl(new: Array, old: Array) -> Array:
    """``KL(old || new) = sum_a old log(old / new)`` of every row, nats."""
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(old > 0, old * (np.log(old) - np.log(new)), 0.0)
    return terms.sum(-1)


def tv_term(ratio: Array, *, half: bool = True) -> Array:
    """``(1/2) |r - 1|``: what is averaged under ``old``, and what one sample says."""
    return np.abs(ratio - 1) * (0.5 if half else 1.0)


def kl_term(ratio: Array) -> Array:
    """``-log r``, signed: only its mean under ``old`` is a divergence."""
    return -np.log(ratio)


def ratio_form(term: Array, old: Array) -> Array:
    """``E_old[term]`` of every row."""
    return np.where(old > 0, old * term, 0.0).sum(-1)


def per_state(value: Array, state: Indices, states: int) -> Array:
    """Mean of the tokens' values at every state; NaN where a state was never visited."""
    visits = np.bincount(state, minlength=states).astype(np.float64)
    sums = np.bincount(state, weights=value, minlength=states)
    return np.where(visits > 0, sums / np.maximum(visits, 1), np.nan)


def maximum(value: Array, state: Indices, states: int) -> float:
    """Largest per-state value over the visited states."""
    return float(np.nanmax(per_state(value, state, states)))


def average(value: Array, walks: Walks) -> float:
    """Mean over tokens, each trajectory with its probability."""
    weight = walks.probability[walks.trajectory]
    return float(weight @ value / weight.sum())


def per_trajectory(value: Array, walks: Walks) -> Array:
    """``(1/T_tau) sum_t value`` of every trajectory."""
    sums = np.bincount(walks.trajectory, weights=value, minlength=len(walks.probability))
    return sums / walks.lengths


def trajectory_normalized(value: Array, walks: Walks) -> float:
    """Mean over trajectories of the mean over their tokens."""
    return float(walks.probability @ per_trajectory(value, walks))


__all__ = [
    "average", "kl", "kl_term", "maximum", "per_state", "per_trajectory", "ratio_form",
    "total_variation", "trajectory_normalized", "tv_term",
]  # fmt: skip
