"""A few worker processes; one that dies takes only its own cell with it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.context import SpawnProcess
from typing import Any

from .cells import Cell, State
from .worker import ONE_THREAD, TRAINER, Job, serve


@dataclass
class _Worker:
    process: SpawnProcess
    pipe: connection.Connection
    cell: Cell | None = None
    started: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """What came of a cell: its error, or an empty text."""

    cell: Cell
    error: str


class Pool:
    """Up to ``size`` processes that run cells; use it in a ``with`` block.

    Leaving the block ends the processes, also in the middle of a cell.

    Args:
        size: most processes at a time.
        trainer: see `fiberpo.study.worker.TRAINER`.
    """

    def __init__(self, size: int, trainer: str = TRAINER) -> None:
        self.size, self.trainer = size, trainer
        self._workers: list[_Worker] = []
        self._context = multiprocessing.get_context("spawn")

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: Any) -> None:
        for worker in self._workers:
            worker.process.kill()  # half a cell is worth nothing, so there is nothing to save
        for worker in self._workers:
            worker.process.join()
            worker.pipe.close()
        self._workers = []

    @property
    def busy(self) -> int:
        """Processes with a cell."""
        return sum(worker.cell is not None for worker in self._workers)

    @property
    def free(self) -> int:
        """Cells that can be started now."""
        return self.size - self.busy

    def start(self, job: Job) -> None:
        """Give a cell to a process that has none."""
        idle = [w for w in self._workers if w.cell is None and w.process.is_alive()]
        worker = idle[0] if idle else self._spawn()
        worker.cell, worker.started = job.cell, time.monotonic()
        with suppress(OSError):  # it died just now, which `wait` finds out
            worker.pipe.send(job)

    def wait(self, seconds: float) -> list[Outcome]:
        """The cells that ended, after at most ``seconds`` if none does."""
        at_work = {w.pipe: w for w in self._workers if w.cell is not None}
        found = []
        for pipe in connection.wait([*at_work], seconds):
            worker = at_work[pipe]  # type: ignore[index]
            cell, worker.cell = worker.cell, None
            assert cell is not None
            try:
                error = worker.pipe.recv()
            except (EOFError, OSError):
                error = self._bury(worker, cell)
            found.append(Outcome(cell, error))
        return found

    def _spawn(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=serve, args=(theirs, self.trainer), daemon=True)
        with _worker_environment():
            process.start()
        theirs.close()
        worker = _Worker(process, ours)
        self._workers.append(worker)
        return worker

    def _bury(self, worker: _Worker, cell: Cell) -> str:
        """Note the failure of a cell whose process is gone."""
        worker.process.join()
        worker.pipe.close()
        self._workers.remove(worker)
        if cell.state() is State.FINISHED:  # it died after its last line
            return ""
        error = f"the worker process ended {_exit(worker.process.exitcode or 0)}"
        cell.fail(error, time.monotonic() - worker.started)
        return error


def _exit(code: int) -> str:
    if code >= 0:
        return f"with exit code {code}"
    name = signal.Signals(-code).name
    hint = "; perhaps the memory did not suffice for so many at a time (--jobs)"
    return f"by {name}" + (hint if name == "SIGKILL" else "")


@contextmanager
def _worker_environment() -> Iterator[None]:
    """What a child inherits: one thread, and no interruption while it starts."""
    before = {name: os.environ.get(name) for name in ONE_THREAD}
    os.environ.update(ONE_THREAD)
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
