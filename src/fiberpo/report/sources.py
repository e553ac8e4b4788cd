"""The runs of a report: run directories and recordings, read into one shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .. import palette
from ..diagnosis import Finding, examine
from ..errors import DataError, FiberPOError, RecordingError
from ..recording import RUN_FOLDER, open_recording
from .reader import FILES, Run, is_run, read_run
from .recorded import Recorded, read_recorded
from .series import RunSeries

MOST_RUNS = len(palette.CYCLE) * len(palette.PLOT_DASHES)
"""Most runs of one page: beyond that no two curves can be told apart."""


@dataclass(frozen=True)
class Source:
    """One run of the report.

    Attributes:
        label: unique among the runs of the page.
        color, dash: of its curves where several runs are drawn.
        strata: rows of the strata table: the summary's, else the recording's.
        recorded: what its recording holds, or None without one.
        config: its settings as far as they could be read.
    """

    label: str
    path: Path
    run: Run
    series: RunSeries
    color: str
    dash: str
    strata: Sequence[dict[str, Any]] = ()
    recorded: Recorded | None = None
    findings: Sequence[Finding] = ()
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def summary(self) -> dict[str, Any]:
        """``summary.json``, or an empty mapping."""
        return self.run.summary or {}


def read_sources(
    paths: Sequence[Path], progress: Callable[[int, int], None] | None = None
) -> list[Source]:
    """Read every run.

    Args:
        paths: directories of runs, or recordings.
        progress: called with the tokens of a recording that were read, and those to be read.

    Raises:
        DataError: for a path that is neither a run directory nor a recording, one that is given
            twice, and for more runs than a page can tell apart.
    """
    if not paths:
        raise DataError("no run given; pass the directory of a run or of a recording")
    if len(paths) > MOST_RUNS:
        raise DataError(
            f"{len(paths)} runs are more than one page can tell apart; give at most {MOST_RUNS}"
        )
    for path in paths:
        if not path.exists():
            raise DataError(
                f"{path}: no such run; give the directory of a run (with metrics.jsonl) or a "
                "recording"
            )
    resolved = [path.resolve() for path in paths]
    for i, path in enumerate(resolved):
        if path in resolved[:i]:
            raise DataError(f"{paths[i]} is given twice; name each run once")
    read = [_read(path, progress) for path in paths]
    labels = _labels([run.name for run, _ in read], resolved)
    return [
        _source(path, label, i, run, recorded)
        for i, (path, label, (run, recorded)) in enumerate(zip(paths, labels, read, strict=True))
    ]


def _read(path: Path, progress: Callable[[int, int], None] | None) -> tuple[Run, Recorded | None]:
    if not is_run(path):
        return _recording_only(path, progress)
    run = read_run(path)
    if not (path / RUN_FOLDER).exists():
        return run, None
    try:
        own = run.summary is not None and bool(run.train)
        recording = open_recording(path / RUN_FOLDER)
        return run, read_recorded(recording, curves=not own, progress=progress)
    except FiberPOError as error:
        run.notes.append(f"The recording of this run could not be used: {error}")
        return run, None


def _recording_only(
    path: Path, progress: Callable[[int, int], None] | None
) -> tuple[Run, Recorded]:
    """A run of another trainer, of which there is only the recording."""
    try:
        recording = open_recording(path)
    except RecordingError as error:
        raise DataError(
            f"{path}: neither a run (it holds none of {', '.join(FILES)}) nor a recording: {error}"
        ) from error
    recorded = read_recorded(recording, progress=progress)
    if not recorded.metrics:
        raise DataError(f"{path}: the recording holds no complete step; nothing can be shown")
    where = path.resolve()
    name = where.parent.name if where.name == RUN_FOLDER else where.name
    manifest = recording.manifest
    made = {"objective": manifest.objective, "objective_kwargs": dict(manifest.parameters)}
    settings = {**dict(manifest.settings), **(made if manifest.objective else {})}
    notes = [
        f"This report is built from a recording alone{_host(manifest)}: there are no held-out "
        "evaluations, and the curves are those of the steps that were read."
    ]
    summary = {"name": name, "objective": recorded.objective, "steps": recorded.metrics[-1]["step"]}
    config = yaml.safe_dump(_plain(settings), sort_keys=False, allow_unicode=True)
    return Run(name, recorded.metrics, [], summary, config, notes), recorded


def _host(manifest: Any) -> str:
    return f" (recorded by {manifest.host})" if getattr(manifest, "host", "") else ""


def _plain(value: Any) -> Any:
    """A value as YAML writes it: mappings, lists and scalars, anything else as text."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _source(path: Path, label: str, index: int, run: Run, recorded: Recorded | None) -> Source:
    own = (run.summary or {}).get("strata")
    strata = own or (recorded.strata if recorded is not None else [])
    colors = len(palette.CYCLE)
    return Source(
        label=label,
        path=path,
        run=run,
        series=RunSeries(run.train, run.evals, strata),
        color=palette.NAMES[index % colors],
        dash=palette.PLOT_DASHES[index // colors],
        strata=strata,
        recorded=recorded,
        findings=_findings(path, run),
        config=_config(run),
    )


def _labels(names: Sequence[str], paths: Sequence[Path]) -> list[str]:
    """Names that differ: with as much of the path as that takes.

    >>> _labels(["a", "a"], [Path("/x/one/a"), Path("/x/two/a")])
    ['one/a', 'two/a']
    """
    if len(set(names)) == len(names):
        return list(names)
    depth = 1
    labels = [path.name for path in paths]
    while len(set(labels)) < len(labels) and depth < max(len(path.parts) for path in paths):
        depth += 1
        labels = ["/".join(path.parts[-depth:]) for path in paths]
    return labels


def _config(run: Run) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(run.config) if run.config else None
    except (yaml.YAMLError, RecursionError, ValueError):
        run.notes.append("config.yaml is not YAML; its settings are not compared.")
        return {}
    return {str(k): v for k, v in loaded.items()} if isinstance(loaded, dict) else {}


def _findings(path: Path, run: Run) -> list[Finding]:
    try:
        return examine(path)
    except FiberPOError as error:
        run.notes.append(f"The doctor could not examine this run: {error}")
        return []
