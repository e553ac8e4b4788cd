"""Data sources, reasoning-gym problems, reward functions, held-out splits and mixing."""

import json
import logging
import math
from collections import Counter

import datasets
import pytest

from fiberpo.columns import DOMAIN_ALIASES, GROUP_ALIASES, find_column
from fiberpo.errors import ConfigError, DataError
from fiberpo.train import gym as gym_module
from fiberpo.train.data import load_data
from fiberpo.train.gym import ReasoningGymReward, reasoning_gym_rows
from fiberpo.train.mixing import mix_indices, split_held_out
from fiberpo.train.rewards import load_function

CHAT = [{"role": "user", "content": "2+2?"}]
TRL_ROWS = [
    {"prompt": "1+1?", "domain": "sum", "answer": 2, "level": "easy"},
    {"prompt": "2+2?", "domain": "sum", "answer": 4, "level": "hard"},
]
VERL_ROWS = [
    {
        "data_source": "openai/gsm8k",
        "prompt": CHAT,
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "4"},
        "extra_info": {"split": "train", "index": 0},
    }
]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# Columns ------------------------------------------------------------------------------------------


def test_find_column():
    assert find_column(["prompt", "data_source"], DOMAIN_ALIASES, "the domain") == "data_source"
    assert find_column(["prompt"], GROUP_ALIASES, "the group") is None
    with pytest.raises(DataError, match=r"'domain', 'task'.*the domain.*remove or rename 'task'"):
        find_column(["task", "domain"], DOMAIN_ALIASES, "the domain")


# Own data -----------------------------------------------------------------------------------------


def test_trl_rows_from_every_file_type(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", TRL_ROWS)
    (tmp_path / "a.json").write_text(json.dumps(TRL_ROWS))
    reference = datasets.Dataset.from_list(TRL_ROWS)
    reference.to_parquet(tmp_path / "a.parquet")
    reference.save_to_disk(str(tmp_path / "saved"))
    for name in ("a.jsonl", "a.json", "a.parquet", "saved"):
        loaded = load_data(tmp_path / name)
        assert sorted(loaded.column_names) == ["answer", "domain", "level", "prompt"]
        assert [dict(row) for row in loaded] == TRL_ROWS
        assert list(load_data(tmp_path / name, need_answer=True)["answer"]) == ["2", "4"]


def test_verl_rows_load_unchanged(tmp_path):
    for path in (tmp_path / "a.jsonl", tmp_path / "a.parquet"):
        if path.suffix == ".parquet":
            datasets.Dataset.from_list(VERL_ROWS).to_parquet(path)
        else:
            write_jsonl(path, VERL_ROWS)
        row = load_data(path, need_answer=True)[0]
        assert row == {**VERL_ROWS[0], "domain": "openai/gsm8k", "answer": "4"}


def test_split_of_a_saved_dictionary(tmp_path):
    part = datasets.Dataset.from_list(TRL_ROWS)
    datasets.DatasetDict(train=part, test=part.select([1])).save_to_disk(str(tmp_path / "d"))
    assert len(load_data(tmp_path / "d", split="test")) == 1
    with pytest.raises(DataError, match="no split 'dev'; it has train, test"):
        load_data(tmp_path / "d", split="dev")


def test_no_domain_column(tmp_path, caplog):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "hi"}, {"prompt": CHAT[0]["content"]}])
    with caplog.at_level(logging.INFO, "fiberpo"):
        assert list(load_data(path)["domain"]) == ["all", "all"]
    assert "all rows get the domain 'all'" in caplog.text


def test_two_domain_columns(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "hi", "task": "a", "data_source": "b"}])
    with pytest.raises(DataError, match=r"'data_source', 'task'.*remove or rename 'task'"):
        load_data(path)
    assert list(load_data(path, domain_column="task")["domain"]) == ["a"]
    with pytest.raises(DataError, match="no 'kind' for the domain"):
        load_data(path, domain_column="kind")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "hi", "answer": "1"}], "columns question, answer, but no 'prompt'"),
        ([{"prompt": "hi"}, {"prompt": ""}], "row 1: the prompt '' is neither"),
        ([{"prompt": [{"content": "hi"}]}], r"row 0: the prompt \[.*'role' and 'content'"),
        ([{"prompt": "a", "domain": "d"}, {"prompt": "b"}], "row 1: the domain is None"),
        ([], "has no rows"),
        ([{"prompt": "a"}, {"prompt": CHAT}], "cannot load .*a.jsonl: Arrow"),
    ],
)
def test_bad_rows(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        load_data(write_jsonl(tmp_path / "a.jsonl", rows))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a"}, "columns prompt, domain, but none of answer, ground_truth"),
        ({"prompt": "a", "answer": "1", "ground_truth": "1"}, "remove or rename 'ground_truth'"),
        ({"prompt": "a", "ground_truth": None}, "row 0: ground_truth is None"),
        ({"prompt": "a", "reward_model": {"ground_truth": [1]}}, r"ground_truth is \[1\]"),
    ],
)
def test_answer_is_required_only_on_demand(tmp_path, row, message):
    path = write_jsonl(tmp_path / "a.jsonl", [row])
    load_data(path)
    with pytest.raises(DataError, match=message):
        load_data(path, need_answer=True)


def test_unreadable_sources(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n{oops\n')
    (tmp_path / "b.json").write_text('{"prompt": "a"}')
    (tmp_path / "c.json").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    (tmp_path / "d.csv").write_text("prompt\n")
    (tmp_path / "e.parquet").write_bytes(b"nothing")
    (tmp_path / "f.jsonl").write_text('"text"\n')
    for name, message in (
        ("a.jsonl", "line 2 is not JSON"),
        ("b.json", "holds a dict; use a list"),
        ("c.json", "give lines a .jsonl file"),
        ("d.csv", "is not one of .jsonl, .json, .parquet"),
        ("e.parquet", "cannot load .*: ArrowInvalid"),
        ("f.jsonl", "row 0 is 'text'"),
        ("absent.jsonl", "no data file or directory"),
        ("absent", "no data file or directory"),
    ):
        with pytest.raises(DataError, match=message):
            load_data(tmp_path / name)


def test_hub_id(monkeypatch):
    calls = []

    def load_dataset(source, split):
        calls.append((source, split))
        if source == "org/absent":
            raise FileNotFoundError("nothing there")
        return datasets.Dataset.from_list(TRL_ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(load_data("org/name", split="test")) == 2
    assert calls == [("org/name", "test")]
    with pytest.raises(DataError, match="taken for a hub id.*nothing there"):
        load_data("org/absent")


# reasoning-gym ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gym():
    return pytest.importorskip("reasoning_gym", reason="the extra 'tasks' is not installed")


def test_gym_rows_and_rewards(gym, capsys):
    rows = reasoning_gym_rows(["basic_arithmetic", "bf"], 0, 6)
    assert Counter(row["domain"] for row in rows) == {"basic_arithmetic": 6, "bf": 6}
    assert len({row["prompt"] for row in rows}) == 12
    assert all(isinstance(value, str) for row in rows for value in row.values())
    reward = ReasoningGymReward()
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    prompts = columns.pop("prompt")
    assert reward(prompts, columns["answer"], **columns) == [1.0] * 12
    tagged = [[{"role": "assistant", "content": f"so <answer> {a} </answer>."}]
              for a in columns["answer"]]  # fmt: skip
    assert reward(prompts, tagged, **columns) == [1.0] * 12
    assert reward(prompts, ["wrong"] * 12, **columns) == [0.0] * 12
    assert reward.failures == {}
    assert capsys.readouterr().out == ""
    assert reward(["x"], ["1"], problem_id=[None]) == [None]


def test_gym_partial_credit(gym):
    row = reasoning_gym_rows(["basic_arithmetic"], 0, 1)[0]
    text = f"I say {row['answer']}"
    keys = [row["problem_id"]]
    assert ReasoningGymReward()(["?"], [text], problem_id=keys) == [0.0]
    (partial,) = ReasoningGymReward(partial_credit=True)(["?"], [text], problem_id=keys)
    assert 0 < partial < 1


def test_gym_is_deterministic_and_found_again(gym):
    first = reasoning_gym_rows(["chain_sum"], 3, 4, options={"chain_sum": {"min_terms": 5}})
    assert first == reasoning_gym_rows(["chain_sum"], 3, 4, options={"chain_sum": {"min_terms": 5}})
    assert first != reasoning_gym_rows(["chain_sum"], 4, 4, options={"chain_sum": {"min_terms": 5}})
    gym_module._entries.clear()  # as in another process
    assert ReasoningGymReward()(
        ["?"], [first[0]["answer"]], problem_id=[first[0]["problem_id"]]
    ) == [1]
    other = json.dumps([*json.loads(first[0]["problem_id"])[:-1], "00"])
    with pytest.raises(DataError, match="'chain_sum' is another one.*PYTHONHASHSEED"):
        ReasoningGymReward()(["?"], ["1"], problem_id=[other])


def test_gym_held_out_is_disjoint(gym):
    options = {"basic_arithmetic": {"max_digits": 1, "max_terms": 2}}  # few distinct problems
    train = {r["prompt"] for r in reasoning_gym_rows(["basic_arithmetic"], 0, 60, options=options)}
    for seed in range(3):
        rows = reasoning_gym_rows(["basic_arithmetic"], seed, 15, True, options=options)
        assert len({row["prompt"] for row in rows}) == 15
        assert not train & {row["prompt"] for row in rows}
    with pytest.raises(DataError, match=r"gave \d+ distinct training problems in \d+ draws, 5000"):
        reasoning_gym_rows(["basic_arithmetic"], 0, 5000, options=options)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("game_of_life_halting", "its scorer gives 1.0 to the wrong answer 'wrong'"),
        ("prime_factorization", "its scorer raises ValueError .* on the wrong answer 'wrong'"),
        ("rush_hour", "has no answer"),
        ("rubiks_cube", "has no answer"),
        ("graph_color", "has no answer"),
        ("propositional_logic", "has no answer"),
        ("boxnet", "has no answer"),
    ],
)
def test_gym_refuses_what_cannot_be_scored(gym, name, reason):
    with pytest.raises(DataError, match=f"'{name}' is refused: .*{reason}"):
        reasoning_gym_rows([name], 0, 2)


def test_gym_leaves_out_single_problems_without_answer(gym, caplog):
    with caplog.at_level(logging.INFO, "fiberpo"):
        rows = reasoning_gym_rows(["ab"], 0, 100)
    assert len(rows) == 100
    assert all(row["answer"] for row in rows)
    assert "'ab': left out" in caplog.text


def test_gym_settings(gym):
    with pytest.raises(ConfigError, match="'basic_arithmetics'; did you mean basic_arithmetic"):
        reasoning_gym_rows(["basic_arithmetics"], 0, 1)
    with pytest.raises(ConfigError, match="'chain_sum' cannot be made with .*'depth'"):
        reasoning_gym_rows(["chain_sum"], 0, 1, options={"chain_sum": {"depth": 1}})
    with pytest.raises(ConfigError, match="options are given for bf"):
        reasoning_gym_rows(["chain_sum"], 0, 1, options={"bf": {}})
    with pytest.raises(ConfigError, match="count_per_domain >= 1"):
        reasoning_gym_rows(["chain_sum"], 0, 0)


class Scorer:
    def __init__(self, result):
        self.result = result

    def score_answer(self, answer, entry):
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


@pytest.mark.parametrize("result", [RuntimeError("boom"), 1.5, -1.0, math.nan, None])
def test_failing_scorer_earns_nothing(monkeypatch, caplog, result):
    key = json.dumps(["made_up", 0, 1, 0, {}, ""])
    monkeypatch.setitem(gym_module._entries, key, (Scorer(result), {}))
    reward = ReasoningGymReward(partial_credit=True)
    with caplog.at_level(logging.WARNING, "fiberpo"):
        assert reward(["?"] * 3, ["a"] * 3, problem_id=[key] * 3) == [0.0] * 3
    assert reward.failures == {"made_up": 3}
    assert len(caplog.records) == 1


# Reward functions ---------------------------------------------------------------------------------

SOURCE = """
from dataclasses import dataclass

@dataclass
class Rule:
    bonus: float = 1.0

limit = 3

def reward(prompts, completions, **columns):
    return [Rule().bonus for _ in completions]

def narrow(prompts, completions):
    return []
"""


def test_load_function(tmp_path):
    path = tmp_path / "rewards.py"
    path.write_text(SOURCE)
    assert load_function(f"{path}:reward")(["a"], ["b"], domain=["c"]) == [1.0]
    exact = load_function("fiberpo.train.tasks:exact_answer")
    assert exact(["?"], ["x#4"], answer=["4"]) == [1.0]


def test_load_function_errors(tmp_path):
    (tmp_path / "rewards.py").write_text(SOURCE)
    (tmp_path / "broken.py").write_text("1 / 0\n")
    for spec, message in (
        ("rewards.py", "write path/to/file.py:function"),
        (f"{tmp_path}/absent.py:reward", "no file .*absent.py"),
        (f"{tmp_path}/broken.py:reward", "importing .* failed: ZeroDivisionError"),
        (f"{tmp_path}/rewards.py:rewards", "has no 'rewards'; did you mean reward"),
        (f"{tmp_path}/rewards.py:limit", "limit is a int, which cannot be called"),
        (f"{tmp_path}/rewards.py:narrow", r"def narrow\(prompts, completions, \*\*columns\)"),
        ("no_such_package.rewards:reward", "failed: ModuleNotFoundError"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_function(spec)


# Held-out split and mixing ------------------------------------------------------------------------


def make_rows(**sizes):
    return [{"prompt": f"{d} {i}", "domain": d} for d, n in sizes.items() for i in range(n)]


def test_split_held_out():
    rows = make_rows(a=10, b=4)
    train, held = split_held_out(datasets.Dataset.from_list(rows), 3, seed=0)
    assert Counter(row["domain"] for row in held) == {"a": 3, "b": 3}
    assert sorted(train + held, key=rows.index) == rows
    assert split_held_out(rows, 3, seed=0) == (train, held)
    assert split_held_out(rows, 3, seed=1)[1] != held


def test_split_held_out_repeated_prompts(caplog):
    rows = make_rows(a=6) * 2
    train, held = split_held_out(rows, 2, seed=0)
    assert len(held) == 2
    assert len(train) == 8
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held}
    assert "2 rows repeat a held-out prompt" in caplog.text


def test_split_held_out_errors():
    with pytest.raises(
        DataError, match="'b' has 3 distinct prompts; holding out 3 needs at least 4"
    ):
        split_held_out(make_rows(a=9, b=3), 3, 0)
    with pytest.raises(ConfigError, match="per_domain must be at least 1, got 0"):
        split_held_out(make_rows(a=9), 0, 0)
    shared = [{"prompt": str(i), "domain": d} for i in range(4) for d in "ab"]
    with pytest.raises(DataError, match="'b' (shares all but|has no prompt left)"):
        split_held_out(shared, 3, 0)


def test_mix_weights_and_epochs():
    sizes = {"a": 100, "b": 7}
    plan = mix_indices(sizes, {"a": 3, "b": 1}, 400, seed=0)
    counts = Counter(domain for domain, _ in plan)
    assert counts["a"] == pytest.approx(300, abs=3)
    for start in range(0, 400, 8):  # every batch has nearly the wanted shares
        assert 5 <= sum(domain == "a" for domain, _ in plan[start : start + 8]) <= 7
    for domain, size in sizes.items():
        order = [index for name, index in plan if name == domain]
        epochs = [order[i : i + size] for i in range(0, len(order) - size + 1, size)]
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_mix_defaults_and_determinism():
    sizes = {"a": 400, "b": 100}
    plan = mix_indices(sizes, None, 300, seed=0)
    assert Counter(domain for domain, _ in plan)["a"] == pytest.approx(200, abs=3)  # 20 : 10
    assert mix_indices(sizes, None, 300, seed=0) == plan
    assert mix_indices(sizes, None, 100, seed=0) == plan[:100]
    assert mix_indices(sizes, None, 300, seed=1) != plan
    assert mix_indices(sizes, None, 0, seed=0) == []
    assert {d for d, _ in mix_indices(sizes, {"a": 0, "b": 2}, 50, seed=0)} == {"b"}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": 1, "b": 1, "c": 1}, "weight is given for 'c'; the domains are a, b"),
        ({"a": 1, "b": -0.5}, "weight of 'b' is -0.5"),
        ({"a": 1, "b": math.nan}, "weight of 'b' is nan"),
        ({"a": 0, "b": 0}, "all weights are 0"),
        ({"a": 1}, "no weight for 'b'"),
    ],
)
def test_mix_errors(weights, message):
    with pytest.raises(ConfigError, match=message):
        mix_indices({"a": 3, "b": 3}, weights, 5, seed=0)


def test_mix_empty_domain():
    with pytest.raises(ConfigError, match="'b' has 0 prompts; give it weight 0"):
        mix_indices({"a": 3, "b": 0}, {"a": 1, "b": 1}, 5, seed=0)
    with pytest.raises(ConfigError, match="all weights are 0"):
        mix_indices({"a": 0}, None, 5, seed=0)
