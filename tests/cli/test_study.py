"""`fiberpo study` as its user meets it."""

import json
import sys

import pytest
import yaml
from typer.testing import CliRunner

from fiberpo.cli import app
from fiberpo.errors import ConfigError
from fiberpo.study import runner
from fiberpo.study.results import read_results
from fiberpo.study.runner import Result
from study.fakes import GRID


@pytest.fixture
def grid(tmp_path, monkeypatch):
    """The directory we are in has a grid."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(GRID, sort_keys=False))
    return tmp_path


@pytest.fixture
def pages(monkeypatch):
    """In place of the report."""

    def write_study_report(directory, table, design):
        (directory / "report.html").write_text(f"{len(table)} rows")
        return directory / "report.html"

    module = type(sys)("fiberpo.study.page")
    module.write_study_report = write_study_report
    monkeypatch.setitem(sys.modules, "fiberpo.study.page", module)


def run(*words, code=0):
    done = CliRunner().invoke(app, ["study", *words])
    assert done.exit_code == code, (done.output, done.exception)
    return done.stdout


def test_list_says_what_would_run(grid):
    text = run("grid.yaml", "--list", "--jobs", "1", "--arms", "gspo", "--minutes", "0.2")
    assert "study      grid: for tests" in text
    assert "2 settings, 2 arms, 8 cells, 0 finished" in text
    assert "left out   2 cells that do not fit into 0.2 min" in text
    assert "usual  as it is" in text
    rows = text.partition("in their order\n")[2].splitlines()
    assert [row.split()[0] for row in rows] == [
        "usual/gspo-seed0", "hot/gspo-seed0", "usual/gspo-seed1", "hot/gspo-seed1"
    ]  # fmt: skip
    assert all(" s  " in row for row in rows)
    assert rows[0].endswith("open")
    assert rows[-1].endswith("left out")
    assert [p.name for p in grid.iterdir()] == ["grid.yaml"]


def test_list_for_other_programs(grid):
    listed = json.loads(run("grid.yaml", "--list", "--jobs", "1", "--seeds", "1", "--json", "-"))
    assert [cell["name"] for cell in listed["cells"]] == [
        "usual/grpo-seed1", "usual/gspo-seed1", "hot/grpo-seed1", "hot/gspo-seed1"
    ]  # fmt: skip
    assert listed["about"]["settings"] == {"usual": "as it is", "hot": "faster"}
    assert sum(cell["seconds"] for cell in listed["cells"]) < listed["seconds"]


def test_a_shipped_study_by_its_name(grid):
    assert "study      small: " in run("small", "--list")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["smal"], "no study 'smal'; did you mean 'small'?"),
        (["none.yaml"], "no study file none.yaml"),
        (["grid.yaml", "--arms", "gsp"], "--arms: unknown arm 'gsp'; did you mean 'gspo'?"),
        (["grid.yaml", "--arms", "gspo,"], "--arms 'gspo,': names go between commas"),
        (["grid.yaml", "--seeds", "one"], "--seeds 'one': numbers go between commas"),
        (["grid.yaml", "--seeds", "9"], "--seeds: unknown seed 9; there are 0, 1"),
        (["grid.yaml", "--output", "."], ". is not the directory of a study"),
        (["grid.yaml", "--jobs", "0"], "jobs is 0"),
        (["grid.yaml", "--report-only", "--list"], "leave out --list"),
        (["grid.yaml", "--report-only"], "is not the directory of a study: it has no study.json"),
    ],
)
def test_mistakes_run_nothing(grid, words, message):
    done = CliRunner().invoke(app, ["study", *words])
    assert isinstance(done.exception, ConfigError)
    assert message in str(done.exception)
    assert [p.name for p in grid.iterdir()] == ["grid.yaml"]


@pytest.mark.parametrize(
    ("failed", "interrupted", "code"),
    [({}, False, 0), ({"usual/grpo-seed0": "broken"}, False, 1), ({}, True, 130)],
)
def test_exit_codes(grid, monkeypatch, failed, interrupted, code):
    given = []

    def run_study(study, output, options, say):
        given.append((study.name, str(output), options.jobs, options.arms, options.seeds))
        return Result({"name": study.name}, None, failed, interrupted)

    monkeypatch.setattr(runner, "run_study", run_study)
    words = ["grid.yaml", "--jobs", "3", "--arms", "grpo, gspo", "--seeds", "1,0", "--json", "o"]
    run(*words, code=code)
    assert given == [("grid", "runs/study-grid", 3, ["grpo", "gspo"], [1, 0])]
    stored = json.loads((grid / "o").read_text())
    assert stored["errors"] == failed
    assert stored["output"] == "runs/study-grid"


@pytest.mark.slow
def test_two_real_cells(grid, pages, monkeypatch):
    """Trained in one worker, and again in another: the numbers do not depend on who came before."""
    tiny = {
        **GRID, "seeds": [0], "settings": {"usual": {}},
        "base": {
            "prompts": 4, "generations": 2, "rollouts": 1, "heldout_prompts": 4,
            "updates_per_rollout": 2, "heldout_every": 1, "learning_rate": 1e-3, "warmup_steps": 1,
        },
    }  # fmt: skip
    (grid / "grid.yaml").write_text(yaml.safe_dump(tiny))
    for name in ("PYTHONWARNINGS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    text = run("grid.yaml", "--jobs", "1")
    assert "[2/2] usual/gspo-seed0  held-out 0." in text
    output = grid / "runs" / "study-grid"
    assert (output / "report.html").read_text() == "4 rows"
    names = {p.name for p in (output / "cells" / "usual" / "gspo-seed0").iterdir()}
    assert {"config.yaml", "metrics.jsonl", "summary.json"} <= names
    assert not names & {"checkpoint-2", "report.html", "report.png"}
    first = read_results(output).to_pandas()
    assert list(first["step"]) == [0, 2, 0, 2]
    assert list(first["answers"]) == [0, 8, 0, 8]
    assert first["tokens"][1] > 8
    assert first["entropy"].notna().tolist() == [False, True, False, True]
    assert set(first["arm"]) == {"grpo", "gspo"}
    (output / "cells" / "usual" / "gspo-seed0" / "summary.json").unlink()
    text = run("grid.yaml", "--jobs", "1")
    assert "[1/1] usual/gspo-seed0" in text
    second = read_results(output).to_pandas()
    volatile = ["cell_seconds", "step_time"]
    assert first.drop(columns=volatile).equals(second.drop(columns=volatile))
    assert first["cell_seconds"][0] == second["cell_seconds"][0]
    assert first["cell_seconds"][2] != second["cell_seconds"][2]
    assert "finished   2 of 2 cells" in run("grid.yaml", "--report-only")
