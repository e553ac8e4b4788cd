"""`Recorder`: what a trainer calls, once per optimizer step."""

from __future__ import annotations

import datetime
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from ..batch import RatioBatch
from ..errors import FiberPOError, RecordingError
from ..objective import Objective
from .manifest import MANIFEST_FILE, UNITS, Manifest, describe, encode, write_whole
from .shards import FOLDER, Columns, describe_columns, pack, parse_name, shard_name, write_shard
from .tokens import TOKENIZER_FILE, VOCABULARY_FILE, save_tokenizer

logger = logging.getLogger(__name__)

_SHARED = (MANIFEST_FILE, TOKENIZER_FILE, VOCABULARY_FILE)
"""What the first rank writes for all."""

REPLACE = "remove the directory, or pass overwrite=True to Recorder(...) or record(trainer, ...)"
"""The remedies: a setting as ``record_to`` leaves only the first."""

Values = Tensor | Sequence[Tensor] | None


class Recorder:
    """Writes a recording; safe against a kill at any moment.

    A step is on disk, whole, when `record` returns: shards are written under another name, synced
    and renamed. `close` writes the completion marker.

    Args:
        path: directory of the recording (``RUN/recording`` where the run has a directory).
        objective: what is optimised; None where it is not an `Objective`.
        host: what writes: name and version.
        settings: settings of the host that matter, for people and for the doctor.
        tokenizer: a Hugging Face tokenizer (or `tokenizers.Tokenizer`), kept beside the manifest so
            that a reader can show text.
        rank, ranks: this process and how many there are; each writes its own files into the same
            directory, the first one the manifest.
        overwrite: replace the recording that is there.
        resume: True continues the recording that is there even if it was closed; False refuses
            one that is there; None continues it where it was not closed.

    Continuing (the same run, from a checkpoint): the first step recorded replaces the one with its
    number and all after it.

    Raises:
        RecordingError: if ``path`` holds a closed recording, one of another run, or something else.

    Example:
        >>> import tempfile, torch, fiberpo
        >>> from fiberpo.recording import Recorder, open_recording
        >>> log_probs, old = torch.tensor([-0.9, -1.2]), torch.tensor([-1.0, -1.0])
        >>> batch = fiberpo.RatioBatch.from_packed(log_probs, old, torch.ones(1), [2])
        >>> folder = tempfile.mkdtemp()
        >>> with Recorder(folder, fiberpo.recipes.fiberpo()) as recorder:
        ...     recorder.record(1, batch)
        >>> recording = open_recording(folder)
        >>> recording.steps, recording.tokens, recording.manifest.objective
        ([1], 2, 'fiberpo')
        >>> [item.batch.log_ratio for item in recording.iterate()]
        [tensor([ 0.1000, -0.2000])]
    """

    def __init__(
        self,
        path: str | Path,
        objective: Objective | None = None,
        *,
        host: str = "",
        settings: Mapping[str, Any] | None = None,
        tokenizer: Any = None,
        rank: int = 0,
        ranks: int = 1,
        overwrite: bool = False,
        resume: bool | None = None,
    ) -> None:
        if not 0 <= rank < ranks:
            raise RecordingError(f"rank is {rank} of {ranks}; it is 0 to ranks - 1")
        self.path = Path(path)
        self.rank = rank
        self._steps = 0
        self._closed = False
        self._manifest = Manifest(
            host=host,
            settings=encode(settings or {}),
            ranks=ranks,
            created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            fiberpo=__version__,
            **describe(objective),
        )
        self._prepare(overwrite, resume)
        if rank == 0:
            found = save_tokenizer(tokenizer, self.path)
            self._manifest = replace(self._manifest, tokenizer=found)
            self._manifest.write(self.path)

    def _prepare(self, overwrite: bool, resume: bool | None) -> None:
        """Make the directory, and look at what is in it."""
        if self.path.exists() and not self.path.is_dir():
            raise RecordingError(f"{self.path} is a file; name a directory for the recording")
        self._last: int | None = None
        self._first: int | None = None
        if overwrite:
            self._remove(0)
        elif (self.path / MANIFEST_FILE).exists():
            self._continue(resume)
        elif self.rank == 0 and self.path.is_dir() and any(self._strangers()):
            raise RecordingError(
                f"{self.path} is not empty and not a recording; name a new directory "
                "(RUN/recording is usual)"
            )
        (self.path / FOLDER).mkdir(parents=True, exist_ok=True)
        mine = [f"**/.*.rank-{self.rank:04d}.*.tmp"]
        shared = [f".{name}.*.tmp" for name in _SHARED] if self.rank == 0 else []
        for torn in [path for pattern in mine + shared for path in self.path.glob(pattern)]:
            torn.unlink()  # left by a kill

    def _strangers(self) -> list[str]:
        """What other ranks cannot have put there."""
        return [
            p.name
            for p in self.path.iterdir()
            if p.name not in (FOLDER, *_SHARED)
            and not p.name.startswith((".", "index.", "complete."))
        ]

    def _continue(self, resume: bool | None) -> None:
        before = Manifest.read(self.path)
        differs = self._manifest.same_run(before)
        if differs is not None:
            raise RecordingError(
                f"{self.path} holds the recording of another run ({differs} was "
                f"{getattr(before, differs)!r} and is {getattr(self._manifest, differs)!r}); name "
                f"another directory, or replace it: {REPLACE}"
            )
        steps = [step for step, _ in self._mine(0)]
        if steps and (resume is False or (self._marker.exists() and not resume)):
            raise RecordingError(
                f"{self.path} holds the recording of a run (steps {min(steps)} to {max(steps)}); "
                f"name another directory, or replace it: {REPLACE}; a Recorder goes on with it "
                "where it is given resume=True"
            )
        if steps:
            self._first, self._last = min(steps), max(steps)
        self._manifest = replace(self._manifest, created=before.created, columns=before.columns)

    @property
    def _marker(self) -> Path:
        return self.path / f"complete.rank-{self.rank:04d}.json"

    def _mine(self, since: int) -> list[tuple[int, Path]]:
        """Shards of this rank (the first one answers for ranks that are no more) from a step on."""
        found = []
        for path in (self.path / FOLDER).glob("step-*.npz"):
            named = parse_name(path.name)
            if named is None or named[0] < since:
                continue
            gone = self.rank == 0 and named[1] >= self._manifest.ranks
            if named[1] == self.rank or gone:
                found.append((named[0], path))
        return found

    def _remove(self, since: int) -> None:
        """Take away this rank's steps from ``since`` on, newest first."""
        self._marker.unlink(missing_ok=True)
        for _, path in sorted(self._mine(since), reverse=True):
            path.unlink()
        index = self.path / index_name(self.rank)
        kept = [line for line in read_index(index) if line["step"] < since]
        if index.exists():
            write_whole(index, b"".join(_line(entry) for entry in kept))

    def record(
        self,
        step: int,
        batch: RatioBatch | Sequence[RatioBatch],
        *,
        token_ids: Values = None,
        entropies: Values = None,
        rewards: Values = None,
        prompts: Sequence[str] | None = None,
    ) -> None:
        """Write one optimizer step.

        Args:
            step: number of the optimizer step as the host's log counts it, rising.
            batch: this rank's tokens of the step, or its micro-batches in order.
            token_ids, entropies: ``[N]`` of the loss tokens; ``[B, T]`` where the batch came from
                `RatioBatch.from_padded`; a list of those where ``batch`` is one. Entropies in nats.
            rewards: one a row with a loss token, likewise.
            prompts: text, one a row with a loss token.

        Raises:
            RecordingError: for a step that is not beyond the last, or columns of the wrong length.
        """
        if self._closed:
            raise RecordingError(f"the recorder of {self.path} is closed")
        self._check_step(step)
        parts = [batch] if isinstance(batch, RatioBatch) else list(batch)
        if not parts:
            raise RecordingError(f"step {step} has no batch")
        whole = RatioBatch.concatenate(parts)
        if prompts is not None and len(prompts) != whole.rows:
            raise RecordingError(
                f"{len(prompts)} prompts for the {whole.rows} rows with a loss token of step {step}"
            )
        columns = Columns(
            whole,
            _column("token_ids", token_ids, parts, step),
            _column("entropies", entropies, parts, step),
            _column("rewards", rewards, parts, step, rows=True),
            None if prompts is None else list(prompts),
        )
        arrays = pack(columns, step, self.rank)
        name = shard_name(step, self.rank)
        size = write_shard(self.path / FOLDER / name, arrays)
        entry = {"file": name, "step": step, "rows": whole.rows, "tokens": len(whole)}
        with (self.path / index_name(self.rank)).open("ab") as index:
            index.write(_line({**entry, "bytes": size}))
        self._last, self._steps = step, self._steps + 1
        found = {**self._manifest.columns, **describe_columns(arrays, UNITS)}
        if self.rank == 0 and found != self._manifest.columns:
            self._manifest = replace(self._manifest, columns=found)
            self._manifest.write(self.path)

    def attempt(self, step: int, make: Callable[[], Mapping[str, Any]]) -> None:
        """`record` for hosts: what goes wrong is a warning, and training goes on.

        A step that cannot be recorded (NaN log-probs) is left out; after an error of the file
        system the recording ends, unfinished and readable.

        Args:
            step: as in `record`.
            make: gives the arguments of `record` but the step.
        """
        if self._closed:
            return
        try:
            self.record(step, **make())
        except FiberPOError as error:
            logger.warning("step %d is not in the recording: %s", step, error)
        except OSError as error:
            logger.warning(
                "RECORDING STOPPED at step %d: %s; training goes on, and what was recorded before "
                "is readable: %s", step, error, self.path,
            )  # fmt: skip
            self.close(complete=False)

    def _check_step(self, step: int) -> None:
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise RecordingError(f"step is {step!r}; it is the number of the optimizer step, >= 0")
        if self._steps == 0 and self._first is not None:
            if step <= self._first:
                raise RecordingError(
                    f"{self.path} holds steps {self._first} to {self._last}, and step {step} would "
                    "replace them all; name another directory, or replace it: {REPLACE}"
                )
            self._remove(step)
        elif self._last is not None and step <= self._last:
            raise RecordingError(
                f"step {step} comes after step {self._last}; call record once per optimizer step, "
                "with rising numbers"
            )

    def close(self, *, complete: bool = True) -> None:
        """End the recording.

        Args:
            complete: write the completion marker; False for a run that is to be continued.
        """
        if self._closed:
            return
        self._closed = True
        if complete:
            entries = read_index(self.path / index_name(self.rank))
            tokens = sum(entry["tokens"] for entry in entries)
            done = {"steps": len(entries), "tokens": tokens}
            write_whole(self._marker, json.dumps(done).encode())

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(complete=error is None)


def index_name(rank: int) -> str:
    """File with one line a shard: name, step, rows, tokens, exact size."""
    return f"index.rank-{rank:04d}.jsonl"


def read_index(path: Path) -> list[dict[str, Any]]:
    """The whole lines of an index; none where there is no file. The last one of a file counts."""
    found: dict[str, dict[str, Any]] = {}
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
            wanted = {"file": str, "step": int, "rows": int, "tokens": int, "bytes": int}
            if all(isinstance(entry[k], kind) for k, kind in wanted.items()):
                found[entry["file"]] = entry
        except (ValueError, KeyError, TypeError, RecursionError):
            continue  # the shard speaks for itself
    return list(found.values())


def _line(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry).encode() + b"\n"


def _column(
    name: str, values: Values, parts: list[RatioBatch], step: int, rows: bool = False
) -> Tensor | None:
    """One column of the whole step, from that or from one piece a micro-batch."""
    if values is None:
        return None
    pieces = [values] if isinstance(values, Tensor) else [torch.as_tensor(v) for v in values]
    if len(pieces) == len(parts):
        masks = [part.mask for part in parts]
        pieces = [
            piece.to(mask.device)[mask] if piece.ndim == 2 and mask is not None
            and piece.shape == mask.shape else piece
            for piece, mask in zip(pieces, masks, strict=True)
        ]  # fmt: skip
    whole = torch.cat([piece.detach().reshape(-1).cpu() for piece in pieces])
    wanted = sum(part.rows if rows else len(part) for part in parts)
    if len(whole) != wanted:
        kind = "rows with a loss token" if rows else "loss tokens"
        raise RecordingError(
            f"{name} has {len(whole)} values for the {wanted} {kind} of step {step}"
        )
    return whole
