"""What the laboratory checks: a claim of a paper, and what was found when it was tried."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Indices = NDArray[np.int64]


class Verdict(enum.Enum):
    """How a claim fares. A failing claim is information, not an error."""

    HOLDS = "holds"
    CONDITIONAL = "holds under conditions"
    FAILS = "fails"


@dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    Attributes:
        verdict: how the claim fared.
        tried: number of random (or enumerated) cases.
        worst: largest error over the cases in which the claim is said to hold; None where the
            claim is not a matter of size.
        detail: the counterexample or the conditions, short.
    """

    verdict: Verdict
    tried: int
    worst: float | None
    detail: str


@dataclass(frozen=True)
class Claim:
    """A statement of a paper and the function that tries it.

    Attributes:
        name: short, unique; what ``fiberpo lab --only`` matches.
        source: paper and place, as ``"FiberPO, Thm D.10"``.
        statement: what is claimed, in one sentence.
        check: takes a generator seeded from the claim's name, so that a claim finds the same
            whichever others run beside it.
        recorded: the verdict on record; another one is an error of the laboratory.
    """

    name: str
    source: str
    statement: str
    check: Callable[[np.random.Generator], Finding]
    recorded: Verdict


def judge(
    tried: int, error: float, tolerance: float, *, broken: str | None = None, note: str = ""
) -> Finding:
    """A finding from evidence: nothing is decided before the numbers are in.

    Args:
        tried: number of cases.
        error: largest error over the cases that the claim covers (under its conditions). Above
            ``tolerance``, or NaN, the claim fails.
        tolerance: what still counts as equal.
        broken: the case outside of the conditions that was seen to break the claim, None if none
            was; with it the claim holds under conditions only.
        note: what to say in any case: conditions, or the counterexample of a failing claim.

    >>> judge(10, 1e-15, 1e-12).verdict
    <Verdict.HOLDS: 'holds'>
    >>> judge(10, 1e-15, 1e-12, broken="at x = 0 it is off by 1").verdict
    <Verdict.CONDITIONAL: 'holds under conditions'>
    >>> judge(10, float("nan"), 1e-12).verdict
    <Verdict.FAILS: 'fails'>
    """
    if not error <= tolerance:
        verdict = Verdict.FAILS
    elif broken is not None:
        verdict = Verdict.CONDITIONAL
    else:
        verdict = Verdict.HOLDS
    return Finding(verdict, tried, float(error), "; ".join(t for t in (note, broken) if t))


__all__ = ["Array", "Claim", "Finding", "Indices", "Verdict", "judge"]
