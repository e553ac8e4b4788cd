"""Each check fires on what it is for, and not on a healthy run."""

import json
import re
import warnings
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from diagnosis.cases import Memory, batch, steps, tokens
from fiberpo import FiberPOError, MaxDivergence, RatioBatch, exact, recipes
from fiberpo.diagnosis import (
    Finding,
    examine,
    examine_batch,
    examine_config,
    examine_window,
    exit_code,
    suggest,
)  # fmt: skip
from fiberpo.diagnosis.settings import TRL_DEFAULTS
from fiberpo.recording import RecordedStep, Recorder

SETTINGS = {"updates_per_rollout": 4, "generations": 4}
BUDGETS = {"domain": (0.14, 0.14), "group": (0.06, 0.06), "trajectory": (0.09, 0.09)}
HEALTHY = recipes.fiberpo_domain(BUDGETS, epsilon=0.3)
TIDY = recipes.fiberpo_domain(BUDGETS, epsilon=0.07)


def recorded(items, objective=HEALTHY, settings=SETTINGS, **more):
    return Memory(items, objective, settings, **more)


def run(count=8, **changes):
    """A healthy run: 4 updates per rollout, 4 answers a prompt, budgets near the drift's p90."""
    return steps(count, fresh_every=4, **changes)


def codes(findings, *severities):
    return {f.code for f in findings if not severities or f.severity in severities}


def test_a_healthy_run_has_no_findings():
    """None at all: neither from the settings nor from the steps."""
    assert examine(recorded(run())) == []
    assert examine_batch(HEALTHY, batch(), settings=SETTINGS) == []
    assert examine_config({**SETTINGS, "prompts": 64}, objective=TIDY) == []


def test_stops_are_examined():
    """Budgets near the p90 of the drifts: nothing. Far from them: said, stratum by stratum."""
    found = suggest(recorded(run()), activity=0.1, stops=True)
    healthy = recipes.fiberstop(**found.parameters)
    assert examine(recorded(run(), healthy)) == []
    assert examine_config({**SETTINGS, "prompts": 64}, objective=healthy) == []
    wide = recipes.fiberstop(dict.fromkeys(found.budgets, (50.0, 50.0)), 50.0)
    places = {f.numbers["stratum"]: f.code for f in examine(recorded(run(), wide))}
    assert places == dict.fromkeys([*found.budgets, "token"], "budget-too-wide")
    narrow = recipes.fiberstop({"group": (1e-4, 1e-4)}, float("inf"))
    (finding,) = examine(recorded(run(), narrow))
    assert (finding.code, finding.numbers["stratum"]) == ("budget-too-narrow", "group")
    local = examine_config({**SETTINGS, "split_mode": "local"}, objective=healthy)
    assert codes(local) == {"local-aggregates"}
    alone = [RecordedStep(1, batch(groups=2)), RecordedStep(2, batch(seed=1, groups=2))]
    assert "idle-stratum" not in codes(examine(recorded(alone, healthy)))


def test_every_finding_says_what_to_change():
    """Numbers in words, and in a dictionary that JSON takes."""
    found = examine(recorded(steps(3, fresh_every=1)))
    for finding in found:
        assert finding.seen.endswith(".")
        assert finding.means
        assert finding.change
        assert json.loads(json.dumps(finding.as_dict()))["code"] == finding.code
    with pytest.raises(FiberPOError, match="severity"):
        Finding("x", "fatal", "", "", "")


@pytest.mark.parametrize(
    ("settings", "cause"),
    [
        ({"updates_per_rollout": 1, "passes_per_rollout": 1}, "updates_per_rollout = 1"),
        ({"num_generations": 8, "gradient_accumulation_steps": 4}, "steps_per_generation = 4"),
        (
            {"generation_batch_size": 32, "per_device_train_batch_size": 8,
             "gradient_accumulation_steps": 4}, "steps_per_generation = 4",
        ),
        (
            {"data": {"train_batch_size": 64},
             "actor_rollout_ref": {"actor": {"ppo_mini_batch_size": 64}}}, "ppo_mini_batch_size",
        ),
        ({"actor_rollout_ref.actor.ppo_mini_batch_size": 64, "data.train_batch_size": 64},
         "data.train_batch_size = 64"),
        ({"data": {"train_batch_size": 256}, "actor": {}}, "ppo_mini_batch_size = 256"),
        ({"actor_rollout_ref.actor.ppo_mini_batch_size": 1024}, "data.train_batch_size = 1024"),
    ],
)  # fmt: skip
def test_inert_gates_of_settings(settings, cause):
    """One update per rollout, with the settings that make it so."""
    (found,) = [f for f in examine_config(settings) if f.code == "inert-gates"]
    assert found.severity == "error"
    assert cause in found.seen


@pytest.mark.parametrize(
    "settings",
    [
        {"updates_per_rollout": 1, "passes_per_rollout": 2},
        {"steps_per_generation": 8, "gradient_accumulation_steps": 4, "fp16": True},
        {"num_iterations": 2, "num_generations": 8, "bf16": False},
        {"data.train_batch_size": 64, "actor_rollout_ref.actor.ppo_mini_batch_size": 16},
        {"data.train_batch_size": 64, "actor_rollout_ref.actor.ppo_mini_batch_size": 64,
         "actor_rollout_ref.actor.ppo_epochs": 2},
        {"data.train_batch_size": 64, "actor_rollout_ref.actor.ppo_mini_batch_size": 64,
         "algorithm.rollout_correction.bypass_mode": True},
        {"actor_rollout_ref.rollout.n": 8},
    ],
)  # fmt: skip
def test_several_updates_are_fine(settings):
    """Gates can act."""
    assert examine_config(settings) == []


def test_inert_gates_of_steps():
    """Every log ratio is 0: with one update per rollout, or where nothing is known."""
    still = [RecordedStep(i, batch(i, fresh=True)) for i in range(4)]
    one = examine(recorded(still, settings={"updates_per_rollout": 1}))
    assert codes(one) == {"inert-gates"}
    assert "updates_per_rollout = 1" in one[0].seen
    assert codes(examine(recorded(still, settings={}))) == {"inert-gates"}


def test_old_equals_current():
    """Several updates per rollout, and none of them moves: the anchor is computed anew."""
    still = [RecordedStep(i, batch(i, fresh=True)) for i in range(4)]
    assert codes(examine(recorded(still))) == {"old-equals-current"}
    assert examine(recorded(still[:1])) == []  # the first update of the first rollout
    assert codes(examine_batch(HEALTHY, batch(fresh=True))) == {"old-equals-current"}
    assert examine_batch(HEALTHY, batch(fresh=True), first_update=True) == []


def test_zero_advantages():
    """In all steps: nothing is learnt. In some: worth a warning."""
    dead = [RecordedStep(i, batch(i, advantages=torch.zeros(24))) for i in range(2)]
    (found,) = examine(recorded(dead))
    assert (found.code, found.severity) == ("zero-advantages", "error")
    (found,) = examine(
        recorded(
            [
                *run(),
                RecordedStep(9, replace(batch(), given_advantages=dead[0].batch.given_advantages)),
            ]
        )
    )
    assert (found.code, found.severity) == ("zero-advantages", "warning")
    assert found.numbers == {"steps": 9, "zero_steps": 1}


def test_groups_of_one():
    """Every group id stands once."""
    alone = [RecordedStep(i, batch(i, groups=24, answers=1)) for i in range(4)]
    found = {f.code: f for f in examine(recorded(alone, settings={}))}
    assert found["group-of-one"].severity == "error"
    assert "idle-stratum" in found
    assert codes(examine_config({"updates_per_rollout": 4, "generations": 1})) == {"group-of-one"}


def test_cut_groups():
    """Fewer answers of a prompt in a step than were sampled."""
    assert codes(examine(recorded(run(), settings={"updates_per_rollout": 4, "generations": 8}))) \
        == {"cut-groups"}  # fmt: skip
    cut = {"per_device_train_batch_size": 2, "steps_per_generation": 8, "num_generations": 4,
           "bf16": False}  # fmt: skip
    assert codes(examine_config(cut)) == {"cut-groups"}
    whole = {**cut, "per_device_train_batch_size": 8}
    assert examine_config(whole) == []
    one_window = {"gradient_accumulation_steps": 6, "steps_per_generation": 6, "num_iterations": 2}
    assert examine_config({**cut, **one_window, "per_device_train_batch_size": 3}) == []
    apart = {**whole, "keep_groups_together": False, "objective": "fiberpo_domain"}
    assert codes(examine_config(apart), "warning") == {"cut-groups"}


def test_ids_that_do_not_nest():
    """A group with answers to different prompts; labels that are refused."""
    item = run(1)[0]
    prompts = [f"prompt {g}" for g in item.batch.labels["group"].codes.tolist()]
    good = replace(item, prompts=prompts)
    assert examine(recorded([good], settings={})) == []
    bad = replace(item, prompts=[f"prompt {i}" for i in range(item.batch.rows)])
    assert codes(examine(recorded([bad], settings={}))) == {"ids-do-not-nest"}


def rounded(name):
    items = []
    for item in run():
        columns = {n: getattr(item.batch, n) for n in ("log_probs", "old_log_probs")}
        columns[name] = columns[name].bfloat16().double()
        items.append(RecordedStep(item.step, replace(item.batch, **columns)))
    return items


@pytest.mark.parametrize("name", ["log_probs", "old_log_probs"])
def test_bf16_log_probs(name):
    """Seen in the values themselves."""
    found = [f for f in examine(recorded(rounded(name))) if f.code == "bf16-log-probs"]
    assert found[0].numbers["columns"] == [name]


@pytest.mark.parametrize(
    ("given", "fires"),
    [
        ({}, True),
        ({"bf16": None, "fp16": None}, True),
        ({"bf16": True}, True),
        ({"fp16": False, "cast_lm_head_to_fp32": False}, True),
        ({"bf16": False}, False),
        ({"fp16": True}, False),
        ({"cast_lm_head_to_fp32": True}, False),
        ({"bf16": True, "cast_lm_head_to_fp32": True}, False),
    ],
)
def test_bf16_of_trl(given, fires):
    """TRL takes bf16 unless it is told otherwise."""
    found = examine_config({"steps_per_generation": 2, **given})
    assert codes(found) == ({"bf16-log-probs"} if fires else set())


def test_answers_to_a_prompt_of_trl():
    """8 by default: windows of 4 cut them."""
    cut = {"per_device_train_batch_size": 4, "steps_per_generation": 8, "bf16": False}
    (found,) = examine_config(cut)
    assert found.code == "cut-groups"
    assert found.numbers == {"window": 4, "generations": 8}
    assert examine_config({**cut, "num_generations": 4}) == []


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_defaults_of_trl():
    """Those of the installed one."""
    trl = pytest.importorskip("trl")
    defaults = {f.name: f.default for f in fields(trl.GRPOConfig)}
    assert {name: defaults[name] for name in TRL_DEFAULTS} == dict(TRL_DEFAULTS)
    made = {fp16: trl.GRPOConfig(use_cpu=True, report_to="none", fp16=fp16) for fp16 in (0, 1)}
    assert [made[fp16].bf16 for fp16 in (0, 1)] == [True, False]
    assert made[0].steps_per_generation == made[0].gradient_accumulation_steps


def test_few_values_do_not_show_a_precision():
    """Log-probs of -1 are numbers that bf16 has, and so are many of a toy example."""
    ones = RatioBatch.from_packed(
        -torch.ones(64) * 0.5, -torch.ones(64), torch.randn(16), [4] * 16,
        labels={"domain": [0] * 16, "group": torch.arange(16) // 4},
    )  # fmt: skip
    assert "bf16-log-probs" not in codes(examine_batch(HEALTHY, ones))


@pytest.mark.parametrize(
    ("factor", "code", "severity"),
    [(50, "budget-too-wide", "warning"), (1 / 50, "budget-too-narrow", "error"),
     (1 / 6, "mostly-gated", "error")],
)  # fmt: skip
def test_budgets_against_drifts(factor, code, severity):
    """Twenty times too wide or too narrow, or so narrow that most contexts are gated."""
    items = run()
    good = suggest(recorded(items), activity=0.2)
    assert examine(recorded(items, recipes.fiberpo_domain(good.budgets, epsilon=0.3))) == []
    budgets = {**good.budgets, "trajectory": tuple(factor * c for c in good.budgets["trajectory"])}
    found = examine(recorded(items, recipes.fiberpo_domain(budgets, epsilon=0.3)))
    (mine,) = [f for f in found if f.code == code]
    assert mine.severity == severity
    assert mine.numbers["stratum"] == "trajectory"
    assert codes(found, "error", "warning") == {code}


def test_budget_of_one_domain():
    """A named pair is held against the drifts of its domain."""
    named = {**BUDGETS, "domain": {"math": (5.0, 5.0), "*": BUDGETS["domain"]}}
    found = examine(recorded(run(), recipes.fiberpo_domain(named, epsilon=0.3)))
    (mine,) = [f for f in found if f.code == "budget-too-wide"]
    assert mine.numbers["context"] == "math"


def test_a_clip_has_a_limit_too():
    """GSPO with PPO's epsilon never clips; with its own it does."""
    wide = recipes.gspo(0.95, 30.0)
    assert "budget-too-wide" in codes(examine(recorded(run(), wide)))
    assert examine(recorded(run(), recipes.gspo(0.1))) == []


def test_epsilon_above_the_budget():
    """A note; as a finding of steps only where no token is clipped."""
    loose = HEALTHY
    (found,) = examine_config({**SETTINGS, "prompts": 64}, objective=loose)
    assert (found.code, found.severity) == ("epsilon-above-budget", "note")
    assert examine(recorded(run(), loose)) == []  # tokens are clipped
    never = recipes.fiberpo_domain(BUDGETS, epsilon=3.0)
    assert "epsilon-above-budget" in codes(examine(recorded(run(), never)))


def with_rollout(size):
    items = []
    for item in run():
        shift = size * torch.randn(len(item.batch), generator=torch.Generator().manual_seed(1))
        rollout = item.batch.old_log_probs + shift.double()
        items.append(RecordedStep(item.step, replace(item.batch, rollout_log_probs=rollout)))
    return items


def test_rollout_mismatch():
    """Engine and trainer apart by as much as the budget."""
    assert codes(examine(recorded(with_rollout(0.2)))) == {"rollout-mismatch"}
    assert examine(recorded(with_rollout(0.01))) == []


def test_length_bias_of_a_mask():
    """The largest divergence of a token rejects long answers; the mean of all does not."""
    items = []
    for i in range(4):
        item = batch(i, groups=16)
        generator = torch.Generator().manual_seed(i)
        lengths = torch.where(torch.arange(item.rows) % 2 == 0, 5, 80)
        new, old = tokens(generator, int(lengths.sum()), 0.1)
        group = torch.arange(item.rows) // 4
        step = RatioBatch.from_packed(
            new, old, item.advantages[: item.rows], lengths, rollout_log_probs=old,
            labels={"domain": ["a"] * item.rows, "group": group},
        )  # fmt: skip
        items.append(RecordedStep(i, step))
    budgets = {"group": (0.03, 0.03), "trajectory": (0.06, 0.06)}
    biased = recipes.fiberpo_domain(budgets, epsilon=0.05, mask=MaxDivergence(0.03))
    found = [f for f in examine(recorded(items, biased)) if f.code == "mask-length-bias"]
    assert found[0].numbers["kept_short"] > found[0].numbers["kept_long"] + 0.2
    even = recipes.fiberpo_domain(budgets, epsilon=0.05, mask=MaxDivergence(10.0))
    assert "mask-length-bias" not in codes(examine(recorded(items, even)))


def test_noise_is_told_from_a_changed_policy():
    """Symmetric errors have mean 0; a changed policy has ``mean l = -mean l^2 / 2``."""
    noisy = []
    for item in run(8):
        if item.step % 4 == 1:
            continue
        old = item.batch.old_log_probs
        shift = 0.3 * torch.randn(len(old), generator=torch.Generator().manual_seed(item.step))
        noisy.append(RecordedStep(item.step, replace(item.batch, log_probs=old + shift.double())))
    found = [f for f in examine(recorded(noisy)) if f.code == "noise"]
    assert found[0].numbers["expected"] > 4 * abs(found[0].numbers["k1"])
    assert "noise" not in codes(examine(recorded(run(8))))
    # too small to matter, and too few tokens to tell
    quiet = []
    for item in run(4):
        old = item.batch.old_log_probs
        moved = old + 0.01 * (item.batch.log_probs - old).sign()
        quiet.append(RecordedStep(item.step, replace(item.batch, log_probs=moved)))
    assert "noise" not in codes(examine(recorded(quiet)))


def test_idle_stratum():
    """One prompt group a domain, in most steps."""
    few = [RecordedStep(i, batch(i, groups=2)) for i in range(4)]
    (found,) = [f for f in examine(recorded(few)) if f.code == "idle-stratum"]
    assert found.numbers["stratum"] == "group"
    settings = {**SETTINGS, "prompts": 8, "tasks": []}
    assert codes(examine_config(settings, objective=TIDY)) == {"idle-stratum"}
    assert examine_config({**settings, "prompts": 64}, objective=TIDY) == []


def test_local_aggregates():
    """Gates above the trajectory, per micro-batch."""
    settings = {"steps_per_generation": 4, "split_mode": "local", "bf16": False}
    assert codes(examine_config(settings, objective=TIDY)) == {"local-aggregates"}
    assert examine_config(settings, objective=recipes.fiberpo(epsilon=0.04)) == []
    assert examine_config({**settings, "split_mode": "exact"}, objective=TIDY) == []


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
def test_denominators_of_the_host(mode):
    """verl divides by what ``loss_agg_mode`` says."""
    settings = {
        "actor_rollout_ref": {"actor": {
            "loss_agg_mode": mode, "ppo_mini_batch_size": 8,
            "policy_loss": {"loss_mode": "fiberpo", "epsilon": 0.04},
        }}, "data": {"train_batch_size": 32},
    }  # fmt: skip
    wrong = {"double-division"} if mode == "token-mean" else set()
    assert codes(examine_config(settings)) == wrong
    del settings["actor_rollout_ref"]["actor"]["loss_agg_mode"]  # token-mean, by default
    assert codes(examine_config(settings)) == {"double-division"}


def test_gradient_that_arrived():
    """Compared with the coefficients: a factor, a factor by part, or equal."""
    step = batch()
    right = -HEALTHY(step).coefficients
    assert examine_batch(HEALTHY, step, gradient=right) == []
    (found,) = examine_batch(HEALTHY, step, gradient=right / 4)
    assert found.code == "double-division"
    assert found.numbers["factor"] == pytest.approx(0.25)
    parts = right * torch.where(torch.arange(len(right)) < 200, 1.0, 3.0)
    (found,) = examine_batch(HEALTHY, step, gradient=parts)
    assert found.numbers["largest"] == pytest.approx(3)
    with pytest.raises(FiberPOError, match="3 entries"):
        examine_batch(HEALTHY, step, gradient=torch.zeros(3))


def test_a_window_is_examined_by_its_parts():
    """Groups that lie in two micro-batches are whole in the step."""
    whole = batch(groups=8)
    parts = [whole.select(torch.arange(whole.rows)[i::2]) for i in range(2)]
    leaves = [p.log_probs.clone().requires_grad_() for p in parts]
    stepper = exact.Stepper(HEALTHY)
    window = stepper.backward(parts, lambda k: leaves[k])
    assert examine_window(window, settings=SETTINGS) == []
    single = exact.Stepper(recipes.fiberpo((0.25, 0.25), epsilon=0.3))  # one surrogate a part
    window = single.backward(parts, lambda k: leaves[k])
    assert len(window.surrogates) == 2
    assert examine_window(window, settings=SETTINGS) == []
    dead = [replace(p, given_advantages=p.given_advantages * 0) for p in parts]
    window = stepper.backward(dead, lambda k: leaves[k])
    assert codes(examine_window(window, settings=SETTINGS)) == {"zero-advantages"}


def test_settings_of_nobody():
    """Refused with what is known."""
    with pytest.raises(FiberPOError, match="whose settings"):
        examine_config({"flavour": "vanilla"})
    with pytest.raises(FiberPOError, match="mapping"):
        examine_config({})
    with pytest.raises(FiberPOError, match="prompts is 'many'"):
        examine_config({**SETTINGS, "prompts": "many"})


def test_an_objective_that_is_refused():
    """By its recipe, or by the steps."""
    settings = {"steps_per_generation": 4, "objective": "grpo", "objective_kwargs": {"cliff": 1}}
    (found,) = examine_config({**settings, "bf16": False})
    assert (found.code, found.severity) == ("objective-refused", "error")
    assert "cliff" in found.seen
    plain = [RecordedStep(i, batch(i, labels={})) for i in range(2)]
    assert "objective-refused" in codes(examine(recorded(plain)))


def test_findings_come_once(tmp_path):
    """Settings and steps of a run's directory see the same inert gates."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("updates_per_rollout: 1\npasses_per_rollout: 1\n")
    with Recorder(folder / "recording", HEALTHY, settings={"updates_per_rollout": 1}) as recorder:
        for i in range(3):
            recorder.record(i + 1, batch(i, fresh=True))
    assert [f.code for f in examine(folder, objective=TIDY)] == ["inert-gates"]


def test_a_run_without_a_recording(tmp_path):
    """Its summary has budgets and drifts."""
    (tmp_path / "config.yaml").write_text("updates_per_rollout: 4\n")
    drift = {"p50": 0.1, "p90": 0.2, "p99": 0.3, "max": 0.4}
    row = {"stratum": "group", "context": "all", "budget": [0.005, 0.005], "drift_pos": drift,
           "drift_neg": drift, "pass": 0.02}  # fmt: skip
    summary = {"strata": [row, {**row, "stratum": "domain", "budget": [0.2, 0.2], "pass": 0.9}]}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert codes(examine(tmp_path)) == {"budget-too-narrow"}
    (tmp_path / "summary.json").unlink()
    assert codes(examine(tmp_path)) == {"recording-incomplete"}
    (tmp_path / "summary.json").write_text('{"strata": [{"stratum": "group", "budget": 3}]}')
    with pytest.raises(FiberPOError, match="no summary"):
        examine(tmp_path)


def test_an_unfinished_recording_is_a_note():
    """What could be read is looked at."""
    found = examine(recorded(run(), problems=["step-000003 is torn"]))
    assert [(f.code, f.severity) for f in found] == [("recording-incomplete", "note")]
    assert exit_code(found, strict=True) == 0


def test_long_recordings_are_sampled():
    """Some steps, at every place within a rollout."""
    from fiberpo.diagnosis.examining import _spread

    chosen = _spread(list(range(1000)))
    assert len(chosen) <= 65
    assert {0, 999} <= set(chosen)
    assert {step % 4 for step in chosen} == {0, 1, 2, 3}
    assert _spread([3, 4]) == [3, 4]


def test_warnings_of_the_objective_are_findings_instead():
    """No FiberPOWarning escapes."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        examine_batch(HEALTHY, batch(groups=2))


def test_the_page_lists_every_finding():
    """docs/doctor.md has a row for each code, and no others; troubleshooting names known ones."""
    root = Path(__file__).resolve().parents[2]
    sources = root.glob("src/fiberpo/diagnosis/*.py")
    finding = re.compile(r'Finding\(\s*"([a-z0-9-]{3,})"')
    made = {code for path in sources for code in finding.findall(path.read_text())}
    page = (root / "docs/doctor.md").read_text()
    assert set(re.findall(r"^\| `([a-z0-9-]+)` \|", page, re.MULTILINE)) == made
    table = (root / "docs/troubleshooting.md").read_text().split("```")[0]
    named = {
        c for line in table.splitlines() for c in re.findall(r"`([a-z0-9]+-[a-z0-9-]+)`", line)
    }
    assert named
    assert named <= made
