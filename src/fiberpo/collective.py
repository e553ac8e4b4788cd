"""The sums that cross ranks. The only file that knows ``torch.distributed``.

An objective needs two reductions an optimizer step: the sums of every context (drift per channel,
mass, token count), and later the adjoint of every context. Both are small (numbers per *context*,
never per token). Which contexts are shared between ranks is decided by their keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Collective(Protocol):
    """Sums over everything that belongs to one optimizer step."""

    @property
    def size(self) -> int:
        """Number of ranks."""
        ...

    def total(self, values: Tensor) -> Tensor:
        """Elementwise sum of ``values`` over all ranks (same shape on every rank)."""
        ...

    def merge(self, keys: Sequence[object], values: Tensor) -> Tensor:
        """Sum columns with equal keys over all ranks.

        ``values`` is ``[rows, contexts]`` and ``keys[c]`` names column ``c`` (equal keys on two
        ranks are the same context). Returns the summed columns in the caller's own order.
        """
        ...


@dataclass(frozen=True)
class Local:
    """One process holds the whole optimizer batch: every sum is already complete."""

    @property
    def size(self) -> int:
        """1."""
        return 1

    def total(self, values: Tensor) -> Tensor:
        """``values`` itself."""
        return values

    def merge(self, keys: Sequence[object], values: Tensor) -> Tensor:
        """``values`` itself."""
        return values


@dataclass(frozen=True)
class TorchGroup:
    """All ranks of a ``torch.distributed`` process group.

    Every rank must call the same methods in the same order; a rank without tokens takes part with
    an empty batch.
    """

    group: Any = None

    @property
    def size(self) -> int:
        """Number of ranks in the group."""
        return torch.distributed.get_world_size(self.group)

    def total(self, values: Tensor) -> Tensor:
        """All-reduce of a copy of ``values``."""
        values = values.clone()
        torch.distributed.all_reduce(values, group=self.group)
        return values

    def merge(self, keys: Sequence[object], values: Tensor) -> Tensor:
        """All-reduce over the union of the keys, laid out in sorted order on every rank."""
        gathered: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(gathered, list(keys), group=self.group)
        union = sorted({key for part in gathered for key in part}, key=repr)
        position = {key: i for i, key in enumerate(union)}
        index = torch.tensor([position[key] for key in keys], dtype=torch.long).to(values.device)
        whole = values.new_zeros(values.shape[0], len(union))
        whole[:, index] = values
        torch.distributed.all_reduce(whole, group=self.group)
        return whole[:, index]


LOCAL = Local()
