"""What happens in a worker process: one cell after the other, on one thread."""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import connection, parent_process
from pathlib import Path
from typing import Any

from ..errors import FiberPOError
from .cells import Cell

TRAINER = "fiberpo.train.program:train"
"""What trains a cell; ``module:function`` with the signature of `fiberpo.train.program.train`."""

ONE_THREAD = {
    "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false",
}  # fmt: skip
"""Environment of a worker, set before it imports torch."""


@dataclass(frozen=True)
class Job:
    """A cell to run.

    Args:
        cell: what to run.
        log: file for everything that the run prints.
        keep_checkpoints: whether the weights stay in the run's directory.
    """

    cell: Cell
    log: Path
    keep_checkpoints: bool = False


def serve(jobs: Any, trainer: str = TRAINER) -> None:
    """Run the jobs that come through a connection until it closes; answer with each one's error.

    The process is out of reach of the terminal's Ctrl-C, and ends with the process that started it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.setpgid(0, 0)  # a run handles SIGINT itself; here its parent decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch
    from tqdm import tqdm

    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a kill would leave behind
    while True:
        try:
            job = jobs.recv()
        except EOFError:
            return
        jobs.send(run_job(job, trainer))


def run_job(job: Job, trainer: str = TRAINER) -> str:
    """Train a cell from its start; the error if it failed, else an empty text.

    An error is also in ``failure.json`` of the run's directory, its traceback in the log.
    """
    _print_to(job.log)
    cell, started = job.cell, time.monotonic()
    shutil.rmtree(cell.run_dir, ignore_errors=True)
    error = ""
    try:
        summary = load(trainer)(
            cell.config, overwrite=True, progress=False, say=print, report=False
        )
        if summary["interrupted"]:
            raise FiberPOError("the run was stopped by a signal")
    except Exception as problem:
        traceback.print_exc()
        error = str(problem) if isinstance(problem, FiberPOError) else _described(problem)
        cell.fail(error, time.monotonic() - started)
    if not job.keep_checkpoints:
        remove_checkpoints(cell.run_dir)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return error


def remove_checkpoints(run_dir: Path) -> None:
    """Delete weights and optimizer states, which are most of a run's bytes."""
    for folder in run_dir.glob("checkpoint-*"):
        shutil.rmtree(folder)


def load(name: str) -> Callable[..., Any]:
    """The function behind ``module:function``."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def _described(problem: Exception) -> str:
    return f"{type(problem).__name__}: {problem}" if str(problem) else type(problem).__name__


def _print_to(path: Path) -> None:
    """Send everything that this process prints, also from C++, into a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
