"""From APC-Obj to PPO, GRPO and GSPO in steps, each a textbook objective on numbers.

    APC-Obj        (1/N) sum clip(r - 1, B) A + ...     a TV budget shared by the tokens of a state
      | every state on its own: B_i = delta
    PPO, no min    (1/N) sum clip(r, 1 +- delta) A
      | clip only the side that the sign of A names
    PPO            (1/N) sum min(r A, clip(r) A)
      | trajectories weigh equally
    GRPO           mean over trajectories of (1/T) sum min(r A, clip(r) A)
      | one ratio for the trajectory, s = exp(mean of log r)
    GSPO           mean over trajectories of min(s A, clip(s) A)

Reference: *Fibration Policy Optimization*, arXiv 2603.08239, App. C.4, Remark C.5.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .apc import token_form
from .claims import Array, Indices


@dataclass(frozen=True, eq=False)
class Sample:
    """Tokens of one batch.

    Attributes:
        log_ratio, advantage: ``[N]``.
        state, trajectory: ``[N]`` labels 0, 1, ...
    """

    log_ratio: Array
    advantage: Array
    state: Indices
    trajectory: Indices

    @property
    def ratio(self) -> Array:
        """``r = exp(l)``."""
        return np.exp(self.log_ratio)

    @property
    def lengths(self) -> Array:
        """Tokens of each trajectory."""
        return np.bincount(self.trajectory).astype(np.float64)

    def trajectory_mean(self, value: Array) -> Array:
        """Mean of a token value over each trajectory."""
        return np.bincount(self.trajectory, weights=value) / self.lengths


def clipped(ratio: Array, low: float, high: float) -> Array:
    """``clip(r, 1 - low, 1 + high)``."""
    return np.clip(ratio, 1 - low, 1 + high)


def one_sided(ratio: Array, advantage: Array, low: float, high: float) -> Array:
    """``min(r A, clip(r) A)``."""
    return np.minimum(ratio * advantage, clipped(ratio, low, high) * advantage)


def apc_obj(sample: Sample, delta: float) -> float:
    """APC-Obj over all states, token form."""
    gated = np.empty_like(sample.ratio)
    for s in np.unique(sample.state):
        here = sample.state == s
        gated[here] = 1 + token_form(sample.ratio[here] - 1, delta)
    return float((gated * sample.advantage).mean())


def ppo_without_min(sample: Sample, delta: float) -> float:
    """Every token its own state (Remark C.5)."""
    return float((clipped(sample.ratio, delta, delta) * sample.advantage).mean())


def ppo(sample: Sample, low: float, high: float | None = None) -> float:
    """``(1/N) sum min(r A, clip(r) A)``; DAPO with ``high > low``."""
    high = low if high is None else high
    return float(one_sided(sample.ratio, sample.advantage, low, high).mean())


def grpo(sample: Sample, low: float, high: float | None = None) -> float:
    """PPO's terms averaged over each trajectory first."""
    high = low if high is None else high
    terms = one_sided(sample.ratio, sample.advantage, low, high)
    return float(sample.trajectory_mean(terms).mean())


def gspo(sample: Sample, low: float, high: float | None = None) -> float:
    """One ratio a trajectory, ``s = exp(mean of log r)``, and the mean of its advantages."""
    high = low if high is None else high
    s = np.exp(sample.trajectory_mean(sample.log_ratio))
    return float(one_sided(s, sample.trajectory_mean(sample.advantage), low, high).mean())


__all__ = ["Sample", "apc_obj", "clipped", "grpo", "gspo", "one_sided", "ppo", "ppo_without_min"]
