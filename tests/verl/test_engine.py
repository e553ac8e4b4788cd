"""verl's real engine: the gradient is that of the undivided mini-batch, however it is cut."""

import functools
import math
import os
import shutil
import subprocess
import sys

import cpu_step
import harness
import pytest
import ray
import torch
import verl
from harness import CASES, PENALTIES, SIZES, norm, plain_log_probs, plain_logits, step

from core import oracle
from fiberpo.recording import open_recording


@pytest.fixture(scope="session")
def undivided(model, batch):
    """Autograd on the whole mini-batch, by case."""
    return {case: harness.undivided(model, batch, CASES[case]) for case in CASES}


@pytest.fixture(scope="session")
def alone(worker, batch):
    """Every case and size of micro-batch in one process."""
    return {
        (case, size): step(worker, batch, overrides, size)
        for case, overrides in CASES.items()
        for size in SIZES
    }


@pytest.fixture(scope="session")
def two_processes(model, batch, tmp_path_factory):
    """The same by torchrun on two ranks."""
    folder = tmp_path_factory.mktemp("two")
    shutil.copytree(model, folder / "model")
    torch.save(batch, folder / "batch.pt")
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
            harness.__file__, str(folder),
        ],
        capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(folder / "results.pt", weights_only=False)


def close(gradients, expected):
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_gates_act(undivided, case):
    """The batch is hard enough for the tests below to fail."""
    metrics = undivided[case][2]
    assert metrics["gate/active"] > 0.5
    assert metrics["gate/gradient_kept"] < 0.9
    strata = {"domain_weights": ["domain"], "pessimistic_tokens": ["domain", "group"]}
    for stratum in strata.get(case, [case]):
        assert metrics[f"gate/{stratum}/pass_frac"] < 1


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES)
def test_one_process(alone, undivided, case, size):
    """Every parameter's gradient, its norm, the loss and all metrics are the undivided batch's."""
    metrics, gradients = alone[case, size]
    expected, loss, statistics = undivided[case]
    close(gradients, expected)
    assert metrics["grad_norm"] == pytest.approx(norm(expected), rel=1e-6)
    assert metrics["grad_norm"] == pytest.approx(alone[case, 8][0]["grad_norm"], rel=1e-6)
    assert metrics["actor/pg_loss"] == pytest.approx(loss, rel=1e-5)
    assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
    assert metrics["gate/phase_difference"] < 1e-5
    for name, value in statistics.items():
        assert metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", [*CASES, "tokens", "registered"])
def test_two_processes(alone, two_processes, case, size):
    """Two ranks with half the rows each: the same update to six digits.

    ``tokens``: verl chooses the micro-batches; ``registered``: the loss without the worker.
    """
    metrics, gradients = two_processes[case, size]
    same = {"tokens": "domain", "registered": "trajectory"}
    expected, whole = alone[same.get(case, case), 8]
    close(gradients, whole)
    assert metrics["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-6)
    assert metrics["actor/pg_loss"] == pytest.approx(expected["actor/pg_loss"], rel=1e-5)
    assert metrics["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    if case != "registered":
        for name in ("gate/active", "gate/gradient_kept", "gate/domain/pass_frac", "ratio/max"):
            if name in expected:
                assert metrics[name] == pytest.approx(expected[name], rel=1e-5), name


def by_row(item):
    """Tokens, log-probs, ids of every row, in an order that does not depend on ranks."""
    batch = item.batch
    labels = [[label.value(c) for c in label.codes.tolist()] for label in batch.labels.values()]
    columns = (item.token_ids, batch.log_probs, batch.old_log_probs, batch.advantages)
    split = [[x.tolist() for x in column.split(batch.lengths.tolist())] for column in columns]
    return sorted(zip(*split, *labels, strict=True))


def test_recording(worker, batch, two_processes, tmp_path):
    """``record_to``: the mini-batch of all ranks, with ids, token ids and the objective."""
    metrics, _ = step(worker, batch, [*CASES["domain"], harness.recorded(tmp_path)], 4)
    recording = open_recording(tmp_path)
    (item,) = recording.iterate()
    assert recording.manifest.host == f"verl {verl.__version__}"
    found = recording.objective()(item.batch).metrics()
    for name in ("gate/active", "gate/gradient_kept", "gate/domain/pass_frac", "kl/k3"):
        assert metrics[name] == pytest.approx(found[name], rel=1e-4, abs=1e-6), name
    mask = batch.batch["response_mask"].bool()
    assert sorted(item.token_ids.tolist()) == sorted(batch.batch["responses"][mask].tolist())
    assert set(item.batch.labels["domain"].value_names()) == set(
        batch.non_tensor_batch["data_source"]
    )
    joined = open_recording(two_processes["recording"])
    assert joined.manifest.ranks == 2
    (other,) = joined.iterate()
    for mine, theirs in zip(by_row(item), by_row(other), strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert a == (pytest.approx(b, abs=1e-4) if isinstance(a, list) else b)


@pytest.mark.parametrize("case", ["trajectory", "domain"])
def test_rows_without_padding(worker, batch, alone, case):
    """The nested rows that verl's v1 trainer hands over."""
    metrics, _ = step(worker, batch, CASES[case], 4, form=harness.as_v1)
    expected = alone[case, 8][0]
    assert metrics["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-6)
    assert metrics["gate/active"] == pytest.approx(expected["gate/active"], rel=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_micro_batches_by_tokens(worker, batch, alone, size):
    """``use_dynamic_bsz``: verl chooses which rows go together."""
    metrics, gradients = step(worker, batch, CASES["domain"], size, by_tokens=True)
    expected, whole = alone["domain", 8]
    close(gradients, whole)
    assert metrics["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-6)


@pytest.mark.parametrize("case", ["group", "domain"])
def test_micro_batches_by_themselves_would_differ(worker, batch, alone, monkeypatch, case):
    """A loss per micro-batch gives measurably another gradient: the tests above can fail."""
    from fiberpo.integrations import verl_worker

    local = functools.partial(verl_worker.Stepper, mode="local")
    monkeypatch.setattr(verl_worker, "Stepper", local)
    metrics, _ = step(worker, batch, CASES[case], 2)
    exact = alone[case, 2][0]["grad_norm"]
    assert abs(metrics["grad_norm"] / exact - 1) > 0.02


def test_loss_is_that_of_the_printed_formula(model, batch, alone):
    """``-J`` from the loops over Eqs. 30 to 33."""
    with torch.no_grad():
        current = plain_log_probs(plain_logits(harness.plain_model(model), batch), batch)
    rows = batch.batch["response_mask"].bool()
    log_ratio = (current - batch.batch["old_log_probs"]).double()
    kept = [i for i in range(len(batch)) if rows[i].any()]
    trajectories = [log_ratio[i][rows[i]].tolist() for i in kept]
    pair = (0.05, 0.04)
    budgets = dict.fromkeys(("domain", "group", "trajectory"), pair)
    gated = oracle_domain(
        trajectories,
        [batch.non_tensor_batch["uid"][i] for i in kept],
        [batch.non_tensor_batch["data_source"][i] for i in kept],
        budgets, 0.05, k=2.0,
    )  # fmt: skip
    j = 0.0
    for row, log_gated in zip(kept, gated, strict=True):
        advantages = batch.batch["advantages"][row][rows[row]].tolist()
        terms = (math.exp(g) * a for g, a in zip(log_gated, advantages, strict=True))
        j += math.fsum(terms) / len(log_gated) / len(batch)
    assert alone["domain", 2][0]["actor/pg_loss"] == pytest.approx(-j, rel=1e-5)


def oracle_domain(trajectories, group_of, domain_of, budgets, epsilon, k):
    """`oracle.domain_eqs30_33` with one rollback slope ``k`` everywhere."""
    gate = oracle.aggregate_gate_eq10
    try:
        oracle.aggregate_gate_eq10 = lambda x, budget, _: gate(x, budget, k)
        return oracle.domain_eqs30_33(trajectories, group_of, domain_of, budgets, epsilon)
    finally:
        oracle.aggregate_gate_eq10 = gate


@pytest.mark.parametrize("size", SIZES)
def test_kl_loss_and_entropy_bonus_stay_verls(model, worker, batch, undivided, size):
    """They are added by ``ppo_loss`` as ever, with its denominators."""
    metrics, gradients = step(worker, batch, [*CASES["domain"], *PENALTIES], size)
    net = harness.plain_model(model)
    logits = plain_logits(net, batch)
    mask = batch.batch["response_mask"].bool()
    gap = batch.batch["ref_log_prob"] - plain_log_probs(logits, batch)
    k3 = gap.exp() - gap - 1
    entropy = -(torch.log_softmax(logits, -1) * torch.softmax(logits, -1)).sum(-1)
    per_row = torch.where(mask, 0.5 * k3 - 0.1 * entropy, 0.0).sum(1) / mask.sum(1).clamp(min=1)
    (per_row.sum() / len(batch)).backward()
    base = undivided["domain"][0]
    expected = {name: base[name] + p.grad for name, p in net.named_parameters()}
    close(gradients, expected)
    assert metrics["grad_norm"] == pytest.approx(norm(expected), rel=1e-5)
    assert metrics["kl_loss"] > 0
    assert metrics["actor/entropy_loss"] > 0


@pytest.fixture(scope="session")
def two_ray_workers(model, batch):
    """Two workers of verl's Ray worker group; loss and size change between updates."""
    from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup

    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    config = harness.make_config(model, *CASES["domain"])
    group = RayWorkerGroup(
        RayResourcePool([2], use_gpu=False, max_colocate_count=1),
        RayClassWithInitArgs(
            ray.remote(cpu_step.CPUWorker), config=config.actor_rollout_ref, role="actor"
        ),
    )
    group.init_model()
    found = {}
    for case in ("domain", "group", "trajectory"):
        config = harness.make_config(model, *CASES[case])
        harness.change_loss(group, config)
        for size in SIZES:
            output = group.update_actor(harness.cut(batch, config, size))
            found[case, size] = harness.floats(output)
    ray.shutdown()
    return found


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", ["trajectory", "group", "domain"])
def test_two_ray_workers(alone, two_ray_workers, case, size):
    """Dispatch, ``set_loss_fn`` and metrics through Ray."""
    metrics, expected = two_ray_workers[case, size], alone[case, 8][0]
    for name in ("grad_norm", "actor/pg_loss", "gate/active", "gate/gradient_kept"):
        assert metrics[name] == pytest.approx(expected[name], rel=1e-6), name


@pytest.mark.parametrize("size", [8, 2])
def test_configuration_alone(model, batch, alone, size):
    """Nothing but the configuration: ``init_model`` brings the worker and the loss."""
    config = harness.make_config(
        model, *CASES["domain"], f"{harness.ACTOR}.ppo_micro_batch_size_per_gpu={size}"
    )
    made = harness.build(config)
    assert type(made.actor).__name__ == "FiberPOTrainingWorker"
    metrics = harness.floats(made.update_actor(cpu_step.for_update(batch, config)))
    assert metrics["grad_norm"] == pytest.approx(alone["domain", 8][0]["grad_norm"], rel=1e-6)
