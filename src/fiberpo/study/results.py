"""The table of a study: one row for each held-out evaluation of each cell."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..report.reader import number, read_metrics
from ..train.config import TrainConfig
from .cells import Cell, State

if TYPE_CHECKING:
    import pyarrow

RESULTS_FILE = "results.parquet"
METRICS_FILE = "metrics.jsonl"
METADATA_KEY = b"fiberpo.study"
"""Where the schema's metadata keep what was selected, as JSON."""

TEXT = ("study", "setting", "arm", "family", "objective", "status", "error", "digest")
COUNTS = ("seed", "step", "rollout", "answers", "tokens")
FIRST = (
    "study", "setting", "arm", "family", "seed", "objective", "status", "error", "cell_seconds",
    "digest", "step", "rollout", "answers", "tokens",
)  # fmt: skip
HELDOUT = "heldout/reward"

NOT_METRICS = frozenset({"kind", "step", "rollout", "epoch", "num_tokens"})
"""Of a metric line: its place, and TRL's count of tokens, which includes the prompts."""

Row = dict[str, Any]


def cell_rows(cell: Cell) -> list[Row]:
    """Rows of one cell; none while it is open, and one, with its error, if it failed."""
    state = cell.state()
    if state is State.OPEN:
        return []
    metrics = cell.run_dir / METRICS_FILE
    records = read_metrics(metrics)[0] if metrics.is_file() else []
    rows = evaluation_rows(records, cell.config)
    if state is State.FAILED:
        rows = rows[:1] or [{}]
        outcome = cell.failure() or {}
        fixed = {"objective": _objective(cell.config), "error": outcome["error"]}
    else:
        outcome = cell.summary() or {}
        fixed = {"objective": outcome["objective"], "error": ""}
    fixed |= {
        "study": cell.study, "setting": cell.setting, "arm": cell.arm, "family": cell.family,
        "seed": cell.seed, "status": state.value, "cell_seconds": outcome["seconds"],
        "digest": cell.digest,
    }  # fmt: skip
    return [{**fixed, **row} for row in rows]


def evaluation_rows(records: Iterable[Mapping[str, Any]], config: TrainConfig) -> list[Row]:
    """One row for each evaluation in the lines of ``metrics.jsonl``.

    A metric of the training lines is its mean over the updates since the evaluation before, where
    it was logged; ``grad_norm/max`` is the largest gradient norm of them. ``answers`` and
    ``tokens`` count what was sampled for training from the start: prompts times answers of the
    rollouts begun, and their mean length times that.
    """
    updates_per_rollout = config.updates_per_rollout * config.passes_per_rollout
    answers_per_rollout = config.prompts * config.generations
    rows: list[Row] = []
    values: dict[str, list[float]] = {}
    tokens = 0
    for record in records:
        if record["kind"] == "train":
            for key in record.keys() - NOT_METRICS:
                if (value := number(record[key])) is not None:
                    values.setdefault(key, []).append(value)
            # once a rollout, with its first update
            tokens += round(record.get("completions/mean_length", 0.0) * answers_per_rollout)
            continue
        rollout = -(-record["step"] // updates_per_rollout)
        row = {
            "step": record["step"], "rollout": rollout, "answers": rollout * answers_per_rollout,
            "tokens": tokens,
            **{key: number(record[key]) for key in record if key.startswith(HELDOUT)},
            **{key: sum(found) / len(found) for key, found in values.items()},
        }  # fmt: skip
        if "grad_norm" in values:
            row["grad_norm/max"] = max(values["grad_norm"])
        rows.append(row)
        values = {}
    return rows


def results_table(cells: Iterable[Cell], about: Mapping[str, Any]) -> pyarrow.Table:
    """All rows of the cells that ran; ``about`` goes into the metadata of the schema.

    Columns that a cell lacks (a domain, a gate) are null in its rows.
    """
    import pyarrow as pa

    rows = [row for cell in cells for row in cell_rows(cell)]
    metrics = sorted({key for row in rows for key in row} - {*FIRST}, key=_heldout_first)
    names = [*FIRST, *metrics]
    schema = pa.schema([(name, _type(name)) for name in names]).with_metadata(
        {METADATA_KEY: json.dumps(about)}
    )
    return pa.table({name: [row.get(name) for row in rows] for name in names}, schema=schema)


def write_results(cells: Iterable[Cell], output: Path, about: Mapping[str, Any]) -> pyarrow.Table:
    """Write `results_table` into ``results.parquet``, which is whole at any moment."""
    import pyarrow.parquet as pq

    table = results_table(cells, about)
    path = output / RESULTS_FILE
    fresh = path.with_suffix(f".{os.getpid()}.new")
    pq.write_table(table, fresh)
    os.replace(fresh, path)
    return table


def read_results(output: Path) -> pyarrow.Table:
    """The table of a study's directory.

    Raises:
        ConfigError: if there is none.
    """
    import pyarrow.parquet as pq

    path = output / RESULTS_FILE
    if not path.is_file():
        raise ConfigError(f"{output} holds no {RESULTS_FILE}; run fiberpo study first")
    return pq.read_table(path)


def read_selection(table: pyarrow.Table) -> dict[str, Any]:
    """What the metadata of a table say about the cells that were chosen and left out."""
    metadata: Mapping[bytes, bytes] = table.schema.metadata or {}
    return json.loads(metadata.get(METADATA_KEY, b"{}"))


def _objective(config: TrainConfig) -> str:
    if config.objective == "dr_grpo" and config.max_completion_length is None:
        return config.objective  # its length comes from the tasks, when it runs
    return str(config.build_objective())


def _heldout_first(name: str) -> tuple[bool, str]:
    return not name.startswith(HELDOUT), name


def _type(name: str) -> Any:
    import pyarrow as pa

    return pa.string() if name in TEXT else pa.int64() if name in COUNTS else pa.float64()
