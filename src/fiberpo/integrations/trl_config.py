"""Settings of the TRL adapter, and which combinations are refused."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from trl import GRPOConfig

from ..errors import ConfigError

REPLACED = {
    "loss_type": "the recipe (objective=...) and its weights",
    "epsilon": "objective_kwargs={'epsilon': ...}",
    "epsilon_high": "objective_kwargs={'epsilon_high': ...}",
    "delta": "objective_kwargs={'dual_clip': ...} of ppo and grpo",
    "importance_sampling_level": "objective='gspo' for sequence ratios",
    "off_policy_mask_threshold": "correction='opsm', correction_kwargs={'delta': ...}",
    "top_entropy_quantile": "nothing: not supported",
    "entropy_coef": "nothing: not supported",
    "use_adaptive_entropy": "nothing: not supported",
}
"""Settings of GRPOConfig that mean nothing here, and what takes their place."""


@dataclass
class FiberPOConfig(GRPOConfig):
    """`trl.GRPOConfig` with the choice of an objective.

    Args:
        objective: name of a recipe (`fiberpo.recipes`).
        objective_kwargs: its parameters.
        domain_column: data column with the domain of a prompt; None looks for ``domain``,
            ``data_source``, ``task``, ... and takes one domain for all if there is none.
        keep_groups_together: shuffle whole prompt groups into the windows of a rollout. False
            shuffles single answers, as TRL does: a group is then spread over several windows, and
            group gates see only a part of it at a time.
        split_mode: ``"exact"``; or ``"local"`` or ``"stale"`` (see `fiberpo.exact.Stepper`), which
            save the extra forward and are wrong by what ``gate/split_error`` says.
        split_check_every: with those, measure the error in every so many windows; 0 never does.
        mask_max, mask_mean: thresholds of `MaxDivergence` (k2) and `MeanDivergence` (k3), nats.
        correction: ``"tis"``, ``"masked_is"``, ``"icepop"``, ``"geometric_mask"`` or ``"opsm"``
            (`fiberpo.corrections`).
        correction_kwargs: its parameters.
        reward_range: lowest and highest possible reward (weighted sum); with it ``bound/*`` is
            logged.
        linear_log_probs: log-probs by `fiberpo.linear_logprob`; None: on a CPU, where the output
            head is a plain linear one with a vocabulary of 4096 or more.
        record_to: directory for a recording of every optimizer step (`trl_record.record`); none
            where None.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        *GRPOConfig._VALID_DICT_FIELDS, "objective_kwargs", "correction_kwargs",
    ]  # fmt: skip

    objective: str = field(default="fiberstop", metadata={"help": "Name of a recipe."})
    objective_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Parameters of the recipe."}
    )
    domain_column: str | None = field(
        default=None, metadata={"help": "Data column with the domain of a prompt."}
    )
    keep_groups_together: bool = field(
        default=True, metadata={"help": "Shuffle whole prompt groups into optimizer windows."}
    )
    split_mode: str = field(
        default="exact", metadata={"help": "exact, or the cheaper and wrong local or stale."}
    )
    split_check_every: int = field(
        default=20, metadata={"help": "Windows between two measurements of their error."}
    )
    mask_max: float | None = field(
        default=None, metadata={"help": "Largest k2 of a token, in nats, of answers that count."}
    )
    mask_mean: float | None = field(
        default=None, metadata={"help": "Largest mean k3, in nats, of answers that count."}
    )
    correction: str | None = field(
        default=None, metadata={"help": "tis, masked_is, icepop, geometric_mask or opsm."}
    )
    correction_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Parameters of the correction."}
    )
    reward_range: list[float] | None = field(
        default=None, metadata={"help": "Lowest and highest reward; logs the bound."}
    )
    linear_log_probs: bool | None = field(
        default=None,
        metadata={"help": "Log-probs by fiberpo.linear_logprob; None: where it helps."},
    )
    record_to: str | None = field(
        default=None, metadata={"help": "Directory for a recording of every optimizer step."}
    )


def check_config(args: FiberPOConfig) -> None:
    """Refuse settings that cannot work, or that would silently have no effect."""
    if not isinstance(args, FiberPOConfig):
        raise ConfigError(f"args is a {type(args).__name__}; use FiberPOConfig")
    defaults = {f.name: f.default for f in fields(GRPOConfig)}
    for name, remedy in REPLACED.items():
        value = getattr(args, name)
        if value != defaults[name]:
            raise ConfigError(
                f"{name} = {value!r} has no effect on a fiberpo objective; remove it (in its "
                f"place: {remedy})"
            )
    micro, accumulation = args.steps_per_generation, args.gradient_accumulation_steps
    if micro % accumulation:
        raise ConfigError(
            f"steps_per_generation = {micro} is not a multiple of gradient_accumulation_steps = "
            f"{accumulation}: an optimizer window would span two rollouts. Set "
            f"steps_per_generation to a multiple of {accumulation} (twice or more for several "
            "updates per rollout)."
        )


def check_model(model: torch.nn.Module, args: FiberPOConfig) -> None:
    """Refuse a random forward pass where it is needed twice."""
    if args.gradient_accumulation_steps == 1:
        return
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout) and module.p > 0:
            raise ConfigError(
                f"{name} is a dropout of {module.p}: the two phases of the exact form need the "
                "same log-probs twice. Set disable_dropout=True."
            )
