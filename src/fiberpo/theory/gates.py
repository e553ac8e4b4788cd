"""The atomic gates as equations on numbers (Eqs. 10 and 12).

Reference: *Fibration Policy Optimization*, arXiv 2603.08239, Eqs. 10, 12.
"""

from __future__ import annotations

import numpy as np

from .claims import Array


def aggregate_gate(x: Array, budget: Array | float, k: Array | float) -> Array:
    """``g(x, C, k)``: ``x``, then ``sign(x) (k + 1) C - k x``, then 0 (Eq. 10).

    Args:
        x: drifts, nats per token.
        budget: ``C > 0``, nats per token.
        k: rollback slope, the token count below the context in the paper.

    >>> aggregate_gate(np.array([0.1, 0.3, -0.3, 0.5]), 0.2, 1.0).round(12).tolist()
    [0.1, 0.1, -0.1, 0.0]
    """
    size = np.abs(x)
    rolled = np.sign(x) * (k + 1) * budget - k * x
    outer = np.where(size < (1 + 1 / k) * budget, rolled, 0.0)
    return np.where(size <= budget, x, outer)


def aggregate_slope(x: Array, budget: Array | float, k: Array | float) -> Array:
    """``g'``: 1 where it passes, ``-k`` where it rolls back, 0 where it is zeroed."""
    size = np.abs(x)
    outer = np.where(size < (1 + 1 / k) * budget, -k * np.ones_like(x), 0.0)
    return np.where(size <= budget, 1.0, outer)


def aggregate_gate_compact(x: Array, budget: Array | float, k: Array | float) -> Array:
    """The compact form ``clip(x, +-max((k + 1) C - k |x|, 0))``."""
    bound = np.maximum((k + 1) * budget - k * np.abs(x), 0.0)
    return np.clip(x, -bound, bound)


def log_clip(x: Array, epsilon: float) -> Array:
    """``clip(x, -epsilon, +epsilon)`` on log ratios, nats (Eq. 12)."""
    return np.clip(x, -epsilon, epsilon)


__all__ = ["aggregate_gate", "aggregate_gate_compact", "aggregate_slope", "log_clip"]
