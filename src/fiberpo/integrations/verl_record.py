"""Recording inside verl: what the exact worker optimised, one shard a rank and optimizer step.

Switched on by ``policy_loss.record_to=<directory>`` of `FiberPOPolicyLossConfig`. verl tells its
workers of no end of training, so a recording of verl never carries the completion marker.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import verl
from torch import Tensor

from ..exact import Window
from ..objective import Objective
from ..recording import Recorder


class WorkerRecording:
    """The recorder of one worker.

    Args:
        path: directory of the recording, the same on all ranks.
        objective: what is optimised.
        engine: verl's engine; its optimizer knows how many steps a resumed run has behind it.
        config: verl's actor configuration.
        tokenizer: verl's, or None.
    """

    def __init__(
        self, path: str, objective: Objective, engine: Any, config: Any, tokenizer: Any
    ) -> None:
        self._step = _steps_taken(engine.optimizer)
        self._writes = engine.is_mp_src_rank_with_outputs()  # one of the ranks with the same rows
        if not self._writes:
            return
        self.recorder = Recorder(
            path,
            objective,
            host=f"verl {verl.__version__}",
            settings={
                "loss_mode": config.policy_loss.loss_mode,
                "ppo_mini_batch_size": config.ppo_mini_batch_size,
                "ppo_epochs": config.ppo_epochs,
                "loss_agg_mode": config.loss_agg_mode,
                "rollout_n": config.rollout_n,
                "strategy": config.strategy,
            },
            tokenizer=tokenizer,
            rank=engine.get_data_parallel_rank(),
            ranks=engine.get_data_parallel_size(),
            resume=self._step > 0,
        )

    def write(
        self, window: Window, log_probs: Sequence[Tensor], micro_batches: Sequence[Any]
    ) -> None:
        """One optimizer step; what goes wrong is a warning."""
        self._step += 1
        if self._writes:
            self.recorder.attempt(self._step, lambda: _columns(window, log_probs, micro_batches))


def _columns(
    window: Window, log_probs: Sequence[Tensor], micro_batches: Sequence[Any]
) -> Mapping[str, Any]:
    pairs = zip(window.parts, log_probs, strict=True)
    responses = [_padded(x["responses"]) if "responses" in x else None for x in micro_batches]
    return {
        "batch": [part.with_log_probs(x.float()) for part, x in pairs],
        "token_ids": None if any(x is None for x in responses) else responses,
    }


def _padded(tensor: Tensor) -> Tensor:
    return tensor.to_padded_tensor(0) if tensor.is_nested else tensor


def _steps_taken(optimizer: Any) -> int:
    """Optimizer steps so far, those before a checkpoint included; 0 where it does not count."""
    counts = [state["step"] for state in optimizer.state.values() if "step" in state]
    return int(torch.as_tensor(counts[0])) if counts else 0
