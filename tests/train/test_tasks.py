"""Tests of the procedural tasks and their verifier."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest

from fiberpo.errors import ConfigError
from fiberpo.train.tasks import (
    DOMAINS,
    MAX_COMPLETION_TOKENS,
    completion_text,
    exact_answer,
    final_answer,
    is_held_out,
    make_problem,
    make_rows,
)

NAMES = list(DOMAINS)


@pytest.mark.parametrize("name", NAMES)
def test_verifier_accepts_demonstrations_and_rejects_wrong_answers(name: str) -> None:
    domain = DOMAINS[name]
    for index in range(300):
        problem = make_problem(name, 1, index)
        assert len(problem.demonstration) <= domain.max_completion
        assert set(problem.demonstration) <= set(domain.alphabet)
        assert problem.prompt.startswith(name)
        head = problem.demonstration[: len(problem.demonstration) - len(problem.answer)]
        assert head + problem.answer == problem.demonstration
        wrong = [
            head + problem.answer[:place] + c + problem.answer[place + 1 :]
            for place in range(len(problem.answer))
            for c in domain.alphabet + " #"
            if c != problem.answer[place]
        ]
        wrong += [head + problem.answer[:-1], head + problem.answer + domain.alphabet[0], head]
        rewards = exact_answer(
            [problem.prompt] * (len(wrong) + 1),
            [problem.demonstration, *wrong],
            [problem.answer] * (len(wrong) + 1),
        )
        # Without scratchpad the empty head is a wrong answer as well.
        assert rewards == [1.0] + [0.0] * len(wrong)


def test_answers_are_right() -> None:
    for index in range(200):
        problem = make_problem("sum", 2, index)
        a, b = problem.prompt[len("sum ") : -1].split("+")
        assert int(problem.answer) == int(a) + int(b)
        steps, answer = problem.demonstration.split("#")
        units, tens = steps.split(";")
        for step in (units, tens):
            left, right = step.split("=")
            assert sum(map(int, left.split("+"))) == int(right)
        assert answer == tens.split("=")[1] + units.split("=")[1][-1]

        problem = make_problem("sort", 2, index)
        assert problem.answer == "".join(sorted(problem.prompt[len("sort ") : -1]))

        problem = make_problem("reverse", 2, index)
        assert problem.answer[::-1] == problem.prompt[len("reverse ") : -1]

        problem = make_problem("boolean", 2, index)
        values = []
        for clause in problem.prompt[len("boolean ") : -1].split():
            words = clause.replace("~T", "0").replace("~F", "1").replace("T", "1")
            words = words.replace("F", "0")
            left, operator, right = words
            both = {"&": left == right == "1", "|": "1" in (left, right)}
            values.append(both[operator])
        assert problem.answer == ("T" if sum(values) > len(values) / 2 else "F")
        assert problem.demonstration.split("#")[0] == "".join("FT"[v] for v in values)


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_deterministic_and_prefix_stable(name: str) -> None:
    rows = make_rows(name, 3, 40)
    assert rows == make_rows(name, 3, 60)[:40]
    assert rows != make_rows(name, 4, 40)
    assert set(rows[0]) == {"prompt", "answer", "domain"}
    assert {row["domain"] for row in rows} == {name}
    assert make_rows(name, 3, 0) == []


def test_rows_do_not_depend_on_the_hash_seed_of_the_process() -> None:
    code = (
        "from fiberpo.train.tasks import make_rows\n"
        "print([r['prompt'] for n in ('sum', 'boolean') for r in make_rows(n, 0, 5)])"
    )
    expected = [r["prompt"] for n in ("sum", "boolean") for r in make_rows(n, 0, 5)]
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == str(expected)


@pytest.mark.parametrize("name", NAMES)
def test_training_and_held_out_prompts_are_disjoint(name: str) -> None:
    train = {row["prompt"] for row in make_rows(name, 0, 1500)}
    held_out = {row["prompt"] for row in make_rows(name, 0, 300, held_out=True)}
    assert not train & held_out
    assert not any(map(is_held_out, train))
    assert all(map(is_held_out, held_out))
    rng = random.Random(0)
    share = sum(is_held_out(DOMAINS[name].sample(rng).prompt) for _ in range(4000)) / 4000
    assert 0.10 < share < 0.15


def test_training_rows_seldom_repeat() -> None:
    for name in ("sort", "reverse", "boolean"):
        prompts = [row["prompt"] for row in make_rows(name, 0, 500)]
        assert len(set(prompts)) > 450


def test_domains_differ_in_answer_length() -> None:
    lengths = {
        name: sum(len(make_problem(name, 0, i).demonstration) for i in range(200)) / 200
        for name in NAMES
    }
    assert max(lengths.values()) > 2 * min(lengths.values())
    assert MAX_COMPLETION_TOKENS <= 32


def test_reward_reads_chat_completions_and_survives_garbage() -> None:
    good = "1+2=3;1+1+0=2#23"
    chat = [{"role": "assistant", "content": good}]
    parts = [{"role": "assistant", "content": [{"type": "text", "text": good}]}]
    garbage = [
        None,
        7,
        "",
        "#",
        [],
        [None],
        ["23"],
        [{"role": "assistant"}],
        [{"role": "assistant", "content": None}],
        [{"role": "assistant", "content": [3, {"text": 4}]}],
        {"content": "23"},
        "\x00\ud800",
        "23#",
    ]
    completions = [good, chat, parts, " 23\n", *garbage]
    count = len(completions)
    rewards = exact_answer(
        ["sum 11+12:"] * count, completions, ["23"] * count, ["sum"] * count, trainer_state=None
    )
    assert rewards == [1.0] * 4 + [0.0] * len(garbage)
    assert all(isinstance(reward, float) for reward in rewards)
    assert completion_text(parts) == good
    assert final_answer("a#b#c ") == "c"


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ConfigError, match="'product'.*sum, sort"):
        make_rows("product", 0, 1)
    with pytest.raises(ConfigError, match="-1"):
        make_rows("sum", 0, -1)
    with pytest.raises(ValueError, match="shorter|longer"):
        exact_answer(["p"], ["c"], ["a", "b"])
