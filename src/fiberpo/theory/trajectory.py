"""FiberPO on one trajectory, as printed: Definition 5.1, Eqs. 6-16, Jacobian Eq. 20, regimes.

``l`` are the log ratios of its ``T`` tokens in nats; ``sigma = +1`` where ``l >= 0``.

Reference: *Fibration Policy Optimization*, arXiv 2603.08239, Definition 5.1, Eqs. 6-16, 20.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .claims import Array
from .gates import aggregate_gate, aggregate_slope, log_clip


@dataclass(frozen=True)
class TwoScale:
    """The parameters of FiberPO.

    Args:
        plus, minus: budgets ``C+`` and ``C-``, nats per token.
        epsilon: half-width of the log clip, nats.
        k: rollback slope; None for the token count.
    """

    plus: float = 0.12
    minus: float = 0.05
    epsilon: float = 0.04
    k: float | None = None

    def slope(self, ell: Array) -> float:
        """``k`` of a trajectory."""
        return float(len(ell)) if self.k is None else self.k

    @property
    def budget(self) -> tuple[float, float]:
        """``(C+, C-)``."""
        return self.plus, self.minus


def sign(ell: Array) -> Array:
    """``sigma``: +1 where ``l >= 0`` (zero included), else -1."""
    return np.where(ell >= 0, 1.0, -1.0)


def aggregates(ell: Array) -> tuple[float, float]:
    """``S+-``: mean over *all* tokens of ``max(+-l, 0)`` (Eq. 9)."""
    return float(np.maximum(ell, 0).mean()), float(np.maximum(-ell, 0).mean())


def residuals(ell: Array) -> tuple[Array, Array]:
    """``u = sigma l - S^sigma`` and ``v = -S^(-sigma)`` (Eqs. 14, 15)."""
    plus, minus = aggregates(ell)
    positive = ell >= 0
    u = np.abs(ell) - np.where(positive, plus, minus)
    return u, -np.where(positive, minus, plus)


def log_base(ell: Array, p: TwoScale) -> float:
    """``g(S+, C+, T) - g(S-, C-, T)`` (Eq. 8)."""
    s, k = np.array(aggregates(ell)), p.slope(ell)
    gated = aggregate_gate(s, np.array(p.budget), k)
    return float(gated[0] - gated[1])


def log_fiber(ell: Array, p: TwoScale) -> Array:
    """``clip(sigma u) - clip(sigma v)`` (Eq. 16)."""
    sigma, (u, v) = sign(ell), residuals(ell)
    return log_clip(sigma * u, p.epsilon) - log_clip(sigma * v, p.epsilon)


def log_fiber_written_out(ell: Array, p: TwoScale) -> Array:
    """``clip(l - S+) + clip(S-)`` where ``l >= 0``, ``clip(l + S-) - clip(S+)`` elsewhere."""
    plus, minus = (np.full_like(ell, s) for s in aggregates(ell))
    up = log_clip(ell - plus, p.epsilon) + log_clip(minus, p.epsilon)
    down = log_clip(ell + minus, p.epsilon) - log_clip(plus, p.epsilon)
    return np.where(ell >= 0, up, down)


def log_gated(ell: Array, p: TwoScale) -> Array:
    """``log G = log base + log fiber`` (Eqs. 6, 7)."""
    return log_base(ell, p) + log_fiber(ell, p)


def log_gated_from_gated_aggregate(ell: Array, p: TwoScale) -> Array:
    """The tempting mistake: residuals ``u``, ``v`` from ``g(S+-)`` instead of ``S+-``."""
    s, k, sigma = np.array(aggregates(ell)), p.slope(ell), sign(ell)
    plus, minus = aggregate_gate(s, np.array(p.budget), k)
    own, other = np.where(ell >= 0, plus, minus), np.where(ell >= 0, minus, plus)
    fiber = log_clip(sigma * (np.abs(ell) - own), p.epsilon) + log_clip(sigma * other, p.epsilon)
    return float(plus - minus) + fiber


def base_slopes(ell: Array, p: TwoScale) -> Array:
    """``gamma(+), gamma(-)``: slopes of the two base gates."""
    return aggregate_slope(np.array(aggregates(ell)), np.array(p.budget), p.slope(ell))


def jacobian(ell: Array, p: TwoScale) -> Array:
    """``d log G_i / d l_j`` (Eq. 20), ``[T, T]``.

    ::

        1[i=j] 1[|u_i|<=e] + (gamma(sigma_j) - 1[sigma_i=sigma_j] 1[|u_i|<=e]
                                             - 1[sigma_i!=sigma_j] 1[|v_i|<=e]) / T
    """
    gamma, sigma, (u, v) = base_slopes(ell, p), sign(ell), residuals(ell)
    inside_u = (np.abs(u) <= p.epsilon).astype(float)
    inside_v = (np.abs(v) <= p.epsilon).astype(float)
    same = sigma[:, None] == sigma[None, :]
    slope = np.where(sigma > 0, gamma[0], gamma[1])
    coupling = slope[None, :] - np.where(same, inside_u[:, None], inside_v[:, None])
    return np.diag(inside_u) + coupling / len(ell)


def gradient(ell: Array, factor: Array, p: TwoScale) -> Array:
    """``dJ/dl_j`` of ``J = sum factor_i G_i`` in O(T): segment sums only.

    ::

        a_j 1[|u_j|<=e] + (gamma(sigma_j) sum a - sum_{same sign, |u|<=e} a
                                                - sum_{other sign, |v|<=e} a) / T
    """
    gamma, sigma, (u, v) = base_slopes(ell, p), sign(ell), residuals(ell)
    a = factor * np.exp(log_gated(ell, p))
    in_u, in_v = a * (np.abs(u) <= p.epsilon), a * (np.abs(v) <= p.epsilon)
    shared = {}
    for s, slope in ((1.0, gamma[0]), (-1.0, gamma[1])):
        shared[s] = slope * a.sum() - in_u[sigma == s].sum() - in_v[sigma != s].sum()
    return in_u + np.where(sigma > 0, shared[1.0], shared[-1.0]) / len(ell)


def global_regime(ell: Array, p: TwoScale) -> str:
    """G-I both pass; G-II,r one rolls back; G-II one zeroed; G-III,r both act; G-III both zeroed.

    >>> global_regime(np.array([0.5, -0.3]), TwoScale())
    'G-III'
    """
    gamma = base_slopes(ell, p)
    rolling, zeroed = int((gamma < 0).sum()), int((gamma == 0).sum())
    if zeroed == 2:
        return "G-III"
    if rolling + zeroed == 2:
        return "G-III,r"
    if zeroed == 1:
        return "G-II"
    return "G-II,r" if rolling else "G-I"


def local_regime(ell: Array, p: TwoScale) -> str:
    """L-I none, L-II some, L-III all tokens with ``|u| > epsilon``."""
    beyond = int((np.abs(residuals(ell)[0]) > p.epsilon).sum())
    if beyond == 0:
        return "L-I"
    return "L-III" if beyond == len(ell) else "L-II"


def distance_to_kinks(ell: Array, p: TwoScale) -> float:
    """How far the nearest corner of the piecewise linear map is, nats (for finite differences)."""
    s, k, (u, v) = np.array(aggregates(ell)), p.slope(ell), residuals(ell)
    budget = np.array(p.budget)
    corners = [
        np.abs(s - budget), np.abs(s - (1 + 1 / k) * budget),
        np.abs(np.abs(u) - p.epsilon), np.abs(np.abs(v) - p.epsilon), np.abs(ell),
    ]  # fmt: skip
    return float(min(c.min() for c in corners))


__all__ = [
    "TwoScale", "aggregates", "base_slopes", "distance_to_kinks", "global_regime", "gradient",
    "jacobian", "local_regime", "log_base", "log_fiber", "log_fiber_written_out", "log_gated",
    "log_gated_from_gated_aggregate", "residuals", "sign",
]  # fmt: skip
