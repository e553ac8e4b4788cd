"""Budgets: how far a context may drift, per channel."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Union

import torch
from jaxtyping import Float
from torch import Tensor

from .errors import BudgetError, FiberPOWarning
from .labels import ContextNames

Pair = tuple[float, float]
BudgetLike = Union["Budget", Sequence[float], Mapping[str, Sequence[float]]]

OTHERS = "*"


def check_positive(
    name: str, value: object, *, above: float = 0.0, below: float = math.inf
) -> float:
    """``value`` as a float in ``(above, below)``, or a `BudgetError` that quotes it."""
    if isinstance(value, bool) or not isinstance(value, Real) or math.isnan(value):
        raise BudgetError(f"{name} is {value!r}; it must be a number")
    number = float(value)
    if not above < number < below:
        upper = "" if math.isinf(below) else f" and < {below:g}"
        raise BudgetError(f"{name} is {value!r}; it must be > {above:g}{upper}")
    return number


def _pair(name: str, value: object) -> Pair:
    if isinstance(value, (str, Mapping)) or not isinstance(value, Sequence) or len(value) != 2:
        raise BudgetError(
            f"{name} is {value!r}; a budget is a pair (positive, negative) in nats per token, or "
            'a mapping from context name to such a pair, {"math": (0.12, 0.05), "*": (0.1, 0.05)}'
        )
    pair = []
    for channel, number in zip(("positive", "negative"), value, strict=True):
        if number == math.inf:
            pair.append(math.inf)  # an open gate
        else:
            pair.append(check_positive(f"{name} ({channel} channel)", number))
    positive, negative = pair
    if negative > positive:
        warnings.warn(
            f"{name} is ({positive:g}, {negative:g}): the negative channel has more room than the "
            "positive one. C- < C+ is recommended, since the mean of -log r estimates a KL "
            "divergence (exactly so for trajectories of one length), so S- exceeds S+ on average.",
            FiberPOWarning,
            stacklevel=2,
        )
    return positive, negative


@dataclass(frozen=True)
class Budget:
    """Budgets of one stratum: a pair for all contexts, or one per context name.

    ``positive`` bounds ``S+`` (mean of ``max(log r, 0)``), ``negative`` bounds ``S-``; both in
    nats per token, > 0 (``inf`` leaves the channel open).

    Example:
        >>> Budget.parse((0.12, 0.05)).for_context("domain", "math")
        (0.12, 0.05)
        >>> Budget.parse({"math": (0.2, 0.1), "*": (0.12, 0.05)}).for_context("domain", "code")
        (0.12, 0.05)
    """

    named: tuple[tuple[str, Pair], ...] = ()
    others: Pair | None = None

    @classmethod
    def parse(cls, value: BudgetLike) -> Budget:
        """A budget from a pair or a mapping.

        Raises:
            BudgetError: for anything else, and for numbers that are not > 0.
        """
        if isinstance(value, Budget):
            return value
        if isinstance(value, Mapping):
            if not value:
                raise BudgetError('budget is an empty mapping; give at least {"*": (0.12, 0.05)}')
            pairs = {str(k): _pair(f'budget["{k}"]', v) for k, v in value.items()}
            others = pairs.pop(OTHERS, None)
            return cls(tuple(pairs.items()), others)
        return cls((), _pair("budget", value))

    def for_context(self, stratum: str, name: str) -> Pair:
        """The pair of one context, by the caller's id for it.

        Raises:
            BudgetError: if it has none and there is no ``"*"``.
        """
        for context, pair in self.named:
            if context == name:
                return pair
        if self.others is None:
            raise BudgetError(
                f'no budget for the {stratum} "{name}"; budgets are given for '
                f'{[context for context, _ in self.named]}. Add it, or "*" for all others.'
            )
        return self.others

    def resolve(
        self, stratum: str, names: ContextNames, contexts: int
    ) -> Float[Tensor, "2 contexts"]:
        """Budgets of all contexts of a stratum, float64, ``[channel, context]``.

        Raises:
            BudgetError: if a context has none and there is no ``"*"``.
        """
        others = (math.nan, math.nan) if self.others is None else self.others
        pairs = torch.tensor(others, dtype=torch.float64)[:, None].repeat(1, contexts)
        for name, pair in self.named:
            pairs[:, names.find(name).cpu()] = torch.tensor(pair, dtype=torch.float64)[:, None]
        if self.others is None and bool(pairs.isnan().any()):
            self.for_context(stratum, names(int(pairs[0].isnan().nonzero()[0])))
        return pairs
