"""The registered losses: verl's own where they should be, exact over any cut, refused elsewhere."""

import copy
import functools
import importlib.metadata
import logging
import subprocess
import sys

import cpu_step
import harness
import pytest
import torch
from harness import ACTOR, CASES, POLICY, SEQUENCES, SIZES, TARGET, policy_loss, step
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY, get_policy_loss_fn
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.engine_workers import ActorRolloutRefWorker, TrainingWorker

import fiberpo
from fiberpo.errors import ConfigError, FiberPOError
from fiberpo.integrations import verl as plugin
from fiberpo.integrations import verl_worker

CLIP = [f"{ACTOR}.clip_ratio_low=0.1", f"{ACTOR}.clip_ratio_high=0.15"]
OURS = {"epsilon": 0.1, "objective_kwargs": "{epsilon_high: 0.15, dual_clip: 1.8}"}
DUAL = f"{ACTOR}.clip_ratio_c=1.8"
NORM = [f"{ACTOR}.loss_agg_mode=seq-mean-token-sum-norm", f"{ACTOR}.loss_scale_factor=8"]
PAIRS = {
    "ppo": (policy_loss("fiberpo_ppo", **OURS), [*CLIP, DUAL]),
    "grpo": ([*policy_loss("fiberpo_grpo", **OURS), SEQUENCES], [*CLIP, DUAL, SEQUENCES]),
    "dapo": (
        policy_loss("fiberpo_dapo", epsilon=0.1, objective_kwargs="{epsilon_high: 0.15}"),
        [*CLIP, f"{ACTOR}.clip_ratio_c=1e9"],  # verl's vanilla always has a dual clip
    ),
    "dr_grpo": (
        [*policy_loss("fiberpo_dr_grpo", epsilon=0.1, objective_kwargs="{length: 8}"), *NORM],
        [f"{ACTOR}.clip_ratio_low=0.1", f"{ACTOR}.clip_ratio_high=0.1", f"{ACTOR}.clip_ratio_c=1e9",
         *NORM],
    ),
    "gspo": (
        [
            *policy_loss("fiberpo_gspo", epsilon=0.1, objective_kwargs="{epsilon_high: 0.15}"),
            SEQUENCES,
        ],
        [f"{POLICY}.loss_mode=gspo", *CLIP, SEQUENCES],
    ),
}  # fmt: skip


@pytest.fixture(scope="session")
def plain_worker(model):
    """verl's own actor: what a loss mode does without the exact worker."""
    return harness.build(harness.make_config(model), harness.PlainWorker)


@pytest.fixture(scope="session")
def weighted(batch):
    """The batch with verl's correction for the engine that sampled."""
    made = batch[list(range(len(batch)))]
    generator = torch.Generator().manual_seed(5)
    made.batch["rollout_is_weights"] = 0.5 + torch.rand(
        made.batch["advantages"].shape, generator=generator
    )
    return made


@pytest.mark.parametrize(
    ("pair", "corrected"),
    [*((pair, False) for pair in PAIRS), *((pair, True) for pair in PAIRS if pair != "gspo")],
)
def test_equals_verls_own_loss(worker, plain_worker, batch, weighted, pair, corrected):
    """Loss, gradients and panel of verl's ``vanilla`` and ``gspo``, with and without the worker."""
    ours, theirs = PAIRS[pair]
    data = weighted if corrected else batch
    expected, whole = step(plain_worker, data, theirs)
    assert expected["actor/pg_clipfrac"] > 0.1
    if pair in ("ppo", "grpo"):
        assert expected["actor/pg_clipfrac_lower"] > 0.01
    for each in (worker, plain_worker):
        metrics, gradients = step(each, data, ours)
        assert metrics["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-6)
        assert metrics["actor/pg_loss"] == pytest.approx(expected["actor/pg_loss"], rel=1e-5)
        assert metrics["actor/ppo_kl"] == pytest.approx(expected["actor/ppo_kl"], rel=1e-5)
        for name, gradient in whole.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6)
        panel = [m["actor/pg_clipfrac"] for m in (metrics, expected)]
        lower = [m["actor/pg_clipfrac_lower"] for m in (metrics, expected)]
        if pair == "gspo":  # which of the clipped tokens count as lower is by their own ratio here
            assert panel[0] + lower[0] == pytest.approx(panel[1], rel=1e-5)
        else:
            assert panel[0] == pytest.approx(panel[1], rel=1e-5)
            assert lower[0] == pytest.approx(lower[1], rel=1e-5)


def test_gspo_with_a_weight_per_token(model, worker, plain_worker, weighted):
    """verl gives each token its own weight's gradient; here it is that of the objective."""
    ours, theirs = PAIRS["gspo"]
    expected, _ = step(plain_worker, weighted, theirs)
    weights = weighted.batch["rollout_is_weights"]
    whole, loss, _ = harness.undivided(model, weighted, ours, weights)
    for each in (worker, plain_worker):
        metrics, gradients = step(each, weighted, ours, 2)
        assert metrics["actor/pg_loss"] == pytest.approx(expected["actor/pg_loss"], rel=1e-5)
        assert metrics["actor/pg_loss"] == pytest.approx(loss, rel=1e-5)
        assert metrics["grad_norm"] == pytest.approx(harness.norm(whole), rel=1e-6)
    assert abs(expected["grad_norm"] / harness.norm(whole) - 1) > 0.001


@pytest.mark.parametrize("size", SIZES)
def test_trajectory_gates_need_no_worker(model, plain_worker, weighted, size):
    """The registered loss alone is the objective on the undivided mini-batch, for any cut."""
    weights = weighted.batch["rollout_is_weights"]
    whole, loss, statistics = harness.undivided(model, weighted, CASES["trajectory"], weights)
    metrics, gradients = step(plain_worker, weighted, CASES["trajectory"], size)
    assert statistics["gate/trajectory/pass_frac"] < 0.9
    assert metrics["grad_norm"] == pytest.approx(harness.norm(whole), rel=1e-6)
    assert metrics["actor/pg_loss"] == pytest.approx(loss, rel=1e-5)
    for name, gradient in whole.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6)
    assert 0 < metrics["gate/active"] < 1


def test_loss_mode_alone(model, worker, plain_worker, batch):
    """Without ``_target_`` a recipe that needs no worker runs with its defaults."""
    named = [f"{POLICY}.loss_mode=fiberpo", SEQUENCES]
    whole = [step(each, batch, named)[0] for each in (worker, plain_worker)]
    full = step(plain_worker, batch, [TARGET, *named])[0]
    for metrics in whole:
        assert metrics["grad_norm"] == pytest.approx(full["grad_norm"], rel=1e-6)


@pytest.mark.parametrize("mode", ["vanilla", "gspo"])
def test_verls_own_modes_are_left_alone(worker, plain_worker, batch, mode):
    """With verl's loss modes the exact worker is verl's worker, bit for bit."""
    named = [f"{POLICY}.loss_mode={mode}", SEQUENCES]
    (mine, gradients), (theirs, whole) = (
        step(each, batch, named) for each in (worker, plain_worker)
    )
    assert mine["grad_norm"] == theirs["grad_norm"]
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(gradients[name], whole[name]) for name in whole)


def test_two_epochs_of_two_updates_follow_verl(model, batch):
    """Four updates with AdamW: the same gradient norms as verl's vanilla, all the way."""
    norms = {}
    more = [
        f"{ACTOR}.optim.lr=0.003", f"{ACTOR}.ppo_mini_batch_size=2", f"{ACTOR}.ppo_epochs=2",
        f"{ACTOR}.ppo_micro_batch_size_per_gpu=2",
    ]  # fmt: skip
    for i, overrides in enumerate(PAIRS["grpo"]):
        config = harness.make_config(model, *overrides, *more)
        made = harness.build(config)
        output = made.update_actor(cpu_step.for_update(batch, config))
        norms[i] = cpu_step.tu.get(output, "metrics")["grad_norm"]
    assert len(norms[0]) == 4
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


# -- plugin ----------------------------------------------------------------------------------------


def test_entry_point():
    """verl finds the plugin by its entry point, and its own names stay its own."""
    (entry,) = importlib.metadata.entry_points(group="verl.plugins", name="fiberpo")
    assert entry.load() is plugin
    assert {"vanilla", "gspo", "cispo"} <= set(POLICY_LOSS_REGISTRY) - set(plugin.LOSS_MODES)
    assert {"fiberpo", "fiberpo_domain", "fiberpo_gspo"} <= set(plugin.LOSS_MODES)
    assert len(plugin.LOSS_MODES) == len(fiberpo.recipes.RECIPES)


@pytest.mark.parametrize(("policy", "found"), [("auto", True), ("none", False)])
def test_import_verl_registers(policy, found):
    """``import verl`` is enough; verl's switch for plugins is honoured."""
    code = (
        "import verl, sys; from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY as r; "
        "print('fiberpo_domain' in r, 'verl.workers.engine_workers' in sys.modules)"
    )
    env = {**cpu_step.os.environ, "VERL_USE_EXTERNAL_PLUGINS": policy}
    env.pop("VERL_USE_EXTERNAL_MODULES")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout.split() == [str(found), "False"], done.stderr


def test_only_our_modes_install_the_worker(monkeypatch):
    """One class attribute, set when a configuration asks for one of our modes."""
    monkeypatch.setattr(ActorRolloutRefWorker, "actor_worker_cls", TrainingWorker)
    plugin.FiberPOPolicyLossConfig(loss_mode="vanilla")
    assert ActorRolloutRefWorker.actor_worker_cls is TrainingWorker
    plugin.FiberPOPolicyLossConfig(loss_mode="fiberpo")
    assert ActorRolloutRefWorker.actor_worker_cls is verl_worker.FiberPOTrainingWorker
    assert harness.PlainWorker.actor_worker_cls is TrainingWorker
    other = type("Other", (TrainingWorker,), {})
    monkeypatch.setattr(ActorRolloutRefWorker, "actor_worker_cls", other)
    verl_worker.install()
    assert ActorRolloutRefWorker.actor_worker_cls is other


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["group", "domain", "domain_weights"])
def test_without_the_worker_it_is_refused(plain_worker, batch, case):
    """Never silently computed per micro-batch."""
    with pytest.raises(ConfigError, match="FiberPOTrainingWorker") as caught:
        step(plain_worker, batch, CASES[case])
    assert "uid" in str(caught.value)
    assert plugin.CONFIG in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "quoted"),
    [
        ([f"{ACTOR}.clip_ratio_high=0.28"], "clip_ratio_high = 0.28"),
        ([f"{ACTOR}.clip_ratio_c=10"], "objective_kwargs.dual_clip"),
        ([f"{ACTOR}.loss_agg_mode=token-mean"], "loss_agg_mode=seq-mean-token-mean"),
        ([f"{ACTOR}.loss_agg_mode=token-sum"], "'token-sum'"),
        (NORM, "with loss_scale_factor=8"),
    ],
)
def test_settings_without_effect_are_refused(worker, plain_worker, batch, overrides, quoted):
    """When the loss is set, before anything is sampled; without the worker at the first call."""
    for each in (worker, plain_worker):
        with pytest.raises(ConfigError, match="loss_mode|aggregates") as caught:
            step(each, batch, [*CASES["trajectory"], *overrides])
        assert quoted in str(caught.value)


def test_constant_weights_name_their_length(worker, batch):
    """Dr. GRPO's length is verl's loss_scale_factor."""
    named = policy_loss("fiberpo_dr_grpo", objective_kwargs="{length: 12}")
    with pytest.raises(ConfigError, match=r"seq-mean-token-sum-norm and .*loss_scale_factor=12"):
        step(worker, batch, [*named, *NORM])


@pytest.mark.parametrize(
    ("fields", "quoted"),
    [
        ({"loss_mode": "fiberpo", "epsilon": -1.0}, "epsilon"),
        ({"loss_mode": "fiberpo", "budgets": {"group": [0.1, 0.1]}}, "'budgets'"),
        ({"loss_mode": "fiberpo_gspo", "pessimistic": True}, "'pessimistic'"),
        ({"loss_mode": "fiberpo_dr_grpo"}, "'length'"),
        ({"loss_mode": "fiberpo_domain", "budgets": {"group": [0.0, 0.1]}}, "0.0"),
        (
            {"loss_mode": "fiberpo", "epsilon": 0.1, "objective_kwargs": {"epsilon": 0.2}},
            "'epsilon' twice",
        ),
    ],
)
def test_parameters_are_checked_with_the_configuration(fields, quoted):
    """On the driver, when verl reads the configuration."""
    with pytest.raises(FiberPOError, match=quoted):
        plugin.FiberPOPolicyLossConfig(**fields)


def test_unknown_field_is_refused():
    """A misspelt field of policy_loss does not pass."""
    config = harness.make_config("unused", *CASES["domain"], f"+{POLICY}.epsilo=0.1")
    with pytest.raises(Exception, match="epsilo"):
        harness.policy_loss_of(config)


@pytest.mark.parametrize("column", ["uid", "data_source"])
def test_missing_column_is_named(worker, batch, column):
    """With the columns that are there, and the setting that names another."""
    poor = batch[list(range(len(batch)))]
    poor.non_tensor_batch.pop(column)
    stratum = {"uid": "group", "data_source": "domain"}[column]
    with pytest.raises(ConfigError, match=rf"{column}.*policy_loss.labels.{stratum}"):
        step(worker, poor, CASES["domain"])


def test_labels_name_other_columns(worker, batch):
    """``policy_loss.labels``; also ids that are a tensor."""
    other = batch[list(range(len(batch)))]
    codes = {"math": 0, "code": 1}
    sources = other.non_tensor_batch.pop("data_source")
    other.batch["realm"] = torch.tensor([codes[source] for source in sources])
    named = [*CASES["domain"], f"+{POLICY}.labels={{domain: realm}}"]
    expected = step(worker, batch, CASES["domain"], 2)[0]["grad_norm"]
    assert step(worker, other, named, 2)[0]["grad_norm"] == pytest.approx(expected, rel=1e-6)


def test_rows_of_one_session_are_one_trajectory(worker, batch):
    """``labels={trajectory: [uid, session_id]}``: pieces in other micro-batches count."""
    agentic = batch[list(range(len(batch)))]
    agentic.batch["session_id"] = torch.arange(len(batch)) // 8  # two rows a session
    joined = [*CASES["domain"], f"+{POLICY}.labels={{trajectory: [uid, session_id]}}"]
    norms = [step(worker, agentic, joined, size)[0]["grad_norm"] for size in (8, 2)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    apart = step(worker, agentic, CASES["domain"], 8)[0]["grad_norm"]
    assert abs(norms[0] / apart - 1) > 0.01


def test_joined_rows_need_the_worker(plain_worker, batch):
    """A loss that sees one micro-batch would take every row for a trajectory of its own."""
    joined = [*CASES["trajectory"], f"+{POLICY}.labels={{trajectory: [uid, session_id]}}"]
    with pytest.raises(ConfigError, match=r"\['trajectory'\]"):
        step(plain_worker, batch, joined)


@pytest.mark.parametrize("form", [lambda data: data, harness.as_v1], ids=["padded", "v1"])
def test_a_label_of_every_token(worker, batch, form):
    """Turns below the trajectory: a column ``[B, T]``."""
    turns = batch[list(range(len(batch)))]
    width = turns.batch["responses"].shape[1]
    turns.batch["turn"] = (torch.arange(width) // 3).expand(len(turns), width).contiguous()

    def nested(data):
        made = form(data)
        if made["responses"].is_nested:
            lengths = made["responses"].offsets().diff().tolist()
            rows = [row[:n] for row, n in zip(made["turn"], lengths, strict=True)]
            made["turn"] = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
        return made

    named = [
        *harness.hierarchy("trajectory", "turn"),
        SEQUENCES,
        f"+{POLICY}.labels={{turn: turn}}",
    ]
    metrics = step(worker, turns, named, 4, form=nested)[0]
    net = harness.plain_model(worker.config.model.path)
    whole = fiberpo.RatioBatch.from_padded(
        harness.plain_log_probs(harness.plain_logits(net, turns), turns),
        turns.batch["old_log_probs"], turns.batch["advantages"], turns.batch["response_mask"],
        labels={"turn": turns.batch["turn"]},
    )  # fmt: skip
    out = harness.objective_of("unused", named)(whole)
    assert out.metrics()["gate/turn/pass_frac"] < 1
    assert metrics["actor/pg_loss"] == pytest.approx(15 / 16 * float(out.loss.detach()), rel=1e-5)


def test_one_value_for_all_rows(worker, batch):
    """A column that holds one value stands for every row."""
    config = harness.make_config("unused", *CASES["domain"])
    norms = []
    for one in (True, False):
        same = batch[list(range(len(batch)))]
        same.non_tensor_batch["data_source"][:] = "math"
        data = harness.cut(same, config, 4)
        if one:
            data.pop("data_source")
            cpu_step.tu.assign_non_tensor(data, data_source="math")
        harness.change_loss(worker, config)
        norms.append(harness.floats(worker.update_actor(data))["grad_norm"])
    assert norms[0] == norms[1]


def test_counts_of_the_mini_batch_are_needed():
    """A direct call without ``global_batch_info`` would be scaled by the number of parts."""
    config = harness.make_config("unused", *CASES["trajectory"])
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    one = torch.zeros(1, 2, requires_grad=True)
    with pytest.raises(ConfigError, match="batch_num_tokens"):
        get_policy_loss_fn("fiberpo")(one, one, one, torch.ones(1, 2), config=actor)


def test_micro_batch_without_loss_tokens(plain_worker, worker, batch):
    """Alone in its micro-batch, a rejected answer gives no gradient and no NaN."""
    assert (batch.batch["response_mask"].sum(1) == 0).any()
    for each, case in ((plain_worker, "trajectory"), (worker, "domain")):
        one, whole = (step(each, batch, CASES[case], size)[0] for size in (1, 8))
        assert one["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-6)


def obstacle(worker, monkeypatch, what):
    """Something that the exact worker cannot go with: another engine, another loss."""
    loss = harness.ppo_loss
    if what == "megatron":
        other = copy.copy(worker.actor.engine_config)
        object.__setattr__(other, "strategy", "megatron")
        monkeypatch.setattr(worker.actor, "engine_config", other)
    else:

        def distillation_ppo_loss(config, model_output, data, dp_group=None):
            return harness.ppo_loss(config, model_output, data, dp_group)

        loss = distillation_ppo_loss
    return loss


@pytest.mark.parametrize("what", ["megatron", "distillation_ppo_loss"])
def test_other_engines_and_losses(worker, batch, monkeypatch, what):
    """Refused where the objective needs the whole mini-batch; else the registered loss does it."""
    loss = obstacle(worker, monkeypatch, what)
    config = harness.make_config("unused", *CASES["domain"])
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    with pytest.raises(ConfigError, match=rf"{what}.*looks at the domain"):
        worker.set_loss_fn(functools.partial(loss, config=actor))
    expected = step(worker, batch, CASES["trajectory"])[0]["grad_norm"]
    config = harness.make_config("unused", *CASES["trajectory"])
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    worker.set_loss_fn(functools.partial(loss, config=actor))
    metrics = harness.floats(worker.update_actor(harness.cut(batch, config, 4)))
    assert metrics["grad_norm"] == pytest.approx(expected, rel=1e-6)
    assert "gate/phase_difference" not in metrics


def test_another_cut_is_noticed(worker, batch, monkeypatch):
    """If verl cut the mini-batch differently the second time, coefficients would be misplaced."""
    cut = verl_worker.prepare_micro_batches

    def other(data, **arguments):
        parts, index = cut(data, **arguments)
        return parts[::-1], index

    monkeypatch.setattr(verl_worker, "prepare_micro_batches", other)
    with pytest.raises(ConfigError, match="cut the mini-batch in another way"):
        step(worker, batch, CASES["domain"])


def test_dropout_is_refused_where_the_forward_runs_twice(model, batch):
    """Phase 1 and phase 2 need the same log-probs."""
    config = harness.make_config(
        model, *CASES["domain"], "+actor_rollout_ref.model.override_config.attention_dropout=0.1"
    )
    made = harness.build(config)
    with pytest.raises(ConfigError, match="dropout of 0.1"):
        made.update_actor(harness.cut(batch, config, 4))
    made.update_actor(harness.cut(batch, config, 16))  # one forward: nothing to compare with


# -- what the worker says and saves ----------------------------------------------------------------


def told(made, data, caplog, word):
    with caplog.at_level(logging.WARNING, logger="fiberpo"):
        made.update_actor(data)
    return [r.getMessage() for r in caplog.records if word in r.getMessage()]


def test_one_update_per_rollout_is_announced_once(model, batch, caplog):
    """All log ratios are 0 then: say so, with the settings."""
    config = harness.make_config(model, *CASES["domain"])
    made = harness.build(config)
    data = cpu_step.for_update(batch, config)
    assert len(told(made, data, caplog, "INERT")) == 1
    assert len(told(made, cpu_step.for_update(batch, config), caplog, "INERT")) == 1
    assert "ppo_mini_batch_size = 4" in caplog.text


def test_cut_groups_are_announced(model, batch, caplog):
    """Two mini-batches over rows in an order that cuts every group."""
    config = harness.make_config(model, *CASES["group"], f"{ACTOR}.ppo_mini_batch_size=2")
    made = harness.build(config)
    (message,) = told(made, cpu_step.for_update(batch, config), caplog, "fewer than")
    assert "4 of 4 prompt groups" in message
    assert "INERT" not in caplog.text


def forwards(made, data):
    """Micro-batches that went forward, and the metrics."""
    calls = []
    forward = made.actor.engine.forward_step
    made.actor.engine.forward_step = lambda *args, **kwargs: (
        calls.append(1), forward(*args, **kwargs)
    )[1]  # fmt: skip
    metrics = made.update_actor(data)
    made.actor.engine.forward_step = forward
    return len(calls), harness.floats(metrics)


@pytest.mark.parametrize(
    ("case", "size", "expected"),
    [("domain", 4, 8), ("domain", 16, 1), ("trajectory", 4, 4)],
    ids=["two phases", "one micro-batch", "no context beyond"],
)
def test_forwards(worker, batch, case, size, expected):
    """The extra forward is left out where it is not needed."""
    config = harness.make_config("unused", *CASES[case])
    harness.change_loss(worker, config)
    assert forwards(worker, harness.cut(batch, config, size))[0] == expected


def test_skip_first_forward(model, batch):
    """With the actor's own old log-probs the first update is the same without the extra forward."""
    found = {}
    for skip in ("false", "true"):
        config = harness.make_config(
            model, *CASES["domain"], f"+{POLICY}.skip_first_forward={skip}",
            f"{ACTOR}.ppo_epochs=2", f"{ACTOR}.optim.lr=0.01",
        )  # fmt: skip
        made = harness.build(config)
        fresh = batch[list(range(len(batch)))]
        fresh.batch["old_log_probs"] = cpu_step.old_log_probs(made, fresh)
        data = cpu_step.for_update(fresh, config)
        found[skip] = forwards(made, data)
    assert found["false"][0] == 4 * 4
    assert found["true"][0] == 3 * 4
    norms = [metrics["grad_norm"] for _, metrics in found.values()]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    assert found["true"][1]["gate/active"] > 0
