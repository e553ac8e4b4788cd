"""The equations themselves: the fibration gating hierarchy as an operator on densities.

This file is the definition that the fast engine (`fiberpo.gating`) must agree with, in value and in
gradient. It works with densities ``rho`` on the strata, as the paper does:

    decompose   F(r)_{i,ch} = omega_i d_{i,ch}            (for FiberPO: 1[sigma_i = ch] |l_i| / T)
    push        (pi_* rho)_c = sum of rho over what lies below c
    gate        g_c on the density of a context; per unit of its measure m_c: m_c g(rho_c / m_c)
    reflect     (K rho)_child = rho_parent * m_child / m_parent      (reflecting: pi_* K = id)
    recover     R(rho)_i = exp( (rho_{i,+} - rho_{i,-}) / omega_i )

    G(rho) = K_{n<-0} g_0(pi_{0<-n*} rho)
             + sum_{0 < k <= n} K_{n<-k} g_k( pi_{k<-n*} rho - K_{k-1} pi_{k-1<-n*} rho )

Everything is dense float64 and written for reading: a context is a row of a 0/1 incidence matrix.

Reference: *Fibration Policy Optimization*, arXiv 2603.08239, Definitions 4.2-4.4, 6.1, 6.2,
Eqs. 26-28, Remark 6.5.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

ContextGate = Callable[[int, Tensor], Tensor]
"""``(context, drift per unit of measure [channels]) -> gated drift [channels]``."""


@dataclass(frozen=True, eq=False)
class Forest:
    """Contexts as rows of an incidence matrix over the tokens.

    Args:
        parent: per context its parent, -1 for a root; parents come before their children.
        leaf: per token its finest context.
        measure: ``omega_i > 0`` per token, float64.
    """

    parent: Sequence[int]
    leaf: Sequence[int]
    measure: Float[Tensor, " N"]

    def path(self, token: int) -> list[int]:
        """Contexts that contain a token, coarse to fine."""
        found, context = [], self.leaf[token]
        while context >= 0:
            found.append(context)
            context = self.parent[context]
        return found[::-1]

    def incidence(self) -> Float[Tensor, "C N"]:
        """1 where a context contains a token."""
        inside = torch.zeros(len(self.parent), len(self.leaf), dtype=torch.float64)
        for token in range(len(self.leaf)):
            inside[self.path(token), token] = 1
        return inside

    def context_measure(self) -> Float[Tensor, " C"]:
        """Measure below each context."""
        return self.incidence() @ self.measure

    def push_forward(self, rho: Float[Tensor, "channels N"]) -> Float[Tensor, "channels C"]:
        """``pi_{c<-E*} rho``: the density of every context."""
        return rho @ self.incidence().T

    def reflect_to_tokens(self) -> Float[Tensor, "C N"]:
        """``K_{E<-c}``: the share of a context's density that each token below it receives."""
        return self.incidence() * self.measure / self.context_measure()[:, None]

    def reflect_to_children(self) -> Float[Tensor, "C C"]:
        """``K_{child<-parent}[child, parent]``: the share of a parent that each child receives."""
        shares = torch.zeros(len(self.parent), len(self.parent), dtype=torch.float64)
        measure = self.context_measure()
        for child, parent in enumerate(self.parent):
            if parent >= 0:
                shares[child, parent] = measure[child] / measure[parent]
        return shares


def hierarchy(
    rho: Float[Tensor, "channels N"],
    forest: Forest,
    context_gate: ContextGate,
    token_gate: Callable[[Tensor], Tensor],
) -> Float[Tensor, "channels N"]:
    """``G(rho)``: gate the residual density of every stratum, reflect it to the tokens, add up.

    ``context_gate`` and ``token_gate`` act per unit of measure (nats per token); the residual of
    a context is what its density exceeds the share that its parent's *ungated* density gives it.
    """
    density, measure = forest.push_forward(rho), forest.context_measure()
    residual = density - density @ forest.reflect_to_children().T
    gated = torch.stack(
        [m * context_gate(c, residual[:, c] / m) for c, m in enumerate(measure)], dim=1
    )
    shares = forest.reflect_to_tokens()
    at_leaf = torch.zeros_like(shares)
    for token, context in enumerate(forest.leaf):
        at_leaf[context, token] = shares[context, token]
    token_residual = rho - density @ at_leaf
    return gated @ shares + forest.measure * token_gate(token_residual / forest.measure)


def decompose_signed(
    log_ratio: Float[Tensor, " N"], measure: Float[Tensor, " N"]
) -> Float[Tensor, "2 N"]:
    """``F(r)``: the density of ``|log r|`` in the channel of its sign (``l = 0`` is positive)."""
    positive = log_ratio >= 0
    zero = torch.zeros_like(log_ratio)
    return measure * torch.stack(
        [torch.where(positive, log_ratio, zero), torch.where(positive, zero, -log_ratio)]
    )


def recover_signed(rho: Float[Tensor, "2 N"], measure: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """``log R(rho)``."""
    return (rho[0] - rho[1]) / measure
