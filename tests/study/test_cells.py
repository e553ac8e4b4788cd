"""What is finished, what it costs, what fits into the time, and the table."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from fiberpo.errors import ConfigError
from fiberpo.study.cells import State, all_cells, units
from fiberpo.study.costs import WORKER, Costs, fitting, modelled_seconds
from fiberpo.study.design import parse_study
from fiberpo.study.results import (
    read_results,
    read_selection,
    results_table,
    write_results,
)
from fiberpo.train.config import TrainConfig
from study.fakes import GRID, heldout, lines, train


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def cells(tmp_path):
    return all_cells(parse_study(GRID, "x"), tmp_path)


def run(cell):
    train(cell.config, overwrite=True, progress=False, say=lambda line: None, report=False)


def test_the_directory_decides_what_is_finished(cells):
    cell, other = cells[:2]
    assert cell.state() is State.OPEN
    run(cell)
    assert cell.state() is State.FINISHED
    assert other.state() is State.OPEN
    cell.fail("broken", 1.0)
    assert cell.state() is State.FAILED
    assert cell.failure() == {"error": "broken", "seconds": 1.0, "digest": cell.digest}


def test_a_changed_configuration_is_run_anew(cells, tmp_path):
    for cell in cells:
        run(cell)
    cells[0].fail("broken", 1.0)
    grid = {**GRID, "settings": {**GRID["settings"], "usual": {"config": {"temperature": 0.9}}}}
    states = {cell.name: cell.state() for cell in all_cells(parse_study(grid, "x"), tmp_path)}
    assert all(
        state is (State.OPEN if name.startswith("usual") else State.FINISHED)
        for name, state in states.items()
    )
    assert len(states) == 8


@pytest.mark.parametrize("file", ["summary.json", "config.yaml"])
def test_half_a_run_is_open(cells, file):
    cell = cells[0]
    run(cell)
    path = cell.run_dir / file
    whole = path.read_text()
    path.write_text(whole[: len(whole) // 2])
    assert cell.state() is State.OPEN
    path.unlink()
    assert cell.state() is State.OPEN
    path.write_text(whole)
    assert cell.state() is State.FINISHED


def test_an_interrupted_run_is_open(cells):
    run(cells[0])
    path = cells[0].run_dir / "summary.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "interrupted": True}))
    assert cells[0].state() is State.OPEN


def test_a_setting_that_is_younger_than_the_run(cells):
    """It had today's default then; one that the run took another value for is a change."""
    cell = cells[0]
    run(cell)
    path = cell.run_dir / "config.yaml"
    saved = yaml.safe_load(path.read_text())
    del saved["max_grad_norm"]
    path.write_text(yaml.safe_dump(saved))
    assert cell.state() is State.FINISHED
    path.write_text(yaml.safe_dump({**saved, "max_grad_norm": 2.0}))
    assert cell.state() is State.OPEN


def test_costs_follow_the_finished_cells_of_a_setting(cells):
    usual, hot = cells[0], cells[2]
    costs = Costs()
    assert costs.seconds(usual) == modelled_seconds(usual.config)
    costs.measured(usual, 30.0)
    costs.measured(usual, 10.0)
    assert costs.seconds(usual) == pytest.approx(20.0)
    ratio = 20.0 / modelled_seconds(usual.config)
    assert costs.seconds(hot) == pytest.approx(ratio * modelled_seconds(hot.config))
    costs.measured(hot, 7.0)
    assert costs.seconds(hot) == pytest.approx(7.0)


def test_costs_of_more_work_are_higher():
    base = TrainConfig()
    for change in (
        {"rollouts": 80}, {"generations": 16}, {"passes_per_rollout": 2}, {"heldout_every": 5},
        {"heldout_prompts": 256}, {"model": "smollm2"},
    ):  # fmt: skip
        assert modelled_seconds(base.replace(**change)) > modelled_seconds(base), change


@pytest.mark.parametrize("jobs", [1, 2, 3, 20])
def test_wall_time_is_that_of_workers_who_take_the_next_cell(cells, jobs):
    costs = Costs()
    for cell, seconds in zip((cells[0], cells[2]), (5.0, 11.0), strict=True):
        costs.measured(cell, seconds)
    busy_until = np.full(min(jobs, 8), WORKER)
    for cell in cells:
        busy_until[np.argmin(busy_until)] += 5.0 if cell.setting == "usual" else 11.0
    assert costs.wall(cells, jobs) == pytest.approx(busy_until.max())
    assert costs.wall([], jobs) == 0.0


def test_what_fits_is_a_prefix_of_whole_units(cells):
    costs, sizes = Costs(), set()
    costs.measured(cells[0], 10.0)
    costs.measured(cells[2], 20.0)
    ends = np.cumsum([20.0, 40.0, 20.0, 40.0]) + WORKER
    for seconds in np.arange(1.0, 140.0, 3.0):
        chosen = fitting(cells, (), costs, float(seconds), jobs=1)
        assert len(chosen) == 2 * np.sum(ends <= seconds)
        assert chosen == cells[: len(chosen)]
        sizes.add(len(chosen))
    assert sizes == {0, 2, 4, 6, 8}
    done = {cell.name for unit in [*units(cells)][:3] for cell in unit}
    assert len(fitting(cells, done, costs, 1.0, jobs=1)) == 6
    assert len(fitting(cells, done, costs, 49.0, jobs=1)) == 8


def test_the_table_has_a_row_for_each_evaluation(cells, tmp_path):
    """Against loops over the lines of one cell: two updates a rollout, each used twice."""
    cell = next(cell for cell in cells if cell.name == "hot/gspo-seed1")
    run(cell)
    table = results_table(cells, {}).to_pylist()
    assert [row["step"] for row in table] == [0, 8, 16]
    assert [row["rollout"] for row in table] == [0, 2, 4]
    assert [row["answers"] for row in table] == [0, 16, 32]
    assert [row["tokens"] for row in table] == [0, 26 + 34, 26 + 34 + 42 + 50]
    records = list(lines(cell.config))
    for row, (first, last) in zip(table[1:], ((1, 8), (9, 16)), strict=True):
        part = [r for r in records if r["kind"] == "train" and first <= r["step"] <= last]
        assert len(part) == 8
        for key in ("loss", "entropy", "grad_norm"):
            assert row[key] == pytest.approx(np.mean([r[key] for r in part]))
        norms = [r["completions/mean_length"] for r in part if "completions/mean_length" in r]
        assert row["completions/mean_length"] == pytest.approx(np.mean(norms))
        assert len(norms) == 2
        assert row["grad_norm/max"] == max(r["grad_norm"] for r in part)
    assert table[0]["loss"] is None
    assert table[0]["grad_norm/max"] is None
    for row in table:
        rewards = heldout(1, row["step"])
        assert row["heldout/reward"] == rewards["mean"]
        assert row["heldout/reward/domain=sort"] == rewards["sort"]
        assert (row["study"], row["setting"], row["arm"], row["family"], row["seed"]) == (
            "grid", "hot", "gspo", "gspo", 1
        )  # fmt: skip
        assert (row["status"], row["error"], row["cell_seconds"]) == ("finished", "", 2.5)
        assert row["objective"].startswith("gspo(epsilon=0.02")
        assert row["digest"] == cell.digest
    assert {"epoch", "kind", "num_tokens"}.isdisjoint(table[0])


def test_a_failed_cell_has_one_row(cells):
    early, late = cells[:2]
    early.fail("no model", 0.5)
    run(late)
    late.fail("NaN", 3.0)
    first, second = results_table(cells, {}).to_pylist()
    assert (first["status"], first["error"], first["step"]) == ("failed", "no model", None)
    assert first["objective"].startswith("grpo(")
    assert (second["status"], second["error"], second["step"]) == ("failed", "NaN", 0)
    assert second["heldout/reward"] == heldout(0, 0)["mean"]
    assert (second["tokens"], second["cell_seconds"]) == (0, 3.0)


def test_metrics_that_only_some_cells_have_are_null_elsewhere(cells):
    for cell in cells[:2]:
        run(cell)
    path = cells[1].run_dir / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        record["gate/active" if record["kind"] == "train" else "heldout/reward/domain=new"] = 0.5
        if record["step"] == 2 and record["kind"] == "train":
            record |= {"loss": None, "note": "text"}
    path.write_text("\n".join(map(json.dumps, records)) + "\n")
    table = results_table(cells, {})
    plain, gated = table.slice(0, 3).to_pylist(), table.slice(3, 3).to_pylist()
    assert [row["gate/active"] for row in plain + gated] == [None] * 4 + [0.5] * 2
    assert [row["heldout/reward/domain=new"] for row in plain + gated] == [None] * 3 + [0.5] * 3
    losses = [0.1 / step for step in (1, 3, 4)]
    assert gated[1]["loss"] == pytest.approx(np.mean(losses))
    assert "note" not in table.column_names
    assert table.column_names[14] == "heldout/reward"


def test_a_table_on_disk(cells, tmp_path):
    with pytest.raises(ConfigError, match=r"holds no results\.parquet"):
        read_results(tmp_path)
    assert write_results(cells, tmp_path, {}).num_rows == 0
    run(cells[0])
    write_results(cells, tmp_path, {"left_out": ["a"]})
    table = read_results(tmp_path)
    assert read_selection(table) == {"left_out": ["a"]}
    assert table.num_rows == pq.read_metadata(tmp_path / "results.parquet").num_rows == 3
    assert [p.name for p in tmp_path.iterdir() if "new" in p.name] == []
