"""Labels: which context of a stratum a trajectory or a token belongs to.

Labels above the trajectory (``domain``, ``group``, ...) have one entry a row; labels below it
(``turn``, ...) one entry a token. A row is one trajectory, or, where ``trajectory`` is a label too,
one piece of the trajectory with that id. Entries are non-negative integers or strings; ``-1`` (or
``None`` in a list of strings) says that there is no context of this stratum here, which makes a
rooted tree whose branches differ in depth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from .errors import StrataError

CANONICAL_ORDER = ("domain", "group", "trajectory", "turn")
"""Strata whose place is known, coarse to fine, in whatever order the caller lists them."""

ROW_LEVEL = frozenset({"domain", "group", "trajectory"})
"""Labels that are always read one entry a row."""

TOKEN_LEVEL = frozenset({"turn", "state"})
"""Labels that are always read one entry a token."""

GLOBAL_TOKEN_LEVEL = frozenset({"state"})
"""Token labels whose ids mean the same in every trajectory (elsewhere they are local to one)."""

RESERVED = frozenset({"token"})


@dataclass(frozen=True, eq=False)
class Label:
    """One classification, encoded: ``codes`` index ``values``; -1 means absent."""

    name: str
    codes: Int[Tensor, " entries"]
    values: tuple[str, ...] | Int[Tensor, " contexts"]
    per_token: bool

    @property
    def count(self) -> int:
        """Number of distinct contexts."""
        return len(self.values)

    def value(self, code: int) -> str:
        """The caller's own id of a context, as text."""
        return str(self.values[code] if isinstance(self.values, tuple) else int(self.values[code]))

    def value_names(self) -> tuple[str, ...]:
        """The caller's ids of all contexts, as text."""
        if isinstance(self.values, tuple):
            return self.values
        return tuple(str(v) for v in self.values.tolist())

    def select(self, keep: Tensor) -> Label:
        """The entries at ``keep``, a mask or indices (contexts that lose all entries go too)."""
        codes = self.codes[keep]
        used = torch.unique(codes[codes >= 0])
        table = codes.new_full((self.count + 1,), -1)
        table[used] = torch.arange(len(used), device=codes.device)
        values: tuple[str, ...] | Tensor
        if isinstance(self.values, tuple):
            values = tuple(self.values[i] for i in used.tolist())
        else:
            values = self.values[used]
        return replace(self, codes=table[codes], values=values)

    def keys(self) -> Int[Tensor, " contexts"]:
        """64-bit keys of all contexts, equal wherever the caller's ids are equal.

        Text that reads as an integer has the key of that integer. Two different ids collide with
        a probability of ``contexts^2 / 2^65``.
        """
        salt = _digest(self.name)
        if isinstance(self.values, Tensor):
            return mix(self.values, salt)
        codes = [int(v) if _is_id(v) and str(int(v)) == v else _digest(v) for v in self.values]
        return mix(torch.tensor(codes, dtype=torch.long, device=self.codes.device), salt)

    @staticmethod
    def concatenate(labels: Sequence[Label]) -> Label:
        """The entries of several labels of one name, one after the other.

        Raises:
            StrataError: if some hold integers and others strings.
        """
        if len(labels) == 1:
            return labels[0]
        filled = [label for label in labels if label.count] or list(labels[:1])
        first, device = filled[0], filled[0].codes.device
        values: tuple[str, ...] | Tensor
        numbers = [label.values for label in filled if isinstance(label.values, Tensor)]
        texts = [label.values for label in filled if isinstance(label.values, tuple)]
        if not texts:
            values = union = torch.unique(torch.cat(numbers))
            tables = [torch.searchsorted(union, mine) for mine in numbers]
        elif not numbers:
            values = tuple(sorted({v for mine in texts for v in mine}))
            position = {v: i for i, v in enumerate(values)}
            tables = [torch.tensor([position[v] for v in m], dtype=torch.long) for m in texts]
        else:
            raise StrataError(
                f'labels["{first.name}"] holds integers in one part and strings in another; use '
                "one kind throughout"
            )
        # one slot more, at the end: the code -1 stays -1
        absent = torch.tensor([-1])
        joined = {id(v): torch.cat([t.cpu(), absent]) for v, t in zip(filled, tables, strict=True)}
        codes = [joined.get(id(v), absent).to(device)[v.codes] for v in labels]
        return replace(first, codes=torch.cat(codes), values=values)


def _digest(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def mix(ids: Int[Tensor, " n"], salt: int | Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """A 64-bit finaliser (splitmix64) of ``ids ^ salt``; the same on every machine."""
    x = (ids ^ salt) + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >= 1 << 63 else word


def _shift(x: Tensor, by: int) -> Tensor:
    return (x >> by) & ((1 << (64 - by)) - 1)


@dataclass(frozen=True, eq=False)
class ContextNames:
    """What the contexts of one stratum are called, both ways.

    ``label`` is None for trajectories without ids (called by their number). Below the trajectory a
    context is one label value in one trajectory: ``local[i] = trajectory * label.count + code``,
    and ``trajectory`` is the label of the trajectories where they have ids.
    """

    label: Label | None = None
    local: Int[Tensor, " contexts"] | None = None
    count: int = 0
    trajectory: Label | None = None

    def __call__(self, i: int) -> str:
        """The caller's id of context ``i`` (``trajectory/id`` below the trajectory)."""
        if self.label is None:
            return str(i)
        if self.local is None:
            return self.label.value(i)
        trajectory, code = divmod(int(self.local[i]), self.label.count)
        row = str(trajectory) if self.trajectory is None else self.trajectory.value(trajectory)
        return f"{row}/{self.label.value(code)}"

    def keys(self) -> Int[Tensor, " contexts"]:
        """Keys of all contexts (see `Label.keys`)."""
        assert self.label is not None
        keys = self.label.keys()
        if self.local is None:
            return keys
        assert self.trajectory is not None
        trajectory = torch.div(self.local, self.label.count, rounding_mode="floor")
        return mix(self.trajectory.keys()[trajectory], keys[self.local % self.label.count])

    def find(self, value: str) -> Int[Tensor, " matches"]:
        """Contexts that carry the label value ``value`` (none, one, or one a trajectory)."""
        if self.label is None:
            matches = [int(value)] if _is_id(value) and int(value) < self.count else []
            return torch.tensor(matches, dtype=torch.long)
        if isinstance(self.label.values, tuple):
            codes = [i for i, v in enumerate(self.label.values) if v == value]
        else:
            hit = self.label.values == int(value) if _is_id(value) else None
            codes = [] if hit is None else hit.nonzero().flatten().tolist()
        wanted = torch.tensor(codes, dtype=torch.long, device=self.label.codes.device)
        if self.local is None:
            return wanted
        return torch.isin(self.local % self.label.count, wanted).nonzero().flatten()


def _is_id(value: str) -> bool:
    return value.isascii() and value.isdigit()


def encode(name: str, entries: Any, device: torch.device) -> tuple[Tensor, Any]:
    """Integer codes and distinct values of a label's entries, shape kept.

    Raises:
        StrataError: for ids that are not integers or strings, and for negative ids below -1.
    """
    if isinstance(entries, np.ndarray) and entries.dtype.kind not in "OUS":
        entries = torch.from_numpy(entries)
    if not isinstance(entries, (Tensor, np.ndarray, Sequence)) or isinstance(entries, str):
        raise StrataError(
            f'labels["{name}"] is {entries!r}; pass a tensor or a list with one id an entry'
        )
    if not isinstance(entries, Tensor):
        listed = entries.tolist() if isinstance(entries, np.ndarray) else list(entries)
        flat = _flat(listed)
        if any(isinstance(e, str) for e in flat) or all(e is None for e in flat):
            return _encode_strings(name, listed, device)
        try:
            entries = torch.tensor(listed)
        except (TypeError, ValueError) as error:
            raise StrataError(
                f'labels["{name}"] could not be read as ids: {error}. Pass a tensor of integers, '
                "or a list of strings (None where a trajectory has no such context)."
            ) from error
    if entries.numel() and (entries.is_floating_point() or entries.is_complex()):
        raise StrataError(
            f'labels["{name}"] has dtype {entries.dtype}; ids are integers or strings. '
            "Did you pass rewards or advantages?"
        )
    ids = entries.to(device=device, dtype=torch.long)
    if bool((ids < -1).any()):
        bad = int(ids[ids < -1][0])
        raise StrataError(
            f'labels["{name}"] holds the id {bad}; ids are >= 0, and -1 means that there is no '
            f"{name} here. Pass strings if your ids are hashes."
        )
    values, codes = torch.unique(ids, return_inverse=True)
    if values.numel() and bool(values[0] == -1):
        return codes - 1, values[1:]
    return codes, values


def _flat(listed: Sequence[Any]) -> list[Any]:
    if listed and isinstance(listed[0], (list, tuple, np.ndarray)):
        return [e for row in listed for e in row]
    return list(listed)


def _encode_strings(name: str, listed: Sequence[Any], device: torch.device) -> tuple[Tensor, Any]:
    flat = _flat(listed)
    for i, entry in enumerate(flat):
        if entry is not None and not isinstance(entry, str):
            raise StrataError(
                f'labels["{name}"][{i}] is {entry!r} among strings; use strings throughout, with '
                "None where there is no such context."
            )
    values = tuple(sorted({e for e in flat if e is not None}))
    position = {value: i for i, value in enumerate(values)}
    codes = torch.tensor([-1 if e is None else position[e] for e in flat], dtype=torch.long)
    nested = bool(listed) and isinstance(listed[0], (list, tuple, np.ndarray))
    if nested and len({len(row) for row in listed}) > 1:
        raise StrataError(
            f'labels["{name}"] has rows of different lengths; pad them to [B, T] (what stands '
            "under the mask may be anything)"
        )
    shape = (len(listed), -1) if nested else (-1,)
    return codes.reshape(shape).to(device), values


def order_strata(names: Sequence[str]) -> tuple[str, ...]:
    """Coarse to fine: the well-known names among themselves by `CANONICAL_ORDER`, others as listed.

    >>> order_strata(["group", "domain"])
    ('domain', 'group')
    >>> order_strata(["continent", "country"])
    ('continent', 'country')
    """
    known = sorted((n for n in names if n in CANONICAL_ORDER), key=CANONICAL_ORDER.index)
    taken = iter(known)
    return tuple(next(taken) if n in CANONICAL_ORDER else n for n in names)


def ordered(labels: Mapping[str, Label]) -> dict[str, Label]:
    """The labels coarse to fine, those of rows before those of tokens."""
    above = [n for n, label in labels.items() if not label.per_token]
    below = [n for n, label in labels.items() if label.per_token]
    return {name: labels[name] for name in order_strata([*above, *below])}


def chain(labels: Mapping[str, Label]) -> tuple[str, ...]:
    """All strata that the labels make, coarse to fine, ``trajectory`` among them."""
    above = [n for n, label in labels.items() if not label.per_token and n != "trajectory"]
    below = [n for n, label in labels.items() if label.per_token]
    return order_strata([*above, "trajectory", *below])
