"""How far the current policy is from the one that sampled, token by token.

At the context ``c`` of a token, in nats and over the full vocabulary,

    KL(c) = KL(p || q) = sum_v p(v) log(p(v) / q(v)),   p = pi_rollout(. | c), q = pi_theta(. | c)

- `full_divergence` from the logits of both policies: exact.
- `top_k_divergence` from the rollout's stored top-k log-probs: with ``S`` the stored tokens, ``p``
  the rollout, ``q`` the current policy, ``P = 1 - sum_S p`` and ``Q = 1 - sum_S q`` their tails,

      KL >= sum_{v in S} p log(p/q) + P log(P/Q)

  by the log-sum inequality (the tail counts as one token; data processing never adds divergence).
  A lower bound: it can show that a token is beyond a threshold, never that it is within.
- `k2` and `k3`, estimates from the sampled token alone.

Reference: *Trust Region Masking for Long-Horizon LLM Reinforcement Learning*, arXiv 2512.23075.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .errors import NonFiniteError, ShapeError
from .inputs import Input, check_finite

ELEMENTS = 2**24
"""Numbers of a chunk: tokens at a time times vocabulary. 128 MiB for each float64 temporary."""

ROUNDING = 1e-6
"""A tail of the stored top-k that is smaller may be rounding of the log-probs."""


class Certainty(enum.Enum):
    """What is known of a divergence, weakest last."""

    EXACT = "exact"
    LOWER_BOUND = "lower bound"
    ESTIMATED = "estimated"

    def __and__(self, other: Certainty) -> Certainty:
        """The weaker of the two: what is known of both together.

        >>> Certainty.EXACT & Certainty.LOWER_BOUND
        <Certainty.LOWER_BOUND: 'lower bound'>
        """
        order = list(Certainty)
        return max(self, other, key=order.index)


@dataclass(frozen=True, eq=False)
class TokenDivergence:
    """A divergence at the context of every token, and what is known of it.

    Attributes:
        values: nats, >= 0; ``[N]`` in a packed batch, ``[B, T]`` beside padded rows.
        certainty: `Certainty` of all of them.
    """

    values: Float[Tensor, "..."]
    certainty: Certainty

    def select(self, tokens: Tensor) -> TokenDivergence:
        """Those of some tokens, by a mask or by indices."""
        return TokenDivergence(self.values[tokens], self.certainty)

    @staticmethod
    def concatenate(parts: Sequence[TokenDivergence]) -> TokenDivergence:
        """One after the other, as certain as the least certain part."""
        certainty = parts[0].certainty
        for part in parts[1:]:
            certainty = certainty & part.certainty
        return TokenDivergence(torch.cat([part.values for part in parts]), certainty)


def check_divergence(
    value: Input, log_probs: Tensor, lengths: Tensor, mask: Tensor | None = None
) -> TokenDivergence | None:
    """What a caller hands in as ``token_divergence``, checked; packed by ``mask``.

    Args:
        value: a `TokenDivergence` or None.
        log_probs: its shape is asked for.
        lengths: loss tokens of the rows, for messages.
        mask: ``[B, T]``, where padded.

    Raises:
        ShapeError: if it is no `TokenDivergence`, or not of the shape of the log-probs.
        NonFiniteError: if it is not finite, or negative, at a loss token.
    """
    if value is None:
        return None
    if not isinstance(value, TokenDivergence):
        raise ShapeError(
            f"token_divergence is a {type(value).__name__}; wrap it, to say what is known of it: "
            "TokenDivergence(values, Certainty.EXACT), or take that of full_divergence"
        )
    if value.values.shape != log_probs.shape:
        raise ShapeError(
            f"token_divergence has shape {tuple(value.values.shape)}, but log_probs has "
            f"{tuple(log_probs.shape)}"
        )
    values = value.values.detach().to(log_probs.device)
    values = values if mask is None else values[mask]
    check_finite({"token_divergence": values}, lengths)
    if bool((values < 0).any()):
        token = int((values < 0).nonzero()[0])
        raise NonFiniteError(
            f"token_divergence is {float(values[token]):g} at token {token} of the batch; a KL "
            "divergence is never negative. Pass KL(pi_rollout || pi_theta) over the vocabulary, "
            "not a log ratio of the sampled token."
        )
    return TokenDivergence(values, value.certainty)


def k2(log_rho: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """``(log rho)^2 / 2``, ``rho = pi_theta / pi_rollout`` of the sampled token; float64."""
    return log_rho.double().square() / 2


def k3(log_rho: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """``rho - 1 - log rho``, never negative, unbiased for KL; float64."""
    return torch.expm1(log_rho.double()) - log_rho.double()


def full_divergence(
    rollout_logits: Float[Tensor, "..."],
    logits: Float[Tensor, "..."],
    *,
    tokens_at_once: int | None = None,
) -> TokenDivergence:
    """Exact ``KL(pi_rollout || pi_theta)`` of every token; no gradient.

    Args:
        rollout_logits: ``[*tokens, vocabulary]`` of the policy that sampled; logits or log-probs,
            divided by the temperature of sampling and with whatever else the engine did to them.
        logits: of the current policy, likewise.
        tokens_at_once: chunk size; by default so that a chunk has `ELEMENTS` numbers.

    Returns:
        values ``[*tokens]`` float64; infinite where the current policy excludes a token that the
        rollout does not.

    Raises:
        ShapeError: for shapes that differ.

    >>> found = full_divergence(torch.tensor([[0.0, 0.0]]), torch.log(torch.tensor([[0.8, 0.2]])))
    >>> found.values.round(decimals=4).tolist(), found.certainty.name
    ([0.2231], 'EXACT')
    """
    _check_same("rollout_logits", rollout_logits.shape, "logits", logits.shape)

    def chunk(rollout: Tensor, current: Tensor) -> Tensor:
        log_p = torch.log_softmax(rollout.double(), -1)
        log_q = torch.log_softmax(current.double(), -1)
        # 0 log 0 = 0: words that the rollout excludes
        return torch.where(log_p > -torch.inf, log_p.exp() * (log_p - log_q), 0.0).sum(-1)

    values = _chunked(chunk, (rollout_logits, logits), logits.shape, tokens_at_once)
    return TokenDivergence(values, Certainty.EXACT)


def top_k_divergence(
    rollout_top: Float[Tensor, "..."],
    token_ids: Tensor,
    logits: Float[Tensor, "..."],
    *,
    tokens_at_once: int | None = None,
) -> TokenDivergence:
    """Lower bound of ``KL(pi_rollout || pi_theta)`` from the stored top-k; no gradient.

    ``sum_{v in S} p log(p/q) + P log(P/Q)``, up to the rounding of the stored log-probs.

    Args:
        rollout_top: ``[*tokens, k]`` log-probs (not logits) of the stored tokens, nats.
        token_ids: ``[*tokens, k]`` which tokens these are, each once.
        logits: of the current policy, as in `full_divergence`.
        tokens_at_once: as in `full_divergence`.

    Returns:
        values ``[*tokens]`` float64, `Certainty.LOWER_BOUND`; `Certainty.EXACT` where at most one
        token of the vocabulary is not stored.

    Raises:
        ShapeError: for shapes that do not fit, ids that repeat, or probabilities that add up to
            more than 1.
    """
    _check_same("rollout_top", rollout_top.shape, "token_ids", token_ids.shape)
    _check_same("rollout_top", rollout_top.shape[:-1], "logits", logits.shape[:-1])
    ordered = token_ids.sort(-1).values
    if bool((ordered[..., 1:] == ordered[..., :-1]).any()):
        raise ShapeError("token_ids names a token twice at one position; store each token once")
    total = float(rollout_top.double().exp().sum(-1).max()) if rollout_top.numel() else 0.0
    if total > 1 + 1e-3:
        raise ShapeError(
            f"rollout_top adds up to a probability of {total:g}; pass log-probs, not logits"
        )

    def chunk(top: Tensor, ids: Tensor, current: Tensor) -> Tensor:
        log_p, log_q = top.double(), torch.log_softmax(current.double(), -1)
        p, tail = log_p.exp(), (1 - log_p.exp().sum(-1)).clamp(min=0)
        inside = torch.where(p > 0, p * (log_p - log_q.gather(-1, ids)), 0.0).sum(-1)
        log_rest = log_q.scatter(-1, ids, -torch.inf).logsumexp(-1)  # 1 - sum q would cancel
        tail = torch.where((tail < ROUNDING) & (log_rest == -torch.inf), 0.0, tail)
        return inside + torch.where(tail > 0, tail * (tail.log() - log_rest), 0.0)

    values = _chunked(chunk, (rollout_top, token_ids, logits), logits.shape, tokens_at_once)
    complete = rollout_top.shape[-1] >= logits.shape[-1] - 1
    return TokenDivergence(values, Certainty.EXACT if complete else Certainty.LOWER_BOUND)


@torch.no_grad()
def _chunked(
    function: Callable[..., Tensor],
    tensors: Sequence[Tensor],
    shape: torch.Size,
    tokens_at_once: int | None,
) -> Tensor:
    """``function`` on some tokens at a time; never below 0."""
    rows = [x.reshape(-1, x.shape[-1]) for x in tensors]
    size = max(1, ELEMENTS // shape[-1]) if tokens_at_once is None else tokens_at_once
    parts = [function(*(x[i : i + size] for x in rows)) for i in range(0, len(rows[0]), size)]
    found = torch.cat(parts) if parts else rows[0].new_zeros(0, dtype=torch.float64)
    return found.clamp(min=0).reshape(shape[:-1])


def _check_same(name: str, shape: torch.Size, other: str, expected: torch.Size) -> None:
    if shape != expected:
        raise ShapeError(
            f"{name} has shape {tuple(shape)}, which does not fit {other} with {tuple(expected)}"
        )


__all__ = [
    "Certainty", "TokenDivergence", "full_divergence", "k2", "k3", "top_k_divergence",
]  # fmt: skip
