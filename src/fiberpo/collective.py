"""The sums that cross ranks. The only file that knows ``torch.distributed``.

What crosses is small: numbers per *context* (domain, prompt group, split trajectory), never per
token. Contexts are matched by 64-bit keys made from the caller's ids, so a string or an integer id
means the same context on every rank, and only contexts that two ranks really hold are exchanged.

Per batch layout (labels only): one gather of the keys, one all-reduce of masses and counts.
Per optimizer step: one all-reduce of the drift sums, one of the adjoints.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from .errors import StrataError


@runtime_checkable
class Contexts(Protocol):
    """Contexts that other ranks may hold too (`Strata` is one)."""

    def shared_contexts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Their indices, their keys, and the keys of their parents (int64 each)."""
        ...

    def describe(self, context: int) -> str:
        """What a context is called, for errors."""
        ...


@runtime_checkable
class Match(Protocol):
    """Which contexts of this rank other ranks hold too."""

    @property
    def width(self) -> int:
        """Number of contexts that more than one rank holds (the same number on every rank)."""
        ...

    def merge(self, values: Tensor) -> Tensor:
        """``[rows, contexts]`` sums of this rank to sums over all ranks, in the same order."""
        ...


@runtime_checkable
class Collective(Protocol):
    """Sums over everything that belongs to one optimizer step.

    Every rank calls the same methods in the same order; a rank without tokens takes part with an
    empty batch.
    """

    @property
    def size(self) -> int:
        """Number of ranks."""
        ...

    def total(self, values: Tensor) -> Tensor:
        """Elementwise sum of ``values`` over all ranks (same shape on every rank)."""
        ...

    def largest(self, values: Tensor) -> Tensor:
        """Elementwise maximum of ``values`` over all ranks."""
        ...

    def match(self, contexts: Contexts) -> Match:
        """Find the contexts that several ranks hold."""
        ...


@dataclass(frozen=True)
class Local:
    """One process holds the whole optimizer batch: every sum is already complete."""

    size: int = 1
    width: int = 0

    def total(self, values: Tensor) -> Tensor:
        """``values`` itself."""
        return values

    def largest(self, values: Tensor) -> Tensor:
        """``values`` itself."""
        return values

    def match(self, contexts: Contexts) -> Match:
        """Nothing is shared."""
        return self

    def merge(self, values: Tensor) -> Tensor:
        """``values`` itself."""
        return values


LOCAL = Local()


@dataclass(frozen=True, eq=False)
class RankMatch:
    """`Match` by an all-reduce over the contexts that at least two ranks hold.

    Attributes:
        ranks: the ranks.
        mine: ``[k]`` this rank's contexts that another rank holds too.
        slot: ``[k]`` their places in the common layout.
        width: length of the common layout.
    """

    ranks: Ranks
    mine: Tensor
    slot: Tensor
    width: int

    def merge(self, values: Tensor) -> Tensor:
        """Sums over all ranks; contexts that only this rank holds stay as they are."""
        if not self.width:
            return values
        common = values.new_zeros(values.shape[0], self.width)
        common[:, self.slot] = values[:, self.mine]
        common = self.ranks.total(common)
        merged = values.clone()
        merged[:, self.mine] = common[:, self.slot]
        return merged


class Ranks(abc.ABC):
    """A `Collective` from a sum, a maximum and a gather: subclass it for any transport."""

    @property
    @abc.abstractmethod
    def size(self) -> int:
        """Number of ranks."""

    @abc.abstractmethod
    def total(self, values: Tensor) -> Tensor:
        """Elementwise sum over all ranks, in new memory."""

    @abc.abstractmethod
    def largest(self, values: Tensor) -> Tensor:
        """Elementwise maximum over all ranks, in new memory."""

    @abc.abstractmethod
    def gather(self, rows: Tensor) -> list[Tensor]:
        """``[2, n]`` int64 of every rank, in rank order; ``n`` may differ between ranks."""

    def match(self, contexts: Contexts) -> Match:
        """Find the contexts that several ranks hold, by one gather of their keys.

        Raises:
            StrataError: on every rank, if a context has different parents on two ranks.
        """
        index, keys, parents = contexts.shared_contexts()
        everyone = torch.cat(self.gather(torch.stack([keys, parents])), dim=1)
        ids, inverse, holders = torch.unique(
            everyone[0], return_inverse=True, return_counts=True, sorted=True
        )
        _check_parents(contexts, everyone[1], inverse, ids, index, keys)
        common = ids[holders > 1]
        if not len(common):
            return RankMatch(self, index[:0], index[:0], 0)
        slot = torch.searchsorted(common, keys).clamp(max=len(common) - 1)
        held = common[slot] == keys
        return RankMatch(self, index[held], slot[held], len(common))


def _check_parents(
    contexts: Contexts, parents: Tensor, inverse: Tensor, ids: Tensor, index: Tensor, keys: Tensor
) -> None:
    low = parents.new_full((len(ids),), torch.iinfo(torch.long).max)
    low = low.scatter_reduce(0, inverse, parents, "amin")
    high = parents.new_full((len(ids),), torch.iinfo(torch.long).min)
    high = high.scatter_reduce(0, inverse, parents, "amax")
    torn = ids[low != high]
    if not len(torn):
        return
    mine = index[torch.isin(keys, torn)]
    name = contexts.describe(int(mine[0])) if len(mine) else "a context of other ranks"
    raise StrataError(
        f"{name} lies in different parents on different ranks ({len(torn)} such contexts). Labels "
        "must nest over the whole optimizer batch: use ids that mean the same on every rank (a "
        "prompt's own id or a hash of it, not its position on the rank)."
    )


@dataclass(frozen=True)
class TorchGroup(Ranks):
    """All ranks of a ``torch.distributed`` process group.

    Args:
        group: the process group; None is the default group. With context or sequence parallelism,
            one that spans data *and* context ranks (and leaves out tensor and pipeline ranks).
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

    def largest(self, values: Tensor) -> Tensor:
        """All-reduce with the maximum."""
        values = values.clone()
        torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX, group=self.group)
        return values

    def gather(self, rows: Tensor) -> list[Tensor]:
        """All-gather of the widths, then of the rows padded to the widest."""
        width = torch.tensor([rows.shape[1]], device=rows.device)
        widths = [torch.zeros_like(width) for _ in range(self.size)]
        torch.distributed.all_gather(widths, width, group=self.group)
        counts = torch.cat(widths).tolist()  # one copy to the host, not one a rank
        padded = rows.new_zeros(rows.shape[0], max(counts))
        padded[:, : rows.shape[1]] = rows
        gathered = [torch.empty_like(padded) for _ in counts]
        torch.distributed.all_gather(gathered, padded, group=self.group)
        return [part[:, :n] for part, n in zip(gathered, counts, strict=True)]
