"""How much a sequence mask keeps, overall and by length: mergeable statistics."""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor

from .batch import RatioBatch
from .divergence import Certainty
from .statistics import Moments


@torch.no_grad()
def acceptance(
    batch: RatioBatch, kept: Bool[Tensor, " trajectories"], certainty: Certainty
) -> dict[str, Moments]:
    """``mask/kept``, ``mask/kept/length=<bin>``, ``mask/certified``; means over trajectories.

    A bin holds the lengths ``2^k`` to ``2^(k+1) - 1``. A trajectory of which several ranks hold
    pieces is counted by each, by its share of the tokens.

    Args:
        batch: the tokens.
        kept: what the mask says.
        certainty: of the mask on this batch; ``mask/certified`` is 1 for `Certainty.EXACT`.
    """
    lengths = batch.trajectory_lengths
    ones = torch.ones(len(batch), dtype=torch.float64, device=batch.device)
    share = batch.by_trajectory.sum(ones) / lengths
    certified = torch.full_like(lengths, float(certainty is Certainty.EXACT))
    found = {"mask/kept": Moments.of(kept, share), "mask/certified": Moments.of(certified, share)}
    exponent = torch.frexp(lengths).exponent - 1
    for k in torch.unique(exponent).tolist():
        mine = exponent == k
        name = str(2**k) if k == 0 else f"{2**k}-{2 ** (k + 1) - 1}"
        found[f"mask/kept/length={name}"] = Moments.of(kept[mine], share[mine])
    return found
