"""TRL trainers and ``fiberpo train`` record what they optimise, and train as if they did not."""

import json

import pytest
import torch
from transformers import TrainerCallback
from typer.testing import CliRunner

from fiberpo import ConfigError, RatioBatch, RecordingError, recipes
from fiberpo.cli import app
from fiberpo.integrations.trl_record import known_objective, record
from fiberpo.recording import Recorder, open_recording
from integrations.tiny import host, rows, scripted, tiny_model, trainer, updates, vowels
from recording.samples import make

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::fiberpo.FiberPOWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
]

CUT = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "num_iterations": 2}
OBJECTIVE = recipes.fiberpo_domain(
    {"domain": (0.01, 0.008), "group": (0.02, 0.015), "trajectory": (0.05, 0.03)}, epsilon=0.05
)


class Windows(TrainerCallback):
    """The batches of every optimizer step, as the trainer's own windows hold them."""

    def __init__(self):
        self.found = []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        surrogates = self.run.last_window.surrogates
        batch = RatioBatch.concatenate([s.batch for s in surrogates])
        self.found.append((batch, torch.cat([s.coefficients for s in surrogates])))


def ours(folder, **settings):
    windows = Windows()
    run = trainer(folder, objective=OBJECTIVE, callbacks=[windows], **{**CUT, **settings})
    windows.run = run
    return scripted(run), windows


def test_our_trainer_records_its_windows(tmp_path):
    """Tokens, ids, rewards and log-probs of every update; the objective says the same of them."""
    run, windows = ours(tmp_path, record_to=str(tmp_path / "recording"))
    run.train()
    recording = open_recording(tmp_path)
    assert recording.problems == []
    assert recording.manifest.host.startswith("trl 1.")
    assert recording.manifest.settings["num_iterations"] == 2
    assert "loss_type" not in recording.manifest.settings  # means nothing here
    assert recording.objective().gate_map == OBJECTIVE.gate_map
    assert recording.steps == [1, 2, 3, 4]
    for item, (batch, coefficients) in zip(recording.iterate(), windows.found, strict=True):
        found = item.batch
        assert found.lengths.tolist() == batch.lengths.tolist()
        assert torch.equal(found.old_log_probs, batch.old_log_probs)
        assert torch.equal(found.advantages, batch.advantages)
        torch.testing.assert_close(found.log_probs, batch.log_probs, atol=1e-5, rtol=0)
        again = recording.objective()(found)
        torch.testing.assert_close(again.coefficients, coefficients, atol=1e-5, rtol=1e-3)
        for name in ("domain", "group"):
            assert found.labels[name].value_names() == batch.labels[name].value_names()
            assert torch.equal(found.labels[name].codes, batch.labels[name].codes)
        for row in range(found.rows):
            text = "".join(item.text(row)).removesuffix("<eos>")
            assert vowels(None, [text])[0] == pytest.approx(float(item.rewards[row]), abs=0.04)
        assert item.entropies.min() > 0
        assert len(item.prompts) == found.rows
    assert updates(run)[0]["gate/active"] == 0
    assert max(line["gate/active"] for line in updates(run)) > 0


@pytest.mark.slow
def test_recording_changes_nothing(tmp_path):
    """Same metrics with and without, for our trainer and TRL's."""
    logs = {}
    for kind in ("ours", "host"):
        for recorded in (True, False):
            folder = tmp_path / kind / str(recorded)
            run = ours(folder)[0] if kind == "ours" else scripted(host(folder, **CUT))
            if recorded:
                record(run, folder / "recording")
            run.train()
            timed = ("time", "runtime", "per_second")
            logs[kind, recorded] = [
                {k: v for k, v in line.items() if not any(t in k for t in timed)}
                for line in updates(run)
            ]
        assert logs[kind, True] == logs[kind, False]


def test_a_plain_trl_trainer(tmp_path):
    """Groups by place, domains by column, rewards and text; the loss is that of the recipe."""
    run = scripted(host(tmp_path, loss_type="grpo", epsilon=0.01, beta=0.0, **CUT))
    added = record(run, tmp_path / "recording")
    assert added.recorder is None
    run.train()
    recording = open_recording(tmp_path)
    assert recording.problems == []
    assert recording.manifest.settings["loss_type"] == "grpo"
    assert "shuffles single answers" in recording.manifest.settings["groups"]
    data, objective = rows(), recording.objective()
    losses = [line["loss"] for line in updates(run)]
    for item, loss in zip(recording.iterate(), losses, strict=True):
        batch = item.batch
        assert torch.equal(batch.rollout_log_probs, batch.old_log_probs)
        assert float(objective(batch).loss) == pytest.approx(loss, abs=2e-6)
        domains, groups = batch.labels["domain"], batch.labels["group"]
        of = {row["prompt"]: row["domain"] for row in data}
        prompt_of = {}
        for row in range(batch.rows):
            prompt = item.prompts[row].strip()
            assert domains.value(int(domains.codes[row])) == of[prompt]
            assert prompt_of.setdefault(groups.value(int(groups.codes[row])), prompt) == prompt
            text = "".join(item.text(row)).removesuffix("<eos>")
            assert vowels(None, [text])[0] == pytest.approx(float(item.rewards[row]), abs=0.04)
        assert groups.count == len(set(item.prompts))
    moved = [float(i.batch.log_ratio.abs().max()) for i in recording.iterate()]
    assert moved[0] < 1e-6 < moved[1]


def test_one_update_a_rollout_has_a_ratio_of_one(tmp_path):
    """TRL leaves out old log-probs there, and our trainer anchors at the policy itself."""
    cut = {"steps_per_generation": 1, "max_steps": 2}
    for folder, run in (
        (tmp_path / "host", host(tmp_path / "host", **cut)),
        (tmp_path / "ours", trainer(tmp_path / "ours", objective=OBJECTIVE, **cut)),
    ):
        record(run, folder / "recording")
        run.train()
        for item in open_recording(folder).iterate():
            assert float(item.batch.log_ratio.abs().max()) == 0
            assert float(item.batch.log_probs.max()) < 0
            assert item.step in (1, 2)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"loss_type": "grpo", "epsilon_high": 0.3}, recipes.grpo(0.2, 0.3)),
        ({"loss_type": "grpo", "delta": 2.0}, recipes.grpo(0.2, dual_clip=2.0)),
        ({"loss_type": "dapo"}, recipes.ppo(0.2)),
        ({"loss_type": "dr_grpo"}, recipes.dr_grpo(8, 0.2)),
        ({"loss_type": "grpo", "importance_sampling_level": "sequence"}, recipes.gspo(0.2, 0.2)),
        ({"loss_type": "dapo", "importance_sampling_level": "sequence"}, None),
        ({"loss_type": "bnpo"}, None),
        ({"loss_type": "grpo", "top_entropy_quantile": 0.5}, None),
        ({"loss_type": "grpo", "off_policy_mask_threshold": 0.5}, None),
    ],
)
def test_objectives_of_trl(tmp_path, settings, wanted):
    """Named only where the recipe equals TRL's own loss."""
    found = known_objective(host(tmp_path, **settings))
    if wanted is None:
        assert found is None
    else:
        assert (found.gate_map, found.weights) == (wanted.gate_map, wanted.weights)


@pytest.mark.slow
def test_resume_of_our_trainer(tmp_path):
    """From the checkpoint of step 2 on: later steps are replaced, earlier ones kept."""
    settings = {"save_strategy": "steps", "save_steps": 2, "model": None}
    path = tmp_path / "recording"
    run, _ = ours(tmp_path, record_to=str(path), **{**settings, "max_steps": 3})
    run.train()
    before = {item.step: item.batch for item in open_recording(path).iterate()}
    again, _ = ours(tmp_path, record_to=str(path), **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    recording = open_recording(path)
    assert (recording.steps, recording.problems) == ([1, 2, 3, 4], [])
    after = {item.step: item.batch for item in recording.iterate()}
    for step in (1, 2):
        assert torch.equal(after[step].log_probs, before[step].log_probs)
    torch.testing.assert_close(after[3].log_probs, before[3].log_probs, atol=1e-5, rtol=0)
    with pytest.raises(
        RecordingError, match=r"steps 1 to 4.*remove the directory, or pass overwrite=True to"
    ):
        ours(tmp_path, record_to=str(path), **settings)[0].train()
    fresh, _ = ours(tmp_path, **settings)
    record(fresh, path, overwrite=True)
    fresh.train()
    assert open_recording(path).manifest.complete


def test_an_update_that_cannot_be_recorded(tmp_path, caplog):
    """NaN log-probs: said, and the host goes on as it would have."""
    run = scripted(host(tmp_path, **CUT))
    score = run._get_per_token_logps_and_entropies

    def broken(*args, **kwargs):
        found = score(*args, **kwargs)
        bad = run.state.global_step == 1 and torch.is_grad_enabled()
        return (found[0] * float("nan"), *found[1:]) if bad else found

    run._get_per_token_logps_and_entropies = broken
    record(run, tmp_path / "recording")
    run.train()
    assert run.state.global_step == 4
    assert open_recording(tmp_path).steps[:1] == [1]
    assert 2 not in open_recording(tmp_path).steps
    assert "step 2 is not in the recording" in caplog.text


def test_what_cannot_be_recorded(tmp_path):
    """Another kind of trainer; a column that is not there."""
    with pytest.raises(ConfigError, match="not a int"):
        record(3, tmp_path)
    run = host(tmp_path)
    record(run, tmp_path / "recording", domain_column="nope")
    with pytest.raises(ValueError, match="no column 'nope'"):
        run.train()


def test_evaluation_is_not_recorded(tmp_path):
    """An evaluation between updates leaves the recording as it is."""
    cut = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 2}
    run = trainer(tmp_path, objective=OBJECTIVE, eval_dataset=rows(8), **CUT, **cut)
    record(run, tmp_path / "recording")
    run.train()
    recording = open_recording(tmp_path)
    assert [item.batch.rows for item in recording.iterate()] == [16, 16]


# ------------------------------------------------------------------------------- fiberpo train


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A model directory and a reward file."""
    folder = tmp_path_factory.mktemp("start")
    model, tokenizer = tiny_model(max_position_embeddings=128)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "reward.py").write_text(
        "def vowels(prompts, completions, domain, **columns):\n"
        "    return [sum(c in 'aeiou0123' for c in text) / 8 for text in completions]\n"
    )
    return folder


@pytest.mark.slow
def test_train_with_the_flag(start, tmp_path):
    """``--record`` leaves a recording in the run's directory; its steps are the metrics'."""
    values = {
        "prompts": 8, "generations": 4, "heldout_prompts": 4, "max_completion_length": 8,
        "save_every": 1,
    }  # fmt: skip
    arguments = [
        "train", "--model", str(start / "model"), "--reward", f"{start}/reward.py:vowels",
        "--name", "run", "--output", str(tmp_path), "--rollouts", "2", "--record",
        *(part for k, v in values.items() for part in ("--set", f"{k}={v}")),
    ]  # fmt: skip
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    recording = open_recording(tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    train = [r for r in map(json.loads, lines) if r["kind"] == "train"]
    assert recording.steps == [r["step"] for r in train]
    assert recording.problems == []
    assert recording.objective().name == "fiberstop"
    for item, line in zip(recording.iterate(), train, strict=True):
        assert float(item.rewards.mean()) >= 0
        found = recording.objective()(item.batch).metrics()
        assert found["gate/active"] == pytest.approx(line["gate/active"], abs=0.02)
        assert found["kl/k3"] == pytest.approx(line["kl/k3"], abs=1e-6)
    again = CliRunner().invoke(app, ["train", "--resume", str(tmp_path / "run"), "--rollouts", "3"])
    assert again.exit_code == 0, again.output
    assert len(open_recording(tmp_path / "run").steps) == 12


def test_the_recorder_of_the_examples_docs(tmp_path):
    """A custom loop: one call a step."""
    recorder = Recorder(tmp_path, recipes.gspo(), host="my loop")
    recorder.record(0, make())
    recorder.close()
    assert open_recording(tmp_path).manifest.host == "my loop"
