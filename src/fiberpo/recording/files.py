"""Parquet and JSONL files as arrow tables of bounded size."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from ..errors import RecordingError

Note = Callable[[str], None]
Tables = Iterator[Any]

READ = 2**19
"""Tokens of a parquet file that are read at a time."""

READ_BYTES = 2**24
"""Bytes of a JSONL file that are read at a time."""

JSON_SUFFIXES = (".jsonl", ".ndjson")
PARQUET_SUFFIXES = (".parquet", ".pq")


def column_names(path: Path) -> list[str]:
    """Names of the columns of a file.

    Raises:
        RecordingError: if the file is empty or damaged.
    """
    if path.suffix in PARQUET_SUFFIXES:
        file = _parquet(path)
        if not file.metadata.num_rows:
            raise RecordingError(f"{path} has no row")
        return list(file.schema_arrow.names)
    return list(_first_row(path))


def read_tables(path: Path, columns: list[str], note: Note, rows: int | None = None) -> Tables:
    """Arrow tables of a bounded number of tokens; ``rows`` at a time where parquet is given it."""
    if path.suffix in PARQUET_SUFFIXES:
        return _parquet_tables(path, columns, rows)
    return _json_tables(path, columns, note)


def _parquet_tables(path: Path, columns: list[str], rows: int | None) -> Tables:
    import pyarrow as pa

    file = _parquet(path)
    present = [name for name in columns if name in file.schema_arrow.names]
    at_a_time = rows or _rows_at_a_time(file, present)
    try:
        for batch in file.iter_batches(at_a_time, columns=present, use_threads=False):
            yield pa.Table.from_batches([batch])
    except (pa.ArrowException, OSError) as error:
        raise RecordingError(f"{path} is damaged ({error}); write it again") from error


def _parquet(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path, memory_map=True)
    except (pa.ArrowException, OSError) as error:
        size = path.stat().st_size
        what = "is empty" if not size else f"is not a whole parquet file ({error})"
        raise RecordingError(f"{path} {what}; write it again") from error


def _rows_at_a_time(file: Any, columns: list[str]) -> int:
    """So many rows that about `READ` tokens are read."""
    return max(1, READ * file.metadata.num_rows // max(_values(file, columns[0]), 1))


def _values(file: Any, column: str) -> int:
    """Values of a column over all lists, from the metadata."""
    metadata = file.metadata
    total = 0
    for g in range(metadata.num_row_groups):
        group = metadata.row_group(g)
        for c in range(group.num_columns):
            if group.column(c).path_in_schema.split(".")[0] == column:
                total += group.column(c).num_values
    return total


def count_tokens(path: Path, column: str) -> int:
    """Values of a column over all rows; of JSONL an estimate from its first lines."""
    if path.suffix in PARQUET_SUFFIXES:
        return _values(_parquet(path), column)
    values, size = _json_sample(path, column)
    return int(values * path.stat().st_size / max(size, 1))


def _json_sample(path: Path, column: str) -> tuple[int, int]:
    """Values of a column in the first lines, and their bytes."""
    values, size = 0, 0
    with path.open("rb") as file:
        for raw in itertools.islice(file, 32):
            size += len(raw)
            found = _parse(raw)
            cell = found.get(column) if isinstance(found, dict) else None
            values += len(cell) if isinstance(cell, list) else 1
    return values, size


def _first_row(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if raw.strip():
                found = _parse(raw)
                return found if isinstance(found, dict) else _refuse(path, number, raw)
    raise RecordingError(f"{path} has no row")


def _json_tables(path: Path, columns: list[str], note: Note) -> Tables:
    line = 1
    for part, last in _whole_lines(path):
        table = _by_line(path, part, line, columns, last, note)
        if len(table):
            yield table
        line += part.count(b"\n")


def _whole_lines(path: Path) -> Iterator[tuple[bytes, bool]]:
    """The file in pieces that end with a line; whether the piece is the last."""
    rest = b""
    with path.open("rb") as file:
        while data := file.read(READ_BYTES):
            cut = data.rfind(b"\n") + 1
            if cut:
                yield rest + data[:cut], False
                rest = data[cut:]
            else:
                rest += data
    if rest:
        yield rest, True


def _by_line(path: Path, part: bytes, line: int, columns: list[str], last: bool, note: Note) -> Any:
    """The rows of some lines; the last line of the file may be cut short, which is noted.

    Raises:
        RecordingError: for any other line that is no JSON object, and for mixed values.
    """
    import pyarrow as pa

    rows = []
    lines = part.split(b"\n")
    for number, raw in enumerate(lines, line):
        if not raw.strip():
            continue
        found = _parse(raw)
        if isinstance(found, dict):
            rows.append(found)
        elif last and number == line + len(lines) - 1:
            note(f"{path.name}: line {number}, the last, is cut short and was skipped")
        else:
            _refuse(path, number, raw)
    arrays = {}
    for name in columns:
        try:
            arrays[name] = pa.array([row.get(name) for row in rows])
        except (pa.ArrowException, TypeError, OverflowError) as error:
            raise RecordingError(
                f"{path}: {name!r} holds values of different kinds ({error})"
            ) from error
    return pa.table(arrays)


def _parse(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return None


def _refuse(path: Path, number: int, raw: bytes) -> NoReturn:
    text = raw[:60].decode("utf-8", errors="replace").strip()
    raise RecordingError(
        f"{path}, line {number}: not a JSON object: {text!r}; correct or remove the line"
    )
