"""Running a grid: workers that fail or die, interruption, time limits, resuming."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

import study.fakes
from fiberpo.errors import ConfigError
from fiberpo.study import runner
from fiberpo.study.cells import State
from fiberpo.study.design import parse_study
from fiberpo.study.planning import Options, locked, make_plan
from fiberpo.study.pool import Outcome
from fiberpo.study.results import read_results
from fiberpo.study.runner import report_study, run_study
from study.fakes import GRID

STUDY = parse_study(GRID, "grid")
SCRIPT = """
import sys
from pathlib import Path
from fiberpo.study import runner
from fiberpo.study.design import load_study
from fiberpo.study.planning import Options
if __name__ == "__main__":
    options = Options(jobs=2, trainer="study.fakes:endless", seeds=[0], settings=["usual"])
    result = runner.run_study(load_study(Path(sys.argv[1])), Path(sys.argv[2]), options)
    sys.exit(130 if result.interrupted else 0)
"""


@pytest.fixture(autouse=True)
def pages(monkeypatch):
    """The report is somebody else's: notes what it was asked to show."""
    asked = []

    def write_study_report(directory, table, design):
        asked.append((directory, len(table), design.name))
        return directory / "report.html"

    module = type(sys)("fiberpo.study.page")
    module.write_study_report = write_study_report
    monkeypatch.setitem(sys.modules, "fiberpo.study.page", module)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return asked


class Here:
    """A pool without processes: each cell is done as soon as somebody waits; keeps their order."""

    order: list[str] = []
    broken: set[str] = set()
    seconds_each = 0.0

    def __init__(self, size, trainer):
        self.size, self.running = size, []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        assert not self.running

    @property
    def busy(self):
        return len(self.running)

    @property
    def free(self):
        return self.size - self.busy

    def start(self, job):
        Here.order.append(job.cell.name)
        self.running.append(job.cell)

    def wait(self, seconds):
        cell = self.running.pop(0)
        clock.now += self.seconds_each
        if cell.name in self.broken:
            cell.fail("broken", 1.0)
            return [Outcome(cell, "broken")]
        arguments = {"overwrite": True, "progress": False, "report": False, "say": str}
        study.fakes.train(cell.config, **arguments)
        return [Outcome(cell, "")]


class Clock:
    """`time.monotonic` under control."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now


clock = Clock()


@pytest.fixture
def here(monkeypatch):
    clock.now = 0.0
    monkeypatch.setattr(Here, "order", [])
    monkeypatch.setattr(Here, "broken", set())
    monkeypatch.setattr(runner, "Pool", Here)
    monkeypatch.setattr(runner, "time", clock)
    return Here


def test_workers_that_raise_and_die_take_one_cell_each(tmp_path, pages):
    """The rest goes on; the same command tries the failed ones again, and only them."""
    said = []
    options = Options(jobs=2, trainer="study.fakes:troubled", settings=["usual"])
    result = run_study(STUDY, tmp_path, options, said.append)
    assert set(result.failed) == {"usual/gspo-seed0", "usual/gspo-seed1"}
    assert result.failed["usual/gspo-seed0"] == "ZeroDivisionError: by nothing"
    assert "the worker process ended by SIGKILL" in result.failed["usual/gspo-seed1"]
    assert result.status["finished"] == ["usual/grpo-seed0", "usual/grpo-seed1"]
    assert result.report == tmp_path / "report.html"
    assert pages == [(tmp_path, 3 + 3 + 1 + 1, "grid")]
    log = tmp_path / "logs" / "usual" / "gspo-seed0.txt"
    assert "ZeroDivisionError" in log.read_text()
    assert "threads 1" in log.read_text()
    assert sum("failed: " in line for line in said) == 2
    run_dirs = [*(tmp_path / "cells" / "usual").iterdir()]
    assert len(run_dirs) == 4
    kept = {p.name: p.stat().st_mtime_ns for p in run_dirs if "grpo" in p.name}
    (tmp_path / "mended").touch()
    again = run_study(STUDY, tmp_path, dataclasses.replace(options, jobs=1), said.append)
    assert not again.failed
    assert len(again.status["finished"]) == 4
    assert not [*tmp_path.rglob("checkpoint-*")]
    assert {p.name: p.stat().st_mtime_ns for p in run_dirs if "grpo" in p.name} == kept


def start_endless(tmp_path):
    """A study whose second cell never ends, in a process of its own; its worker's id."""
    grid, script = tmp_path / "grid.yaml", tmp_path / "script.py"
    grid.write_text(yaml.safe_dump(GRID, sort_keys=False))
    script.write_text(SCRIPT)
    path = os.pathsep.join(p for p in sys.path if p)
    process = subprocess.Popen(
        [sys.executable, script, grid, tmp_path / "out"], stdout=subprocess.PIPE, text=True,
        stderr=subprocess.STDOUT, env={**os.environ, "PYTHONPATH": path},
        start_new_session=True,
    )  # fmt: skip
    cells = tmp_path / "out" / "cells" / "usual"
    for _ in range(600):
        if (cells / "gspo-seed0/pid").exists() and (cells / "grpo-seed0/summary.json").exists():
            time.sleep(0.5)
            return process, int((cells / "gspo-seed0" / "pid").read_text())
        time.sleep(0.1)
    process.kill()
    raise AssertionError(process.communicate()[0])


def gone(pid):
    """Whether a process ended within a few seconds."""
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)  # ours, and endless
    return False


def states(tmp_path):
    plan = make_plan(STUDY, tmp_path / "out", Options())
    return {name: state for name, state in plan.states.items() if state is not State.OPEN}


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_finished(tmp_path, pages):
    """As the terminal sends it, to the whole process group; the table is written."""
    process, worker = start_endless(tmp_path)
    os.killpg(process.pid, signal.SIGINT)
    assert gone(worker)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130, printed
    assert "the same command goes on" in printed
    assert "Traceback" not in printed
    assert "leaked" not in printed
    assert read_results(tmp_path / "out").num_rows == 3
    assert states(tmp_path) == {"usual/grpo-seed0": State.FINISHED}


@pytest.mark.slow
def test_kill_9_leaves_no_worker_behind(tmp_path, pages):
    """And nothing that stands in the way of a report, or of going on."""
    process, worker = start_endless(tmp_path)
    process.kill()
    assert gone(worker)
    process.communicate(timeout=60)
    assert states(tmp_path) == {"usual/grpo-seed0": State.FINISHED}
    result = report_study(STUDY, tmp_path / "out", lambda line: None)
    assert result.report is not None
    assert pages == [(tmp_path / "out", 3, "grid")]
    assert result.status["selection"]["seeds"] == [0]


def test_cells_run_in_their_order_and_once(tmp_path, here):
    result = run_study(STUDY, tmp_path, Options(seeds=[1]), lambda line: None)
    assert here.order == [
        "usual/grpo-seed1", "usual/gspo-seed1", "hot/grpo-seed1", "hot/gspo-seed1"
    ]  # fmt: skip
    assert result.status["finished"] == here.order
    assert len(result.status["open"]) == 4
    here.order.clear()
    run_study(STUDY, tmp_path, Options(), lambda line: None)
    assert all(name.endswith("seed0") for name in here.order)
    assert len(here.order) == 4
    here.order.clear()
    run_study(STUDY, tmp_path, Options(), lambda line: None)
    assert here.order == []


def test_minutes_choose_whole_units_and_say_so(tmp_path, here):
    run_study(STUDY, tmp_path, Options(seeds=[0]), lambda line: None)
    here.order.clear()
    said = []
    # 2.5 seconds a cell by what was measured, and 8 for the start of a worker
    result = run_study(STUDY, tmp_path, Options(minutes=14 / 60), said.append)
    assert here.order == ["usual/grpo-seed1", "usual/gspo-seed1"]
    assert result.status["selection"]["left_out"] == ["hot/grpo-seed1", "hot/gspo-seed1"]
    assert len(result.status["selection"]["chosen"]) == 6
    text = "\n".join(said)
    assert "left out   2 cells that do not fit into" in text
    assert "hot, 2 cells (seeds 1)" in text
    stored = json.loads((tmp_path / "study.json").read_text())
    assert stored == json.loads(json.dumps(result.status))
    metadata = read_results(tmp_path).schema.metadata[b"fiberpo.study"]
    assert json.loads(metadata) == stored["selection"]


def test_too_little_time_for_anything(tmp_path, here):
    with pytest.raises(ConfigError, match=r"not enough for all arms of the first .*usual, seed 0"):
        run_study(STUDY, tmp_path, Options(minutes=0.1), lambda line: None)
    assert here.order == []
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("seconds_each", "expected"),
    [
        (2.5, 8),  # as expected
        (9.0, 4),  # the third unit would not fit any more
        (25.0, 2),  # not even the second
        (45.0, 1),  # over in the middle of a unit
    ],
)
def test_no_cell_starts_when_the_time_is_over(tmp_path, here, monkeypatch, seconds_each, expected):
    """Expected are about two seconds a cell; the clock says otherwise."""
    monkeypatch.setattr(here, "seconds_each", seconds_each)
    original = study.fakes.train

    def slow(config, **arguments):
        summary = {**original(config, **arguments), "seconds": seconds_each}
        (config.run_dir / "summary.json").write_text(json.dumps(summary))

    monkeypatch.setattr(study.fakes, "train", slow)
    said = []
    run_study(STUDY, tmp_path, Options(minutes=42 / 60), said.append)
    assert len(here.order) == expected
    assert any("time over" in line for line in said) == (expected < 8)


def test_failed_cells_count_in_the_table_and_nothing_else(tmp_path, here, pages):
    here.broken.update(f"{s}/{a}-seed0" for s in ("usual", "hot") for a in ("grpo", "gspo"))
    result = run_study(STUDY, tmp_path, Options(seeds=[0]), lambda line: None)
    assert set(result.failed.values()) == {"broken"}
    assert result.report is None
    assert pages == []
    assert read_results(tmp_path).num_rows == 4


def test_progress_has_the_last_reward(tmp_path, here):
    said = []
    run_study(STUDY, tmp_path, Options(seeds=[0], settings=["usual"]), said.append)
    reward = study.fakes.heldout(0, 8)["mean"]
    assert f"[2/2] usual/gspo-seed0  held-out {reward:.3f}  2 s" in said


def test_directories_of_something_else(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ConfigError, match="is not the directory of a study; choose another"):
        make_plan(STUDY, tmp_path, Options())
    (tmp_path / "study.json").write_text('{"name": "other", "selection": {}}')
    with pytest.raises(ConfigError, match="holds the study 'other', not 'grid'"):
        make_plan(STUDY, tmp_path, Options())
    (tmp_path / "study.json").write_text('{"name": "gr')
    with pytest.raises(ConfigError, match="is damaged"):
        make_plan(STUDY, tmp_path, Options())
    with pytest.raises(ConfigError, match=r"it has no study\.json"):
        report_study(STUDY, tmp_path / "none")


def test_two_commands_at_a_time(tmp_path, here):
    with locked(tmp_path), pytest.raises(ConfigError, match="another fiberpo study is at work"):
        run_study(STUDY, tmp_path, Options(), lambda line: None)
    assert here.order == []


@pytest.mark.parametrize(("option", "value"), [("jobs", 0), ("minutes", 0.0), ("minutes", -1.0)])
def test_options_that_make_no_sense(option, value):
    with pytest.raises(ConfigError, match=f"{option} is {value}"):
        Options(**{option: value})


def test_a_page_that_cannot_be_made_is_said_before_anything_runs(tmp_path, here, monkeypatch):
    monkeypatch.setattr(runner, "PAGE", "fiberpo_has_no_such_page")
    with pytest.raises(ModuleNotFoundError, match="fiberpo_has_no_such_page"):
        run_study(STUDY, tmp_path / "out", Options())
    assert not (tmp_path / "out").exists()
