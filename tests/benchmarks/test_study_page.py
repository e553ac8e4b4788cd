"""docs/study.md holds what the tables say, and the studies what the search chose."""

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from fiberpo.study.design import find_study, load_study
from fiberpo.study.measures import arranged, cell_measures
from fiberpo.study.statistics import best_trials

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "benchmarks/study_page.py"
NOT_SEARCHED = {"fiberstop_default", "fiberstop_trm"}


def test_page_is_current():
    """`python benchmarks/study_page.py` would change nothing."""
    done = subprocess.run(
        [sys.executable, str(PROGRAM), "--check"], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr


def complete(arm, study):
    """An objective as it is built, whatever a configuration left to defaults."""
    from fiberpo.train.config import TrainConfig

    config = {**study.base, **next(iter(study.settings.values())).config, **arm.config}
    return str(TrainConfig(**config).build_objective())


@pytest.mark.parametrize("name", ["main", "small", "smollm2"])
def test_parameters_are_those_that_the_search_chose(name):
    search, study = load_study(find_study("search")), load_study(find_study(name))
    table = pd.read_parquet(ROOT / "docs/study/search.parquet")
    best = best_trials(arranged(cell_measures(table), search))
    chosen = {row["family"]: row["arm"] for row in best.to_dict("records")}
    arms = set(study.arms) - NOT_SEARCHED
    assert arms <= set(chosen)
    for arm in arms:
        assert complete(study.arms[arm], study) == complete(search.arms[chosen[arm]], search), arm
