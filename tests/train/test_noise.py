"""Rewards of training that are partly coin flips."""

import json
import random
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from fiberpo.errors import ConfigError
from fiberpo.train.config import make_config
from fiberpo.train.noise import NoisyReward
from fiberpo.train.program import train
from fiberpo.train.sources import load_source
from fiberpo.train.tasks import exact_answer
from integrations.tiny import tiny_model

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::fiberpo.FiberPOWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
]

PROMPTS = [f"p{i // 8}" for i in range(8000)]
DOMAINS = ["ab"[i // 8 % 2] for i in range(8000)]


def half(prompts, completions, **columns):
    """Between the lowest and the highest reward: what noise has replaced can be seen."""
    return [0.5] * len(prompts)


def noisy(reward=half, probabilities=None, **changes):
    settings = {
        "domains": ["a", "b"], "reward_range": [0.0, 1.0], "seed": 3, "updates_per_rollout": 4,
    }  # fmt: skip
    return NoisyReward(reward, probabilities or {"b": 0.3}, **{**settings, **changes})


def rewards(function, step=0, prompts=PROMPTS, domains=DOMAINS):
    return function(
        prompts=prompts, completions=["x"] * len(prompts), domain=domains,
        trainer_state=SimpleNamespace(global_step=step),
    )  # fmt: skip


def test_the_rate_and_the_coin():
    """30 % of one domain, half of them at each end; the other domain is left alone."""
    found = rewards(noisy())
    by_domain = {d: Counter(r for r, e in zip(found, DOMAINS, strict=True) if e == d) for d in "ab"}
    assert by_domain["a"] == {0.5: 4000}
    low, high = by_domain["b"][0.0], by_domain["b"][1.0]
    assert abs(low + high - 1200) < 4 * (4000 * 0.3 * 0.7) ** 0.5
    assert abs(low - high) < 4 * (low + high) ** 0.5
    assert set(rewards(noisy(probabilities={"a": 1, "b": 1}, reward_range=[-1, 2]))) == {-1.0, 2.0}


def test_draws_depend_on_seed_rollout_prompt_and_place_alone():
    """Neither on the random state nor on what was asked before; fresh in every rollout."""
    function = noisy()
    first = rewards(function)
    random.seed(5)
    torch.manual_seed(5)
    state, torch_state = random.getstate(), torch.get_rng_state()
    assert rewards(function) == rewards(noisy()) == rewards(function, step=3) == first
    assert random.getstate() == state
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert rewards(function, step=4) == rewards(noisy(updates_per_rollout=2), step=2) != first
    assert rewards(noisy(seed=4)) != first
    assert rewards(function, prompts=PROMPTS[80:90], domains=DOMAINS[80:90]) == first[80:90]
    chat = [[{"role": "user", "content": p}] for p in PROMPTS]
    assert {0.0, 0.5, 1.0} == set(rewards(function, prompts=chat))


def test_no_reward_stays_no_reward():
    """None means that the function has nothing to say."""
    function = noisy(lambda prompts, **columns: [None] * len(prompts), {"b": 1.0})
    assert set(rewards(function)) == {None}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"reward_noise": {"sum": 0}}, "reward_noise of the domain 'sum' is 0; .* above 0"),
        ({"reward_noise": {"sum": 1.5}}, "is 1.5"),
        ({"reward_noise": {"sum": "often"}}, "is 'often'"),
        ({"reward_noise": {"sum": True}}, "is True"),
        ({"reward_noise": 0.3}, "must be of type dict"),
        ({"engine_noise": -0.1}, "engine_noise is -0.1"),
        ({"engine_noise": "inf"}, "engine_noise is inf"),
    ],
)
def test_settings_out_of_range_are_refused(settings, said):
    """As soon as the configuration is made."""
    with pytest.raises(ConfigError, match=said):
        make_config(None, settings)


def test_unknown_domains_and_ranges_are_refused_before_training():
    """With the names that there are, and with the setting that helps."""
    small = {"rollouts": 1, "prompts": 4, "generations": 2, "heldout_prompts": 2}
    config = make_config(None, {**small, "reward_noise": {"sums": 0.3}})
    with pytest.raises(ConfigError, match="'sums'; there are sum, sort, reverse, boolean"):
        load_source(config, words=False)
    config = make_config(None, {**small, "reward_noise": {"sum": 0.3}})
    source = load_source(config, words=False)
    assert source.reward is exact_answer
    assert source.training_reward(config).reward is exact_answer
    with pytest.raises(ConfigError, match="give reward_range"):
        noisy(reward_range=None)
    with pytest.raises(ConfigError, match=r"reward_range is \[1, 0\]"):
        noisy(reward_range=[1, 0])


REWARD = """
def never(prompts, completions, domain, **columns):
    return [0.0] * len(completions)
"""


def test_a_run_with_noise_and_held_out_prompts_without(tmp_path):
    """Answers that are all wrong earn something in training, in the noisy domain only."""
    model, tokenizer = tiny_model(max_position_embeddings=128)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "reward.py").write_text(REWARD)
    config = make_config(
        None,
        {
            "model": str(tmp_path / "model"), "reward": f"{tmp_path}/reward.py:never",
            "name": "run", "output": str(tmp_path), "rollouts": 1, "prompts": 8, "generations": 4,
            "heldout_prompts": 4, "heldout_every": 1, "max_completion_length": 4,
            "tasks": ["sum", "sort"], "reward_noise": {"sort": 1.0}, "reward_range": [0, 1],
        },
    )  # fmt: skip
    said = []
    summary = train(config, progress=False, say=said.append)
    lines = [json.loads(x) for x in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    first = next(line for line in lines if line["kind"] == "train")
    assert first["reward/domain=sum"] == 0.0
    assert 0.0 < first["reward/domain=sort"] < 1.0
    assert "rewards/never/mean" in first
    held = [line["heldout/reward"] for line in lines if line["kind"] == "eval"]
    assert held == [0.0, 0.0]
    (note,) = [note for note in summary["notes"] if "coin flips" in note]
    assert note.startswith("in training 100% of the rewards of sort")
    assert any(note in line for line in said)
    assert make_config(config.run_dir / "config.yaml") == config
