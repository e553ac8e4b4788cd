"""FiberStop: the multi-scale budgets of FiberPO as stops, a recipe of ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .budgets import BudgetLike
from .building import Aggregation, build
from .charts import Log
from .errors import StrataError
from .gates import Zero
from .gating import GateMap, Measure
from .masks import SequenceMask
from .objective import Objective
from .stops import BudgetStop

STOP_BUDGETS: Mapping[str, tuple[float, float]] = {
    "domain": (0.04, 0.04), "group": (0.06, 0.06), "trajectory": (0.1, 0.1)
}  # fmt: skip
"""Budgets of `fiberstop`, nats per token."""


def fiberstop(
    budgets: Mapping[str, BudgetLike] | None = None,
    epsilon: float | Sequence[float] = 0.2,
    *,
    measure: Measure = "trajectory",
    weights: Aggregation = "trajectory_mean",
    mask: SequenceMask | None = None,
) -> Objective:
    """FiberStop: ``J = sum mu M A log pi``; ``M`` stops what goes outward out of any budget.

    With the aggregates ``S+-`` of FiberPO at every scale (`stops.BudgetStop`)::

        M_i = 0  where not A_i l_i < 0, and some c on the path of i has S+_c > C+_c (A_i > 0) or
                 S-_c > C-_c (A_i < 0), or l_i itself is beyond epsilon on that side
        dJ/dl_i = mu_i A_i M_i

    A token is stopped by the first scale that is out of its budget, and not at all where its
    gradient brings it back. The slope is 1: neither a ratio far above 1 (``A < 0``) amplifies a
    gradient nor one far below 1 (``A > 0``) mutes the one that restores it. Ours, not the paper's,
    and not a ratio gating map: the value of the loss is no surrogate of the return. On policy the
    gradient is that of the policy gradient, ``mu A``.

    Args:
        budgets: stratum -> ``(C+, C-)`` in nats per token, or per context name; may be empty.
            Default: `STOP_BUDGETS`.
        epsilon: of the token's own log ratio, nats; a pair is (above, below).
        measure, weights, mask: as in `fiberpo_domain`.

    Raises:
        StrataError, BudgetError, ObjectiveError: for impossible arguments.

    Example:
        >>> import torch
        >>> from fiberpo import RatioBatch
        >>> batch = RatioBatch.from_packed(torch.tensor([-0.9, -1.0, -1.1]), torch.full((3,), -1.0),
        ...                                torch.ones(1), [3])
        >>> fiberstop({"trajectory": (0.02, 0.02)})(batch).coefficients.round(decimals=4)
        tensor([0.0000, 0.0000, 0.3333], dtype=torch.float64)
    """
    if budgets is None:
        budgets = STOP_BUDGETS
    if not isinstance(budgets, Mapping):
        raise StrataError(
            f"budgets is {budgets!r}; it maps stratum names to budgets, "
            '{"domain": (0.04, 0.04), "trajectory": (0.1, 0.1)}'
        )
    pair = epsilon if isinstance(epsilon, Sequence) else (epsilon, epsilon)
    factors = (BudgetStop(budgets, pair, measure),)
    gate_map = GateMap(Log(), {}, Zero(), detached=True)
    return build("fiberstop", gate_map, weights, mask, ("fiberpo",), locals(), factors)
