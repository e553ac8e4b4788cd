"""Tests of the embedded checkpoint, its tokenizer, its generation and its warm start."""

from __future__ import annotations

import json
import random
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fiberpo.errors import ConfigError
from fiberpo.train.embedded import (
    CHARACTERS,
    SPECIAL_TOKENS,
    build_model,
    build_tokenizer,
    load_embedded,
)
from fiberpo.train.generate import sample_completions
from fiberpo.train.tasks import DOMAINS, MAX_COMPLETION_TOKENS, exact_answer, make_rows
from fiberpo.train.warmstart import corrupt, evaluate, warmstart


@pytest.fixture(scope="module")
def embedded() -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    return load_embedded()


def test_tokenizer_round_trip(tmp_path: Path) -> None:
    built = build_tokenizer()
    built.save_pretrained(tmp_path)
    assert len(CHARACTERS) == len(set(CHARACTERS)) == 60
    for tokenizer in (built, PreTrainedTokenizerFast.from_pretrained(tmp_path)):
        assert len(tokenizer) == len(SPECIAL_TOKENS) + len(CHARACTERS)
        ids = tokenizer(CHARACTERS)["input_ids"]
        assert ids == [1, *range(4, 64)]
        assert tokenizer.decode(ids, skip_special_tokens=True) == CHARACTERS
        for domain in DOMAINS.values():
            rng = random.Random(0)
            for _ in range(50):
                problem = domain.sample(rng)
                text = problem.prompt + problem.demonstration + domain.alphabet
                ids = tokenizer(text)["input_ids"]
                assert len(ids) == len(text) + 1
                assert tokenizer.unk_token_id not in ids
                assert tokenizer.decode(ids, skip_special_tokens=True) == text
        assert tokenizer("é")["input_ids"] == [1, tokenizer.unk_token_id]
        batch = tokenizer(["ab", "abcd"], padding=True)
        assert batch["input_ids"][0][:2] == [0, 0]
        assert batch["attention_mask"][0] == [0, 0, 1, 1, 1]


def test_build_model_is_seeded_and_leaves_the_random_state() -> None:
    before = torch.random.get_rng_state()
    first, same, other = build_model(0), build_model(0), build_model(1)
    assert torch.equal(torch.random.get_rng_state(), before)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(first.state_dict()[name], same.state_dict()[name])
    assert not torch.equal(first.state_dict()[name], other.state_dict()[name])


def test_checkpoint_loads(embedded: tuple[LlamaForCausalLM, PreTrainedTokenizerBase]) -> None:
    model, tokenizer = embedded
    assert 0.75e6 < sum(p.numel() for p in model.parameters()) < 0.77e6
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not model.training
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id == 0
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab()
    assert tokenizer.padding_side == "left"
    assert {p.dtype for p in load_embedded(torch.bfloat16)[0].parameters()} == {torch.bfloat16}
    directory = files("fiberpo").joinpath("assets", "embedded")
    assert len(directory.joinpath("model.safetensors").read_bytes()) < 1.7e6
    with pytest.raises(ConfigError, match="int64"):
        load_embedded(torch.int64)


def test_provenance_describes_a_start_with_room_to_rise() -> None:
    path = files("fiberpo").joinpath("assets", "embedded", "provenance.json")
    provenance = json.loads(path.read_text(encoding="utf-8"))
    sampled, greedy = provenance["sampled_accuracy"], provenance["greedy_accuracy"]
    assert set(sampled) == set(greedy) == {*DOMAINS, "mean"}
    assert all(0.05 < sampled[name] < 0.95 for name in DOMAINS)
    assert greedy["mean"] > sampled["mean"] + 0.2


def test_greedy_accuracy_matches_provenance(
    embedded: tuple[LlamaForCausalLM, PreTrainedTokenizerBase],
) -> None:
    accuracy = evaluate(*embedded, count=16, temperature=0.0)
    assert accuracy["mean"] > 0.6


def test_sample_completions_restores_state_and_order(
    embedded: tuple[LlamaForCausalLM, PreTrainedTokenizerBase],
) -> None:
    model, tokenizer = embedded
    rows = [row for name in DOMAINS for row in make_rows(name, 5, 4)]
    prompts = [row["prompt"] for row in rows]

    def sample(**changes: float) -> list[str]:
        settings = {"max_new_tokens": MAX_COMPLETION_TOKENS, "temperature": 1.0, "seed": 0}
        return sample_completions(model, tokenizer, prompts, **(settings | changes))  # type: ignore[arg-type]

    model.train()
    try:
        before = torch.random.get_rng_state()
        first = sample()
        assert model.training
        assert torch.equal(torch.random.get_rng_state(), before)
        torch.rand(1)
        assert sample() == first
        assert sample(seed=1) != first
    finally:
        model.eval()
    assert sample() == first
    assert not model.training
    # Greedy completions do not depend on the seed or on who shares the batch.
    greedy = sample(temperature=0.0)
    assert greedy == sample(temperature=0.0, seed=1)
    assert greedy == sample(temperature=0.0, batch_size=3)
    assert sum(exact_answer(prompts, greedy, [row["answer"] for row in rows])) >= 8
    assert sample_completions(model, tokenizer, [], max_new_tokens=4) == []


@pytest.mark.parametrize(
    "change", [{"max_new_tokens": 0}, {"batch_size": 0}, {"temperature": -1.0}]
)
def test_sample_completions_refuses(
    change: dict[str, float], embedded: tuple[LlamaForCausalLM, PreTrainedTokenizerBase]
) -> None:
    with pytest.raises(ConfigError, match=str(next(iter(change.values())))):
        sample_completions(*embedded, ["sum 11+11:"], **({"max_new_tokens": 4} | change))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", list(DOMAINS))
def test_corruption_changes_one_character_at_the_given_rate(name: str) -> None:
    rng = random.Random(0)
    changed = 0
    for _ in range(2000):
        text = DOMAINS[name].sample(rng).demonstration
        other = corrupt(text, name, rng, 0.6)
        assert len(other) == len(text)
        assert set(other) <= set(DOMAINS[name].alphabet)
        difference = sum(a != b for a, b in zip(text, other, strict=True))
        assert difference <= 1
        changed += difference
    assert abs(changed / 2000 - 0.6) < 0.05  # 4.5 standard deviations
    assert corrupt("TT#T", "boolean", rng, 0.0) == "TT#T"
    assert corrupt("TT#T", "boolean", rng, 1.0) != "TT#T"
    with pytest.raises(ConfigError, match=r"1\.5"):
        corrupt("TT#T", "boolean", rng, 1.5)


def test_warmstart_writes_a_loadable_checkpoint(tmp_path: Path) -> None:
    settings = {"seed": 3, "steps": 2, "batch_size": 4, "eval_count": 2, "progress": False}
    first = warmstart(tmp_path / "a", **settings)  # type: ignore[arg-type]
    again = warmstart(tmp_path / "b", **settings)  # type: ignore[arg-type]
    assert first["last_loss"] == again["last_loss"]
    assert json.loads((tmp_path / "a" / "provenance.json").read_text()) == first
    model = LlamaForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "a")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert len(sample_completions(model, tokenizer, ["sort 21:"], max_new_tokens=3)) == 1
    start = build_model(3).state_dict()["model.embed_tokens.weight"]
    assert not torch.allclose(model.state_dict()["model.embed_tokens.weight"], start, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("batch_size", 0),
        ("eval_count", 0),
        ("learning_rate", 0.0),
        ("corruption", 2.0),
    ],
)
def test_warmstart_refuses(name: str, value: float, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{name}.*{value}"):
        warmstart(tmp_path / "never", **{name: value})  # type: ignore[arg-type]
    assert not (tmp_path / "never").exists()
