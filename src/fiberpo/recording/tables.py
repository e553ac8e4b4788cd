"""Rows of a foreign table, in fiberpo's terms: arrow batches to packed tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..batch import RatioBatch
from ..columns import RECORDED_ALIASES, find_column
from ..errors import DataError, FiberPOError, RecordingError
from .shards import Columns

TOKEN_COLUMNS = (
    "log_probs", "old_log_probs", "rollout_log_probs", "token_ids", "entropies", "turn",
)  # fmt: skip
STRATA = ("domain", "group", "trajectory")
EITHER = ("advantages", "rewards")


def find_names(columns: Sequence[str], given: Mapping[str, str], where: str) -> dict[str, str]:
    """Which column of a table holds what: our name -> its name.

    Args:
        columns: the table's columns.
        given: the caller's choice, ours -> the table's.
        where: the table, for messages.

    Raises:
        RecordingError: for a column that is missing or could be two, saying what was looked for.
    """
    unknown = sorted(set(given) - set(RECORDED_ALIASES))
    if unknown:
        raise RecordingError(
            f"columns names {unknown[0]!r}; it takes {', '.join(RECORDED_ALIASES)}"
        )
    found: dict[str, str] = {}
    for name, aliases in RECORDED_ALIASES.items():
        if name in given:
            if given[name] not in columns:
                raise RecordingError(
                    f"{where} has no column {given[name]!r} for {name}; it has {', '.join(columns)}"
                )
            found[name] = given[name]
            continue
        try:
            column = find_column(columns, aliases, name)
        except DataError as error:
            raise RecordingError(
                f"{where}: {error}; or say which: columns={{{name!r}: ...}}, "
                f"or --column {name}=NAME"
            ) from error
        if column is not None:
            found[name] = column
    for name in ("log_probs", "old_log_probs", "advantages"):
        if name == "old_log_probs" and "rollout_log_probs" in found:
            continue  # the policy that sampled is the anchor
        if name not in found:
            raise RecordingError(
                f"{where} has no column for {name}: looked for "
                f"{', '.join(RECORDED_ALIASES[name])}; it has {', '.join(columns) or 'none'}. Name "
                f"it with columns={{{name!r}: ...}}, or --column {name}=NAME"
            )
    return found


@dataclass(frozen=True, eq=False)
class Block:
    """Some rows, masked tokens removed.

    Attributes:
        lengths: ``[rows]`` loss tokens.
        tokens: name -> ``[tokens]``.
        rows: name -> ``[rows]``, an array, or a list of texts or ids.
    """

    lengths: np.ndarray
    tokens: dict[str, np.ndarray]
    rows: dict[str, Any]

    def __len__(self) -> int:
        return int(self.lengths.sum())

    def cut(self, start: int, stop: int) -> Block:
        """The rows from ``start`` to ``stop``."""
        ends = np.concatenate([[0], np.cumsum(self.lengths)])
        tokens = slice(int(ends[start]), int(ends[stop]))
        return Block(
            self.lengths[start:stop],
            {name: values[tokens] for name, values in self.tokens.items()},
            {name: values[start:stop] for name, values in self.rows.items()},
        )

    @staticmethod
    def concatenate(blocks: Sequence[Block]) -> Block:
        """One after the other; a column counts where all have it."""
        if len(blocks) == 1:
            return blocks[0]

        def joined(name: str, parts: list[Any]) -> Any:
            if any(isinstance(part, list) for part in parts):
                return [x for part in parts for x in part]
            return np.concatenate(parts)

        tokens = [n for n in blocks[0].tokens if all(n in b.tokens for b in blocks)]
        rows = [n for n in blocks[0].rows if all(n in b.rows for b in blocks)]
        return Block(
            np.concatenate([b.lengths for b in blocks]),
            {n: np.concatenate([b.tokens[n] for b in blocks]) for n in tokens},
            {n: joined(n, [b.rows[n] for b in blocks]) for n in rows},
        )

    def columns(self, where: str) -> Columns:
        """As recorded columns.

        Raises:
            RecordingError: for values that make no batch (NaN, labels that do not nest, ...).
        """
        wide = {n: torch.from_numpy(_float(v)) for n, v in self.tokens.items() if n in _FLOATS}
        labels = {n: self.rows[n] for n in STRATA if n in self.rows}
        labels = {n: v if isinstance(v, list) else _own(v) for n, v in labels.items()}
        if "turn" in self.tokens:
            labels["turn"] = _own(self.tokens["turn"])
        old = wide.get("old_log_probs", wide.get("rollout_log_probs"))
        try:
            batch = RatioBatch.from_packed(
                wide["log_probs"], old, wide["advantages"], torch.from_numpy(self.lengths),
                labels=labels, rollout_log_probs=wide.get("rollout_log_probs"),
            )  # fmt: skip
        except FiberPOError as error:
            raise RecordingError(f"{where}: {error}") from error
        kept = self.lengths > 0
        ids, rewards, prompts = (
            self.tokens.get("token_ids"), self.rows.get("rewards"), self.rows.get("prompts"),
        )  # fmt: skip
        if rewards is not None and np.isnan(rewards[kept]).any():
            rewards = None
        return Columns(
            batch,
            None if ids is None else torch.from_numpy(ids.astype(np.int32)),
            wide.get("entropies"),
            None if rewards is None else torch.from_numpy(rewards[kept].astype(np.float64)),
            None if prompts is None else [p for p, k in zip(prompts, kept, strict=True) if k],
        )


_FLOATS = ("log_probs", "old_log_probs", "rollout_log_probs", "advantages", "entropies")


def _float(values: np.ndarray) -> np.ndarray:
    return _own(values if values.dtype in (np.float32, np.float64) else values.astype(np.float32))


def _own(values: np.ndarray) -> np.ndarray:
    """Arrow's memory is read-only, and torch warns of that."""
    return np.require(values, requirements=["C", "W"])


class Rows:
    """Reads arrow tables with the columns ``names``: one row a trajectory, or one row a token.

    Attributes:
        notes: what was left out, and why.
    """

    def __init__(self, names: Mapping[str, str], where: str) -> None:
        self.names, self.where = names, where
        self.notes: list[str] = []
        self._row = 0
        self._carry: Any = None

    def read(self, table: Any, last: bool) -> Block | None:
        """The whole trajectories so far; a trajectory of several rows may go on in the next table.

        Raises:
            RecordingError: for columns of the wrong kind or length.
        """
        import pyarrow as pa

        if self._carry is not None:
            table = pa.concat_tables([self._carry, table], promote_options="permissive")
        self._carry = None
        kind = table.schema.field(self.names["log_probs"]).type
        if _is_list(kind):
            return self._trajectories(table) if len(table) else None
        if not (pa.types.is_floating(kind) or pa.types.is_integer(kind)):
            raise RecordingError(
                f"{self.where}: column {self.names['log_probs']!r} holds {kind}; it must be a list "
                "of numbers (one row a trajectory) or a number (one row a token)"
            )
        return self._single_tokens(table, last)

    def _trajectories(self, table: Any) -> Block:
        first, self._row = self._row, self._row + len(table)
        raw_lengths = _lengths(table[self.names["log_probs"]])
        total = int(raw_lengths.sum())
        mask = self._mask(table, raw_lengths, first)
        owner = np.repeat(np.arange(len(table)), raw_lengths)
        kept = owner if mask is None else owner[mask]
        lengths = np.bincount(kept, minlength=len(table)).astype(np.int64)
        block = Block(lengths, {}, self._labels(table))
        for name in (*TOKEN_COLUMNS, *EITHER):
            if name not in self.names:
                continue
            column = table[self.names[name]]
            if not _is_list(column.type):
                if name in TOKEN_COLUMNS:
                    self._refuse_kind(name, column)
                values = self._numbers(name, column)
                block.rows[name] = values
                if name == "advantages":
                    block.tokens[name] = np.repeat(values, lengths)
                continue
            found = _lengths(column)
            if not np.array_equal(found, raw_lengths):
                row = int((found != raw_lengths).nonzero()[0][0])
                if name in ("token_ids", "turn", "entropies"):
                    self._leave_out(name, f"row {first + row} has {found[row]} of them")
                    continue
                raise RecordingError(
                    f"{self.where}, row {first + row}: {self.names[name]!r} has {found[row]} "
                    f"values, {self.names['log_probs']!r} has {raw_lengths[row]}"
                )
            values = self._numbers(name, _flat(column))
            block.tokens[name] = values if mask is None else values[mask]
        if "rewards" in block.tokens:  # the same on all tokens of a row
            values = block.tokens.pop("rewards")
            ends = np.cumsum(lengths)
            block.rows["rewards"] = np.where(
                lengths > 0, values[np.clip(ends - 1, 0, None)] if len(values) else np.nan, np.nan
            )
        assert total == len(owner)
        return block

    def _mask(self, table: Any, lengths: np.ndarray, first: int) -> np.ndarray | None:
        if "mask" not in self.names:
            return None
        column = table[self.names["mask"]]
        if not _is_list(column.type):
            self._refuse_kind("mask", column)
        found = _lengths(column)
        if not np.array_equal(found, lengths):
            row = int((found != lengths).nonzero()[0][0])
            raise RecordingError(
                f"{self.where}, row {first + row}: the mask {self.names['mask']!r} has "
                f"{found[row]} values, {self.names['log_probs']!r} has {lengths[row]}"
            )
        return np.nan_to_num(_numbers(_flat(column))) != 0

    def _single_tokens(self, table: Any, last: bool) -> Block | None:
        """One row a token: runs of one trajectory id become rows."""
        if "trajectory" not in self.names:
            raise RecordingError(
                f"{self.where} has one row a token, and no column says which trajectory a token "
                f"belongs to: looked for {', '.join(RECORDED_ALIASES['trajectory'])}; name it with "
                "columns={'trajectory': ...}, or --column trajectory=NAME"
            )
        codes = np.zeros(len(table), dtype=np.int64)
        for name in ("step", "trajectory"):
            if name in self.names and len(table):
                ids = table[self.names[name]].combine_chunks().dictionary_encode().indices
                codes = codes * (len(table) + 1) + _numbers(ids).astype(np.int64)
        starts = np.flatnonzero(np.concatenate([[True], codes[1:] != codes[:-1]])[: len(table)])
        if not last:
            held = int(starts[-1]) if len(starts) else 0
            self._carry = table.slice(held)
            table, starts = table.slice(0, held), starts[:-1]
        if not len(table):
            return None
        first, self._row = self._row, self._row + len(table)
        run = np.repeat(np.arange(len(starts)), np.diff([*starts, len(table)]))
        mask = None
        if "mask" in self.names:
            mask = np.nan_to_num(_numbers(table[self.names["mask"]])) != 0
        kept = run if mask is None else run[mask]
        block = Block(
            np.bincount(kept, minlength=len(starts)).astype(np.int64), {},
            self._labels(table.take(starts)),
        )  # fmt: skip
        for name in (*TOKEN_COLUMNS, *EITHER):
            if name not in self.names:
                continue
            column = table[self.names[name]]
            if _is_list(column.type):
                raise RecordingError(
                    f"{self.where}, row {first}: {self.names[name]!r} is a list where "
                    f"{self.names['log_probs']!r} is a number; give one value a token"
                )
            values = self._numbers(name, column)
            if name == "rewards":
                block.rows[name] = values[starts]
            else:
                block.tokens[name] = values if mask is None else values[mask]
        return block

    def _labels(self, table: Any) -> dict[str, Any]:
        """Row-level columns: ids, prompts, the step."""
        import pyarrow as pa

        found: dict[str, Any] = {}
        for name in (*STRATA, "step", "prompts"):
            if name not in self.names:
                continue
            column = table[self.names[name]]
            kind = column.type
            if name == "prompts":
                found[name] = [_prompt(value) for value in column.to_pylist()]
            elif pa.types.is_null(kind):
                self._leave_out(name, "it is empty")
            elif name == "step":
                values = self._numbers(name, column)
                if np.isnan(values.astype(np.float64)).any():
                    raise RecordingError(f"{self.where}: {self.names[name]!r} is empty in a row")
                found[name] = values.astype(np.int64)
            elif pa.types.is_integer(kind):
                found[name] = _numbers(column.fill_null(-1)).astype(np.int64)
            else:
                found[name] = [None if v is None else str(v) for v in column.to_pylist()]
        return found

    def _numbers(self, name: str, column: Any) -> np.ndarray:
        try:
            return _numbers(column)
        except RecordingError as error:
            raise RecordingError(f"{self.where}: column {self.names[name]!r}: {error}") from error

    def _refuse_kind(self, name: str, column: Any) -> None:
        raise RecordingError(
            f"{self.where}: column {self.names[name]!r} holds {column.type}, but "
            f"{self.names['log_probs']!r} is a list; both must have one value a token"
        )

    def _leave_out(self, name: str, why: str) -> None:
        note = f"{self.where}: {self.names[name]!r} is left out in places: {why}"
        if note not in self.notes:
            self.notes.append(note)


def _prompt(value: Any) -> str:
    """Text of a prompt, which may be a chat."""
    if isinstance(value, list):
        parts = [m.get("content") if isinstance(m, dict) else m for m in value]
        return "\n".join(str(p) for p in parts if p is not None)
    return "" if value is None else str(value)


def _is_list(kind: Any) -> bool:
    import pyarrow as pa

    return (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


def _lengths(column: Any) -> np.ndarray:
    import pyarrow.compute as pc

    return pc.list_value_length(column).fill_null(0).to_numpy().astype(np.int64)


def _flat(column: Any) -> Any:
    import pyarrow.compute as pc

    return pc.list_flatten(column)


def step_numbers(column: Any, where: str) -> set[int]:
    """Numbers of the steps in a column, without those that are null.

    Raises:
        RecordingError: if it holds something else than numbers.
    """
    try:
        return {int(v) for v in column.to_pylist() if v is not None}
    except (TypeError, ValueError, OverflowError) as error:
        raise RecordingError(f"{where} holds {column.type}, not numbers of steps") from error


def _numbers(column: Any) -> np.ndarray:
    """Numbers, NaN where null."""
    import pyarrow as pa

    if pa.types.is_boolean(column.type):
        column = column.cast(pa.int8())
    if pa.types.is_null(column.type):
        return np.full(len(column), np.nan)
    if pa.types.is_decimal(column.type) or pa.types.is_float16(column.type):
        column = column.cast(pa.float32() if pa.types.is_float16(column.type) else pa.float64())
    found = (
        column.to_numpy(zero_copy_only=False) if isinstance(column, pa.Array) else column.to_numpy()
    )
    if found.dtype.kind not in "iuf":
        raise RecordingError(f"it holds {column.type}, not numbers")
    return found
