"""Grids: what is read from YAML, what is refused, and the order of the cells."""

import copy

import pytest
import yaml

from fiberpo.errors import ConfigError
from fiberpo.study.cells import all_cells, choose, digest, units
from fiberpo.study.design import Block, find_study, load_study, parse_study, shipped
from study.fakes import GRID


def changed(path, value):
    """The grid with another value somewhere."""
    grid = copy.deepcopy(GRID)
    place = grid
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return grid


def names(study, output, **options):
    return [cell.name for cell in choose(study, all_cells(study, output), **options)]


def test_a_cell_is_base_then_setting_then_arm(tmp_path):
    grid = changed(("settings", "hot", "config", "prompts"), 8)
    grid["arms"]["gspo"]["config"]["generations"] = 4
    cells = {cell.name: cell for cell in all_cells(parse_study(grid, "x"), tmp_path)}
    config = cells["hot/gspo-seed1"].config
    assert (config.prompts, config.generations, config.rollouts, config.seed) == (8, 4, 4, 1)
    assert config.objective_kwargs == {"epsilon": 0.02}
    assert config.run_dir == tmp_path / "cells" / "hot" / "gspo-seed1"
    assert config.save_every == config.rollouts
    assert cells["usual/grpo-seed0"].config.prompts == 4


def test_seeds_come_before_settings_and_settings_before_arms(tmp_path):
    """Whatever is done when the time is over is balanced."""
    assert names(parse_study(GRID, "x"), tmp_path) == [
        "usual/grpo-seed0", "usual/gspo-seed0", "hot/grpo-seed0", "hot/gspo-seed0",
        "usual/grpo-seed1", "usual/gspo-seed1", "hot/grpo-seed1", "hot/gspo-seed1",
    ]  # fmt: skip


def test_a_plan_orders_blocks_and_names_a_cell_once(tmp_path):
    plan = [{"settings": ["hot"], "seeds": [7]}, {"arms": ["gspo"]}, {"settings": ["usual"]}]
    study = parse_study(changed(("plan",), plan), "x")
    assert study.plan[1] == Block(("usual", "hot"), ("gspo",))
    assert names(study, tmp_path) == [
        "hot/grpo-seed7", "hot/gspo-seed7",
        "usual/gspo-seed0", "hot/gspo-seed0", "usual/gspo-seed1", "hot/gspo-seed1",
        "usual/grpo-seed0", "usual/grpo-seed1",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("setting", "arm", "block", "expected"),
    [
        (None, None, None, (0, 1)),
        ([5, 6], None, None, (5, 6)),
        (None, [8, 9], None, (8, 9)),
        ([5, 6], [6, 7], None, (6,)),
        (None, None, [3], (3,)),
        ([5, 6], None, [6, 3], (6,)),
        ([5, 6], [7, 8], None, ()),
    ],
)
def test_seeds_of_the_block_within_those_of_setting_and_arm(setting, arm, block, expected):
    grid = changed(("settings", "hot", "seeds"), setting)
    grid["arms"]["gspo"]["seeds"] = arm
    grid["plan"] = [{"seeds": block}]
    study = parse_study(grid, "x")
    assert study.seeds_of(study.plan[0], "hot", "gspo") == expected


def test_arms_compare_with_the_first_unless_told_otherwise():
    assert parse_study(GRID, "x").pairs == [("gspo", "grpo")]
    pairs = [["grpo", "gspo"], ["gspo", "grpo"]]
    assert parse_study(changed(("pairs",), pairs), "x").pairs == [tuple(p) for p in pairs]


def test_an_arm_is_its_own_family_unless_told_otherwise():
    arms = parse_study(changed(("arms", "gspo", "family"), "both"), "x").arms
    assert (arms["grpo"].family, arms["gspo"].family) == ("grpo", "both")


MISTAKES = [
    (("seed",), [0], "unknown key 'seed'; did you mean 'seeds'?"),
    (("arms", "grpo", "familly"), "a", "arm 'grpo': unknown key 'familly'; did you mean 'family'?"),
    (("settings", "hot"), None, "setting 'hot' is None; it holds about, config, seeds"),
    (("seeds",), [], "the study has no seeds"),
    (("arms",), {}, "the study has no arms"),
    (("seeds",), [1, 1], "seeds is [1, 1]; it is a list of different numbers"),
    (("seeds",), [True], "seeds is [True]"),
    (("arms", "a/b"), {}, "arms: 'a/b' is no name"),
    (("arms", 4), {}, "arms: 4 is no name"),
    (("base", "seed"), 4, "base: 'seed' is set by the study"),
    (("arms", "grpo", "config", "output"), "x", "arm 'grpo': 'output' is set by the study"),
    (("pairs",), [["grpo", "gsp"]], "pairs: unknown arm 'gsp'; did you mean 'gspo'?"),
    (("pairs",), ["grpo"], "a list of two arms each"),
    (("plan",), [{"arms": ["x"]}], "block 1 of the plan: unknown arm 'x'; there are grpo, gspo"),
    (("plan",), [{"arms": "grpo"}], "arms is 'grpo'; it is a list of names"),
    (("about",), 3, "about is 3; it is a line of text"),
]


@pytest.mark.parametrize(("path", "value", "message"), MISTAKES)
def test_mistakes_in_a_grid(path, value, message):
    with pytest.raises(ConfigError) as error:
        parse_study(changed(path, value), "x")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("base", "promts"), 4, "setting 'usual', arm 'grpo': unknown setting 'promts'; did you"),
        (("settings", "hot", "config", "prompts"), 3, "setting 'hot', arm 'grpo': updates_per"),
        (("arms", "gspo", "config", "objective_kwargs"), {"epsilon": -1}, "arm 'gspo': epsilon"),
    ],
)
def test_every_configuration_is_built_before_anything_runs(tmp_path, path, value, message):
    grid = changed(path, value)
    grid["base"] |= {"updates_per_rollout": 4}
    with pytest.raises(ConfigError) as error:
        all_cells(parse_study(grid, "x"), tmp_path)
    assert message in str(error.value)
    assert not any(tmp_path.iterdir())


def test_a_plan_whose_block_holds_nothing():
    grid = changed(("settings", "hot", "seeds"), [5])
    grid["plan"] = [{"seeds": [0]}, {"settings": ["hot"], "seeds": [0, 1]}]
    with pytest.raises(ConfigError, match=r"block 2 of the plan holds no cell: its seeds, \[0, 1"):
        parse_study(grid, "x")


def test_yaml_is_read_as_meant(tmp_path):
    """3e-4 is a number also inside an objective's parameters; a merged key may be replaced."""
    path = tmp_path / "own.yaml"
    text = yaml.safe_dump(GRID, sort_keys=False).replace("epsilon: 0.02", "epsilon: 3e-4")
    text = text.replace("base:\n", "base: &base\n")
    merged = "  cold: {config: {<<: *base, prompts: 6}}\n"
    path.write_text(text.replace("name: grid\n", "").replace("arms:\n", merged + "arms:\n"))
    study = load_study(find_study(str(path)))
    assert study.name == "own"
    assert study.arms["gspo"].config["objective_kwargs"] == {"epsilon": 3e-4}
    assert [*study.arms] == ["grpo", "gspo"]
    assert study.settings["cold"].config == {**GRID["base"], "prompts": 6}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seeds: [0]\narms: {a: {}, b: {}, a: {}}", "own.yaml is not YAML: 'a' is given twice"),
        ("arms: [", "own.yaml is not YAML"),
        ("- 1", "own.yaml: the study is [1]; it holds name, about"),
        ("", "own.yaml: the study is None"),
    ],
)
def test_files_that_hold_no_grid(tmp_path, text, message):
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_study(path)
    assert message in str(error.value)


def test_studies_that_do_not_exist(tmp_path):
    with pytest.raises(ConfigError, match="no study 'smal'; did you mean 'small'"):
        find_study("smal")
    with pytest.raises(ConfigError, match="no study file"):
        load_study(tmp_path / "none.yaml")


def test_names_to_choose_by(tmp_path):
    study = parse_study(GRID, "x")
    some = names(study, tmp_path, arms=["gspo"], seeds=[1])
    assert some == ["usual/gspo-seed1", "hot/gspo-seed1"]
    for option, value, message in (
        ("arms", ["gsop"], "--arms: unknown arm 'gsop'; did you mean 'gspo'?"),
        ("settings", ["x"], "--settings: unknown setting 'x'; there are usual, hot"),
        ("seeds", [4], "--seeds: unknown seed 4; there are 0, 1"),
    ):
        with pytest.raises(ConfigError) as error:
            names(study, tmp_path, **{option: value})
        assert message in str(error.value)


def test_units_are_the_arms_of_one_setting_and_seed(tmp_path):
    cells = all_cells(parse_study(GRID, "x"), tmp_path)
    assert [[cell.arm for cell in unit] for unit in units(cells)] == [["grpo", "gspo"]] * 4


def test_a_digest_is_of_what_is_run_not_of_where(tmp_path):
    here, there = (all_cells(parse_study(GRID, "x"), tmp_path / name)[0] for name in "ab")
    assert here.digest == there.digest == digest(here.config.replace(name="other"))
    assert here.digest != digest(here.config.replace(learning_rate=2e-4))
    assert here.digest != digest(here.config.replace(objective_kwargs={"epsilon": 0.3}))


@pytest.mark.parametrize("name", [*shipped()])
def test_shipped_studies(tmp_path, name):
    study = load_study(find_study(name))
    cells = all_cells(study, tmp_path)
    assert study.name == name
    assert study.about
    assert all(part.about for part in [*study.settings.values(), *study.arms.values()])
    assert {cell.arm for cell in cells} == set(study.arms)
    assert {cell.setting for cell in cells} == set(study.settings)
    assert len({cell.run_dir for cell in cells}) == len(cells)
