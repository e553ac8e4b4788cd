"""The limit of a gate in the unit of its drift, whatever kind of gate it is."""

from __future__ import annotations

import math

from ..budgets import Budget
from ..gates import AggregateGate, BudgetClip, Gate, LogClip, RatioClip, Zero
from ..objective import Objective

Limits = list[tuple[str, list[float] | None]]

ALL = "all"
"""The context name that stands for every context without a limit of its own."""


def limits_of(gate: Gate) -> Limits:
    """Context name -> ``[positive, negative]``, as far as the gate has one.

    Nats per token for budgets, nats for clips of log ratios and ratios, ``|r - 1|`` for
    `BudgetClip`; None for gates of other kinds.

    >>> limits_of(LogClip(0.04))
    [('all', [0.04, 0.04])]
    """
    if isinstance(gate, AggregateGate):
        return _of_budget(gate.budget)
    if isinstance(gate, LogClip):
        return [(ALL, [gate.epsilon, gate.epsilon])]
    if isinstance(gate, RatioClip):
        high = gate.epsilon if gate.epsilon_high is None else gate.epsilon_high
        return [(ALL, [math.log1p(high), -math.log1p(-gate.epsilon)])]
    if isinstance(gate, BudgetClip):
        return [(ALL, [gate.radius, gate.radius])]
    return [(ALL, None)]


def _of_budget(budget: Budget) -> Limits:
    named = [(name, list(pair)) for name, pair in budget.named]
    others = [] if budget.others is None else [(ALL, list(budget.others))]
    return [*others, *named]


def limits(objective: Objective) -> dict[str, Limits]:
    """The limits of every scale, coarse to fine and ``"token"`` last, by gates and by stops.

    Where both stand at a scale, those of the gate.

    >>> from fiberpo import recipes
    >>> limits(recipes.fiberstop({"group": (0.06, 0.05)}, 0.2))
    {'group': [('all', [0.06, 0.05])], 'token': [('all', [0.2, 0.2])]}
    """
    gates, stops = objective.gate_map.gates, objective.stops
    found: dict[str, Limits] = {}
    for name in objective.strata:
        if name in gates:
            found[name] = limits_of(gates[name])
        else:
            found[name] = _of_budget(next(s.budgets[name] for s in stops if name in s.budgets))
    token = objective.gate_map.token
    if isinstance(token, Zero) and stops:
        widths = stops[0].epsilon
        found["token"] = [(ALL, list(widths) if min(widths) < math.inf else None)]
    else:
        found["token"] = limits_of(token)
    return found
