"""How far the surrogate can be from the truth: bounds on ``Error = J(theta) - J(roll) - L'``.

``R`` in [0, 1] is the reward of a sequence of at most ``T`` tokens, ``c_t`` the context of its
token ``t``, ``rho_t = pi_theta / pi_roll`` of that token, ``L' = E_roll[R sum_t (rho_t - 1)]``.

    TV(c) = (1/2) sum_v |pi_theta - pi_roll|         KL(c) = KL(pi_roll || pi_theta), nats
    tv_max = eps = max TV(c)                         kl_max = max KL(c), over reachable contexts
    tv_seq = TV of the distributions of sequences    kl_seq = sum_t E_roll KL(c_t)
    mean_tv_t = E_roll TV(c_t)

Every bound says ``|Error| <= B``. Any upper bounds may stand for the divergences. Rewards in
``[a, b]`` multiply it by ``b - a``. Where only ``kl_max`` is known, ``eps`` is Pinsker's
``sqrt(kl_max / 2)``.

**Constants.** With ``Q_t(c, v) = E_roll[R | c, v]``, which lies in [0, 1], and
``g_t(c) = sum_v (pi_theta - pi_roll)(v | c) Q_t(c, v)``,

    Error = sum_t (E_theta - E_roll)[g_t(c_t)]      |(E_theta - E_roll) g| <= 2 TV(prefix) sup|g|

- The paper has ``|g_t| <= 2 eps``, thus its factor 4. ``factor=2``: the differences of
  probabilities sum to 0, so 1/2 may be taken from ``Q_t``, and ``|g_t| <= 2 TV(c_t) (1/2) <= eps``.
  The second step keeps its 2, as ``g_t`` takes both signs. In `adaptive` the 1/2 is taken from
  ``R``: with ``h = E_roll[R (1 - prod_{j>t} rho_j) | c_t, v]``, ``|h| <= TV(future)``, and
  ``|E_roll[(rho_t - 1) h]| <= 2 mean_tv_t sup|h|``.
- For two tokens of two words and a uniform ``pi_roll``, ``Error = 2 eps^2`` is reached: nothing
  below 2 is right for `classical`, `coupling`, `adaptive`, nor (small eps) `pm_kl` and `pm_tv`.
  Factor 1 fails for `mixed_tv` too (three tokens). For `mixed_kl` it is neither proved nor refuted.
- ``product=True``, for `coupling` and `adaptive`: couple the policies token by token. While the
  prefixes agree, the next tokens agree with probability ``1 - eps`` at least, so ``s`` tokens have
  ``TV <= 1 - (1-eps)^s <= min(1, s eps)``. Policies reach it that differ in words which the other
  one never says.

Reference: *Trust Region Masking for Long-Horizon LLM Reinforcement Learning*, arXiv 2512.23075.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..bound_inputs import (
    NO_MAXIMUM,
    SLACK,
    check_factor,
    check_kl,
    check_length,
    check_means,
    check_rewards,
    check_sequence,
    check_tv,
)
from ..errors import BoundError

FORMULAS = {
    "classical": "F/2 T (T-1) eps^2",
    "coupling": "F min(1, eps) sum_t min(1, (t-1) eps)",
    "pm_kl": "F min(1, sqrt(kl_max/2)) sum_t min(1, sqrt((t-1) kl_max/2))",
    "pm_tv": "F min(1, eps) sum_t min(1, sqrt((t-1) kl_max/2))",
    "mixed_kl": "F T min(1, sqrt(kl_max/2)) min(1, sqrt(kl_seq/2))",
    "mixed_tv": "F T min(1, eps) min(1, tv_seq)",
    "adaptive": "F sum_t mean_tv_t min(1, (T-t) eps, sqrt((T-t) kl_max/2))",
}
"""Each bound in ASCII; ``F`` is the factor, 4 in the paper."""

NEEDS = {
    "classical": (), "coupling": (), "pm_kl": ("kl_max",), "pm_tv": ("tv_max", "kl_max"),
    "mixed_kl": ("kl_max", "kl_seq"), "mixed_tv": ("tv_max", "tv_seq"), "adaptive": ("mean_tv",),
}  # fmt: skip
"""What a bound needs beyond ``eps``, which comes from ``tv_max`` or ``kl_max``."""


def pinsker(kl: float) -> float:
    """``min(1, sqrt(kl / 2))``: no total variation is larger, given the divergence in nats.

    >>> pinsker(0.02)
    0.1
    """
    return min(1.0, math.sqrt(check_kl("kl", kl) / 2))


def drift_of_steps(
    steps: NDArray[np.float64],
    tv_max: float | None = None,
    kl_max: float | None = None,
    product: bool = False,
) -> NDArray[np.float64]:
    """The largest total variation that ``steps`` tokens can make: the smallest known cap.

    ``min(1, s eps, sqrt(s kl_max / 2))``; with ``product`` ``1 - (1-eps)^s`` for ``s eps``.

    >>> drift_of_steps(np.array([0.0, 1.0, 2.0]), tv_max=0.1, product=True).round(4).tolist()
    [0.0, 0.1, 0.19]
    """
    if tv_max is None and kl_max is None:
        raise BoundError(NO_MAXIMUM)
    out = np.ones_like(steps)
    if tv_max is not None:
        eps = check_tv("tv_max", tv_max)
        exact = product and eps < 1
        out = np.minimum(out, -np.expm1(steps * math.log1p(-eps)) if exact else steps * eps)
    if kl_max is not None:
        out = np.minimum(out, np.sqrt(steps * (check_kl("kl_max", kl_max) / 2)))
    return out


def _before(length: int) -> NDArray[np.float64]:
    """``t - 1`` for ``t = 1 .. T``."""
    return np.arange(check_length(length), dtype=np.float64)


def classical(length: int, tv_max: float, *, factor: float = 4) -> float:
    """``2 T (T-1) eps^2`` for factor 4; with Pinsker's eps ``T (T-1) kl_max``.

    >>> round(classical(4096, pinsker(1e-4)), 3)
    1677.312
    """
    tokens = check_length(length)
    return check_factor(factor) / 2 * tokens * (tokens - 1) * check_tv("tv_max", tv_max) ** 2


def coupling(length: int, tv_max: float, *, factor: float = 4, product: bool = False) -> float:
    """``4 eps sum_t min(1, (t-1) eps)``; with ``product`` ``1 - (1-eps)^(t-1)`` below the sum.

    >>> round(coupling(4096, 5e-3), 3)
    79.91
    """
    drift = drift_of_steps(_before(length), tv_max=tv_max, product=product)
    return check_factor(factor) * tv_max * float(drift.sum())


def pm_kl(length: int, kl_max: float, *, factor: float = 4) -> float:
    """Pinsker-Marginal, KL only: ``4 sqrt(kl_max/2) sum_t sqrt((t-1) kl_max/2)``, both capped at 1.

    >>> round(pm_kl(4096, 1e-4), 3)
    34.946
    """
    return pm_tv(length, pinsker(kl_max), kl_max, factor=factor)


def pm_tv(length: int, tv_max: float, kl_max: float, *, factor: float = 4) -> float:
    """Pinsker-Marginal with the token's own TV: ``4 eps sum_t min(1, sqrt((t-1) kl_max/2))``.

    >>> round(pm_tv(4096, 5e-3, 1e-4), 3)
    24.711
    """
    drift = drift_of_steps(_before(length), kl_max=kl_max)
    return check_factor(factor) * check_tv("tv_max", tv_max) * float(drift.sum())


def pm_simplified(length: int, kl_max: float) -> float:
    """``(4/3) T^1.5 kl_max``: `pm_kl` with the sum replaced by the integral above it, no caps.

    Never below `pm_kl`.

    >>> round(pm_simplified(4096, 1e-4), 3)
    34.953
    """
    return 4 / 3 * check_length(length) ** 1.5 * check_kl("kl_max", kl_max)


def mixed_kl(length: int, kl_max: float, kl_seq: float, *, factor: float = 4) -> float:
    """``4 T min(1, sqrt(kl_max/2)) min(1, sqrt(kl_seq/2))``: each prefix pays for the sequence.

    >>> round(mixed_kl(4096, 1e-4, 0.01), 3)
    8.192
    """
    largest, sequence = check_kl("kl_max", kl_max), check_kl("kl_seq", kl_seq)
    check_sequence("kl", check_length(length), largest, sequence)
    return check_factor(factor) * length * pinsker(largest) * pinsker(sequence)


def mixed_tv(length: int, tv_max: float, tv_seq: float, *, factor: float = 4) -> float:
    """``4 T eps tv_seq``.

    >>> round(mixed_tv(4096, 5e-3, 0.05), 3)
    4.096
    """
    largest, sequence = check_tv("tv_max", tv_max), check_tv("tv_seq", tv_seq)
    check_sequence("tv", check_length(length), largest, sequence)
    return check_factor(factor) * length * largest * sequence


def adaptive(
    mean_tv: ArrayLike,
    *,
    tv_max: float | None = None,
    kl_max: float | None = None,
    factor: float = 4,
    product: bool = False,
) -> float:
    """``4 sum_t mean_tv_t min(1, (T-t) eps, sqrt((T-t) kl_max/2))``: the future, not the prefix.

    Args:
        mean_tv: mean TV of the contexts of each position, ``[T]``, 0 to 1 each.
        tv_max, kl_max: one or both; a missing one leaves its term out.
        factor: 4, or 2.
        product: ``1 - (1-eps)^(T-t)`` for ``(T-t) eps``.

    Raises:
        BoundError: also where a mean lies above ``tv_max``.

    >>> round(adaptive([0.1, 0.1, 0.1], tv_max=0.1), 6)
    0.12
    """
    means = check_means(mean_tv, tv_max)
    remaining = _before(len(means))[::-1]
    weights = drift_of_steps(remaining, tv_max=tv_max, kl_max=kl_max, product=product)
    return check_factor(factor) * float((means * weights).sum())


@dataclass(frozen=True)
class Bounds:
    """Every bound on ``|Error|`` for one set of divergences; None where its inputs are missing.

    Attributes:
        length: ``T``.
        eps: largest total variation of a token: the smaller of ``tv_max`` and Pinsker's.
        kl_max, kl_seq, tv_seq: as given.
        width: ``b - a`` of the rewards; all bounds are multiplied by it.
        factor: 4 or 2.
        product: whether the product form of the coupling was used.
        reach: no ``|L'|`` is larger. It is at most ``(b - a) sum_t mean_tv_t``, and that sum at
            most ``T eps`` and, by Pinsker and Jensen, ``sqrt(T kl_seq / 2)``.
    """

    length: int
    eps: float
    kl_max: float | None
    kl_seq: float | None
    tv_seq: float | None
    width: float
    factor: float
    product: bool
    reach: float
    classical: float
    coupling: float
    pm_kl: float | None = None
    pm_tv: float | None = None
    mixed_kl: float | None = None
    mixed_tv: float | None = None
    adaptive: float | None = None

    @property
    def known(self) -> dict[str, float]:
        """The bounds that have a value, by name."""
        values = {name: getattr(self, name) for name in FORMULAS}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def best(self) -> float:
        """``B*``, the smallest."""
        return min(self.known.values())

    @property
    def tightest(self) -> str:
        """The name of the smallest; of several equal ones the first, as they are listed."""
        return next(n for n, value in self.known.items() if value <= self.best * (1 + SLACK))

    @property
    def vacuous(self) -> bool:
        """Whether no ``L'`` could exceed ``B*``: it certifies nothing, whatever the surrogate."""
        return self.best >= self.reach

    def certifies(self, surrogate: float) -> bool:
        """Whether ``L' > B*``, which proves ``J(theta) > J(roll)``.

        Only with exact divergences over all reachable contexts, and the exact ``L'``.
        """
        return surrogate > self.best

    def as_dict(self) -> dict[str, float | str | None]:
        """Bounds by name, then ``best`` and ``tightest``; what ``--json`` prints."""
        values = {name: getattr(self, name) for name in FORMULAS}
        return {**values, "best": self.best, "tightest": self.tightest}

    @property
    def why(self) -> str:
        """What decides which bound is the tightest, in a sentence."""
        if self.length == 1:
            return "a single token has no prefix that could have drifted"
        linear = drift_of_steps(_before(self.length), self.eps, product=self.product)
        root = (
            linear
            if self.kl_max is None
            else drift_of_steps(_before(self.length), None, self.kl_max)
        )
        steps = min(linear.mean(), root.mean())
        name = self.tightest
        if name.startswith("mixed"):
            whole = self.tv_seq if name == "mixed_tv" else pinsker(self.kl_seq or 0.0)
            return (
                f"it charges every prefix the drift of the whole sequence, {whole:.4g}; counted "
                f"step by step, a prefix could drift by {steps:.4g} on average"
            )
        if name == "adaptive":
            return (
                "it charges each position the mean TV of its contexts, where the others charge the "
                f"largest, {self.eps:.4g}"
            )
        drift, law = (
            (root, "sqrt((t-1) kl_max/2)") if name.startswith("pm") else (linear, "(t-1) eps")
        )
        if name == "coupling" and self.product:
            law = "1 - (1-eps)^(t-1)"
        capped = int((drift >= 1).argmax()) + 1 if drift[-1] >= 1 else None
        cap = (
            "and stays below 1" if capped is None else f"and is capped at 1 from token {capped} on"
        )
        return f"the drift of the prefix grows as {law} {cap}: {drift.mean():.4g} on average"


def bounds(
    length: int,
    *,
    kl_max: float | None = None,
    kl_seq: float | None = None,
    tv_max: float | None = None,
    tv_seq: float | None = None,
    mean_tv: ArrayLike | None = None,
    reward_range: Sequence[float] = (0.0, 1.0),
    factor: float = 4,
    product: bool = False,
    tight: bool = False,
) -> Bounds:
    """All bounds of the paper that the given divergences allow.

    ``kl_max`` or ``tv_max`` is needed. The eps of `classical` and `coupling` is the smaller of
    ``tv_max`` and ``sqrt(kl_max / 2)``; the TV forms exist only where ``tv_max`` is given.

    Args:
        length: tokens of the longest sequence, ``T``.
        kl_max, kl_seq: nats.
        tv_max, tv_seq: 0 to 1.
        mean_tv: ``[T]``, see `adaptive`.
        reward_range: ``(a, b)``, the lowest and the highest reward.
        factor: 4 as in the paper, or 2.
        product: product form of the coupling.
        tight: both tighter constants at once.

    Raises:
        BoundError: an input out of its range, or two that contradict each other.

    >>> b = bounds(4096, kl_max=1e-4, kl_seq=0.01)
    >>> b.tightest, round(b.best, 3), b.mixed_tv
    ('mixed_kl', 8.192, None)
    """
    tokens, width = check_length(length), check_rewards(reward_range)
    if tight:
        factor, product = 2, True
    known = [] if tv_max is None else [check_tv("tv_max", tv_max)]
    known += [] if kl_max is None else [pinsker(check_kl("kl_max", kl_max))]
    if not known:
        raise BoundError(NO_MAXIMUM)
    if kl_seq is not None:
        check_kl("kl_seq", kl_seq)
    if tv_seq is not None:
        check_tv("tv_seq", tv_seq)
    eps = min(known)
    sums = [tokens * eps] + ([] if kl_seq is None else [math.sqrt(tokens * kl_seq / 2)])
    values = {
        "classical": classical(tokens, eps, factor=factor),
        "coupling": coupling(tokens, eps, factor=factor, product=product),
    }
    if kl_max is not None:
        values["pm_kl"] = pm_kl(tokens, kl_max, factor=factor)
        if kl_seq is not None:
            values["mixed_kl"] = mixed_kl(tokens, kl_max, kl_seq, factor=factor)
    if tv_max is not None:
        if kl_max is not None:
            values["pm_tv"] = pm_tv(tokens, tv_max, kl_max, factor=factor)
        if tv_seq is not None:
            values["mixed_tv"] = mixed_tv(tokens, tv_max, tv_seq, factor=factor)
    if mean_tv is not None:
        means = check_means(mean_tv, tv_max, tokens)
        sums.append(float(means.sum()))
        values["adaptive"] = adaptive(
            means, tv_max=tv_max, kl_max=kl_max, factor=factor, product=product
        )
    return Bounds(
        tokens, eps, kl_max, kl_seq, tv_seq, width, float(factor), product, width * min(sums),
        **{name: width * value for name, value in values.items()},
    )  # fmt: skip
