"""``fiberpo study``: run the chosen cells, then write table and report."""

from __future__ import annotations

import importlib
import math
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from tqdm import tqdm

from ..errors import ConfigError
from .cells import Cell, State, all_cells
from .costs import amount, format_seconds
from .design import Study
from .planning import Options, Plan, check_output, locked, make_plan, read_status, write_status
from .pool import Pool
from .results import write_results
from .worker import Job

LOGS_FOLDER = "logs"
PAGE = "fiberpo.study.page"

POLL = 0.5
"""Seconds within which an interruption is noticed."""

Say = Callable[[str], Any]


@dataclass(frozen=True)
class Result:
    """What a study has led to so far.

    Args:
        status: what ``study.json`` holds.
        report: the HTML page; None without results, and after an interruption.
        failed: the error of each failed cell, by name.
        interrupted: whether somebody asked to stop.
    """

    status: dict[str, Any]
    report: Path | None
    failed: dict[str, str]
    interrupted: bool = False


def run_study(study: Study, output: Path, options: Options, say: Say = print) -> Result:
    """Run what is not finished, then write ``results.parquet``, ``study.json`` and the report.

    Raises:
        ConfigError: before anything runs; also if not even the first cells fit into the time.
    """
    importlib.import_module(PAGE)  # what it lacks is said before hours of training
    plan = make_plan(study, output, options)
    for line in plan.describe():
        say(line)
    if not plan.chosen:
        first = plan.wanted[0]
        raise ConfigError(
            f"--minutes {options.minutes:g} is not enough for all arms of the first setting and "
            f"seed ({first.setting}, seed {first.seed}); give more time, or fewer --arms"
        )
    output.mkdir(parents=True, exist_ok=True)
    with locked(output):
        write_status(study, output, plan.cells, plan.selection())
        interrupted = _run_cells(plan, output, say)
        return _finish(study, output, plan.cells, plan.selection(), interrupted, say)


def report_study(study: Study, output: Path, say: Say = print) -> Result:
    """Table and report from what is there by now; also while the study runs.

    Raises:
        ConfigError: if ``output`` is not the directory of this study.
    """
    check_output(study, output)
    selection = read_status(output)["selection"]
    return _finish(study, output, all_cells(study, output), selection, False, say)


def _finish(
    study: Study,
    output: Path,
    cells: Sequence[Cell],
    selection: Mapping[str, Any],
    interrupted: bool,
    say: Say,
) -> Result:
    status = write_status(study, output, cells, selection)
    table = write_results(cells, output, selection)
    failed = {}
    for cell in cells:
        if cell.name in status[State.FAILED.value]:
            failed[cell.name] = str((cell.failure() or {})["error"])
            say(f"failed     {cell.name}: {failed[cell.name]} ({log_of(output, cell)})")
    finished = len(status[State.FINISHED.value])
    say(f"finished   {finished} of {amount(len(cells), 'cell')}")
    if interrupted or not finished:
        return Result(status, None, failed, interrupted)
    page = importlib.import_module(PAGE)
    return Result(status, page.write_study_report(output, table.to_pandas(), study), failed)


def log_of(output: Path, cell: Cell) -> Path:
    """The file with what a cell printed."""
    return output / LOGS_FOLDER / f"{cell.name}.txt"


def _run_cells(plan: Plan, output: Path, say: Say) -> bool:
    """Run what a plan chose; whether somebody interrupted."""
    options, pending = plan.options, deque(plan.to_run)
    if not pending:
        return False
    end = math.inf if options.minutes is None else time.monotonic() + 60 * options.minutes
    begun = {cell.unit for cell in plan.chosen if plan.finished(cell)}
    with _stop_asked() as stop, _progress(len(pending), say) as progress:
        with Pool(min(options.jobs, len(pending)), options.trainer) as pool:
            while not stop:
                while pending and pool.free:
                    if _late(plan, pending, begun, end):
                        progress.say(f"time over  {amount(len(pending), 'cell')} not started")
                        pending.clear()
                        break
                    cell = pending.popleft()
                    begun.add(cell.unit)
                    pool.start(Job(cell, log_of(output, cell), options.keep_checkpoints))
                if not pool.busy:
                    break
                progress.tick()
                for outcome in pool.wait(POLL):
                    summary = outcome.cell.summary() or {}
                    if not outcome.error:
                        plan.costs.measured(outcome.cell, summary["seconds"])
                    progress.ended(outcome.cell.name, outcome.error, summary)
        if stop:
            progress.say("interrupted; finished cells are kept, the same command goes on")
    return bool(stop)


def _late(
    plan: Plan, pending: Sequence[Cell], begun: set[tuple[int, int, str]], end: float
) -> bool:
    """Whether the time is over: for any cell, or for a whole unit where one would begin."""
    left, unit = end - time.monotonic(), pending[0].unit
    if unit in begun:
        return left <= 0
    cells = [cell for cell in pending if cell.unit == unit]
    return plan.costs.wall(cells, plan.options.jobs, start=0.0) > left


class _Progress:
    """A bar over the cells, or one line for each where nobody looks at a terminal."""

    def __init__(self, bar: tqdm, say: Say) -> None:
        self._bar, self._say, self._ended = bar, say, 0

    def say(self, text: str) -> None:
        """Say something without disturbing the bar."""
        with tqdm.external_write_mode(file=sys.stderr):
            self._say(text)

    def tick(self) -> None:
        """Let the clock of the bar go on."""
        self._bar.refresh()

    def ended(self, name: str, error: str, summary: Mapping[str, Any]) -> None:
        """One more cell."""
        self._ended += 1
        if error:
            self.say(f"[{self._ended}/{self._bar.total}] {name}  failed: {error}")
        else:
            reward = f"held-out {summary['heldout_after']['mean']:.3f}"
            self._bar.set_postfix_str(f"{name} {reward}", refresh=False)
            if self._bar.disable:
                seconds = format_seconds(summary["seconds"])
                self.say(f"[{self._ended}/{self._bar.total}] {name}  {reward}  {seconds}")
        self._bar.update()


@contextmanager
def _progress(total: int, say: Say) -> Iterator[_Progress]:
    with tqdm(
        total=total, unit="cell", dynamic_ncols=True, file=sys.stderr,
        disable=not sys.stderr.isatty(),
    ) as bar:  # fmt: skip
        yield _Progress(bar, say)


@contextmanager
def _stop_asked() -> Iterator[list[int]]:
    """Ctrl-C (or SIGTERM) fills the list; a second one stops at once."""
    asked: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
