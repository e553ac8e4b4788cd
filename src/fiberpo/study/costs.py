"""How long cells take, and how much of a study fits into a given time."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import chain

from ..train.config import TrainConfig
from .cells import Cell, units

# seconds on one thread of a CPU for the embedded model: 0.8 for a rollout of 256 answers with its
# old log-probs, 0.25 for an update on 64 answers, 1 for 512 held-out answers
SAMPLED_ANSWER = 0.8 / 256
TRAINED_ANSWER = 0.25 / 64
HELDOUT_ANSWER = 1 / 512
CELL = 1.0
"""Seconds for loading the model and writing the summary."""

WORKER = 8.0
"""Seconds until a new worker process has imported everything."""

MODEL_FACTOR = {"embedded": 1.0, "smollm2": 32.0}
"""Costs of an answer in those of the embedded model; 1 for models nobody has measured. That of
smollm2 is the mean over the cells of the study of that name, in bfloat16."""

PROCEDURAL_DOMAINS = 4


def modelled_seconds(config: TrainConfig) -> float:
    """A first guess at the seconds of a run, from the number of answers it handles.

    >>> round(modelled_seconds(TrainConfig(prompts=32, rollouts=50, heldout_every=10)))
    97
    """
    answers = config.rollouts * config.prompts * config.generations
    evaluations = 1 + -(-config.rollouts // config.heldout_every)
    domains = len(config.tasks) or PROCEDURAL_DOMAINS
    seconds = (
        answers * SAMPLED_ANSWER
        + answers * config.passes_per_rollout * TRAINED_ANSWER
        + evaluations * config.heldout_prompts * domains * HELDOUT_ANSWER
    )
    return CELL + seconds * MODEL_FACTOR.get(config.model, 1.0)


@dataclass
class Costs:
    """Estimates that follow the finished cells.

    A cell is expected to take what the model says times the mean ratio of measured to modelled
    seconds: over the finished cells of its setting, or of all settings where there are none.
    """

    ratios: dict[str, list[float]] = field(default_factory=dict)

    def measured(self, cell: Cell, seconds: float) -> None:
        """Take note of a finished cell."""
        ratio = seconds / modelled_seconds(cell.config)
        self.ratios.setdefault(cell.setting, []).append(ratio)

    def seconds(self, cell: Cell) -> float:
        """Expected seconds of a cell."""
        ratios = self.ratios.get(cell.setting) or [*chain(*self.ratios.values())] or [1.0]
        return modelled_seconds(cell.config) * sum(ratios) / len(ratios)

    def wall(self, cells: Sequence[Cell], jobs: int, start: float = WORKER) -> float:
        """Expected seconds until all are done: each worker takes the next cell when it is free."""
        if not cells:
            return 0.0
        free = [start] * min(jobs, len(cells))
        for cell in cells:
            heapq.heapreplace(free, free[0] + self.seconds(cell))
        return max(free)


def fitting(
    cells: Sequence[Cell],
    done: Collection[str],
    costs: Costs,
    seconds: float,
    jobs: int,
) -> list[Cell]:
    """The longest run of whole units from the start whose cells fit into ``seconds``.

    ``done`` holds the names of cells that cost nothing any more.
    """
    chosen: list[Cell] = []
    for unit in units(cells):
        longer = [*chosen, *unit]
        if costs.wall([cell for cell in longer if cell.name not in done], jobs) > seconds:
            break
        chosen = longer
    return chosen


def format_seconds(seconds: float) -> str:
    """Short, for a person.

    >>> format_seconds(42), format_seconds(700), format_seconds(9000)
    ('42 s', '12 min', '2.5 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def amount(count: int, what: str) -> str:
    """Number and noun.

    >>> amount(1, "cell"), amount(2, "cell")
    ('1 cell', '2 cells')
    """
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
