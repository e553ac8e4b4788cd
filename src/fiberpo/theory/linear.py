"""Linear programs by HiGHS (through scipy), the independent check of every closed form."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..errors import TheoryError
from .claims import Array

Row = tuple[Array, float]
"""Coefficients and right-hand side of one constraint."""


def maximise(
    gain: Array,
    *,
    at_most: Sequence[Row] = (),
    equal: Sequence[Row] = (),
    bounds: Sequence[tuple[float | None, float | None]] | None = None,
) -> tuple[float, Array] | None:
    """``max gain @ x`` under ``row @ x <= limit`` and ``row @ x = value``.

    Args:
        bounds: per variable (lowest, highest), None for none; free variables by default.

    Returns:
        Largest value and a maximizer; the value is ``inf`` where there is none; None where nothing
        is feasible.

    Raises:
        TheoryError: if scipy is missing or the solver gives up.

    >>> value, x = maximise(np.array([1.0, 2.0]), at_most=[(np.ones(2), 1.0)], bounds=[(0, 1)] * 2)
    >>> round(value, 9), x.round(9).tolist()
    (2.0, [0.0, 1.0])
    """
    try:
        from scipy.optimize import linprog
    except ModuleNotFoundError as error:
        raise TheoryError(
            "the laboratory checks closed forms against linear programs and needs scipy: "
            "pip install 'fiberpo[lab]'"
        ) from error
    result = linprog(
        -gain,
        A_ub=np.array([row for row, _ in at_most]) if at_most else None,
        b_ub=np.array([limit for _, limit in at_most]) if at_most else None,
        A_eq=np.array([row for row, _ in equal]) if equal else None,
        b_eq=np.array([value for _, value in equal]) if equal else None,
        bounds=[(None, None)] * len(gain) if bounds is None else bounds,
        method="highs",
    )
    if result.status == 2:
        return None
    if result.status == 3:
        return math.inf, np.full(len(gain), np.nan)
    if result.status != 0:
        raise TheoryError(f"the linear program was not solved: {result.message}")
    return -float(result.fun), np.asarray(result.x, dtype=np.float64)


__all__ = ["Row", "maximise"]
