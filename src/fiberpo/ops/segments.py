"""Sums over segments, in a fixed order, so that a regime never flips from run to run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Segments:
    """Which of ``count`` segments each item belongs to.

    ``index[i]`` in ``0..count-1`` is the segment of item ``i``; segments may be interleaved and
    may be empty. Sums are deterministic on every device: serial on the CPU, a sorted segmented
    reduction elsewhere (atomic additions would change the last bits from run to run, and with
    them the regime of a context that lies at its budget).
    """

    index: Int[Tensor, " items"]
    count: int

    @cached_property
    def _sorted(self) -> tuple[Tensor, Tensor]:
        order = torch.argsort(self.index, stable=True)
        return order, torch.bincount(self.index, minlength=self.count)

    def sum(self, values: Float[Tensor, " items"]) -> Float[Tensor, " count"]:
        """``out[s] = sum of values[i] over index[i] == s``; differentiable, dtype kept."""
        if values.device.type == "cpu":
            return values.new_zeros(self.count).index_add(0, self.index, values)
        order, lengths = self._sorted
        return torch.segment_reduce(values[order], "sum", lengths=lengths, unsafe=True)

    def rows(self, values: Float[Tensor, "rows items"]) -> Float[Tensor, "rows count"]:
        """`sum` of every row."""
        return torch.stack([self.sum(row) for row in values])


def tokens_of(lengths: Int[Tensor, " rows"], rows: Int[Tensor, " k"]) -> Int[Tensor, " tokens"]:
    """Positions of the tokens of some rows, in the order of ``rows``, where rows lie end to end.

    >>> tokens_of(torch.tensor([2, 1, 3]), torch.tensor([2, 0])).tolist()
    [3, 4, 5, 0, 1]
    """
    starts, taken = lengths.cumsum(0) - lengths, lengths[rows]
    shift = starts[rows] - taken.cumsum(0) + taken
    return torch.arange(int(taken.sum()), device=lengths.device) + shift.repeat_interleave(taken)
