"""What a sampled batch says about the surrogate and its bound, for the log of a run.

    L' = mean_i R_i sum_t (rho_it - 1)

Where the divergences of the full distributions are given, the bound is computed from them; else
from estimates by the sampled tokens alone: ``k2 = (log rho)^2 / 2`` for the maximum of KL, the sum
of ``k3 = rho - 1 - log rho`` for the sequence, ``|rho - 1| / 2`` for TV. Neither is a proof: that
needs the maximum over all reachable contexts, and a batch shows some of them.

Reference: *Trust Region Masking for Long-Horizon LLM Reinforcement Learning*, arXiv 2512.23075.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..bound_inputs import check_rewards
from ..errors import BoundError
from .bounds import Bounds, bounds

Array = NDArray[np.float64]


class Evidence(enum.Enum):
    """Where the divergences come from."""

    EXACT_KL = "exact KL on the sampled contexts"
    ESTIMATED = "estimated from the sampled tokens"


@dataclass(frozen=True)
class Certificate:
    """The surrogate of a batch beside its bound.

    Attributes:
        surrogate: estimate of ``L'``, in units of the reward.
        bounds: all bounds that could be computed.
        evidence: where the divergences come from.
    """

    surrogate: float
    bounds: Bounds
    evidence: Evidence

    @property
    def exceeded(self) -> bool:
        """Whether ``L' > B*``."""
        return self.bounds.certifies(self.surrogate)

    def metrics(self) -> dict[str, float]:
        """Floats to log; ``bound/exceeded`` is 1 for ``L' > B*``, ``bound/exact`` for exact KL."""
        return {
            **{f"bound/{name}": value for name, value in self.bounds.known.items()},
            "bound/best": self.bounds.best,
            "bound/surrogate": self.surrogate,
            "bound/exceeded": float(self.exceeded),
            "bound/exact": float(self.evidence is Evidence.EXACT_KL),
        }


def certificate(
    log_rho: ArrayLike,
    lengths: ArrayLike,
    rewards: ArrayLike,
    *,
    reward_range: Sequence[float] = (0.0, 1.0),
    token_kl: ArrayLike | None = None,
    token_tv: ArrayLike | None = None,
    tight: bool = False,
) -> Certificate:
    """Surrogate and bounds of a batch of sampled sequences.

    Args:
        log_rho: ``log pi_theta / pi_rollout``, ``[N]``, sequence after sequence, nats.
        lengths: tokens of each sequence, ``[sequences]``.
        rewards: ``[sequences]``, raw rewards, not advantages.
        reward_range: lowest and highest possible reward.
        token_kl: exact ``KL(pi_rollout || pi_theta)`` at the context of each token, ``[N]``, nats.
        token_tv: exact total variation there, ``[N]``; only beside ``token_kl``.
        tight: the tighter constants.

    Raises:
        BoundError: for shapes that do not fit, a ratio that overflows, or rewards out of range.

    >>> certificate([0.01, -0.01], [2], [1.0]).evidence.name
    'ESTIMATED'
    """
    ell, counts = np.asarray(log_rho, dtype=np.float64), np.asarray(lengths)
    reward = np.asarray(rewards, dtype=np.float64)
    _check(ell, counts, reward, reward_range)
    starts = np.cumsum(counts) - counts
    position = np.arange(len(ell)) - np.repeat(starts, counts)
    longest = int(counts.max())
    excess = np.expm1(ell)
    surrogate = float((reward * np.add.reduceat(excess, starts)).mean())

    def by_position(values: Array) -> Array:
        # beyond its end a sequence has no divergence, but it counts
        return np.bincount(position, values, minlength=longest) / len(counts)

    if token_kl is not None:
        kl = _tokens("token_kl", token_kl, len(ell))
        tv = None if token_tv is None else _tokens("token_tv", token_tv, len(ell))
        kl_max, kl_seq = float(kl.max()), float(by_position(kl).sum())
    elif token_tv is not None:
        raise BoundError("token_tv without token_kl: pass both, or neither for estimates")
    else:
        kl_seq = float(by_position(excess - ell).sum())
        # the largest is at least the mean, also of two different estimators
        kl_max = max(float((ell**2).max()) / 2, kl_seq / longest)
        tv = np.minimum(abs(excess) / 2, 1.0)
    found = bounds(
        longest, kl_max=kl_max, kl_seq=kl_seq, reward_range=reward_range, tight=tight,
        tv_max=None if tv is None else float(tv.max()),
        mean_tv=None if tv is None else by_position(tv),
    )  # fmt: skip
    return Certificate(
        surrogate, found, Evidence.ESTIMATED if token_kl is None else Evidence.EXACT_KL
    )


def _tokens(name: str, values: ArrayLike, tokens: int) -> Array:
    array = np.asarray(values, dtype=np.float64)
    if array.shape != (tokens,):
        raise BoundError(f"{name} has shape {array.shape}; it is one number a token, [{tokens}]")
    return array


def _check(ell: Array, counts: NDArray, reward: Array, reward_range: Sequence[float]) -> None:
    if counts.ndim != 1 or not len(counts) or counts.dtype.kind not in "iu" or counts.min() < 1:
        raise BoundError(f"lengths is {counts.tolist()}; a whole number >= 1 for each sequence")
    if ell.shape != (counts.sum(),):
        raise BoundError(f"log_rho has shape {ell.shape}, but lengths add up to {counts.sum()}")
    off = ~(abs(ell) < 700)
    if off.any():
        i = int(off.argmax())
        raise BoundError(f"log_rho[{i}] is {ell[i]:g}: neither rho nor 1 / rho may overflow")
    if reward.shape != counts.shape:
        raise BoundError(
            f"rewards has shape {reward.shape}; one for each of {len(counts)} sequences"
        )
    check_rewards(reward_range)
    out = ~((reward >= reward_range[0]) & (reward <= reward_range[1]))
    if out.any():
        i = int(out.argmax())
        raise BoundError(f"rewards[{i}] is {reward[i]:g}, outside of {tuple(reward_range)}")


__all__ = ["Certificate", "Evidence", "certificate"]
