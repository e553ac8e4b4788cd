"""What every recipe does last: put weights, gate map and the rest together under a name."""

from __future__ import annotations

from typing import Any

from .gating import GateMap
from .masks import SequenceMask
from .objective import Objective, TokenFactor
from .weights import Weights

Aggregation = Weights | str


def build(
    name: str,
    gate_map: GateMap,
    weights: Aggregation,
    mask: SequenceMask | None,
    papers: tuple[str, ...],
    parameters: dict[str, Any],
    factors: tuple[TokenFactor, ...] = (),
) -> Objective:
    """An `Objective` that knows the arguments it was made with.

    Args:
        name, gate_map, mask, papers, factors: as in `Objective`.
        weights: aggregation weights, or their name.
        parameters: ``locals()`` of the recipe; what is no argument of it is left out.
    """
    internal = {"factors", "gates", "gate_map", "pair", "slopes", "unknown"}
    shown = {k: v for k, v in parameters.items() if k not in internal}
    return Objective(Weights.parse(weights), gate_map, mask, name, shown, papers, factors)
