"""Fiber bundle gating and the fibration gating hierarchy as operators on densities.

    FBG     G(rho) = K g_0(pi_* rho) + g_1(rho - K pi_* rho)
    FGH     G(rho) = K_{n<-0} g_0(pi_{0<-n*} rho)
                     + sum_{0<k<=n} K_{n<-k} g_k(pi_{k<-n*} rho - K_{k-1} pi_{k-1<-n*} rho)
    trees   G(rho) = sum_c K_{E<-c} g_c(rho_c - share_c rho_parent) + g_E(rho - share rho_leaf)

``pi_*`` sums densities up, ``K`` hands them down by given shares. The *reflecting condition* is
``pi_* K = id``; in a tree it is joint: the shares of all children of a context sum to 1. Kernels
are plain matrices here, reflecting or not, so that the condition can be broken.

Densities have one row a channel. Gates map densities of a stratum to densities.

Reference: *Fibration Policy Optimization*, arXiv 2603.08239, Definitions 4.1-4.4, 6.1, 6.2,
Eqs. 26-28, Remark 6.5, App. E.7.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import StrataError
from .claims import Array, Indices

DensityGate = Callable[[Array], Array]


def decompose(log_ratio: Array, measure: Array) -> Array:
    """``F(r)``: ``measure * |l|`` in the channel of its sign, ``[2, N]``; ``l = 0`` is positive."""
    positive = log_ratio >= 0
    size = measure * np.abs(log_ratio)
    return np.stack([np.where(positive, size, 0.0), np.where(positive, 0.0, size)])


def recover(rho: Array, measure: Array) -> Array:
    """``log R(rho) = (rho_+ - rho_-) / measure``."""
    return (rho[0] - rho[1]) / measure


def per_measure(gate: Callable[[Array], Array], measure: Array) -> DensityGate:
    """A gate on drifts (nats per token) as a gate on densities: ``m g(rho / m)``."""
    return lambda rho: measure * gate(rho / measure)


def push(parent: Indices, rho: Array, count: int) -> Array:
    """``pi_*``: sums of ``[channels, B_k]`` over the fibers, ``[channels, count]``."""
    return np.stack([np.bincount(parent, weights=row, minlength=count) for row in rho])


def mass_weighted(parent: Indices, measure: Array) -> Array:
    """The kernel that hands a density down in proportion to measure, ``[B_k, B_{k-1}]``."""
    count = int(parent.max()) + 1
    kernel = np.zeros((len(parent), count))
    total = np.bincount(parent, weights=measure, minlength=count)
    kernel[np.arange(len(parent)), parent] = measure / total[parent]
    return kernel


def gate_bundle(
    rho: Array, parent: Indices, kernel: Array, base: DensityGate, fiber: DensityGate
) -> Array:
    """Fiber bundle gating over one map ``E -> B``.

    Args:
        rho: ``[channels, N]``.
        parent: ``[N]`` the base point of each token.
        kernel: ``[N, B]``.
        base, fiber: gates on the densities of ``B`` and of ``E``.
    """
    pushed = push(parent, rho, kernel.shape[1])
    return base(pushed) @ kernel.T + fiber(rho - pushed @ kernel.T)


@dataclass(frozen=True, eq=False)
class Fibration:
    """``B_0 <- B_1 <- ... <- B_n = E``.

    Args:
        parents: per step k = 1..n, ``[B_k]`` the image of each point in ``B_{k-1}``.
        kernels: per step, ``[B_k, B_{k-1}]``.
    """

    parents: Sequence[Indices]
    kernels: Sequence[Array]

    def densities(self, rho: Array) -> list[Array]:
        """``pi_{k<-n*} rho`` for k = 0..n."""
        found = [rho]
        for parent, kernel in zip(reversed(self.parents), reversed(self.kernels), strict=True):
            found.append(push(parent, found[-1], kernel.shape[1]))
        return found[::-1]

    def reflect(self, rho: Array, k: int) -> Array:
        """``K_{n<-k}``: from stratum k to the tokens."""
        for kernel in self.kernels[k:]:
            rho = rho @ kernel.T
        return rho

    def reflecting_defect(self) -> float:
        """Largest entry of ``pi_* K - id`` over the steps."""
        worst = 0.0
        for parent, kernel in zip(self.parents, self.kernels, strict=True):
            back = push(parent, kernel.T, kernel.shape[1])
            worst = max(worst, float(np.abs(back - np.eye(kernel.shape[1])).max()))
        return worst


def gate_hierarchy(rho: Array, fibration: Fibration, gates: Sequence[DensityGate]) -> Array:
    """The fibration gating hierarchy; ``gates`` are those of ``B_0`` to ``B_n = E``."""
    density = fibration.densities(rho)
    out = fibration.reflect(gates[0](density[0]), 0)
    for k in range(1, len(density)):
        residual = density[k] - density[k - 1] @ fibration.kernels[k - 1].T
        out = out + fibration.reflect(gates[k](residual), k)
    return out


def fibration_of(labels: Sequence[Indices], measure: Array) -> Fibration:
    """The chain of strata named by labels of the tokens, with mass-weighted kernels.

    Args:
        labels: coarse to fine, ``[N]`` each, without the tokens themselves.
        measure: ``[N]`` ``omega_i``.

    Raises:
        StrataError: if a context of one label lies in two contexts of the label before it: two
            independent classifications of the same tokens are not a chain.
    """
    codes = [np.unique(label, return_inverse=True)[1] for label in labels]
    codes.append(np.arange(len(measure)))
    parents, kernels = [], []
    for k, (coarse, fine) in enumerate(itertools.pairwise(codes)):
        parent = np.full(int(fine.max()) + 1, -1, dtype=np.int64)
        parent[fine] = coarse
        if (parent[fine] != coarse).any():
            token = int(np.flatnonzero(parent[fine] != coarse)[0])
            raise StrataError(
                f"context {fine[token]} of stratum {k + 1} lies in two contexts of stratum {k}: "
                f"{coarse[token]} and {parent[fine[token]]}. Two independent classifications of "
                "the same tokens are not a tree: join them into one label, or gate only one of them"
            )
        parents.append(parent)
        kernels.append(mass_weighted(parent, push(fine, measure[None], len(parent))[0]))
    return Fibration(parents, kernels)


@dataclass(frozen=True, eq=False)
class Tree:
    """A forest whose branches may differ in depth (Remark 6.5).

    Args:
        parent: ``[C]`` parent context, -1 for a root; parents come first.
        leaf: ``[N]`` finest context of each token.
        share: ``[C]`` what a context receives of its parent's density.
        token_share: ``[N]`` what a token receives of its leaf's density.
    """

    parent: Indices
    leaf: Indices
    share: Array
    token_share: Array

    def densities(self, rho: Array) -> Array:
        """Density of every context, ``[channels, C]``."""
        out = push(self.leaf, rho, len(self.parent))
        for c in range(len(self.parent) - 1, -1, -1):
            if self.parent[c] >= 0:
                out[:, self.parent[c]] += out[:, c]
        return out

    def joint_defect(self) -> float:
        """How far the shares of all children of a context are from summing to 1."""
        total = np.bincount(self.leaf, weights=self.token_share, minlength=len(self.parent))
        inner = self.parent >= 0
        total += np.bincount(
            self.parent[inner], weights=self.share[inner], minlength=len(self.parent)
        )
        return float(np.abs(total - 1).max())


def gate_tree(
    rho: Array, tree: Tree, gates: Callable[[Array], Array], token_gate: DensityGate
) -> Array:
    """The hierarchy on a tree; ``gates`` maps the residual densities ``[channels, C]`` of all."""
    density = tree.densities(rho)
    above = np.where(tree.parent >= 0, tree.parent, 0)
    given = np.where(tree.parent >= 0, tree.share, 0.0) * density[:, above]
    gated = gates(density - given)
    down = np.zeros_like(gated)
    for c in range(len(tree.parent)):  # parents first: what c passes on to its own tokens
        parent = tree.parent[c]
        down[:, c] = gated[:, c] + (tree.share[c] * down[:, parent] if parent >= 0 else 0.0)
    residual = rho - tree.token_share * density[:, tree.leaf]
    return tree.token_share * down[:, tree.leaf] + token_gate(residual)


def tree_of(parent: Indices, leaf: Indices, measure: Array) -> Tree:
    """A tree with mass-weighted shares, which meet the joint reflecting condition."""
    mass = Tree(parent, leaf, np.ones(len(parent)), np.ones(len(leaf))).densities(measure[None])[0]
    share = np.where(parent >= 0, mass / mass[np.where(parent >= 0, parent, 0)], 1.0)
    return Tree(parent, leaf, share, measure / mass[leaf])


__all__ = [
    "DensityGate", "Fibration", "Tree", "decompose", "fibration_of", "gate_bundle",
    "gate_hierarchy", "gate_tree", "mass_weighted", "per_measure", "push", "recover", "tree_of",
]  # fmt: skip
