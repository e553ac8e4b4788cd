"""A generation engine that samples from other weights than the trainer's."""

import copy
import json
import os
import signal

import pytest
import torch

from fiberpo.errors import ConfigError
from fiberpo.integrations import trl_rows
from fiberpo.integrations.trl import FiberPOConfig
from fiberpo.train.callbacks import RunCallback
from fiberpo.train.config import make_config
from fiberpo.train.mismatch import Engine, MismatchTrainer
from fiberpo.train.program import train
from integrations.tiny import DEFAULTS, apart, gradients, rows, tiny_model, trainer, updates, vowels

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::fiberpo.FiberPOWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
]


def mismatched(folder, engine, *, model=None, **settings):
    model, tokenizer = model or tiny_model()
    return MismatchTrainer(
        model, vowels, FiberPOConfig(**{"output_dir": str(folder), **DEFAULTS, **settings}),
        train_dataset=rows(), processing_class=tokenizer, engine=engine,
    )  # fmt: skip


def perturbed(model, engine, rollout):
    """A copy with the engine's weights, put there by the ordinary means of torch."""
    other = copy.deepcopy(model)
    other.forward = type(other).forward.__get__(other)  # without TRL's fused head
    state = dict(engine.weights(model, rollout))
    if engine.bf16:
        other = other.to(torch.bfloat16)
        other.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq  # no weight
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            parameter.copy_(state[name])
    return other


def spied(run):
    """What the first rollout gave, and the weights that it was sampled from."""
    found = {}
    original = run._generate_and_score_completions

    def spy(inputs):
        found.setdefault("model", copy.deepcopy(run.model))
        output = original(inputs)
        found.setdefault("output", output)
        return output

    run._generate_and_score_completions = spy
    return found


def log_probs(model, output, temperature):
    """Of the completion tokens, from the logits, row by row."""
    ids = torch.cat([output["prompt_ids"], output["completion_ids"]], 1)
    attention = torch.cat([output["prompt_mask"], output["completion_mask"]], 1)
    width = output["completion_ids"].shape[1]
    out = torch.zeros(len(ids), width)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=attention).logits.float() / temperature
    for i, row in enumerate(ids.tolist()):
        for t in range(width):
            place = len(row) - width + t
            out[i, t] = logits[i, place - 1].log_softmax(-1)[row[place]]
    return out


def test_the_engine_perturbs_matrices_by_their_size():
    """Relative to the root mean square of each; vectors stay; the draw is that of the rollout."""
    model, _ = tiny_model()
    state = torch.get_rng_state()
    engine, own = Engine(0.05, seed=1), {n: p.detach() for n, p in model.named_parameters()}
    first = dict(engine.weights(model, 0))
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in first.items():
        gap = (value - own[name]).double()
        if value.ndim == 1:
            assert not gap.any()
        else:
            size = own[name].double().square().mean().sqrt()
            assert abs(float(gap.square().mean().sqrt() / size) / 0.05 - 1) < 0.1, name
    same, other = dict(engine.weights(model, 0)), dict(engine.weights(model, 1))
    assert all(torch.equal(same[name], first[name]) for name in first)
    moved = {name for name in first if not torch.equal(other[name], first[name])}
    assert moved == {name for name, value in first.items() if value.ndim > 1}
    twice = dict(Engine(0.1, seed=1).weights(model, 0))  # the same noise, twice as large
    name = "model.layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(twice[name] - own[name], 2 * (first[name] - own[name]))
    assert dict(Engine(bf16=True).weights(model, 0))[name].dtype == torch.bfloat16


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_the_weights_come_back_to_the_bit(tmp_path, error, monkeypatch):
    """However generation ends."""
    run = mismatched(tmp_path, Engine(0.3, bf16=True))
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    places = {name: p.data_ptr() for name, p in run.model.named_parameters()}
    seen = []
    original = type(run.model).generate

    def generate(model, *args, **kwargs):
        seen.append({name: p.detach().clone() for name, p in model.named_parameters()})
        if error is not None:
            raise error("in the middle")
        return original(model, *args, **kwargs)

    monkeypatch.setattr(type(run.model), "generate", generate)
    inputs = list(rows(4)) * 2
    if error is None:
        run._generate_and_score_completions(inputs)
    else:
        with pytest.raises(error, match="in the middle"):
            run._generate_and_score_completions(inputs)
    assert {p.dtype for p in seen[0].values()} == {torch.bfloat16}
    for name, parameter in run.model.named_parameters():
        assert parameter.data_ptr() == places[name]
        assert torch.equal(parameter, before[name])
        assert not torch.equal(seen[0][name].float(), before[name]) or parameter.ndim == 1


@pytest.mark.parametrize("engine", [Engine(0.1, seed=2), Engine(bf16=True)], ids=["noise", "bf16"])
@pytest.mark.parametrize("updates_per_rollout", [1, 2])
def test_log_probs_are_those_of_engine_and_trainer(tmp_path, engine, updates_per_rollout):
    """Each equals an independent forward pass of its weights."""
    run = mismatched(
        tmp_path, engine, objective="grpo", steps_per_generation=updates_per_rollout,
        per_device_train_batch_size=8, max_steps=1, temperature=0.8,
    )  # fmt: skip
    found = spied(run)
    run.train()
    model, output = found["model"], found["output"]
    mask = trl_rows.loss_mask(output)
    for name, weights in (
        ("sampling_per_token_logps", perturbed(model, engine, 0)),
        ("old_per_token_logps", perturbed(model, Engine(), 0)),
    ):
        expected = log_probs(weights, output, 0.8)
        torch.testing.assert_close(output[name][mask], expected[mask], rtol=0, atol=1e-5)
    gap = (output["old_per_token_logps"] - output["sampling_per_token_logps"])[mask].double()
    line = updates(run)[0]
    assert line["engine/k3"] == pytest.approx(float((gap.exp() - 1 - gap).mean()), rel=1e-6)
    assert line["engine/max_k2"] == pytest.approx(float(gap.square().max() / 2), rel=1e-6)
    assert line["engine/max_k2"] > 1e-5
    batch = run.last_window.surrogates[0].batch
    assert not torch.equal(batch.rollout_log_probs, batch.old_log_probs)
    assert line["kl_rollout/k3"] > line["kl/k3"]
    assert "importance_sampling_ratio" not in output


def test_an_engine_without_noise_changes_nothing(tmp_path):
    """The same answers, gradients and metrics as without an engine, to the bit."""
    settings = {"objective": "grpo", "mask_mean": 0.02, "max_steps": 4, "steps_per_generation": 2}
    plain = trainer(tmp_path / "a", **settings)
    expected = gradients(plain)
    run = mismatched(tmp_path / "b", Engine(seed=1), **settings)
    found = gradients(run)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    for line, other in zip(updates(run), updates(plain), strict=True):
        assert line.pop("engine/k3", 0.0) == line.pop("engine/max_k2", 0.0) == 0.0
        same = {k: v for k, v in other.items() if k not in ("step_time", "epoch")}
        assert {k: line[k] for k in same} == same
        assert set(line) - set(other) <= {"kl_rollout/k1", "kl_rollout/k3"}


@pytest.mark.parametrize("objective", ["gspo", "fiberpo_domain"])
def test_masks_and_corrections_stay_exact_over_micro_batches(tmp_path, objective):
    """The window in one piece and in four: the mask compares with the engine in both."""
    settings = {
        "objective": objective, "mask_max": 0.05, "correction": "tis", "max_steps": 3,
        "learning_rate": 0.02, "temperature": 1.0,
    }  # fmt: skip
    whole = mismatched(tmp_path / "a", Engine(0.05, seed=1), steps_per_generation=3, **settings)
    expected = gradients(whole)
    parts = mismatched(
        tmp_path / "b", Engine(0.05, seed=1), per_device_train_batch_size=4,
        gradient_accumulation_steps=4, steps_per_generation=12, **settings,
    )  # fmt: skip
    found = gradients(parts)
    assert apart(found, expected) < 1e-4
    kept = [line["mask/kept"] for line in updates(whole)]
    assert kept == [line["mask/kept"] for line in updates(parts)]
    assert all(0 < value < 1 for value in kept)
    surrogate = whole.last_window.surrogates[0]
    batch = surrogate.batch
    drift = (batch.log_probs - batch.rollout_log_probs).double()
    largest = [float(x.square().max()) / 2 for x in drift.split(batch.lengths.tolist())]
    assert surrogate.kept.tolist() == [value <= 0.05 for value in largest]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A model directory."""
    folder = tmp_path_factory.mktemp("start")
    model, tokenizer = tiny_model(max_position_embeddings=128)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_config(start, output, **settings):
    return make_config(
        None,
        {
            "model": str(start), "name": "run", "output": str(output), "rollouts": 2,
            "prompts": 4, "generations": 2, "updates_per_rollout": 2, "heldout_prompts": 2,
            "heldout_every": 2, "max_completion_length": 6, "learning_rate": 3e-3,
            "objective": "grpo", "reward": "integrations.tiny:vowels", **settings,
        },
    )  # fmt: skip


def ran(config, *, resume=False):
    """Lines of the metrics of a run, and its summary."""
    summary = train(config, resume=resume, progress=False, say=lambda line: None)
    lines = [json.loads(x) for x in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    return lines, summary


def test_arms_of_a_study_meet_the_same_engine(start, tmp_path):
    """Same seed, other objective: the same first rollout; the mask drops what is far off."""
    a, summary = ran(
        tiny_config(start, tmp_path / "a", engine_noise=0.2, mask_max=0.01, rollouts=1)
    )
    other = {"objective": "gspo", "correction": "icepop", "rollouts": 1}
    b, _ = ran(tiny_config(start, tmp_path / "b", engine_noise=0.2, **other))
    plain, _ = ran(tiny_config(start, tmp_path / "c", rollouts=1))
    first = [next(line for line in lines if line["kind"] == "train") for lines in (a, b, plain)]
    for name in ("engine/k3", "engine/max_k2", "reward", "completions/mean_length"):
        assert first[0][name] == first[1][name]
    assert first[0]["engine/k3"] > 1e-4
    assert first[0]["mask/kept"] < 1
    assert "engine/k3" not in first[2]
    assert first[2]["reward"] != first[0]["reward"]
    assert a[0] == b[0] == plain[0]  # held-out prompts are answered by the policy itself
    (note,) = summary["notes"]
    assert "engine_noise = 0.2" in note


def test_a_resumed_run_goes_on_with_its_noise(start, tmp_path, monkeypatch):
    """Of rewards and of the engine: the second rollout after a stop is that of a run without."""
    settings = {
        "engine_noise": 0.1, "reward_noise": {"sum": 0.5}, "reward_range": [0, 2],
        "updates_per_rollout": 1,
    }  # fmt: skip
    expected, _ = ran(tiny_config(start, tmp_path / "a", **settings))
    sizes = [line["engine/k3"] for line in expected if "engine/k3" in line]
    assert len(sizes) == len(set(sizes)) == 2
    original = RunCallback.on_step_end

    def interrupt(self, args, state, control, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        original(self, args, state, control, **kwargs)

    config = tiny_config(start, tmp_path / "b", **settings)
    monkeypatch.setattr(RunCallback, "on_step_end", interrupt)
    _, summary = ran(config)
    assert summary["interrupted"]
    assert summary["steps"] == 1
    monkeypatch.setattr(RunCallback, "on_step_end", original)
    found, _ = ran(config, resume=True)
    volatile = ("step_time", "epoch")
    for line, wanted in zip(found, expected, strict=True):
        assert {k: v for k, v in line.items() if k not in volatile} == {
            k: v for k, v in wanted.items() if k not in volatile
        }


def test_corrections_need_an_engine_that_differs():
    """And are taken where there is one."""
    with pytest.raises(ConfigError, match="engine_noise or engine_bf16"):
        make_config(None, {"objective": "grpo", "correction": "tis"})
    for settings in ({"engine_noise": 0.01}, {"engine_bf16": True}):
        config = make_config(None, {"objective": "grpo", "correction": "tis", **settings})
        assert "TruncatedIS" in str(config.build_objective())
