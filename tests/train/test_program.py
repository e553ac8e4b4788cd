"""``fiberpo train`` as its user meets it, on a random 50k-parameter model."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fiberpo import recipes
from fiberpo.cli import app, main
from fiberpo.errors import ConfigError
from fiberpo.train import program
from fiberpo.train.callbacks import MetricsFile, RunCallback
from fiberpo.train.config import make_config
from fiberpo.train.program import train
from fiberpo.train.warmstart import warmstart
from integrations.tiny import tiny_model

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::fiberpo.FiberPOWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
]

REWARD = """
def vowels(prompts, completions, domain, **columns):
    return [sum(c in "aeiou0123" for c in text) / 8 for text in completions]
"""


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A model directory and a reward file."""
    folder = tmp_path_factory.mktemp("start")
    model, tokenizer = tiny_model(max_position_embeddings=128)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "reward.py").write_text(REWARD)
    return folder


def settings(start, output, **overrides):
    values = {
        "model": str(start / "model"), "reward": f"{start}/reward.py:vowels", "name": "run",
        "output": str(output), "rollouts": 3, "prompts": 8, "generations": 4, "heldout_prompts": 4,
        "heldout_every": 2, "save_every": 1, "learning_rate": 3e-3, "max_completion_length": 8,
    }  # fmt: skip
    return make_config(None, {**values, **overrides})


def lines(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_everything_behind(start, tmp_path):
    """Report, picture, metrics, summary, configuration, checkpoint."""
    config = settings(start, tmp_path)
    summary = train(config, progress=False, say=lambda line: None)
    assert summary["steps"] == 12
    assert not summary["interrupted"]
    assert set(summary["heldout_after"]) == {"sum", "sort", "reverse", "boolean", "mean"}
    assert {row["stratum"] for row in summary["strata"]} == {
        "domain", "group", "trajectory", "token"
    }  # fmt: skip
    names = {p.name for p in config.run_dir.iterdir()}
    assert {
        "report.html", "report.png", "metrics.jsonl", "summary.json", "config.yaml", "checkpoint-12"
    } <= names  # fmt: skip
    records = lines(config.run_dir)
    assert [r["step"] for r in records if r["kind"] == "train"] == list(range(1, 13))
    assert [r["step"] for r in records if r["kind"] == "eval"] == [0, 8, 12]
    assert [r["rollout"] for r in records if r["kind"] == "train"] == [i // 4 for i in range(12)]
    assert make_config(config.run_dir / "config.yaml") == config


def test_resume_gives_the_numbers_of_an_uninterrupted_run(start, tmp_path, monkeypatch):
    """Interrupted in the middle of the second rollout, resumed: same metrics, same weights."""
    whole = settings(start, tmp_path / "a")
    train(whole, progress=False, say=lambda line: None)
    cut = settings(start, tmp_path / "b")
    original = RunCallback.on_step_end

    def interrupt(self, args, state, control, **kwargs):
        if state.global_step == 6:
            os.kill(os.getpid(), signal.SIGINT)
        original(self, args, state, control, **kwargs)

    monkeypatch.setattr(RunCallback, "on_step_end", interrupt)
    half = train(cut, progress=False, say=lambda line: None)
    assert half["interrupted"]
    assert half["steps"] == 6
    assert half["heldout_after"] is None
    assert (cut.run_dir / "report.html").exists()
    monkeypatch.setattr(RunCallback, "on_step_end", original)
    summary = train(cut, resume=True, progress=False, say=lambda line: None)
    assert not summary["interrupted"]

    def numbers(config):
        volatile = ("step_time", "epoch")
        return [
            {k: v for k, v in record.items() if k not in volatile}
            for record in lines(config.run_dir)
        ]

    assert numbers(whole) == numbers(cut)
    expected = json.loads((whole.run_dir / "summary.json").read_text())
    assert summary["heldout_after"] == expected["heldout_after"]
    assert summary["strata"] == expected["strata"]
    weights = [
        torch.load(c.run_dir / "checkpoint-12" / "optimizer.pt", weights_only=True)["state"]
        for c in (whole, cut)
    ]
    for a, b in zip(weights[0].values(), weights[1].values(), strict=True):
        assert torch.equal(a["exp_avg"], b["exp_avg"])


def test_same_seed_same_run_other_seed_other_run(start, tmp_path):
    """``seed`` makes a run repeatable."""
    runs = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        config = settings(start, tmp_path / name, seed=seed, rollouts=1)
        train(config, progress=False, say=lambda line: None)
        runs[name] = [r["grad_norm"] for r in lines(config.run_dir) if r["kind"] == "train"]
    assert runs["a"] == runs["b"] != runs["c"]


def test_one_update_per_rollout_is_said_once(start, tmp_path, caplog):
    """No gate can act: the doctor in the trainer says so before it starts."""
    config = settings(start, tmp_path, updates_per_rollout=1, rollouts=2)
    train(config, progress=False, say=lambda line: None)
    (message,) = [r.getMessage() for r in caplog.records if "GATES ARE INERT" in r.getMessage()]
    assert "steps_per_generation = 1" in message


@pytest.mark.parametrize(
    "objective", ["grpo", "gspo", "dapo", "ppo", "fiberpo", "fiberpo_domain", "apc", "dr_grpo"]
)
def test_any_recipe_runs_on_the_same_path(start, tmp_path, objective):
    """Baselines take the same trainer."""
    config = settings(start, tmp_path, objective=objective, rollouts=1, micro_batch=4)
    summary = train(config, progress=False, say=lambda line: None)
    assert summary["objective"].startswith(f"{objective}(")
    assert summary["strata"]


def test_own_data_in_the_form_of_verl(start, tmp_path):
    """``data_source`` becomes the domain, ``reward_model.ground_truth`` the answer."""
    words = [
        "".join("abcdef"[(i * k) % 6] for k in range(1, 5)) + "abcdef"[i % 6] for i in range(60)
    ]
    rows = [
        {
            "data_source": ("rev", "dup")[i % 2], "prompt": f"reverse {word}{i}:",
            "reward_model": {"ground_truth": word[::-1]}, "extra_info": {"index": i},
        }
        for i, word in enumerate(words)
    ]  # fmt: skip
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = settings(start, tmp_path, data=str(path), reward=None, rollouts=1)
    summary = train(config, progress=False, say=lambda line: None)
    assert set(summary["heldout_after"]) == {"rev", "dup", "mean"}


def test_a_used_directory_is_not_overwritten(start, tmp_path):
    """The error names the three ways out; a foreign directory is never removed."""
    config = settings(start, tmp_path, rollouts=1)
    config.run_dir.mkdir(parents=True)
    (config.run_dir / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="--resume .* --overwrite"):
        train(config, progress=False, say=lambda line: None)
    with pytest.raises(ValueError, match="is not a run"):
        train(config, overwrite=True, progress=False, say=lambda line: None)
    with pytest.raises(ValueError, match="no checkpoint"):
        train(config, resume=True, progress=False, say=lambda line: None)
    assert (config.run_dir / "notes.txt").read_text() == "mine"


def test_metrics_file_forgets_what_came_after_the_checkpoint(tmp_path):
    """Lines after the checkpoint and a torn last line go; NaN is left out."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    metrics = MetricsFile(path, resume_step=2)
    metrics.write("train", 3, 0, {"a": float("nan"), "b": 1.5})
    metrics.close()
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert records == [
        {"step": 1},
        {"step": 2},
        {"kind": "train", "step": 3, "rollout": 0, "b": 1.5},
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--objective", "fibrepo"], "unknown objective 'fibrepo'"),
        (["--set", "promts=3"], "did you mean 'prompts'"),
        (["--set", "prompts=many"], "prompts is 'many'"),
        (["--budget", "domain=3"], "domain=0.02,0.015"),
        (["--budget", "domain=-1,1"], "must be > 0"),
        (["--printed"], "write --objective fiberpo_domain --printed"),
        (["--objective", "fiberstop", "--pessimistic"], "--objective fiberpo_domain --pessimistic"),
        (["--task", "sums"], "unknown task 'sums'"),
        (["--model", "no/such-model"], "cannot load the model"),
        (["--data", "missing.jsonl"], "missing.jsonl"),
        (["--set", "generations=1"], "generations is 1"),
        (["--reward-noise", "sum"], "'sum' is not of the form sum=0.3"),
        (
            ["--reward-noise", "sum=0.1", "--reward-noise", "sum=0.2"],
            "names the domain 'sum' twice",
        ),
        (["--reward-noise", "sum=2"], "reward_noise of the domain 'sum' is 2.0"),
        (["--reward-noise", "summ=0.2"], "names the domain 'summ'; there are sum, sort"),
        (["--engine-noise", "-1"], "engine_noise is -1.0"),
        (["--set", "updates_per_rollout=7"], "does not divide"),
        (["--resume", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_end_without_a_traceback(tmp_path, arguments, said, monkeypatch, capsys):
    """Exit code 2 and one line that quotes the value."""
    command = ["fiberpo", "train", "--output", str(tmp_path / "runs"), *arguments]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith("fiberpo: ")
    assert not (tmp_path / "runs").exists()


def test_the_summary_for_other_programs(start, tmp_path, monkeypatch, capfd):
    """``--json -`` prints it and nothing else; ``--json FILE`` beside the tables."""
    command = [
        "fiberpo", "train", "--model", f"{start}/model", "--reward", f"{start}/reward.py:vowels",
        "--rollouts", "1", "--output", str(tmp_path),
    ]  # fmt: skip
    for text in ("prompts=4", "generations=4", "heldout_prompts=2", "max_completion_length=4"):
        command += ["--set", text]

    def call(*more):
        monkeypatch.setattr(sys, "argv", [*command, *more])
        with pytest.raises(SystemExit) as end:
            main()
        assert not end.value.code
        return capfd.readouterr()

    said = call("--name", "a", "--json", "-")
    assert json.loads(said.out) == json.loads((tmp_path / "a/summary.json").read_text())
    assert "report: " in said.err
    assert "rollouts   1" in said.err
    said = call("--name", "b", "--json", str(tmp_path / "b.json"))
    assert json.loads((tmp_path / "b.json").read_text())["name"] == "b"
    assert "Held-out reward" in said.out


def test_the_command_is_installed():
    """``python -m fiberpo`` is the same program."""
    command = [sys.executable, "-m", "fiberpo", "train", "--set", "promts=3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "did you mean 'prompts'" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_has_an_example():
    """Every command says what it does and shows how."""
    for command in ("train", "warmstart"):
        result = CliRunner().invoke(app, [command, "--help"])
        assert result.exit_code == 0
        assert f"Example: fiberpo {command}" in " ".join(result.output.split())


def test_version():
    """``fiberpo --version`` prints it."""
    import fiberpo

    result = CliRunner().invoke(app, ["--version"])
    assert result.output.strip() == f"fiberpo {fiberpo.__version__}"


def test_running_from_another_directory(start, tmp_path):
    """A run directory is relative to where the command is given."""
    config = settings(start, "runs", rollouts=1)
    here = Path.cwd()
    os.chdir(tmp_path)
    try:
        train(config, progress=False, say=lambda line: None)
    finally:
        os.chdir(here)
    assert (tmp_path / "runs" / "run" / "report.html").exists()


@pytest.mark.parametrize("objective", ["fiberpo_domain", "fiberstop"])
def test_a_misspelt_stratum_is_refused_before_anything_is_written(tmp_path, objective):
    """Not after the first rollout."""
    config = make_config(
        None,
        {
            "output": str(tmp_path),
            "name": "x",
            "objective": objective,
            "objective_kwargs": {"budgets": {"domian": (0.1, 0.1)}},
        },
    )
    with pytest.raises(ConfigError, match="stratum 'domian'; fiberpo train has domain, group"):
        train(config)
    assert not (tmp_path / "x").exists()


def test_a_warm_start_onto_a_file_is_refused_before_training(tmp_path):
    """Not two minutes later."""
    (tmp_path / "x").write_text("")
    with pytest.raises(ConfigError, match="x is a file: name a directory"):
        warmstart(tmp_path / "x")


def test_resume_of_what_is_no_run_says_so(tmp_path, capsys, monkeypatch):
    """Not that some configuration file is missing."""
    monkeypatch.setattr(sys, "argv", ["fiberpo", "train", "--resume", str(tmp_path)])
    with pytest.raises(SystemExit):
        main()
    assert "it is not the directory of a run" in capsys.readouterr().err


DOMAIN = {
    "budgets": {"domain": (0.02, 0.015), "group": (0.04, 0.03), "trajectory": (0.12, 0.05)},
    "epsilon": 0.2, "pessimistic": True,
}  # fmt: skip
"""What ``objective: fiberpo_domain`` has meant since it was the default."""


def same(made, expected):
    """The same formula and weights, whatever the parameters were written as."""
    parts = [(o.name, o.gate_map, o.factors, o.weights, o.mask) for o in (made, expected)]
    return parts[0] == parts[1]


def test_without_a_word_it_is_fiberstop():
    """With the parameters of the recipe; what is given replaces one at a time."""
    assert same(make_config().build_objective(), recipes.fiberstop())
    assert make_config().run_name == "fiberstop-embedded-seed0"
    given = make_config(None, {"objective_kwargs": {"epsilon": 0.1}})
    assert same(given.build_objective(), recipes.fiberstop(epsilon=0.1))
    assert not same(given.build_objective(), recipes.fiberstop())


@pytest.mark.parametrize(
    "given",
    [
        {}, {"pessimistic": False}, {"epsilon": 0.05}, {"measure": "token"}, {"rollback": 32.0},
        {"budgets": {"domain": (0.05, 0.04)}},
    ],
)  # fmt: skip
def test_fiberpo_domain_means_what_it_meant_as_the_default(given):
    """The parameters of the program, each replaced by what is given: runs of a study name it."""
    made = make_config(None, {"objective": "fiberpo_domain", "objective_kwargs": given})
    assert same(made.build_objective(), recipes.fiberpo_domain(**{**DOMAIN, **given}))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], recipes.fiberstop()),
        (
            ["--budget", "domain=0.03,0.02", "--epsilon", "0.1"],
            recipes.fiberstop({"domain": (0.03, 0.02)}, 0.1),
        ),
        (["--objective", "fiberpo_domain"], recipes.fiberpo_domain(**DOMAIN)),
        (
            ["--objective", "fiberpo_domain", "--printed", "--epsilon", "0.1"],
            recipes.fiberpo_domain(**{**DOMAIN, "pessimistic": False, "epsilon": 0.1}),
        ),
        (
            ["--objective", "fiberpo", "--budget", "trajectory=0.1,0.05", "--pessimistic"],
            recipes.fiberpo((0.1, 0.05), pessimistic=True),
        ),
    ],
)
def test_options_of_the_objective(options, expected, tmp_path, monkeypatch):
    """What the command line says is what is trained."""
    seen = []
    monkeypatch.setattr(
        program, "train", lambda config, **_: seen.append(config) or {"interrupted": False}
    )
    result = CliRunner().invoke(app, ["train", "--output", str(tmp_path), "--json", "-", *options])
    assert result.exit_code == 0, result.output
    assert same(seen[0].build_objective(), expected)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, ["a method of ours", "defaults of the recipe"]),
        ({"objective_kwargs": {"budgets": {"domain": (0.1, 0.1)}}}, ["a method of ours"]),
        ({"objective": "fiberpo_domain"}, ["defaults of this program", "the pessimistic form"]),
        (
            {"objective": "fiberpo_domain", "objective_kwargs": {"pessimistic": False}},
            ["defaults of this program"],
        ),
        ({"objective": "grpo"}, []),
    ],
)
def test_notes_say_whose_parameters_are_in_use(settings, words):
    """And which method is not the paper's."""
    notes = program._notes(make_config(None, settings))
    assert len(notes) == len(words)
    assert all(word in note for word, note in zip(words, notes, strict=True))
