"""The limit of a gate in the unit of its drift, whatever kind of gate it is."""

from __future__ import annotations

import math

from ..gates import AggregateGate, BudgetClip, Gate, LogClip, RatioClip

ALL = "all"
"""The context name that stands for every context without a limit of its own."""


def limits_of(gate: Gate) -> list[tuple[str, list[float] | None]]:
    """Context name -> ``[positive, negative]``, as far as the gate has one.

    Nats per token for budgets, nats for clips of log ratios and ratios, ``|r - 1|`` for
    `BudgetClip`; None for gates of other kinds.

    >>> limits_of(LogClip(0.04))
    [('all', [0.04, 0.04])]
    """
    if isinstance(gate, AggregateGate):
        named = [(name, list(pair)) for name, pair in gate.budget.named]
        others = [] if gate.budget.others is None else [(ALL, list(gate.budget.others))]
        return [*others, *named]
    if isinstance(gate, LogClip):
        return [(ALL, [gate.epsilon, gate.epsilon])]
    if isinstance(gate, RatioClip):
        high = gate.epsilon if gate.epsilon_high is None else gate.epsilon_high
        return [(ALL, [math.log1p(high), -math.log1p(-gate.epsilon)])]
    if isinstance(gate, BudgetClip):
        return [(ALL, [gate.radius, gate.radius])]
    return [(ALL, None)]
