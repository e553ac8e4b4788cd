"""One optimizer step of verl's own worker, whatever the number of ranks.

As a script under torchrun (``harness.py FOLDER``): every case of `CASES` and size of micro-batch on
this many ranks, results into ``FOLDER/results.pt``.
"""

import sys
import warnings
from pathlib import Path

if __name__ == "__main__":
    warnings.simplefilter("ignore")  # what the host warns of
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "verl"))

import functools

import cpu_step
import numpy as np
import torch
import verl.utils.tensordict_utils as tu
from transformers import AutoModelForCausalLM
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.engine_workers import TrainingWorker
from verl.workers.utils.losses import ppo_loss

import fiberpo
from fiberpo.integrations import verl as plugin

PROMPTS, ANSWERS = 4, 4
SIZES = (8, 4, 2)
ACTOR = "actor_rollout_ref.actor"
POLICY = f"{ACTOR}.policy_loss"
TARGET = f"{POLICY}._target_={plugin.CONFIG}"
SEQUENCES = f"{ACTOR}.loss_agg_mode=seq-mean-token-mean"
TIGHT = "[0.05,0.04]"


def policy_loss(mode, **fields):
    """Overrides that choose a loss mode; rollback zones that a test can hit."""
    return [
        TARGET,
        f"{POLICY}.loss_mode={mode}",
        *(f"+{POLICY}.{k}={v}" for k, v in fields.items()),
    ]


def recorded(folder):
    """Override that records every update."""
    return f"+{POLICY}.record_to={folder}"


def hierarchy(*strata, **more):
    """FiberPO-Domain with these strata, tight enough to act."""
    budgets = ", ".join(f"{name}: {TIGHT}" for name in strata)
    kwargs = ", ".join(f"{k}: {v}" for k, v in {"rollback": 2.0, **more}.items())
    return policy_loss(
        "fiberpo_domain", budgets=f"{{{budgets}}}", epsilon=0.05, objective_kwargs=f"{{{kwargs}}}"
    )


CASES = {
    "trajectory": [
        *policy_loss("fiberpo", budget=TIGHT, epsilon=0.05, objective_kwargs="{rollback: 2.0}"),
        SEQUENCES,
    ],
    "group": [*hierarchy("group", "trajectory"), SEQUENCES],
    "domain": [*hierarchy("domain", "group", "trajectory"), SEQUENCES],
    "domain_weights": hierarchy("domain", "trajectory", weights="domain_mean"),
    "pessimistic_tokens": [
        *hierarchy("domain", "group", "trajectory", measure="token", weights="token_mean"),
        f"+{POLICY}.pessimistic=true",
    ],
}
PENALTIES = [f"{ACTOR}.use_kl_loss=true", f"{ACTOR}.kl_loss_coef=0.5", f"{ACTOR}.entropy_coeff=0.1"]


def make_config(folder, *overrides):
    """grpo.yaml of the examples with one mini-batch a rollout, and steps of length 0."""
    return cpu_step.make_config("grpo", folder, f"{ACTOR}.optim.lr=0", *overrides)


def policy_loss_of(config):
    """The dataclass that verl makes of ``policy_loss``."""
    return omega_conf_to_dataclass(config.actor_rollout_ref.actor.policy_loss)


def objective_of(folder, overrides):
    return plugin.make_objective(policy_loss_of(make_config(folder, *overrides)))


# -- data ------------------------------------------------------------------------------------------


def plain_model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")


def plain_logits(model, batch):
    """``[B, T, V]`` of the answers, from transformers alone."""
    ids, mask = batch.batch["input_ids"], batch.batch["attention_mask"]
    logits = model(ids, attention_mask=mask, position_ids=batch.batch["position_ids"]).logits
    return logits[:, -batch.batch["responses"].shape[1] - 1 : -1].float()


def plain_log_probs(logits, batch):
    """``[B, T]``."""
    chosen = batch.batch["responses"][..., None]
    return torch.log_softmax(logits, -1).gather(-1, chosen)[..., 0]


def off_policy(folder, spread=0.15):
    """A rollout whose old log-probs differ from the model's, in an order that cuts every group."""
    batch = cpu_step.make_rollout(PROMPTS, ANSWERS, seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        current = plain_log_probs(plain_logits(plain_model(folder), batch), batch)

    def noise(size, *shape):
        return size * torch.randn(*shape, generator=generator)

    rows, width = current.shape
    batch.batch["old_log_probs"] = current + noise(spread, rows, width) + noise(0.1, rows, 1)
    batch.batch["old_log_probs"][:, 1] -= 1.3 * (torch.arange(rows) % 3 == 0)  # ratios above 3
    batch.batch["ref_log_prob"] = current + noise(0.3, rows, width)
    batch.batch["response_mask"][5] = 0  # a rejected answer
    return batch[np.argsort(np.arange(rows) % ANSWERS, kind="stable")]


def undivided(folder, batch, overrides, weights=None):
    """Gradients, loss and metrics by autograd on the whole batch, without verl."""
    objective, net = objective_of(folder, overrides), plain_model(folder)
    labels = {
        "domain": batch.non_tensor_batch["data_source"],
        "group": batch.non_tensor_batch["uid"],
    }
    out = objective(
        fiberpo.RatioBatch.from_padded(
            plain_log_probs(plain_logits(net, batch), batch),
            batch.batch["old_log_probs"],
            batch.batch["advantages"] * (1.0 if weights is None else weights),
            batch.batch["response_mask"],
            labels={name: list(ids) for name, ids in labels.items()},
        ),
        gradient="autograd",
    )
    # verl's count of rows has the rejected answer in it; other denominators have not
    scale = 15 / 16 if objective.weights.kind == "trajectory_mean" else 1.0
    (scale * out.loss).backward()
    gradients = {name: p.grad for name, p in net.named_parameters()}
    return gradients, scale * float(out.loss.detach()), out.metrics()


def norm(gradients):
    return float(torch.stack([g.double().square().sum() for g in gradients.values()]).sum().sqrt())


# -- verl ------------------------------------------------------------------------------------------


class PlainWorker(cpu_step.CPUWorker):
    """verl's own actor, whatever the configuration says: losses see one micro-batch."""

    actor_worker_cls = TrainingWorker


def build(config, worker=cpu_step.CPUWorker):
    worker = worker(config.actor_rollout_ref, role="actor")
    worker.init_model()
    return worker


def change_loss(worker, config):
    """Through verl's ``set_loss_fn``; also on a worker group."""
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    worker.set_loss_fn(functools.partial(ppo_loss, config=actor))


def cut(batch, config, size, by_tokens=False):
    """What ``update_actor`` takes, to be cut into micro-batches of ``size`` rows."""
    data = cpu_step.for_update(batch, config)
    tu.assign_non_tensor(
        data, micro_batch_size_per_gpu=size, use_dynamic_bsz=by_tokens,
        max_token_len_per_gpu=13 * size,
    )  # fmt: skip
    return data


def as_v1(data):
    """The form of verl's v1 trainer (TransferQueue): rows without any padding."""
    attention, width = data["attention_mask"].bool(), data["prompts"].shape[1]
    parts = {
        "prompts": attention[:, :width],
        **dict.fromkeys(
            ("responses", "response_mask", "loss_mask", "advantages", "old_log_probs"),
            attention[:, width:],
        ),
    }
    for name, mask in parts.items():
        rows = [row[kept] for row, kept in zip(data[name], mask, strict=True)]
        data[name] = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
    for name in ("attention_mask", "max_response_len", "max_seq_len", "indices", "ref_log_prob"):
        data.pop(name)
    return data


def step(worker, batch, overrides, size=4, by_tokens=False, form=lambda data: data):
    """Metrics and whole gradients of one update on this rank's rows; the weights stay."""
    config = make_config("unused", *overrides)
    change_loss(worker, config)
    engine, gradients = worker.actor.engine, {}
    optimizer_step = engine.optimizer_step

    def spy():
        for name, p in engine.module.named_parameters():
            gradients[name] = p.grad.full_tensor().clone()
        return optimizer_step()

    engine.optimizer_step = spy
    try:
        data = form(cut(cpu_step.my_rows(batch), config, size, by_tokens))
        output = worker.update_actor(data)
    finally:
        engine.optimizer_step = optimizer_step
    return floats(output), gradients


def floats(output):
    """Metrics of an update: verl keeps lists, one entry a mini-batch or a micro-batch."""
    return {name: float(np.mean(value)) for name, value in tu.get(output, "metrics").items()}


def main(folder):
    torch.distributed.init_process_group("gloo")
    batch = torch.load(folder / "batch.pt", weights_only=False)
    worker = build(make_config(folder / "model", *CASES["domain"]))
    results = {
        (case, size): step(worker, batch, overrides, size)
        for case, overrides in CASES.items()
        for size in SIZES
    }
    step(worker, batch, [*CASES["domain"], recorded(folder / "recording")], 4)
    plain = build(make_config(folder / "model"), PlainWorker)
    for size in SIZES:
        results["tokens", size] = step(worker, batch, CASES["domain"], size, by_tokens=True)
        results["registered", size] = step(plain, batch, CASES["trajectory"], size)
    results["recording"] = str(folder / "recording")
    if torch.distributed.get_rank() == 0:
        torch.save(results, folder / "results.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
