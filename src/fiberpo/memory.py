"""What the split mode ``"stale"`` remembers: the sums of contexts in windows that are over."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .collective import LOCAL, Collective, Contexts, Match


@dataclass(frozen=True, eq=False)
class _Keys:
    """Contexts that are only keys."""

    keys: Tensor

    def shared_contexts(self) -> tuple[Tensor, Tensor, Tensor]:
        index = torch.arange(len(self.keys), device=self.keys.device)
        return index, self.keys, torch.zeros_like(self.keys)

    def describe(self, context: int) -> str:
        return f"context {context}"


@dataclass(eq=False)
class _Table:
    """Sums by key: ``values[stage]`` is ``[rows, keys]``, ``keys`` sorted."""

    keys: Tensor
    values: list[Tensor]


@dataclass(eq=False)
class Memory:
    """A `Collective` whose merges answer with the sums of the last window that held a context.

    Each reduction of an evaluation is a *stage* (masses, drifts, adjoints). What the parts of the
    current window add up to is noted, and takes effect at `turn_over`. Gates and stops may look at
    the same strata: each `match` of a part has a table of its own.
    """

    collective: Collective = LOCAL
    size: int = 2  # never taken for a whole batch
    _past: dict[tuple[str, ...], _Table] = field(default_factory=dict)
    _notes: dict[tuple[str, ...], list[tuple[int, Tensor, Tensor]]] = field(default_factory=dict)
    _matches: int = 0

    def open_part(self) -> Memory:
        """Another part: its matches come in the same order as those of the part before."""
        self._matches = 0
        return self

    def total(self, values: Tensor) -> Tensor:
        """Not used: denominators are those of the window."""
        return values

    def largest(self, values: Tensor) -> Tensor:
        """``values`` itself."""
        return values

    def match(self, contexts: Contexts) -> Match:
        """Merges that look contexts up by their keys."""
        self._matches += 1
        names = (*getattr(contexts, "names", ()), str(self._matches))
        return _Recall(self, contexts, names)

    def clear(self) -> None:
        """Forget everything: new rollouts, new contexts."""
        self._past.clear()
        self._notes.clear()

    def recall(self, names: tuple[str, ...], stage: int, keys: Tensor, values: Tensor) -> Tensor:
        """``values`` with what is remembered in place of it, where something is."""
        self._notes.setdefault(names, []).append((stage, keys, values))
        past = self._past.get(names)
        if past is None or not len(past.keys) or not len(keys):
            return values
        at = torch.searchsorted(past.keys, keys).clamp(max=len(past.keys) - 1)
        return torch.where(past.keys[at] == keys, past.values[stage][:, at], values)

    def turn_over(self) -> None:
        """The window is over: its sums, over all parts and ranks, become what is remembered."""
        for names, notes in self._notes.items():
            keys = torch.unique(torch.cat([keys for stage, keys, _ in notes if stage == 0]))
            match = self.collective.match(_Keys(keys))
            values = []
            for stage in range(1 + max(stage for stage, _, _ in notes)):
                mine = [(k, v) for s, k, v in notes if s == stage]
                sums = mine[0][1].new_zeros(mine[0][1].shape[0], len(keys))
                for part_keys, part in mine:
                    sums.index_add_(1, torch.searchsorted(keys, part_keys), part)
                values.append(match.merge(sums))
            self._past[names] = _updated(self._past.get(names), _Table(keys, values))
        self._notes.clear()


def _updated(old: _Table | None, new: _Table) -> _Table:
    """``new``, and what ``old`` knows besides."""
    if old is None:
        return new
    kept = ~torch.isin(old.keys, new.keys)
    keys, order = torch.sort(torch.cat([old.keys[kept], new.keys]))
    values = [
        torch.cat([a[:, kept], b], dim=1)[:, order]
        for a, b in zip(old.values, new.values, strict=True)
    ]
    return _Table(keys, values)


@dataclass(eq=False)
class _Recall:
    """`Match` against a `Memory`; one reduction after the other."""

    memory: Memory
    contexts: Contexts
    names: tuple[str, ...]
    width: int = 0
    stage: int = 0

    def merge(self, values: Tensor) -> Tensor:
        index, keys, _ = self.contexts.shared_contexts()
        recalled = self.memory.recall(self.names, self.stage, keys, values[:, index])
        self.stage += 1
        merged = values.clone()
        merged[:, index] = recalled
        return merged
