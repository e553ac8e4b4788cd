"""The cells of a grid: one training run each, in the order in which they are worth most.

What a cell is at any moment is read from its own directory, so that a kill at any moment does no
harm: there is no other state.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..train.config import CONFIG_FILE, TrainConfig, make_config
from .design import Study, check_known

SUMMARY_FILE = "summary.json"
FAILURE_FILE = "failure.json"
CELLS_FOLDER = "cells"


class State(Enum):
    """What the directory of a cell says about it."""

    OPEN = "open"
    FINISHED = "finished"
    FAILED = "failed"


@dataclass(frozen=True)
class Cell:
    """One training run of a study.

    Args:
        study, setting, arm, family, seed: its place in the grid.
        block: number of the block of the plan that it belongs to.
        config: of the run.
    """

    study: str
    setting: str
    arm: str
    family: str
    seed: int
    block: int
    config: TrainConfig

    @property
    def name(self) -> str:
        """``setting/arm-seedN``, also the place of its directory."""
        return f"{self.setting}/{self.config.run_name}"

    @property
    def unit(self) -> tuple[int, int, str]:
        """Block, seed and setting: the arms of one unit are compared with each other."""
        return self.block, self.seed, self.setting

    @property
    def run_dir(self) -> Path:
        """Directory of the run."""
        return self.config.run_dir

    @cached_property
    def digest(self) -> str:
        """Of the configuration, without name and place."""
        return digest(self.config)

    def state(self) -> State:
        """Read from the directory; a run with another configuration, or half a run, is open."""
        failure = _json(self.run_dir / FAILURE_FILE)
        if failure is not None:
            return State.FAILED if failure.get("digest") == self.digest else State.OPEN
        summary = self.summary()
        if summary is None or summary.get("interrupted") or self._saved_digest() != self.digest:
            return State.OPEN
        return State.FINISHED

    def summary(self) -> dict[str, Any] | None:
        """``summary.json``, if it is there and whole."""
        return _json(self.run_dir / SUMMARY_FILE)

    def failure(self) -> dict[str, Any] | None:
        """``failure.json``, if it is there and whole: ``error``, ``seconds``, ``digest``."""
        return _json(self.run_dir / FAILURE_FILE)

    def fail(self, error: str, seconds: float) -> None:
        """Record that the cell failed."""
        self.run_dir.mkdir(parents=True, exist_ok=True)
        values = {"error": error, "seconds": seconds, "digest": self.digest}
        (self.run_dir / FAILURE_FILE).write_text(json.dumps(values, indent=1))

    def _saved_digest(self) -> str | None:
        """Of the configuration that the run was made with.

        Settings that did not exist at that time count with the defaults of today.
        """
        try:
            saved = make_config(self.run_dir / CONFIG_FILE)
        except (ConfigError, OSError):
            return None
        if self.config.max_completion_length is None:  # a run notes the length it took
            saved = saved.replace(max_completion_length=None)
        return digest(saved)


def digest(config: TrainConfig) -> str:
    """Of all settings but the name and the place of the run; 16 hexadecimal digits."""
    values = dataclasses.asdict(config)
    del values["name"], values["output"]
    text = json.dumps(values, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def all_cells(study: Study, output: Path) -> list[Cell]:
    """Every cell of the plan once, each with its checked configuration.

    Block by block; within a block seed by seed, so that what is done at any time is balanced; then
    setting by setting, arm by arm.

    Raises:
        ConfigError: naming the setting and the arm whose configuration cannot work.
    """
    found: dict[tuple[str, str, int], Cell] = {}
    for number, block in enumerate(study.plan):
        of = {(s, a): study.seeds_of(block, s, a) for s in block.settings for a in block.arms}
        for seed in dict.fromkeys(s for seeds in of.values() for s in seeds):
            for (setting, arm), seeds in of.items():
                key = (setting, arm, seed)
                if seed in seeds and key not in found:
                    found[key] = _cell(study, output, setting, arm, seed, number)
    return list(found.values())


def _cell(study: Study, output: Path, setting: str, arm: str, seed: int, block: int) -> Cell:
    values = {**study.base, **study.settings[setting].config, **study.arms[arm].config}
    place = {"name": f"{arm}-seed{seed}", "output": str(output / CELLS_FOLDER / setting)}
    try:
        config = make_config(None, {**values, **place, "seed": seed})
    except ValueError as error:
        raise ConfigError(f"setting {setting!r}, arm {arm!r}: {error}") from error
    if "save_every" not in values:  # half a cell starts again, so nothing needs saving on the way
        config = config.replace(save_every=config.rollouts)
    return Cell(study.name, setting, arm, study.arms[arm].family, seed, block, config)


def choose(
    study: Study,
    cells: Sequence[Cell],
    *,
    arms: Sequence[str] | None = None,
    settings: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
) -> list[Cell]:
    """The cells with these arms, settings and seeds; None takes all.

    Raises:
        ConfigError: for names that are not there, or if nothing is left.
    """
    every_seed = sorted({cell.seed for cell in cells})
    asked: list[tuple[str, Sequence[Any] | None, Collection[Any]]] = [
        ("arm", arms, study.arms), ("setting", settings, study.settings),
        ("seed", seeds, every_seed),
    ]  # fmt: skip
    for kind, names, known in asked:
        for name in names or ():
            check_known(name, [*known], kind, f"--{kind}s")
    chosen = [
        cell for cell in cells
        if all(names is None or getattr(cell, kind) in names for kind, names, _ in asked)
    ]  # fmt: skip
    if not chosen:
        raise ConfigError("no cell has these arms, settings and seeds together")
    return chosen


def units(cells: Sequence[Cell]) -> Iterator[list[Cell]]:
    """The cells in their order, cut where block, seed or setting changes."""
    batch: list[Cell] = []
    for cell in cells:
        if batch and batch[-1].unit != cell.unit:
            yield batch
            batch = []
        batch.append(cell)
    if batch:
        yield batch


def _json(path: Path) -> dict[str, Any] | None:
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None
