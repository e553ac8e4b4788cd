"""Masks, corrections and the bound inside the TRL trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from ..corrections import needs_engine
from ..errors import ConfigError
from ..objective import Objective, Surrogate
from ..theory.certificate import certificate
from .trl_rows import loss_mask

LARGEST_LOG_RATIO = 700.0
"""Beyond it a ratio overflows: such a window has no bound."""


def check_corrections(objective: Objective, args: Any) -> None:
    """Refuse to correct for the engine twice."""
    if objective.factors and args.use_vllm and args.vllm_importance_sampling_correction:
        raise ConfigError(
            f"vllm_importance_sampling_correction = True and the factors {objective.factors} would "
            "both multiply by the ratio of trainer and engine; set "
            "vllm_importance_sampling_correction=False, or leave the correction out"
        )


def rollout_log_probs(
    objective: Objective, inputs: Mapping[str, Any], old: Tensor
) -> Tensor | None:
    """Log-probs of the policy that sampled, ``[B, T]``; None where nobody asks.

    The engine's where there are any (the trainer's own at tokens that it did not score); else
    ``old``: without an engine, the policy that the trainer scored is the one that sampled.

    Raises:
        ConfigError: for a correction that would do nothing without an engine.
    """
    engine = inputs.get("sampling_per_token_logps")
    if engine is not None:
        return torch.where(torch.isnan(engine), old, engine)
    idle = needs_engine(objective)
    if idle:
        raise ConfigError(
            f"{', '.join(idle)} corrects for a generation engine, but the answers were sampled by "
            "the trainer's own model (no sampling_per_token_logps): every ratio would be 1. Use "
            "vLLM, or leave the correction out; masks on the divergence and opsm work without."
        )
    return old if objective.by_trajectory else None


def rewards_of(inputs: Sequence[Mapping[str, Any]]) -> Tensor:
    """Raw rewards of the answers with a loss token, in the order of the window."""
    return torch.cat([x["raw_reward"][loss_mask(x).any(1)] for x in inputs])


def bound_metrics(
    surrogates: Sequence[Surrogate], rewards: Tensor, reward_range: Sequence[float]
) -> dict[str, float]:
    """``bound/*`` of a window over all ranks, which call together; empty where there is none.

    There is none where no answer has a loss token, and where a ratio overflows.

    Raises:
        BoundError: for a reward outside of ``reward_range``.
    """
    log_rho, lengths = [], []
    for batch in (surrogate.batch for surrogate in surrogates):
        rollout = batch.rollout_log_probs
        base = batch.old_log_probs if rollout is None else rollout
        log_rho += (batch.log_probs.detach() - base).double().tolist()
        lengths += batch.lengths.tolist()
    log_rho, lengths = gather_object(log_rho), gather_object(lengths)
    rewards = gather_object(rewards.double().tolist())
    if not lengths or max(map(abs, log_rho)) >= LARGEST_LOG_RATIO:
        return {}
    return certificate(log_rho, lengths, rewards, reward_range=reward_range).metrics()
