"""Which cells of a study are run, and ``study.json``, which says so."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..errors import ConfigError
from .cells import Cell, State, all_cells, choose
from .costs import Costs, amount, fitting, format_seconds
from .design import Study
from .worker import TRAINER

STUDY_FILE = "study.json"
LOCK_FILE = "study.lock"


@dataclass(frozen=True)
class Options:
    """How to run a study.

    Args:
        minutes: of wall time; the cells are chosen so that they fit. None runs all.
        jobs: worker processes, each on one thread.
        arms, settings, seeds: run only these; None takes all.
        keep_checkpoints: keep the weights of every cell.
        trainer: see `fiberpo.study.worker.TRAINER`.
    """

    minutes: float | None = None
    jobs: int = 1
    arms: Sequence[str] | None = None
    settings: Sequence[str] | None = None
    seeds: Sequence[int] | None = None
    keep_checkpoints: bool = False
    trainer: str = TRAINER

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise ConfigError(f"jobs is {self.jobs}; at least one process is needed")
        if self.minutes is not None and self.minutes <= 0:
            raise ConfigError(f"minutes is {self.minutes}; it must be positive")


@dataclass(frozen=True)
class Plan:
    """The cells of a study as they stand before anything runs.

    Args:
        study, options: what was asked for.
        cells: all of the grid, in their order.
        wanted: those that the options name.
        chosen: those of them that fit into the time.
        states: of every cell, by name.
        costs: what they are expected to take.
    """

    study: Study
    options: Options
    cells: list[Cell]
    wanted: list[Cell]
    chosen: list[Cell]
    states: Mapping[str, State]
    costs: Costs

    def finished(self, cell: Cell) -> bool:
        """Whether the cell was done before."""
        return self.states[cell.name] is State.FINISHED

    @property
    def to_run(self) -> list[Cell]:
        """What is chosen and not finished; failed cells are tried again."""
        return [cell for cell in self.chosen if not self.finished(cell)]

    @property
    def left_out(self) -> list[Cell]:
        """What is wanted, not finished, and does not fit into the time."""
        taken = {cell.name for cell in self.chosen}
        return [c for c in self.wanted if c.name not in taken and not self.finished(c)]

    @property
    def seconds(self) -> float:
        """Expected wall time of what is to run."""
        return self.costs.wall(self.to_run, self.options.jobs)

    def selection(self) -> dict[str, Any]:
        """What was asked for, and what it chose and left out, by name."""
        asked = ("minutes", "jobs", "arms", "settings", "seeds")
        return {
            **{key: getattr(self.options, key) for key in asked},
            "chosen": [cell.name for cell in self.chosen],
            "left_out": [cell.name for cell in self.left_out],
        }

    def describe(self) -> Iterator[str]:
        """Lines for a person."""
        study, jobs = self.study, self.options.jobs
        yield f"study      {study.name}" + (f": {study.about}" if study.about else "")
        done = sum(self.finished(cell) for cell in self.cells)
        yield (
            f"grid       {amount(len(study.settings), 'setting')}, {amount(len(study.arms), 'arm')}"
            f", {amount(len(self.cells), 'cell')}, {done} finished"
        )
        yield (
            f"to run     {amount(len(self.to_run), 'cell')} on {amount(jobs, 'worker')}, "
            f"about {format_seconds(self.seconds)}"
        )
        if self.left_out:
            yield (
                f"left out   {amount(len(self.left_out), 'cell')} that "
                f"{'does' if len(self.left_out) == 1 else 'do'} not fit into "
                f"{amount_of(self.options.minutes)}:"
            )
            for setting in study.settings:
                cells = [cell for cell in self.left_out if cell.setting == setting]
                seeds = ", ".join(str(seed) for seed in sorted({cell.seed for cell in cells}))
                if cells:
                    yield f"           {setting}, {amount(len(cells), 'cell')} (seeds {seeds})"


def amount_of(minutes: float | None) -> str:
    """Of time.

    >>> amount_of(20.0)
    '20 min'
    """
    return f"{minutes or 0:g} min"


def make_plan(study: Study, output: Path, options: Options) -> Plan:
    """Build every cell, look at what is finished, and choose.

    Raises:
        ConfigError: for a cell whose configuration cannot work, or a directory of something else.
    """
    check_output(study, output)
    cells = all_cells(study, output)
    states, costs = {cell.name: cell.state() for cell in cells}, Costs()
    done = {name for name, state in states.items() if state is State.FINISHED}
    for cell in cells:
        if cell.name in done:
            costs.measured(cell, (cell.summary() or {})["seconds"])
    wanted = choose(study, cells, arms=options.arms, settings=options.settings, seeds=options.seeds)
    chosen = wanted
    if options.minutes is not None:
        chosen = fitting(wanted, done, costs, 60 * options.minutes, options.jobs)
    return Plan(study, options, cells, wanted, chosen, states, costs)


def write_status(
    study: Study, output: Path, cells: Sequence[Cell], selection: Mapping[str, Any]
) -> dict[str, Any]:
    """``study.json``: the design, what was chosen and left out, and what is done by now."""
    states = {cell.name: cell.state() for cell in cells}
    status = {
        "name": study.name,
        "cells": len(states),
        **{
            state.value: [name for name, found in states.items() if found is state]
            for state in State
        },
        "selection": dict(selection),
        "design": dataclasses.asdict(study),
    }
    path = output / STUDY_FILE
    fresh = path.with_suffix(f".{os.getpid()}.new")
    fresh.write_text(json.dumps(status, indent=1))
    os.replace(fresh, path)
    return status


def read_status(output: Path) -> dict[str, Any]:
    """``study.json`` of a study's directory.

    Raises:
        ConfigError: if there is none, or it is damaged.
    """
    path = output / STUDY_FILE
    if not path.is_file():
        raise ConfigError(f"{output} is not the directory of a study: it has no {STUDY_FILE}")
    try:
        status = json.loads(path.read_text())
        assert isinstance(status["name"], str)
        assert isinstance(status["selection"], dict)
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise ConfigError(f"{path} is damaged ({error!r}); delete it to go on") from error
    return status


def check_output(study: Study, output: Path) -> None:
    """Refuse to write into the directory of something else.

    Raises:
        ConfigError: naming what it holds.
    """
    if (output / STUDY_FILE).is_file():
        name = read_status(output)["name"]
        if name != study.name:
            raise ConfigError(
                f"{output} holds the study {name!r}, not {study.name!r}; choose another --output"
            )
    elif output.exists() and (
        not output.is_dir() or any(path.name != LOCK_FILE for path in output.iterdir())
    ):
        raise ConfigError(f"{output} is not the directory of a study; choose another --output")


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Keep a second command out of the directory.

    Raises:
        ConfigError: if one is at work there.
    """
    lock = FileLock(output / LOCK_FILE, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise ConfigError(f"another fiberpo study is at work in {output}; wait for it") from error
    try:
        yield
    finally:
        lock.release()
