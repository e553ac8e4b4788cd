"""Strata: a forest of contexts over the tokens of a batch.

A context is one domain, one prompt group, one trajectory, one turn, ... ``parent[c]`` is the
context above it, tokens hang on the finest context that covers them. Chains (domain > group >
trajectory) and rooted trees whose branches differ in depth (text domains without turns beside tool
domains with turns) are the same structure.

Reference: *Fibration Policy Optimization*, arXiv 2603.08239, Definition 6.1 and Remark 6.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .errors import StrataError
from .labels import GLOBAL_TOKEN_LEVEL, ContextNames, Label
from .ops.segments import Segments


@dataclass(frozen=True, eq=False)
class Strata:
    """A forest of contexts, coarse to fine, with the tokens attached to it.

    Args:
        names: strata, coarse to fine.
        parent: ``[C]`` index of the parent context, `NO_PARENT` for roots; always smaller than the
            context's own index.
        bounds: contexts ``bounds[k]`` to ``bounds[k + 1]`` belong to stratum ``names[k]``.
        segment_leaf: ``[S]`` finest context of every segment; a segment is a run of tokens of one
            row with one leaf.
        segment_lengths: ``[S]`` tokens of every segment, in the order of the tokens.
        segment_row: ``[S]`` row of every segment; None where the segments are the rows.
        context_names: per stratum, what its contexts are called.
        shared: per stratum, whether its contexts can also have tokens in other batches of the same
            optimizer step (other ranks). Trajectories, and what lies below them, only where the
            batch has ids for trajectories.
    """

    NO_PARENT: ClassVar[int] = -1

    names: tuple[str, ...]
    parent: Int[Tensor, " C"]
    bounds: tuple[int, ...]
    segment_leaf: Int[Tensor, " S"]
    segment_lengths: Int[Tensor, " S"]
    segment_row: Int[Tensor, " S"] | None = None
    context_names: tuple[ContextNames, ...] = field(default=(), repr=False)
    shared: tuple[bool, ...] = ()

    def __len__(self) -> int:
        return self.bounds[-1]

    def level(self, k: int) -> slice:
        """The contexts of stratum ``names[k]``."""
        return slice(self.bounds[k], self.bounds[k + 1])

    @cached_property
    def stratum(self) -> Int[Tensor, " C"]:
        """Index into ``names`` of every context."""
        sizes = torch.tensor(self.bounds).diff().to(self.parent.device)
        return torch.repeat_interleave(torch.arange(len(self.names)).to(sizes.device), sizes)

    @cached_property
    def leaf(self) -> Int[Tensor, " N"]:
        """Finest context of every token."""
        return torch.repeat_interleave(self.segment_leaf, self.segment_lengths)

    def of_rows(self, values: Float[Tensor, " rows"]) -> Float[Tensor, " S"]:
        """``values`` of the row of each segment."""
        return values if self.segment_row is None else values[self.segment_row]

    def push_segments(self, sums: Float[Tensor, "rows S"]) -> Float[Tensor, "rows C"]:
        """Sums over everything below each context, from the sums over the segments."""
        return self.push_up(Segments(self.segment_leaf, len(self)).rows(sums))

    @cached_property
    def leaf_segments(self) -> Segments:
        """Tokens by their leaf context."""
        return Segments(self.leaf, len(self))

    @cached_property
    def _parents(self) -> tuple[tuple[Tensor, Segments], ...]:
        """Per stratum: parent index with one extra slot (the last) that stands above the roots."""
        top = len(self)
        found = []
        for k in range(len(self.names)):
            above = self.parent[self.level(k)]
            above = torch.where(above == self.NO_PARENT, top, above)
            found.append((above, Segments(above, top + 1)))
        return tuple(found)

    def push_up(self, leaf_sums: Float[Tensor, "rows C"]) -> Float[Tensor, "rows C"]:
        """Sums over everything below each context, from the sums over its own tokens."""
        total = leaf_sums
        for k in range(len(self.names) - 1, 0, -1):
            _, segments = self._parents[k]
            total = total + segments.rows(total[:, self.level(k)])[:, :-1]
        return total

    def add_to_parents(self, values: Float[Tensor, "rows C"]) -> Float[Tensor, "rows C"]:
        """``out[c]`` = sum of ``values`` over the children of ``c``."""
        out = torch.zeros_like(values)
        for k in range(1, len(self.names)):
            _, segments = self._parents[k]
            out = out + segments.rows(values[:, self.level(k)])[:, :-1]
        return out

    def of_parent(self, values: Float[Tensor, "rows C"]) -> Float[Tensor, "rows C"]:
        """``values`` of each context's parent; 0 for a root."""
        top = torch.cat([values, values.new_zeros(values.shape[0], 1)], dim=1)
        return top[:, torch.cat([above for above, _ in self._parents])]

    def sum_path(self, values: Float[Tensor, "rows C"]) -> Float[Tensor, "rows C"]:
        """Sum of ``values`` from each context up to its root, itself included."""
        done = values[:, : self.bounds[1]]
        for k in range(1, len(self.names)):
            above, _ = self._parents[k]
            pad = values.new_zeros(values.shape[0], len(self) + 1 - done.shape[1])
            done = torch.cat(
                [done, values[:, self.level(k)] + torch.cat([done, pad], dim=1)[:, above]], dim=1
            )
        return done

    def at_tokens(self, values: Float[Tensor, "rows C"]) -> Float[Tensor, "rows N"]:
        """``values`` of each token's leaf context."""
        return values[:, self.leaf]

    def shared_contexts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Contexts that other ranks may hold too: indices, keys, and keys of their parents.

        Keys are the same on every rank for the same ids; the parent of a root has key 0.
        """
        return self._shared_contexts

    @cached_property
    def _shared_contexts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Made once: ids that are strings are hashed one by one."""
        where = [k for k, shared in enumerate(self.shared) if shared]
        device = self.parent.device
        none = torch.empty(0, dtype=torch.long, device=device)
        keys = torch.zeros(len(self) + 1, dtype=torch.long, device=device)
        for k in where:
            keys[self.level(k)] = self.context_names[k].keys()
        index = torch.cat(
            [none, *(torch.arange(len(self))[self.level(k)].to(device) for k in where)]
        )
        above = torch.where(self.parent == self.NO_PARENT, len(self), self.parent)
        return index, keys[index], keys[above[index]]

    def describe(self, context: int) -> str:
        """``group "7"``: stratum and the caller's id of a context."""
        k = int(self.stratum[context])
        return f'{self.names[k]} "{self.context_names[k](context - self.bounds[k])}"'

    def range(self, values: Int[Tensor, " N"]) -> tuple[Int[Tensor, " C"], Int[Tensor, " C"]]:
        """Smallest and largest of the tokens' ``values`` below each context."""
        limits = torch.iinfo(values.dtype)
        low = values.new_full((len(self),), limits.max).scatter_reduce(0, self.leaf, values, "amin")
        high = values.new_full((len(self),), limits.min).scatter_reduce(
            0, self.leaf, values, "amax"
        )
        for k in range(len(self.names) - 1, 0, -1):
            here = self.level(k)
            child = self.parent[here] != self.NO_PARENT
            above = self.parent[here][child]
            low = low.scatter_reduce(0, above, low[here][child], "amin")
            high = high.scatter_reduce(0, above, high[here][child], "amax")
        return low, high

    @cached_property
    def idle(self) -> tuple[str, ...]:
        """Strata all of whose contexts are the whole of their parent: their residual is always 0.

        Their gates are valid and cannot act (one group a domain, one trajectory a group, ...).
        """
        if not len(self.segment_leaf):
            return ()
        tokens = self.push_segments(self.segment_lengths.double()[None])
        only = (tokens == self.of_parent(tokens))[0]
        return tuple(
            name for k, name in enumerate(self.names) if k and bool(only[self.level(k)].all())
        )


def build(names: Sequence[str], labels: dict[str, Label], lengths: Int[Tensor, " rows"]) -> Strata:
    """The forest of the named strata (coarse to fine; ``trajectory`` among them or not).

    ``lengths`` are the token counts of the rows; a row is a trajectory unless ``trajectory`` is a
    label.

    Raises:
        StrataError: if a name has no label, if a context lies in two parents, or if a token has
            no context at all.
    """
    rows = _Rows(lengths)
    levels: list[_Level] = []
    here = torch.full((len(lengths),), Strata.NO_PARENT, device=lengths.device)
    per_token = False
    for name in names:
        level = _level(name, labels, rows)
        if level.per_token and not per_token:
            here, per_token = here[rows.of_tokens], True
        elif per_token and not level.per_token:
            level = replace(level, codes=level.codes[rows.of_tokens])
        start = sum(len(above.parent) for above in levels)
        level = replace(level, parent=_parent_of(level, here, [*levels, level]))
        here = torch.where(level.codes >= 0, start + level.codes, here)
        levels.append(level)
    bare = here == Strata.NO_PARENT
    if bool(bare.any()):
        token = int((bare if per_token else bare[rows.of_tokens]).nonzero()[0])
        row = int(rows.of_tokens[token])
        raise StrataError(
            f"token {token} (trajectory {row}) belongs to no context of the strata "
            f"{tuple(names)}: every one of its labels is absent. Give it a label in one of them."
        )
    bounds = [0]
    for level in levels:
        bounds.append(bounds[-1] + len(level.parent))
    return Strata(
        names=tuple(names),
        parent=torch.cat([level.parent for level in levels]),
        bounds=tuple(bounds),
        **(rows.runs(here) if per_token else {"segment_leaf": here, "segment_lengths": lengths}),
        context_names=tuple(level.called for level in levels),
        shared=tuple(level.shared for level in levels),
    )


@dataclass(frozen=True, eq=False)
class _Level:
    """One stratum while the forest is built; ``parent`` has one entry a context."""

    name: str
    codes: Tensor
    parent: Tensor
    per_token: bool
    shared: bool
    called: ContextNames


@dataclass(frozen=True, eq=False)
class _Rows:
    """The rows of a batch by their token counts."""

    lengths: Tensor

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def of_tokens(self) -> Tensor:
        """Row of each token."""
        return torch.repeat_interleave(self.index, self.lengths)

    @cached_property
    def index(self) -> Tensor:
        """0, 1, 2, ..."""
        return torch.arange(len(self.lengths), device=self.lengths.device)

    def runs(self, leaf: Tensor) -> dict[str, Tensor]:
        """Runs of tokens with one row and one leaf."""
        row = self.of_tokens
        begins = torch.ones_like(row, dtype=torch.bool)
        begins[1:] = (row[1:] != row[:-1]) | (leaf[1:] != leaf[:-1])
        first = begins.nonzero()[:, 0]
        lengths = torch.cat([first[1:], first.new_tensor([len(row)])])[: len(first)] - first
        return {"segment_leaf": leaf[first], "segment_lengths": lengths, "segment_row": row[first]}


def _level(name: str, labels: dict[str, Label], rows: _Rows) -> _Level:
    """The contexts of one stratum, not yet hung on their parents."""
    pieces = labels.get("trajectory")
    if name == "trajectory" and pieces is None:
        codes, called = rows.index, ContextNames(count=len(rows))
        return _Level(name, codes, codes, per_token=False, shared=False, called=called)
    if name not in labels:
        raise StrataError(
            f'the objective needs the stratum "{name}" for a gate or its weights; the batch has '
            f"{'labels for ' + str(sorted(labels)) if labels else 'no labels'}. Pass "
            f'labels={{"{name}": ids}} to the batch, or leave that stratum out of the objective '
            "(a misspelt name?)."
        )
    label = labels[name]
    if not label.per_token or name in GLOBAL_TOKEN_LEVEL:
        slots = torch.arange(label.count, device=rows.lengths.device)
        called = ContextNames(label)
        return _Level(name, label.codes, slots, label.per_token, shared=True, called=called)
    # ids below the trajectory are local to it: turn 0 of one trajectory is not turn 0 of another
    trajectory = rows.of_tokens if pieces is None else pieces.codes[rows.of_tokens]
    combined = torch.where(label.codes >= 0, trajectory * label.count + label.codes, -1)
    distinct, codes = torch.unique(combined, return_inverse=True)
    if len(distinct) and bool(distinct[0] == -1):
        distinct, codes = distinct[1:], codes - 1
    called = ContextNames(label, distinct, trajectory=pieces)
    shared = pieces is not None
    return _Level(name, codes, distinct, per_token=True, shared=shared, called=called)


def _parent_of(level: _Level, here: Tensor, levels: Sequence[_Level]) -> Tensor:
    """The one parent of each context, or an error that shows a context with two."""
    count = len(level.parent)
    slot = torch.where(level.codes >= 0, level.codes, count)
    low = here.new_full((count + 1,), torch.iinfo(torch.long).max)
    low = low.scatter_reduce(0, slot, here, "amin")[:count]
    high = here.new_full((count + 1,), Strata.NO_PARENT - 1)
    high = high.scatter_reduce(0, slot, here, "amax")[:count]
    if bool((low != high).any()):
        code = int((low != high).nonzero()[0])
        raise StrataError(
            f'{level.name} "{level.called(code)}" lies in two contexts: '
            f"{_describe(int(low[code]), levels)} and {_describe(int(high[code]), levels)}. "
            f"Contexts must nest (strata coarse to fine: {', '.join(x.name for x in levels)}). If "
            f"{level.name} is the coarser one, list it first. If these are two independent "
            "classifications of the same tokens, they are not a tree: join them into one label, "
            "or gate only one of them."
        )
    return low


def _describe(context: int, levels: Sequence[_Level]) -> str:
    for level in levels:
        if 0 <= context < len(level.parent):
            return f'{level.name} "{level.called(context)}"'
        context -= len(level.parent)
    return "no context above it"
