"""`fiberpo replay`, `suggest` and `doctor` as their user meets them."""

import json
import sys

import pytest
import yaml

from diagnosis.cases import batch
from fiberpo import MaxDivergence, recipes
from fiberpo.cli import main
from fiberpo.cli.recordings import _split
from fiberpo.corrections import TruncatedIS, corrected
from fiberpo.recording import Recorder

OBJECTIVE = recipes.fiberpo_domain(
    {"domain": (0.14, 0.14), "group": (0.06, 0.06), "trajectory": (0.09, 0.09)}, epsilon=0.3
)


def write(path, count=8, objective=OBJECTIVE, **settings):
    with Recorder(path, objective, settings={"updates_per_rollout": 4, **settings}) as recorder:
        for i in range(count):
            recorder.record(i + 1, batch(i, fresh=i % 4 == 0))
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The directory of a run with a recording."""
    folder = tmp_path_factory.mktemp("run")
    write(folder / "recording")
    return folder


@pytest.fixture
def fiberpo(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["fiberpo", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        said = capsys.readouterr()
        return end.value.code or 0, said.out, said.err

    return call


def test_replay(fiberpo, run, tmp_path):
    """Tables, and the same numbers as JSON."""
    code, out, err = fiberpo(
        "replay", run, "--objective", "fiberpo_domain", "--budget", "domain=0.02,0.015",
        "--compare", "grpo,gspo(epsilon=0.02),recorded", "--json", tmp_path / "new/replay.json",
    )  # fmt: skip
    assert code == 0, err
    assert "Counterfactual for one step only" in out
    for word in ("Regimes", "Gradient mass", "Cosine", "trajectories most changed", "domain"):
        assert word in out
    found = json.loads((tmp_path / "new/replay.json").read_text())
    names = [o["name"] for o in found["objectives"]]
    assert names == ["fiberpo_domain", "grpo", "gspo(epsilon=0.02)", "recorded"]
    assert "(0.02, 0.015)" in found["objectives"][0]["objective"]
    assert found["objectives"][3]["objective"] == str(OBJECTIVE)
    assert found["first_updates"] == 2
    code, out, _ = fiberpo("replay", run, "--json", "-")
    assert [o["name"] for o in json.loads(out)["objectives"]] == ["recorded"]


def replayed(fiberpo, run, *arguments):
    code, out, err = fiberpo("replay", run, *arguments, "--json", "-")
    assert code == 0, err
    return {o["name"]: o["objective"] for o in json.loads(out)["objectives"]}


def test_replay_changes_what_was_recorded(fiberpo, run, tmp_path):
    """Flags are parameters of the recorded objective; what they do not name stays."""
    budgets = {"domain": (0.14, 0.14), "group": (0.06, 0.06), "trajectory": (0.09, 0.09)}
    for objective in ((), ("--objective", "recorded")):
        changed = replayed(fiberpo, run, *objective, "--epsilon", "0.1", "--pessimistic")
        assert changed == {
            "changed": str(recipes.fiberpo_domain(budgets, epsilon=0.1, pessimistic=True))
        }
        changed = replayed(fiberpo, run, *objective, "--budget", "trajectory=0.002,0.001",
                           "--compare", "recorded")  # fmt: skip
        mine = {**budgets, "trajectory": (0.002, 0.001)}
        assert changed == {
            "changed": str(recipes.fiberpo_domain(mine, epsilon=0.3)), "recorded": str(OBJECTIVE)
        }  # fmt: skip
    made = recipes.fiberpo((0.2, 0.1), epsilon=0.05, mask=MaxDivergence(0.5))
    made = corrected(made, factors=[TruncatedIS(2.0)])
    with Recorder(tmp_path / "factors", made) as recorder:
        recorder.record(1, batch(rollout_log_probs=batch().old_log_probs))
    (changed,) = replayed(fiberpo, tmp_path / "factors", "--epsilon", "0.1").values()
    assert changed == str(made).replace("epsilon=0.05", "epsilon=0.1") != str(made)


@pytest.mark.parametrize(
    ("objective", "arguments", "said"),
    [
        (recipes.gspo(0.1), ("--budget", "trajectory=0.1,0.1"), "gspo has no parameter 'budgets'"),
        (recipes.grpo(0.1), ("--pessimistic",), "grpo has no parameter 'pessimistic'"),
        (recipes.grpo(0.1), ("--epsilon", "2"), "epsilon"),
        (recipes.fiberpo(), ("--budget", "domain=0.1,0.1"), "fiberpo has one budget"),
        (None, ("--epsilon", "0.1"), "does not say which objective"),
        (None, ("--objective", "gspo(epsilon=0.1)", "--epsilon", "0.2"), "epsilon is given twice"),
    ],
)
def test_replay_refuses_what_does_not_apply(fiberpo, tmp_path, objective, arguments, said):
    """Nothing is left out, and no other objective takes the place of the recorded one."""
    code, out, err = fiberpo("replay", write(tmp_path / "run", 1, objective), *arguments)
    assert code == 2
    assert out == ""
    assert said in err
    assert "--objective" in err


def test_commas_inside_brackets():
    """An objective with several parameters is one objective."""
    assert _split("grpo, gspo(epsilon=0.1, epsilon_high=0.2),ppo") == [
        "grpo", "gspo(epsilon=0.1, epsilon_high=0.2)", "ppo",
    ]  # fmt: skip


def test_suggest(fiberpo, run):
    """Numbers and snippets; what it prints can be pasted."""
    code, out, _ = fiberpo("suggest", run, "--activity", "0.2")
    assert code == 0
    for word in ("p50", "p90", "p99", "budget", "epsilon:", "--budget trajectory=", "recipes."):
        assert word in out
    code, out, _ = fiberpo("suggest", run, "--per-domain", "--strata", "domain,trajectory",
                           "--json", "-")  # fmt: skip
    found = json.loads(out)["objective_kwargs"]["budgets"]
    assert set(found) == {"domain", "trajectory"}
    assert set(found["domain"]) == {"code", "math", "*"}


def test_doctor_of_a_run(fiberpo, run, tmp_path):
    """Exit code 0 without an error, 1 with one; warnings count where asked."""
    assert fiberpo("doctor", run)[:2] == (0, "Nothing found.\n")
    inert = write(tmp_path / "inert", 1, updates_per_rollout=1)
    code, out, _ = fiberpo("doctor", inert, "--json", "-")
    found = json.loads(out)
    assert code == found["exit_code"] == 1
    assert [f["code"] for f in found["findings"]] == ["inert-gates"]
    assert found["counts"] == {"error": 1, "warning": 0, "note": 0}
    code, out, _ = fiberpo("doctor", inert)
    assert "seen GATES ARE INERT" in out
    assert "change" in out


def test_doctor_of_settings(fiberpo, tmp_path):
    """Of fiberpo train with its defaults; of TRL; warnings are errors with --strict."""
    path = tmp_path / "config.yaml"
    path.write_text("rollouts: 3\n")
    assert fiberpo("doctor", path)[:2] == (0, "Nothing found.\n")
    path.write_text("rollouts: 3\nobjective: fiberpo_domain\n")
    code, out, _ = fiberpo("doctor", path)
    assert code == 0
    assert "epsilon-above-budget" in out  # with the budgets that the program gives it
    path.write_text("updates_per_rollout: 1\nobjective: grpo\n")
    assert fiberpo("doctor", path)[0] == 1
    warned = {"steps_per_generation": 4, "bf16": True}
    path.write_text(yaml.safe_dump(warned))
    assert fiberpo("doctor", path)[0] == 0
    assert fiberpo("doctor", path, "--strict")[0] == 1
    path.write_text("steps_per_generation: 4\n")  # bf16 by TRL's default
    assert "bf16-log-probs" in fiberpo("doctor", path)[1]
    trl = tmp_path / "trl.json"
    trl.write_text(json.dumps({"gradient_accumulation_steps": 4}))
    code, out, _ = fiberpo("doctor", trl)
    assert code == 1
    assert "steps_per_generation = 4" in out
    code, out, err = fiberpo("doctor", trl, "--column", "log_probs=lp")
    assert (code, out) == (2, "")
    assert "--column 'log_probs=lp'" in err
    assert "settings" in err


BAD = {
    "missing": (None, "does not exist"),
    "empty folder": ({}, "holds nothing"),
    "foreign": ({"notes.txt": "hello"}, "notes.txt"),
    "damaged manifest": ({"manifest.json": '{"format": "fiber'}, "damaged"),
    "no step": ({"manifest.json": '{"format": "fiberpo recording", "schema": 1}'}, "no whole step"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("verb", ["replay", "suggest", "doctor"])
def test_wrong_input_is_one_line(fiberpo, tmp_path, verb, case):
    """Exit code 2, what was found, no traceback."""
    files, said = BAD[case]
    folder = tmp_path / "there"
    if files is not None:
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)
    code, out, err = fiberpo(verb, folder)
    assert code == 2
    assert out == ""
    assert said in err
    assert "Traceback" not in err


def test_torn_shards_are_skipped_and_said(fiberpo, tmp_path):
    """A run that was killed while it wrote."""
    folder = write(tmp_path / "torn")
    shard = sorted(folder.rglob("*.npz"))[-1]
    shard.write_bytes(shard.read_bytes()[:100])
    code, out, _ = fiberpo("replay", folder, "--json", "-")
    found = json.loads(out)
    assert code == 0
    assert found["steps"] == 7
    assert any("torn" in problem for problem in found["problems"])
    code, out, _ = fiberpo("doctor", folder)
    assert code == 0
    assert "recording-incomplete" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("replay", "RUN", "--objective", "grpoo"), "unknown objective 'grpoo'"),
        (("replay", "RUN", "--compare", "gspo(epsilon"), "cannot read the objective"),
        (("replay", "RUN", "--compare", "grpo,grpo"), "named twice"),
        (("replay", "RUN", "--budget", "continent=0.1,0.1"), "continent"),
        (("replay", "RUN", "--objective", "grpo", "--budget", "domain=1,1"), "no parameter"),
        (("replay", "RUN", "--json", "RUN"), "--json"),
        (("suggest", "RUN", "--activity", "2"), "activity is 2.0"),
        (("suggest", "RUN", "--strata", "continent"), "continent"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_one_line(fiberpo, run, arguments, said):
    """Exit code 2, the value that was wrong."""
    code, _, err = fiberpo(*(run if a == "RUN" else a for a in arguments))
    assert code == 2
    assert said in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("text", "said"),
    [("- a\n", "a list"), ("", "nothing"), ("a: [\n", "not YAML"),
     ("flavour: 1\n", "whose settings"), ("updates_per_rollout: many\n", "updates_per_rollout")],
)  # fmt: skip
def test_wrong_settings_are_one_line(fiberpo, tmp_path, text, said):
    """A file that holds something else."""
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    code, _, err = fiberpo("doctor", path)
    assert code == 2
    assert said in err


def test_parquet_and_jsonl_files_are_recordings(fiberpo, tmp_path):
    """Whatever `open_recording` reads; here one line a trajectory."""
    path = tmp_path / "rows.jsonl"
    rows = []
    for row in range(8):
        drift = [0.1 if row % 2 else -0.1] * 5
        rows.append({
            "step": 1, "group": row // 4, "domain": "math", "advantage": 1.0 if row % 2 else -1.0,
            "log_probs": [-1.0 + d for d in drift], "old_log_probs": [-1.0] * 5,
        })  # fmt: skip
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    code, out, err = fiberpo("replay", path, "--objective", "grpo", "--json", "-")
    assert code == 0, err
    assert json.loads(out)["tokens"] == 40
    renamed = [{("lp" if k == "log_probs" else k): v for k, v in r.items()} for r in rows]
    path.write_text("".join(json.dumps(r) + "\n" for r in renamed))
    for verb in (("replay", "--objective", "grpo"), ("suggest",), ("doctor",)):
        code, out, err = fiberpo(verb[0], path, *verb[1:], "--column", "log_probs=lp")
        assert code == 0, err
        code, _, err = fiberpo(verb[0], path, *verb[1:])
        assert code == 2
        assert "lp" in err
    code, _, err = fiberpo("suggest", path, "--column", "log_probs")
    assert code == 2
    assert "ours=theirs" in err
    path.write_text("".join(json.dumps(r)[:40] + "\n" for r in rows))
    code, _, err = fiberpo("replay", path, "--objective", "grpo")
    assert code == 2
    assert "Traceback" not in err
