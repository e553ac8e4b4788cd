"""Hosts that call a function for the loss of one micro-batch: one function each.

SkyRL, slime and miles, prime-rl, Trinity-RFT and NeMo-RL hand their loss the log-probs of a
micro-batch and no ids of groups or domains. Token and trajectory gates are exact there; an
objective with gates above the trajectory is refused, with the remedy. Denominators are the host's:
each function says what the host divides by, and refuses weights that it would turn into others.

Written against contracts (``tests/integrations/contracts.py``), not against installed packages; no
host is imported but for NeMo-RL's two enums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..batch import RatioBatch
from ..errors import ConfigError, ObjectiveError
from ..objective import Objective, Surrogate
from ..recipes import from_name
from ..weights import Denominators, Weights

BY_TRAJECTORY = ("trajectory_mean", "trajectory_sum", "constant")
"""Weights whose denominator is the number of trajectories."""

UNDIVIDED = Denominators(1.0, 1.0)
"""For hosts that divide by the counts of the whole step afterwards."""

TOKEN_MEANS = ("gate/active", "ratio/mean", "kl/k1", "kl/k3")
"""Metrics that hosts may average over micro-batches: the same keys in every call."""


def skyrl(objective: Objective) -> Callable[..., tuple[Tensor, dict[str, float]]]:
    """SkyRL: a function for ``@register_policy_loss``.

    SkyRL folds the weights into the advantages (``trainer.algorithm.loss_reduction``) and adds up
    losses of micro-batches and ranks, so the objective is summed, and its weights must be those of
    the setting: ``token_mean``, or ``trajectory_mean`` with ``sequence_mean`` (rows without a loss
    token then count in the denominator). One row is one trajectory: not so in step-wise training.
    """
    _check(objective, "SkyRL", ("token_mean", "trajectory_mean"))
    summed = replace(objective, weights=Weights.token_mean())
    wanted = objective.weights.kind.replace("trajectory_mean", "sequence_mean")

    def policy_loss(
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        config: Any,
        loss_mask: Tensor | None = None,
        rollout_logprobs: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        if config.loss_reduction != wanted:
            raise ConfigError(
                f"loss_reduction = {config.loss_reduction!r} decides the weights in SkyRL, but "
                f"{objective.name} has {objective.weights.kind}; set loss_reduction={wanted!r}"
            )
        _refuse(config.off_policy_correction, ("tis_ratio_type", "sequence_mask_metric"))
        mask = torch.ones_like(log_probs) if loss_mask is None else loss_mask
        batch = RatioBatch.from_padded(
            log_probs, old_log_probs, advantages, mask,
            rollout_log_probs=rollout_logprobs, allow_empty=True,
        )  # fmt: skip
        out = summed(batch, denominators=UNDIVIDED)
        return out.loss.to(log_probs.dtype), _token_means(out)

    return policy_loss


def slime(
    objective: Objective, log_probs_of: Callable[[Any, Any, Tensor], Sequence[Tensor]]
) -> Callable[..., tuple[Tensor, dict[str, Tensor]]]:
    """slime, miles: a function for ``--loss-type custom_loss --custom-loss-function-path``.

    The host divides by the rollouts of the step (weights by trajectory), or with
    ``--calculate-per-token-loss`` by its tokens (``token_mean``). A rollout of several rows is
    refused unless neither gates nor weights look at trajectories: the loss gets no rollout ids.

    Args:
        objective: what to minimise the negative of.
        log_probs_of: ``(args, batch, logits) -> [R_i] log-probs a row``, by the host's own code.
    """
    _check(objective, "slime", ("token_mean", *BY_TRAJECTORY))
    per_token = objective.weights.kind == "token_mean"

    def loss_function(
        args: Any, batch: Any, logits: Tensor, sum_of_sample_mean: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        _refuse(args, ("use_kl_loss", "entropy_coef", "use_tis", "use_opsm"))
        log_probs = log_probs_of(args, batch, logits)
        _check_slime(args, batch, log_probs, per_token, "trajectory" in objective.strata)
        old = batch.get("rollout_log_probs" if args.use_rollout_logprobs else "log_probs")
        current, mask = torch.cat(list(log_probs)), torch.cat(list(batch["loss_masks"])).bool()
        anchor = torch.cat(list(old)) if old else current.detach()
        rows = RatioBatch.from_packed(
            current[mask], anchor[mask], torch.cat(list(batch["advantages"]))[mask],
            [int(m.sum()) for m in batch["loss_masks"]], allow_empty=True,
        )  # fmt: skip
        out = objective(rows, denominators=UNDIVIDED)
        moved = torch.where(mask, (anchor - current).detach(), 0.0)
        log = {"loss": out.loss.detach(), "ppo_kl": sum_of_sample_mean(moved)}
        return out.loss.to(current.dtype), log

    return loss_function


class LossOutputs(NamedTuple):
    """What prime-rl reads of a loss: its value and its metrics."""

    loss: Tensor
    metrics: dict[str, Tensor]


def prime_rl(inputs: Any, *, objective: str, **parameters: Any) -> LossOutputs:
    """prime-rl: for ``[trainer.loss] type = "custom"``, with no code of your own.

    Called once a sequence, which is taken for one trajectory; the host adds up and divides by the
    loss tokens of the step, so the weights are ``token_mean``. The anchor of the ratio is the
    engine that sampled: prime-rl keeps no other log-probs.

    Args:
        inputs: prime-rl's ``LossInputs``.
        objective: name of a recipe.
        **parameters: its parameters (``weights = "token_mean"`` where that is not its default).
    """
    recipe = from_name(objective, **parameters)
    _check(recipe, "prime-rl", ("token_mean",))
    mask = inputs.loss_mask.bool()
    advantages = inputs.advantages
    if getattr(inputs, "loss_weights", None) is not None:
        advantages = advantages * inputs.loss_weights
    old = inputs.inference_logprobs[mask]
    batch = RatioBatch.from_packed(
        inputs.trainer_logprobs[mask], old, advantages[mask], [int(mask.sum())],
        rollout_log_probs=old, allow_empty=True,
    )  # fmt: skip
    out = recipe(batch, denominators=UNDIVIDED)
    metrics = {name: out.loss.new_tensor(value) for name, value in _token_means(out).items()}
    return LossOutputs(out.loss.to(inputs.trainer_logprobs.dtype), metrics)


def trinity(objective: Objective) -> Callable[..., tuple[Tensor, dict[str, float]]]:
    """Trinity-RFT: the ``__call__`` of a class for ``POLICY_LOSS_FN.register_module``.

    The host takes the loss for a mean over the rows of a micro-batch and averages micro-batches
    (by their rows, where their size varies), which is exact for weights by trajectory. A mean over
    the tokens of a micro-batch is not one over those of the step: ``token_mean`` is refused.
    """
    _check(objective, "Trinity-RFT", BY_TRAJECTORY)

    def __call__(
        self: Any,
        logprob: Tensor,
        old_logprob: Tensor,
        action_mask: Tensor,
        advantages: Tensor,
        **kwargs: Any,
    ) -> tuple[Tensor, dict[str, float]]:
        batch = RatioBatch.from_padded(
            logprob, old_logprob, advantages, action_mask, allow_empty=True
        )
        out = objective(batch, denominators=Denominators(len(batch), len(logprob)))
        loss = out.loss.to(logprob.dtype)
        return loss, {"pg_loss": loss.item(), **_token_means(out)}

    return __call__


def nemo_rl(objective: Objective) -> Callable[..., tuple[Tensor, dict[str, float]]]:
    """NeMo-RL: a loss object for ``policy.train(data, loss_fn)``, input type ``LOGPROB``.

    The host counts valid sequences and tokens over all micro-batches and ranks and passes both;
    they are the denominators, so every cut is exact. It adds up losses and metrics.
    """
    from nemo_rl.algorithms.loss.interfaces import LossInputType, LossType

    _check(objective, "NeMo-RL", ("token_mean", *BY_TRAJECTORY))
    per_token = objective.weights.kind == "token_mean"

    def loss_fn(
        data: Any, global_valid_seqs: Tensor, global_valid_toks: Tensor, next_token_logprobs: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        mask = data["token_mask"][:, 1:] * data["sample_mask"][:, None]
        if data.get("curr_logprobs_keep_mask") is not None:
            mask = mask * data["curr_logprobs_keep_mask"]
        counts = Denominators(float(global_valid_toks), float(global_valid_seqs))
        batch = RatioBatch.from_padded(
            next_token_logprobs, data["prev_logprobs"][:, 1:], data["advantages"][:, 1:], mask,
            rollout_log_probs=data["generation_logprobs"][:, 1:], allow_empty=True,
        )  # fmt: skip
        out = objective(batch, denominators=counts)
        loss, share = out.loss.to(next_token_logprobs.dtype), len(batch) / max(counts.tokens, 1.0)
        metrics = {name: value * share for name, value in _token_means(out).items()}
        valid = int(data["sample_mask"].sum())
        return loss, {"loss": loss.item(), "num_valid_samples": valid, **metrics}

    kind = LossType.TOKEN_LEVEL if per_token else LossType.SEQUENCE_LEVEL
    vars(loss_fn).update(loss_type=kind, input_type=LossInputType.LOGPROB)
    return loss_fn


def _check(objective: Objective, host: str, kinds: Sequence[str]) -> None:
    """Refuse what one micro-batch without ids cannot show, and what the host divides otherwise."""
    above = [name for name in objective.strata if name != "trajectory"]
    if above:
        raise ObjectiveError(
            f"{host} hands its loss one micro-batch without ids, but {objective.name} looks at "
            f"{above}, whose drift is only known over the whole optimizer step. Run that step "
            "through fiberpo.exact (docs/hosts.md says where), or use an objective with token and "
            "trajectory gates (recipes.fiberpo)."
        )
    if objective.weights.kind not in kinds:
        raise ObjectiveError(
            f"{host} would turn the weights {objective.weights.kind} into others; what it divides "
            f"by fits {' or '.join(kinds)}: pass weights={kinds[0]!r} to the recipe"
        )


def _refuse(settings: Any, names: Sequence[str]) -> None:
    """Settings of the host's own losses that would silently do nothing."""
    for name in names:
        if getattr(settings, name, None):
            raise ConfigError(
                f"{name} = {getattr(settings, name)!r} acts inside the host's own losses and has "
                "no effect on a fiberpo objective; switch it off"
            )


def _check_slime(
    args: Any, batch: Any, log_probs: Sequence[Tensor], per_token: bool, by_trajectory: bool
) -> None:
    if bool(args.calculate_per_token_loss) != per_token:
        raise ConfigError(
            f"calculate_per_token_loss = {args.calculate_per_token_loss}, so slime divides by the "
            f"{'tokens' if args.calculate_per_token_loss else 'rollouts'} of the step, which is "
            "not what the weights of the objective say; switch it or the weights"
        )
    if [len(x) for x in log_probs] != [len(m) for m in batch["loss_masks"]]:
        raise ConfigError(
            "the log-probs of a row are not as long as its loss mask: with context parallelism a "
            "rank holds pieces of trajectories. Use context_parallel_size=1, or fiberpo.exact"
        )
    if per_token and not by_trajectory:
        return
    for i, (mask, whole) in enumerate(
        zip(batch["loss_masks"], batch.get("rollout_mask_sums") or [], strict=False)
    ):
        if int(mask.sum()) != int(whole):
            raise ObjectiveError(
                f"row {i} has {int(mask.sum())} of the {int(whole)} loss tokens of its rollout: "
                "the trajectory is spread over rows, whose ids the loss does not get. Join the "
                "rows, or use token gates with weights='token_mean'"
            )


def _token_means(out: Surrogate) -> dict[str, float]:
    found = out.metrics()
    return {name: found.get(name, 0.0) for name in TOKEN_MEANS}


__all__ = ["LossOutputs", "nemo_rl", "prime_rl", "skyrl", "slime", "trinity"]
