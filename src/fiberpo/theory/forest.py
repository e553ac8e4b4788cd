"""The hierarchy in drifts: one formula for every forest, its gradient, and Eqs. 30-33 as printed.

    S_c      = sum_{i below c} omega_i max(+-l_i, 0) / sum_{i below c} omega_i
    log base = sum over c on i's path of g(S+_c - S+_parent, C+_c, k_c) - g(S-_c - S-_parent, ...)
    fiber    = clip(sigma u) - clip(sigma v) with the S+- of i's finest context

    dJ/dS+_c = A_c g'_c - sum_{children b} A_b g'_b - (fiber terms of the tokens attached to c)

with ``A_c`` the sum of ``a_i = dJ/d log G_i`` below ``c``.

Reference: *Fibration Policy Optimization*, arXiv 2603.08239, Definitions 6.1, 6.2, 6.4, Eqs. 30-33,
Remark 6.5.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from .claims import Array, Indices
from .gates import aggregate_gate, aggregate_slope, log_clip
from .operators import Tree, decompose, gate_tree, per_measure, recover, tree_of
from .trajectory import TwoScale, aggregates, log_fiber


@dataclass(frozen=True, eq=False)
class Forest:
    """Contexts with budgets, and the tokens on them.

    Args:
        parent: ``[C]`` parent context, -1 for a root; parents come first.
        leaf: ``[N]`` finest context of each token.
        measure: ``[N]`` ``omega_i``, ``1 / T_tau`` in the paper.
        budget: ``[2, C]`` ``C+`` and ``C-``, nats per token.
        epsilon: half-width of the token clip, nats.
    """

    parent: Indices
    leaf: Indices
    measure: Array
    budget: Array
    epsilon: float

    def _up(self, values: Array) -> Array:
        """Sums of token values ``[rows, N]`` over everything below each context."""
        contexts = len(self.parent)
        plain = Tree(self.parent, self.leaf, np.ones(contexts), np.ones(len(self.leaf)))
        return plain.densities(values)

    @property
    def count(self) -> Array:
        """``k_c``: tokens below each context."""
        return self._up(np.ones((1, len(self.leaf))))[0]

    @property
    def mass(self) -> Array:
        """Measure below each context."""
        return self._up(self.measure[None])[0]

    def drifts(self, log_ratio: Array) -> Array:
        """``S+-`` of every context, ``[2, C]``."""
        parts = np.stack([np.maximum(log_ratio, 0), np.maximum(-log_ratio, 0)])
        return self._up(self.measure * parts) / self.mass

    def _residuals(self, log_ratio: Array) -> tuple[Array, Array]:
        drift = self.drifts(log_ratio)
        above = np.where(self.parent >= 0, drift[:, np.maximum(self.parent, 0)], 0.0)
        parts = np.stack([np.maximum(log_ratio, 0), np.maximum(-log_ratio, 0)])
        return drift - above, parts - drift[:, self.leaf]

    def _path_sum(self, values: Array) -> Array:
        """Sum of context values from each context up to its root."""
        out = values.copy()
        for c, parent in enumerate(self.parent):
            if parent >= 0:
                out[..., c] += out[..., parent]
        return out

    def log_gated(self, log_ratio: Array) -> Array:
        """``log G`` of every token."""
        residual, own = self._residuals(log_ratio)
        base = self._path_sum(aggregate_gate(residual, self.budget, self.count))
        both = base[:, self.leaf] + log_clip(own, self.epsilon)
        return both[0] - both[1]

    def gradient(self, log_ratio: Array, factor: Array) -> Array:
        """``dJ/dl`` of ``J = sum factor_i G_i``, by the adjoints ``dJ/dS_c``."""
        residual, own = self._residuals(log_ratio)
        a = factor * np.exp(self.log_gated(log_ratio))
        below = self._up(a[None])[0]
        passing = below * aggregate_slope(residual, self.budget, self.count)
        inside = (np.abs(own) <= self.epsilon).astype(float)
        adjoint = passing.copy()
        for c, parent in enumerate(self.parent):
            if parent >= 0:
                adjoint[:, parent] -= passing[:, c]
        for i, c in enumerate(self.leaf):
            adjoint[:, c] -= a[i] * inside[:, i]
        spread = self._path_sum(adjoint / self.mass)[:, self.leaf]
        positive = log_ratio >= 0
        total = self.measure * spread + a * inside
        # dJ/dl = dJ/dd+ where l >= 0; two minus signs cancel where l < 0
        return np.where(positive, total[0], total[1])

    def log_gated_on_densities(self, log_ratio: Array) -> Array:
        """The same through the operator on densities (`operators.gate_tree`)."""
        mass, count = self.mass, self.count
        gated = gate_tree(
            decompose(log_ratio, self.measure),
            tree_of(self.parent, self.leaf, self.measure),
            per_measure(lambda x: aggregate_gate(x, self.budget, count), mass),
            per_measure(lambda x: log_clip(x, self.epsilon), self.measure),
        )
        return recover(gated, self.measure)


def domain_log_gated(
    trajectories: list[Array],
    group: list[int],
    domain: list[int],
    budgets: Mapping[str, tuple[float, float]],
    epsilon: float,
) -> Array:
    """FiberPO-Domain as printed, with loops (Eqs. 30-33); ``log G`` of all tokens in order.

    Args:
        trajectories: log ratios of each.
        group, domain: label of each trajectory.
        budgets: ``(C+, C-)`` of ``"domain"``, ``"group"``, ``"trajectory"``.
    """
    s_tau = np.array([aggregates(ell) for ell in trajectories])
    tokens = np.array([len(ell) for ell in trajectories])
    in_group, in_domain = np.array(group), np.array(domain)
    out = []
    for t, ell in enumerate(trajectories):
        mine, ours = in_group == group[t], in_domain == domain[t]
        s_g = s_tau[mine].mean(0)
        s_d = np.zeros(2)
        for g in np.unique(in_group[ours]):  # Eq. 33: groups weigh by their trajectories
            s_d += (in_group == g).sum() / ours.sum() * s_tau[in_group == g].mean(0)
        levels = (
            (s_d, budgets["domain"], tokens[ours].sum()),
            (s_g - s_d, budgets["group"], tokens[mine].sum()),
            (s_tau[t] - s_g, budgets["trajectory"], tokens[t]),
        )
        gated = np.zeros(2)
        for x, budget, k in levels:
            gated += aggregate_gate(x, np.array(budget), float(k))
        out.append(gated[0] - gated[1] + log_fiber(ell, TwoScale(epsilon=epsilon)))
    return np.concatenate(out)


__all__ = ["Forest", "domain_log_gated"]
