"""Objectives of one's own in `fiberpo train`, and how windows are split."""

import pytest

from fiberpo.errors import ConfigError
from fiberpo.train.config import TrainConfig, make_config

OWN = """
from fiberpo import recipes

def mine(epsilon):
    return recipes.grpo(epsilon)

def wrong():
    return 3
"""


@pytest.fixture
def place(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(OWN)
    return path


def test_a_function_of_a_file_makes_the_objective(place):
    config = TrainConfig(objective=f"{place}:mine", objective_kwargs={"epsilon": 0.3})
    assert config.build_objective().gate_map.token.epsilon == 0.3
    assert config.run_name == "mine-embedded-seed0"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wrong", "returned a int; it must return a fiberpo Objective"),
        ("mien", "has no 'mien'; did you mean mine"),
    ],
)
def test_what_is_no_objective_is_refused(place, name, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(objective=f"{place}:{name}")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"objective .*no file .*gone.py"):
        TrainConfig(objective=f"{tmp_path / 'gone.py'}:mine")


def test_split_modes():
    assert make_config(overrides={"split_mode": "stale"}).split_mode == "stale"
    with pytest.raises(ConfigError, match="split_mode = 'cheap'; it is 'exact', 'local' or 'sta"):
        TrainConfig(split_mode="cheap")
