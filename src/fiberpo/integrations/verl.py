"""fiberpo inside verl: loss modes, their settings, and the switch to the exact worker.

Loaded by verl itself through the entry point group ``verl.plugins``. It registers one policy loss a
recipe (``fiberpo``, ``fiberpo_domain``, ``fiberpo_grpo``, ...); none of verl's own is touched.

A registered loss sees the tokens of one micro-batch, without ``uid`` and ``data_source``. Token and
trajectory gates are exact there, since verl hands over the denominators of the whole mini-batch
(``config.global_batch_info``). Group and domain gates are not: they need the worker of
`fiberpo.integrations.verl_worker`, which `FiberPOPolicyLossConfig` switches on. Without it such an
objective is refused.

verl divides no loss by the number of ranks, and FSDP averages gradients over them, so every loss is
multiplied by ``dp_size``.

Tested with verl 0.9.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import register_policy_loss
from verl.workers.config import PolicyLossConfig

from .. import recipes
from ..batch import RatioBatch
from ..errors import ConfigError
from ..objective import Objective
from ..weights import ALIASES, Denominators, Weights

LOSS_MODES: Mapping[str, str] = {
    name if name.startswith("fiber") else f"fiberpo_{name}": name for name in recipes.RECIPES
}
"""``policy_loss.loss_mode`` -> recipe."""

CONFIG = "fiberpo.integrations.verl.FiberPOPolicyLossConfig"

LABELS: Mapping[str, str] = {"domain": "data_source", "group": "uid"}
"""Stratum -> column of verl's batch."""

REPLACED = {
    "clip_ratio": "policy_loss.epsilon",
    "clip_ratio_low": "policy_loss.epsilon",
    "clip_ratio_high": "policy_loss.objective_kwargs.epsilon_high",
    "clip_ratio_c": "policy_loss.objective_kwargs.dual_clip of fiberpo_ppo and fiberpo_grpo",
}
"""Settings of verl's actor that mean nothing here, and what takes their place."""


@dataclass
class FiberPOPolicyLossConfig(PolicyLossConfig):
    """`verl.workers.config.PolicyLossConfig` with the parameters of a recipe.

    Selected by ``policy_loss._target_``. Where it is made with one of `LOSS_MODES`, it also makes
    the `FiberPOTrainingWorker` the actor of that process (`verl_worker.install`).

    Args:
        loss_mode: one of `LOSS_MODES`, or any of verl's own.
        budget: ``[C+, C-]`` in nats per token, of ``fiberpo``.
        budgets: stratum -> ``[C+, C-]``, of ``fiberpo_domain`` and ``fiberstop``;
            possibly one pair a context name.
        epsilon: of the recipe, with the recipe's own meaning.
        pessimistic: of the recipe.
        objective_kwargs: every other parameter of the recipe.
        labels: stratum -> column of the batch, in addition to `LABELS`; a list of columns makes
            one id (``trajectory: [uid, session_id]`` joins the rows of one agent session).
        skip_first_forward: take every log ratio of the first update after a rollout for 0, which
            saves its extra forward. Right where ``old_log_probs`` are recomputed by the actor
            itself (not with ``rollout_correction.bypass_mode``).
        record_to: directory for a recording of every optimizer step (``docs/recording.md``).

    Raises:
        ConfigError, ObjectiveError, BudgetError: for parameters that the recipe does not take.
    """

    loss_mode: str = "fiberstop"
    budget: Any = None
    budgets: Any = None
    epsilon: float | None = None
    pessimistic: bool | None = None
    objective_kwargs: dict[str, Any] = field(default_factory=dict)
    labels: dict[str, Any] = field(default_factory=dict)
    skip_first_forward: bool = False
    record_to: str | None = None

    def __post_init__(self) -> None:
        if self.loss_mode in LOSS_MODES:
            make_objective(self)
            from .verl_worker import install

            install()


def make_objective(settings: Any) -> Objective:
    """The objective that ``policy_loss`` asks for.

    Raises:
        ConfigError: for a parameter that is given twice.
        ObjectiveError, BudgetError, StrataError: from the recipe.
    """
    named = {
        name: getattr(settings, name, None)
        for name in ("budget", "budgets", "epsilon", "pessimistic")
    }
    given = {name: value for name, value in named.items() if value is not None}
    more = dict(getattr(settings, "objective_kwargs", None) or {})
    twice = sorted(set(given) & set(more))
    if twice:
        raise ConfigError(
            f"policy_loss gives {twice[0]!r} twice, as a field ({given[twice[0]]!r}) and in "
            f"objective_kwargs ({more[twice[0]]!r}); remove one"
        )
    return recipes.from_name(LOSS_MODES[settings.loss_mode], **given, **more)


def settings_of(config: Any) -> Any:
    """``config.policy_loss`` of a verl actor configuration where it names one of `LOSS_MODES`."""
    settings = getattr(config, "policy_loss", None)
    return settings if getattr(settings, "loss_mode", None) in LOSS_MODES else None


def check_actor(config: Any, objective: Objective) -> None:
    """Refuse settings of the actor that would silently have no effect, or contradict the recipe."""
    for name, remedy in REPLACED.items():
        default = type(config).__dataclass_fields__[name].default
        value = config.get(name)
        if value is not None and value != default:
            raise ConfigError(
                f"actor.{name} = {value!r} has no effect with loss_mode="
                f"{config.policy_loss.loss_mode!r}; remove it (in its place: {remedy})"
            )
    wanted = objective.weights
    if wanted.kind == "stratum_mean":  # has no name in verl
        return
    mode, length = config.loss_agg_mode, config.loss_scale_factor
    norm = ALIASES.get(mode) == "constant"
    if mode in ALIASES and (length or not norm) and Weights.parse(mode, length) == wanted:
        return
    name = next(theirs for theirs, ours in ALIASES.items() if ours == wanted.kind)
    also = f" and actor.loss_scale_factor={wanted.length:g}" if wanted.length else ""
    raise ConfigError(
        f"actor.loss_agg_mode is {mode!r}"
        + (f" with loss_scale_factor={length}" if norm else "")
        + f", but {objective.name} aggregates with {wanted.kind}. Set actor.loss_agg_mode={name}"
        f"{also}, or give the recipe the other weights (policy_loss.objective_kwargs.weights="
        f"{mode})."
    )


def needs_worker(objective: Objective, settings: Any) -> list[str]:
    """What the objective looks at that a single micro-batch, without ids, does not show."""
    gate_map = objective.gate_map
    seen = [*objective.strata, objective.weights.stratum]
    found = [name for name in seen if name not in (None, "trajectory")]
    joined = ("trajectory", getattr(gate_map.token, "states", None))  # by ids, where there are any
    found += [name for name in settings.get("labels", {}) if name in joined]
    return list(dict.fromkeys(found))


def _register(mode: str) -> None:
    @register_policy_loss(mode)  # type: ignore[untyped-decorator]
    def loss(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        """verl's signature of a policy loss; tensors are ``[B, T]``."""
        mask = response_mask.bool()
        advantages = weighted(advantages, rollout_is_weights)
        with torch.autocast(log_prob.device.type, enabled=False):
            step = getattr(config.policy_loss, "step", None)
            if step is not None:
                value = step.loss(log_prob)
                (gradient,) = torch.autograd.grad(value, log_prob, retain_graph=True)
                more: dict[str, float] = {}
            else:
                value, gradient, more = _part_loss(old_log_prob, log_prob, advantages, mask, config)
            log_ratio = (log_prob.detach() - old_log_prob)[mask]
            return value, {**more, **host_metrics(log_ratio, advantages[mask], gradient[mask])}


for _mode in LOSS_MODES:
    _register(_mode)


def weighted(advantages: Tensor, rollout_is_weights: Tensor | None) -> Tensor:
    """verl's correction for the engine that sampled is an independent factor on the advantages."""
    return advantages if rollout_is_weights is None else advantages * rollout_is_weights


def _part_loss(
    old_log_prob: Tensor, log_prob: Tensor, advantages: Tensor, mask: Tensor, config: Any
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Loss of one micro-batch by itself, its gradient ``[B, T]``, and metrics."""
    objective = make_objective(config.policy_loss)
    check_actor(config, objective)
    beyond = needs_worker(objective, config.policy_loss)
    if beyond:
        raise ConfigError(
            f"loss_mode={config.policy_loss.loss_mode!r} has gates or weights on {beyond}, and "
            "verl hands a loss one micro-batch without uid and data_source: that would silently "
            f"be another objective. Set actor.policy_loss._target_={CONFIG}, which brings the "
            "worker that sees the whole mini-batch (or set actor_worker_cls = "
            "FiberPOTrainingWorker on your own subclass of ActorRolloutRefWorker)."
        )
    info = config.global_batch_info
    size = info.get("dp_size", 1)
    counts = {name: info.get(name) for name in ("batch_num_tokens", "global_batch_size")}
    missing = [name for name, count in counts.items() if count is None]
    if missing:
        raise ConfigError(
            f"config.global_batch_info has no {missing[0]!r}: without the counts of the whole "
            "mini-batch the loss would be scaled by the number of micro-batches. verl's ppo_loss "
            "sets them; call the loss through it."
        )
    out = objective(
        RatioBatch.from_padded(log_prob, old_log_prob, advantages, mask, allow_empty=True),
        denominators=Denominators(counts["batch_num_tokens"], counts["global_batch_size"]),
    )
    metrics = out.metrics() if len(out.batch) else {}
    names = ["gate/active", "gate/gradient_kept", "gate/gradient_reversed", "kl/k3", "ratio/mean"]
    names += [
        f"gate/{stratum}/{regime}_frac"
        for stratum in (*objective.strata, "token")
        for regime in ("pass", "rollback", "zeroed")
    ]
    names += [
        "gate/left_out",
        *dict.fromkeys(f"stop/{n}" for stop in objective.stops for n in (*stop.strata, "token")),
    ]
    # verl wants the same keys from every micro-batch and averages them
    kept = {name: metrics.get(name, 0.0) for name in names}
    return (out.loss * size).float(), out.batch.to_padded(-out.coefficients), kept


def host_metrics(log_ratio: Tensor, advantages: Tensor, gradient: Tensor) -> dict[str, float]:
    """verl's own panel, of the loss tokens ``[N]`` of a micro-batch.

    ``actor/pg_clipfrac``: tokens whose own gradient is 0 or turned round. The part of them with
    ``A < 0`` and a ratio above 1, where the dual clip acts, is in ``actor/pg_clipfrac_lower``.
    """
    stopped = (gradient * advantages >= 0) & (advantages != 0)
    lower = stopped & (advantages < 0) & (log_ratio > 0)
    count = max(len(log_ratio), 1)
    sums = torch.stack([(stopped & ~lower).sum(), lower.sum(), -log_ratio.double().sum()])
    clipped, clipped_lower, kl = (sums / count).tolist()
    return {
        "actor/pg_clipfrac": clipped,
        "actor/pg_clipfrac_lower": clipped_lower,
        "actor/ppo_kl": kl,
    }


__all__ = ["LABELS", "LOSS_MODES", "FiberPOPolicyLossConfig"]
