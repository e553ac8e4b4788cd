"""`open_recording`: native recordings and foreign ones, read step by step in bounded memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from torch import Tensor

from ..batch import RatioBatch
from ..errors import FiberPOError, RecordingError
from ..objective import Objective
from .manifest import MANIFEST_FILE, Manifest
from .shards import FOLDER, join, parse_name, read_header, read_shard
from .tokens import TokenText
from .writer import index_name, read_index

RUN_FOLDER = "recording"
"""Where a run keeps its recording."""


@dataclass(frozen=True, eq=False)
class RecordedStep:
    """One optimizer step, all ranks together.

    Attributes:
        step: its number in the host's log.
        batch: the tokens.
        token_ids, entropies: ``[N]``, or None.
        rewards: ``[rows]``, or None.
        prompts: one text a row, or None.
        chunk: 0; where a foreign step was too large for memory, which piece of it this is.
    """

    step: int
    batch: RatioBatch
    token_ids: Tensor | None = None
    entropies: Tensor | None = None
    rewards: Tensor | None = None
    prompts: list[str] | None = None
    chunk: int = 0
    _text: TokenText | None = field(default=None, repr=False)

    def text(self, row: int) -> list[str] | None:
        """The tokens of a row as text; None without token ids or tokenizer.

        Raises:
            RecordingError: if there is no such row.
        """
        if not 0 <= row < self.batch.rows:
            raise RecordingError(f"row {row} of {self.batch.rows} in step {self.step}")
        if self.token_ids is None or self._text is None:
            return None
        end = int(self.batch.lengths[: row + 1].sum())
        ids = self.token_ids[end - int(self.batch.lengths[row]) : end]
        return self._text(np.asarray(ids))


class Recording(ABC):
    """A recording that can be read: see `open_recording`.

    Attributes:
        path: where it is.
        manifest: what it says of itself.
        problems: what is torn or missing and was skipped, in words; grows while reading.
        steps: numbers of the steps, rising.
        tokens: loss tokens of all steps. Of foreign files the tokens of all rows, masked ones too;
            of JSONL an estimate from the size of the file.
    """

    path: Path
    manifest: Manifest
    problems: list[str]
    steps: list[int]
    tokens: int

    def objective(self) -> Objective | None:
        """The objective of the run, built anew; None where it is not known.

        Raises:
            RecordingError: if the manifest names one that cannot be built.
        """
        return self.manifest.build_objective()

    @abstractmethod
    def iterate(self, steps: Iterable[int] | None = None) -> Iterator[RecordedStep]:
        """Read step by step, rising; one step is in memory at a time.

        Args:
            steps: only these; all by default.

        Raises:
            RecordingError: for a step that is not there.
        """

    def _note(self, problem: str) -> None:
        if problem not in self.problems:
            self.problems.append(problem)

    def _wanted(self, steps: Iterable[int] | None) -> list[int]:
        if steps is None:
            return self.steps
        wanted = sorted(set(steps))
        missing = sorted(set(wanted) - set(self.steps))
        if missing:
            raise RecordingError(
                f"{self.path} has no step {missing[0]}; it has {len(self.steps)} steps, "
                f"{self.steps[0]} to {self.steps[-1]}"
            )
        return wanted


class NativeRecording(Recording):
    """What `Recorder` writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problems = []
        self.manifest = Manifest.read(path)
        self._shards: dict[int, list[Path]] = {}
        self.tokens = 0
        entries = {
            entry["file"]: entry
            for rank in range(self.manifest.ranks)
            for entry in read_index(path / index_name(rank))
        }
        for shard in sorted((path / FOLDER).glob("step-*.npz")):
            self._add(shard, entries.pop(shard.name, None))
        for name in sorted(entries):
            self._note(f"{name} is missing, though the index names it")
        self.steps = sorted(self._shards)
        self._check_ranks()
        self._text = self._tokenizer()
        if not self.steps:
            raise RecordingError(
                f"{path} holds no whole step yet"
                + (f" ({_shortened(self.problems)})" if self.problems else "")
            )

    def _add(self, shard: Path, entry: dict[str, int] | None) -> None:
        named = parse_name(shard.name)
        if named is None or named[1] >= self.manifest.ranks:
            return
        size = shard.stat().st_size
        if entry is not None and entry["bytes"] != size:
            self._note(f"{shard.name} is torn ({size} bytes of {entry['bytes']}) and was skipped")
            return
        if entry is None:  # killed between the shard and its line in the index
            try:
                entry = read_header(shard)
            except RecordingError as error:
                self._note(f"{error} and was skipped")
                return
        self._shards.setdefault(named[0], []).append(shard)
        self.tokens += int(entry["tokens"])

    def _check_ranks(self) -> None:
        ranks = self.manifest.ranks
        markers = [self.path / f"complete.rank-{rank:04d}.json" for rank in range(ranks)]
        complete = all(marker.exists() for marker in markers)
        self.manifest = replace(self.manifest, complete=complete)
        if not complete:
            self._note(
                "the run did not close its recording (killed, or still going); what it wrote "
                "so far is here"
            )
        for step, shards in self._shards.items():
            if len(shards) < ranks:
                self._note(
                    f"step {step} has the shards of {len(shards)} of {ranks} ranks: groups and "
                    "domains that reach over ranks are incomplete in it"
                )

    def _tokenizer(self) -> TokenText | None:
        name = self.manifest.tokenizer
        if name is None:
            return None
        try:
            return TokenText(self.path / Path(name).name)
        except ImportError:
            self._note(f"{name} needs the package tokenizers: pip install tokenizers; no text")
        except Exception as error:  # tokenizers raises bare Exception
            self._note(f"{name} cannot be read ({error}); no text")
        return None

    def iterate(self, steps: Iterable[int] | None = None) -> Iterator[RecordedStep]:  # noqa: D102
        for step in self._wanted(steps):
            parts = []
            for shard in self._shards[step]:
                try:
                    parts.append(read_shard(shard))
                except RecordingError as error:
                    self._note(f"{error} and was skipped")
            if not parts:
                continue
            try:
                whole = join(parts)
            except FiberPOError as error:
                self._note(f"the ranks of step {step} do not go together: {error}")
                continue
            if not len(whole.batch):
                self._note(f"step {step} has no loss token and was skipped")
                continue
            yield RecordedStep(
                step, whole.batch, whole.token_ids, whole.entropies, whole.rewards, whole.prompts,
                _text=self._text,
            )  # fmt: skip


def _shortened(problems: list[str]) -> str:
    rest = len(problems) - 3
    return "; ".join(problems[:3]) + (f"; and {rest} more" if rest > 0 else "")


def open_recording(path: str | Path, *, columns: Mapping[str, str] | None = None) -> Recording:
    """Open a recording for reading.

    Args:
        path: what `Recorder` wrote; the directory of a run with such a ``recording`` in it; or a
            foreign one (see ``docs/recording.md``): prime-rl's ``token_exports``, a parquet or
            JSONL file, or a directory of those.
        columns: for foreign files, which column holds what where the usual names do not say it:
            our name -> theirs, ``{"domain": "source", "log_probs": "lp"}``.

    Raises:
        RecordingError: if there is nothing to read, saying what was found.
    """
    path = Path(path)
    if not path.exists():
        raise RecordingError(f"{path} does not exist; name a recording, or the directory of a run")
    folders = [folder for folder in (path, path / RUN_FOLDER) if (folder / MANIFEST_FILE).is_file()]
    if path.name == MANIFEST_FILE:
        folders.append(path.parent)
    if folders:
        if columns:
            raise RecordingError(
                f"columns {dict(columns)} name those of foreign files, but {folders[0]} was "
                "written by fiberpo, whose columns are known; leave them out"
            )
        return NativeRecording(folders[0])
    from .foreign import open_foreign

    return open_foreign(path, columns or {})
