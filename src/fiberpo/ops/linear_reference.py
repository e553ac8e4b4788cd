"""The equation of `fiberpo.linear_logprob`, with all logits in memory.

    z_iv = (sum_d hidden_id weight_vd + bias_v) / temperature
    log p_iv = z_iv - log sum_w exp(z_iw)
    out_i = log p_{i, targets_i}          entropy_i = -sum_v p_iv log p_iv

In float64, with autograd's own gradient: the definition that the chunked path
(`fiberpo.ops.linear`) must agree with, in value and in gradient.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def linear_logprob(
    hidden: Float[Tensor, "N H"],
    weight: Float[Tensor, "V H"],
    targets: Int[Tensor, " N"],
    temperature: float = 1.0,
    bias: Float[Tensor, " V"] | None = None,
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Log-probs of the targets and the entropy of every row, float64, differentiable.

    >>> hidden, weight = torch.zeros(1, 3), torch.randn(4, 3)
    >>> log_probs, entropy = linear_logprob(hidden, weight, torch.tensor([2]))
    >>> bool(torch.allclose(-log_probs.exp().log(), entropy))       # uniform: both are log 4
    True
    """
    logits = hidden.double() @ weight.double().T
    if bias is not None:
        logits = logits + bias.double()
    log_p = torch.log_softmax(logits / temperature, dim=-1)
    return log_p[torch.arange(len(targets)), targets], -(log_p.exp() * log_p).sum(-1)
