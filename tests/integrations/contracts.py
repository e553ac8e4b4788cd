"""What hosts that are not installed here pass to a loss, and what they do with it afterwards.

Each contract was written down from the host's public sources (repository, file, commit), and is
executed: the function of the same name does with a loss what the host does, micro-batch by
micro-batch and rank by rank, and leaves in ``rows.log_probs.grad`` what reaches the log-probs.
Read on 2026-11-21.
"""

import enum
import inspect
import sys
import types
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Contract:
    host: str
    source: str
    passes: str
    afterwards: str


SKYRL = Contract(
    host="SkyRL",
    source="NovaSky-AI/SkyRL skyrl/backends/skyrl_train/utils/ppo_utils.py 03d74caf, "
    "workers/worker.py 0020c6d1",
    passes="(log_probs, old_log_probs, advantages, config=, loss_mask=, rollout_logprobs=), all "
    "[B, T] of one micro-batch; advantages already divided by the reduction of the mini-batch; no "
    "uid, no data source. The function is sent to workers by cloudpickle.",
    afterwards="loss * dp_size, backward, gradients averaged over dp: the sum over micro-batches "
    "and ranks. Metrics are averaged over micro-batches, then over ranks, key by key.",
)
SLIME = Contract(
    host="slime",
    source="THUDM/slime slime/backends/megatron_utils/loss.py 00c2d6db (loss_function); "
    "radixark/miles miles/backends/training_utils/loss.py 0336a443",
    passes="(args, batch, logits, sum_of_sample_mean), positional; batch holds lists, one entry a "
    "row: advantages, log_probs, rollout_log_probs, loss_masks [R_i], response_lengths, "
    "total_lengths, unconcat_tokens, and rollout_mask_sums (loss tokens of the whole rollout of "
    "each row). Rollout ids and group indices exist in the rollout data; the training step does "
    "not ask for them.",
    afterwards="without calculate_per_token_loss: loss * num_microbatches / step_global_batch_size "
    "* dp_size, Megatron divides by num_microbatches, gradients averaged over dp. With it: "
    "gradients summed and divided by the loss tokens of the step. Metrics are summed likewise.",
)
PRIME_RL = Contract(
    host="prime-rl",
    source="PrimeIntellect-ai/prime-rl docs/algorithms.md (Custom Loss) and "
    "src/prime_rl/trainer/rl/loss.py (compute_loss), versions of 2026",
    passes="(inputs, **kwargs), once a sequence: trainer_logprobs, inference_logprobs, advantages "
    "[seq], loss_mask bool [seq], loss_weights [seq] or None, ref_logprobs or None",
    afterwards="reads .loss and .metrics; losses added up over sequences, divided by the loss "
    "tokens of the step (the sum of the weights, where there are weights); metrics stacked.",
)
TRINITY = Contract(
    host="Trinity-RFT",
    source="modelscope/Trinity-RFT trinity/algorithm/policy_loss_fn/policy_loss_fn.py b86ff630, "
    "trinity/trainer/verl/dp_actor.py 09b6fcf5",
    passes="(self, logprob=, old_logprob=, action_mask=, advantages=), [B, T] of one micro-batch; "
    "a metaclass reads the names of the parameters and passes the columns so named",
    afterwards="loss / number of micro-batches, or loss * rows / rows of the mini-batch where "
    "micro-batches vary in size; gradients averaged over ranks.",
)
NEMO_RL = Contract(
    host="NeMo-RL",
    source="NVIDIA-NeMo/RL nemo_rl/algorithms/loss/interfaces.py 002cdc27, "
    "loss_functions.py 006907a9",
    passes="(data=, global_valid_seqs=, global_valid_toks=, next_token_logprobs=); data[...] are "
    "[B, S] with the first column to be cut, next_token_logprobs is [B, S - 1], sample_mask [B]; "
    "the two counts are over all micro-batches and ranks. Reads loss_type and input_type.",
    afterwards="loss * dp_size, backward, gradients averaged over dp. num_valid_samples is read "
    "from the metrics; the others are summed over micro-batches and ranks.",
)


@dataclass
class Rows:
    """A mini-batch as hosts hold it: ``[B, T]``, NaN under the mask."""

    log_probs: torch.Tensor
    old: torch.Tensor
    advantages: torch.Tensor
    mask: torch.Tensor
    rollout: torch.Tensor

    @classmethod
    def random(cls, seed, lengths=(4, 2, 5, 3, 1, 5, 2, 4)):
        rng = np.random.default_rng(seed)
        rows, width = len(lengths), max(lengths) + 1
        mask = torch.tensor(np.arange(width) < np.asarray(lengths)[:, None])
        old = -rng.random((rows, width)) - 0.5
        shift = rng.normal(0, 0.1, (rows, 1))
        current = np.where(mask, old + shift + rng.normal(0, 0.1, (rows, width)), np.nan)
        return cls(
            torch.tensor(current, requires_grad=True),
            torch.tensor(np.where(mask, old, np.nan)),
            torch.tensor(rng.normal(0, 1, (rows, 1))).expand(rows, width).clone(),
            mask,
            torch.tensor(np.where(mask, old + rng.normal(0, 0.01, (rows, width)), np.nan)),
        )

    @property
    def lengths(self):
        return self.mask.sum(1)


class Settings(dict):
    """A configuration whose settings are read as attributes."""

    __getattr__ = dict.get


def skyrl(loss, rows, cuts, *, reduction, weight=None, settings=None):
    """``cuts``: per rank, lists of row numbers, one a micro-batch. Returns the metrics."""
    counted = rows.mask.sum(-1, keepdim=True).clamp(min=1)
    folded = {
        "token_mean": rows.advantages / rows.mask.sum(),
        "sequence_mean": rows.advantages / (len(rows.mask) * counted),
    }[reduction]
    config = Settings(loss_reduction=reduction, off_policy_correction=Settings(settings or {}))
    metrics = []
    for micro in (micro for rank in cuts for micro in rank):
        value, found = loss(
            rows.log_probs[micro],
            rows.old[micro],
            folded[micro],
            config=config,
            loss_mask=rows.mask[micro].to(torch.float32),
            rollout_logprobs=rows.rollout[micro],
        )
        (value * len(cuts)).backward()
        metrics.append(found)
    rows.log_probs.grad /= len(cuts)
    return metrics


def slime(loss, rows, cuts, *, per_token=False, settings=None, sums=None, old="log_probs"):
    """Rows packed end to end; the "logits" of this stand-in are the log-probs themselves."""
    ranks, metrics = len(cuts), []
    args = Settings(
        calculate_per_token_loss=per_token,
        use_rollout_logprobs=old == "rollout_log_probs",
        **(settings or {}),
    )
    # every second row has a masked token at its end
    lengths = (rows.lengths + torch.arange(len(rows.mask)) % 2).tolist()
    for rank in cuts:
        for micro in rank:
            size = [lengths[i] for i in micro]
            batch = {
                "response_lengths": size,
                "advantages": [rows.advantages[i, : lengths[i]] for i in micro],
                "loss_masks": [rows.mask[i, : lengths[i]].int() for i in micro],
                "rollout_mask_sums": [(rows.lengths if sums is None else sums)[i] for i in micro],
            }
            for name, column in (("log_probs", rows.old), ("rollout_log_probs", rows.rollout)):
                if old in ("log_probs", "rollout_log_probs"):
                    batch[name] = [column[i, : lengths[i]] for i in micro]
            logits = torch.cat([rows.log_probs[i, : lengths[i]] for i in micro])[None]

            def sum_of_sample_mean(x, batch=batch, size=size):
                parts = zip(x.split(size), batch["loss_masks"], batch["rollout_mask_sums"])
                return sum(
                    (v * m).sum() / (1 if per_token else max(int(n), 1)) for v, m, n in parts
                )

            value, found = loss(args, batch, logits, sum_of_sample_mean)
            if per_token:
                value = value / rows.mask.sum()
            else:
                value = value * len(rank) / len(rows.mask) * ranks  # the host
                value = value / len(rank) / ranks  # Megatron, and the mean over ranks
            value.backward()
            # the host lays them out beside a count, as one tensor
            torch.tensor([0, *found.values()])
            metrics.append(found)
    return metrics


def slime_log_probs(args, batch, logits):
    return logits[0].split(batch["response_lengths"])


def prime_rl(loss, rows, cuts, *, weights=None):
    """Sequences of one packed micro-batch after the other."""
    scale = rows.mask.sum() if weights is None else weights[rows.mask].sum()
    total, metrics = 0.0, {}
    for i in (i for rank in cuts for micro in rank for i in micro):
        inputs = types.SimpleNamespace(
            trainer_logprobs=rows.log_probs[i],
            inference_logprobs=rows.old[i],
            advantages=rows.advantages[i],
            loss_mask=rows.mask[i],
            loss_weights=None if weights is None else weights[i],
            ref_logprobs=None,
        )
        found = loss(inputs)
        total = total + found.loss
        for name, value in found.metrics.items():
            metrics.setdefault(name, []).append(value)
    (total / scale).backward()
    return {name: torch.stack(values) for name, values in metrics.items()}


def trinity(call, rows, cuts, *, varying=False):
    """A class made of ``call``; its parameters name the columns."""
    names = inspect.signature(call).parameters
    select = [n for n in names if n not in ("self", "kwargs", "logprob")]
    assert select == ["old_logprob", "action_mask", "advantages"]
    columns = {
        "old_logprob": rows.old,
        "action_mask": rows.mask,
        "advantages": rows.advantages,
    }
    policy_loss_fn = type("FiberPOPolicyLoss", (), {"__call__": call})()
    metrics = []
    for rank in cuts:
        mini = sum(len(micro) for micro in rank)
        for micro in rank:
            value, found = policy_loss_fn(
                logprob=rows.log_probs[micro], **{n: columns[n][micro] for n in select}
            )
            share = len(micro) / mini if varying else 1 / len(rank)
            (value * share / len(cuts)).backward()
            metrics.append(found)
    return metrics


def nemo_interfaces(monkeypatch):
    """The two enums of ``nemo_rl.algorithms.loss.interfaces``."""
    module = types.ModuleType("nemo_rl.algorithms.loss.interfaces")
    module.LossType = enum.Enum(
        "LossType", {"TOKEN_LEVEL": "token_level", "SEQUENCE_LEVEL": "sequence_level"}
    )
    module.LossInputType = enum.Enum("LossInputType", {"LOGIT": "logit", "LOGPROB": "logprob"})
    for name in ("nemo_rl", "nemo_rl.algorithms", "nemo_rl.algorithms.loss"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def nemo_rl(loss, rows, cuts, *, sample_mask=None, keep_mask=None):
    """Columns ``[B, S]`` whose first is cut; returns the metrics as the host adds them up."""
    sample_mask = torch.ones(len(rows.mask)) if sample_mask is None else sample_mask

    def column(x):
        return torch.nn.functional.pad(x, (1, 0), value=0)

    tokens = (rows.mask * sample_mask[:, None]).sum()
    totals = {}
    for micro in (micro for rank in cuts for micro in rank):
        data = {
            "token_mask": column(rows.mask.float())[micro],
            "sample_mask": sample_mask[micro],
            "advantages": column(rows.advantages)[micro],
            "prev_logprobs": column(rows.old)[micro],
            "generation_logprobs": column(rows.rollout)[micro],
        }
        if keep_mask is not None:
            data["curr_logprobs_keep_mask"] = keep_mask[micro]
        value, found = loss(
            data=data,
            global_valid_seqs=sample_mask.sum(),
            global_valid_toks=tokens,
            next_token_logprobs=rows.log_probs[micro],
        )
        (value * len(cuts)).backward()
        for name, number in found.items():
            totals[name] = totals.get(name, 0.0) + number
    rows.log_probs.grad /= len(cuts)
    return totals
