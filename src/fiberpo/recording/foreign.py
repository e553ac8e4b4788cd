"""Recordings of other trainers: prime-rl token exports, parquet and JSONL."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import RecordingError
from .files import JSON_SUFFIXES, PARQUET_SUFFIXES, column_names, count_tokens, read_tables
from .manifest import MANIFEST_FILE, UNITS, Manifest
from .reader import RUN_FOLDER, RecordedStep, Recording
from .shards import FOLDER, Columns
from .tables import STRATA, Block, Rows, find_names, step_numbers
from .writer import index_name

CHUNK = 2**22
"""Tokens of one step that are held in memory; a larger step comes in several items."""

_STEP = re.compile(r"(?:^|[/_.-])step[_-]?(\d+)(?=$|[/_.-])")


@dataclass(frozen=True)
class _Source:
    """One file; ``step`` where its name has one."""

    path: Path
    step: int | None


class TableRecording(Recording):
    """Files of rows.

    Args:
        root: what the caller named.
        paths: the files.
        host: what wrote them.
        columns: the caller's names for columns, ours -> theirs.
    """

    def __init__(
        self, root: Path, paths: list[Path], host: str, columns: Mapping[str, str]
    ) -> None:
        try:
            import pyarrow  # noqa: F401
        except ImportError as error:
            raise RecordingError(
                f"reading {root} needs the package pyarrow: pip install pyarrow"
            ) from error
        self.path = root
        self.problems = []
        self._sources = _number(root, paths)
        self._given = dict(columns)
        self._names: dict[str, str] = {}
        self._readable = [s for s in self._sources if self._check(s)]
        if not self._readable:
            raise RecordingError(f"{root} has nothing to read: {'; '.join(self.problems)}")
        if "old_log_probs" not in self._names:
            self._note(
                f"no column with old log-probs: those of the policy that sampled "
                f"({self._names['rollout_log_probs']!r}) are taken for the anchor of the ratio"
            )
        if host == "prime-rl":
            for folder in sorted({s.path.parent for s in self._readable}):
                if not (folder / "STABLE").exists():
                    self._note(f"{folder.name} has no STABLE marker: it may be incomplete")
        self.manifest = Manifest(
            host=host,
            settings={"files": len(self._readable), "columns": self._names},
            columns=_describe(self._names),
            complete=not self.problems,
        )

    def _check(self, source: _Source) -> bool:
        """Whether a file can be read; its columns are found."""
        try:
            columns = column_names(source.path)
        except RecordingError as error:
            if len(self._sources) == 1:
                raise
            self._note(f"{error} and was skipped")
            return False
        names = find_names(columns, self._given, source.path.name)
        both = self._names or names  # a column counts where every file has it
        self._names = {ours: theirs for ours, theirs in both.items() if names.get(ours) == theirs}
        return True

    @cached_property
    def steps(self) -> list[int]:  # type: ignore[override]
        """Numbers of the steps; where a column holds them, it is read through once."""
        if "step" not in self._names or self._numbered:
            return sorted({s.step for s in self._readable if s.step is not None})
        found: set[int] = set()
        for source in self._readable:
            for table in read_tables(source.path, [self._names["step"]], self._note, 2**16):
                name = self._names["step"]
                found.update(step_numbers(table[name], f"{source.path}: column {name!r}"))
        return sorted(found)

    @cached_property
    def tokens(self) -> int:  # type: ignore[override]
        """Tokens of all rows, masked ones included; estimated from the first rows of JSONL."""
        return sum(count_tokens(s.path, self._names["log_probs"]) for s in self._readable)

    @property
    def _numbered(self) -> bool:
        """Whether files, not rows, say the step."""
        return self.manifest.host == "prime-rl" or "step" not in self._names

    def iterate(self, steps: Iterable[int] | None = None) -> Iterator[RecordedStep]:  # noqa: D102
        wanted = None if steps is None else set(self._wanted(steps))
        last = None if not wanted else max(wanted)
        pending: list[Block] = []
        current: int | None = None
        chunk = 0
        for step, block in self._blocks(wanted):
            if current is not None and step < current:
                raise RecordingError(
                    f"{self.path}: step {step} comes after step {current}; sort the rows by step"
                )
            if step != current:
                yield from self._emit(current, pending, chunk)
                pending, current, chunk = [], step, 0
                if last is not None and step > last:
                    return
            if wanted is not None and step not in wanted:
                continue
            pending.append(block)
            if sum(map(len, pending)) >= CHUNK:
                whole = Block.concatenate(pending)
                head, rest = _split(whole)
                self._note(
                    f"step {step} has more than {CHUNK} tokens and comes in pieces: groups stay "
                    "whole where their rows are side by side, domains are cut"
                )
                yield from self._emit(step, [head], chunk)
                pending, chunk = [rest], chunk + 1
        yield from self._emit(current, pending, chunk)

    def _emit(self, step: int | None, pending: list[Block], chunk: int) -> Iterator[RecordedStep]:
        if step is None or not sum(map(len, pending)):
            return
        found: Columns = Block.concatenate(pending).columns(f"{self.path}, step {step}")
        yield RecordedStep(
            step, found.batch, found.token_ids, found.entropies, found.rewards, found.prompts, chunk
        )

    def _blocks(self, wanted: set[int] | None) -> Iterator[tuple[int, Block]]:
        """Blocks of one step each, in the order of the files."""
        for source in self._readable:
            if self._numbered and wanted is not None and source.step not in wanted:
                continue
            rows = Rows(self._names, str(source.path.name))
            needed = list(dict.fromkeys(self._names.values()))
            tables = read_tables(source.path, needed, self._note)
            for table, end in _with_last(tables):
                block = rows.read(table, end)
                if block is None:
                    continue
                for note in rows.notes:
                    self._note(note)
                if self._numbered:
                    block.rows.pop("step", None)
                    yield int(source.step or 0), block
                else:
                    yield from _by_step(block)


def open_foreign(path: Path, columns: Mapping[str, str]) -> Recording:
    """A foreign recording, by what lies at ``path``.

    Raises:
        RecordingError: if nothing there can be read.
    """
    if path.is_file():
        _refuse_suffix(path)
        return TableRecording(path, [path], path.suffix[1:], columns)
    if not path.is_dir():
        raise RecordingError(
            f"{path} is no recording: it is neither a file nor a directory, but a device, a pipe "
            "or a socket"
        )
    exports = path if path.name == "token_exports" else path / "token_exports"
    for root in (exports, path):
        found = sorted(root.glob("step_*/rank_*.jsonl"))
        if found:
            return TableRecording(root, found, "prime-rl", columns)
    headless = next((p for p in (path / RUN_FOLDER, path) if _is_headless(p)), None)
    if headless is not None:
        raise RecordingError(
            f"{headless} has the shards of a recording, but no {MANIFEST_FILE}; restore it from a "
            "copy"
        )
    folders = [path, *sorted(p for p in path.iterdir() if p.is_dir())]
    inside = [p for folder in folders if not _is_run(folder) for p in sorted(folder.iterdir())]
    for suffixes in (PARQUET_SUFFIXES, JSON_SUFFIXES):
        files = [p for p in inside if p.suffix in suffixes and p.is_file()]
        if files and not _is_run(path):
            return TableRecording(path, files, suffixes[0][1:], columns)
    raise RecordingError(_nothing(path))


def _describe(names: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """The columns as a native manifest would call them."""
    found = {}
    for ours, theirs in names.items():
        if ours in UNITS:
            found[ours] = {"dtype": f"column {theirs}", "unit": UNITS[ours], "per": ""}
        elif ours in (*STRATA, "turn"):
            per = "token" if ours == "turn" else "row"
            found[f"label.{ours}"] = {
                "dtype": f"column {theirs}", "unit": "ids of the caller", "per": per,
            }  # fmt: skip
    return found


def _is_run(path: Path) -> bool:
    return (path / "metrics.jsonl").exists() or (path / "trainer_state.json").exists()


def _is_headless(path: Path) -> bool:
    """Whether the manifest of a native recording is gone."""
    return (path / FOLDER).is_dir() and any(path.glob(index_name(0)))


def _nothing(path: Path) -> str:
    names = sorted(p.name for p in path.iterdir())
    if (path / "metrics.jsonl").exists():
        return (
            f"{path} is a run without a recording; train with --record (fiberpo train), or record "
            "it as docs/recording.md says"
        )
    runs = sorted(p.parent.parent.name for p in path.glob(f"*/{RUN_FOLDER}/{MANIFEST_FILE}"))
    if runs:
        return f"{path} holds recorded runs; name one of them: {', '.join(runs)}"
    some = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    return (
        f"{path} is no recording: it holds {some or 'nothing'}. A recording is a directory with "
        "manifest.json (or a run with recording/ in it), prime-rl's token_exports, or parquet or "
        "JSONL files"
    )


def _refuse_suffix(path: Path) -> None:
    if path.suffix in (*JSON_SUFFIXES, *PARQUET_SUFFIXES):
        return
    pickled = " Pickled files are never read." if path.suffix in (".pt", ".pkl", ".pth") else ""
    raise RecordingError(
        f"{path} is no recording: files are read with the suffixes "
        f"{', '.join((*PARQUET_SUFFIXES, *JSON_SUFFIXES))}.{pickled}"
    )


def _number(root: Path, paths: list[Path]) -> list[_Source]:
    """The files by step: the number in their name, or else their place in the order of names."""
    steps: list[int | None] = []
    for path in paths:
        name = path.relative_to(root).with_suffix("").as_posix() if path != root else path.stem
        found = _STEP.findall(name)
        digits = path.stem if path.stem.isdigit() and path.stem.isascii() else None
        steps.append(int(found[-1]) if found else int(digits) if digits else None)
    if None in steps:
        steps = list(range(len(paths)))
    return sorted(map(_Source, paths, steps), key=lambda s: (s.step, s.path))


def _with_last(tables: Iterator[Any]) -> Iterator[tuple[Any, bool]]:
    """Every table, and whether it is the last."""
    held = next(tables, None)
    while held is not None:
        following = next(tables, None)
        yield held, following is None
        held = following


def _by_step(block: Block) -> Iterator[tuple[int, Block]]:
    steps = block.rows.pop("step")
    starts = np.flatnonzero(np.concatenate([[True], steps[1:] != steps[:-1]]))
    for start, stop in zip(starts, [*starts[1:], len(steps)], strict=True):
        yield int(steps[start]), block.cut(int(start), int(stop))


def _split(block: Block) -> tuple[Block, Block]:
    """Cut where the last group ends that is not the last; at the end where there is none."""
    rows = len(block.lengths)
    groups = block.rows.get("group", block.rows.get("trajectory"))
    at = rows
    if groups is not None:
        last = groups[rows - 1]
        while at > 0 and groups[at - 1] == last:
            at -= 1
    at = at or rows
    return block.cut(0, at), block.cut(at, rows)
