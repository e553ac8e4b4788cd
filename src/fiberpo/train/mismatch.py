"""A generation engine whose policy differs from the trainer's, made on purpose.

In large runs answers are sampled by an engine that computes in other precision, or with other
kernels, than the trainer. `MismatchTrainer` makes such a difference of a size that can be chosen:
it samples with a perturbed copy of the weights, and hands the log-probs of that copy on as those
of the engine. Masks and corrections then have something to mask and to correct, as with vLLM.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from trl.trainer.utils import pad

from ..divergence import k2, k3
from ..integrations import trl_rows as rows
from ..integrations.trl import FiberPOTrainer


@dataclass(frozen=True)
class Engine:
    """The perturbation: what the engine's weights are, given those of the trainer.

    Every weight matrix ``w`` (embeddings too, vectors not) becomes ``w + noise rms(w) z``, where
    ``z`` is standard normal, a fresh draw for each rollout. Then every parameter is cast to
    bfloat16, and so is the computation, where that is asked for.

    Args:
        noise: size of the perturbation, relative to the root mean square of each matrix.
        bf16: cast to bfloat16.
        seed: of ``z``, which depends on (seed, rollout) and the shapes of the weights alone. It
            neither reads nor moves the global random state.
    """

    noise: float = 0.0
    bf16: bool = False
    seed: int = 0

    @torch.no_grad()
    def weights(self, model: torch.nn.Module, rollout: int) -> Iterator[tuple[str, Tensor]]:
        """Name and perturbed value of every parameter; the model's own are only read."""
        digest = hashlib.blake2b(f"engine:{self.seed}:{rollout}".encode(), digest_size=8).digest()
        draw = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
        for name, parameter in model.named_parameters():
            value = parameter.detach()
            if self.noise and value.ndim > 1:
                z = torch.randn(value.shape, generator=draw).to(value)
                value = value + self.noise * value.square().mean().sqrt() * z
            yield name, value.bfloat16() if self.bf16 else value

    @contextlib.contextmanager
    def sampling(self, model: torch.nn.Module, rollout: int) -> Iterator[None]:
        """Within, ``model`` has the engine's weights; afterwards its own, to the bit.

        The trainer's values are set aside, not computed back, so that they return unharmed however
        the block ends.
        """
        own = {name: parameter.data for name, parameter in model.named_parameters()}
        parameters = dict(model.named_parameters())
        try:
            for name, value in self.weights(model, rollout):
                parameters[name].data = value
            yield
        finally:
            for name, value in own.items():
                parameters[name].data = value


class MismatchTrainer(FiberPOTrainer):
    """A `FiberPOTrainer` whose answers are sampled by an `Engine`.

    The engine's log-probs of the sampled tokens (one forward pass of the perturbed weights over
    the finished answers) take the place that vLLM's have in TRL: they become the
    ``rollout_log_probs`` of the batch. ``old_log_probs`` stay those of the trainer's own weights.
    TRL's own correction belongs to vLLM and is not applied.

    Logs ``engine/k3`` and ``engine/max_k2`` of every rollout: the mismatch alone, between engine
    and trainer before the first update on it.

    Args:
        engine: the perturbation.
        *args, **kwargs: as for `FiberPOTrainer`.
    """

    def __init__(self, *args: Any, engine: Engine, **kwargs: Any) -> None:
        self.engine = engine
        super().__init__(*args, **kwargs)

    def _generate_single_turn(
        self, prompt_ids: Sequence[Sequence[int]], *args: Any, **kwargs: Any
    ) -> tuple[list[list[int]], list[list[float]]]:
        rollout = self.state.global_step // self.updates_per_rollout
        with self.engine.sampling(self.accelerator.unwrap_model(self.model), rollout):
            answers, _ = super()._generate_single_turn(prompt_ids, *args, **kwargs)
            prompts, seen = self._padded(prompt_ids, "left")
            completions, written = self._padded(answers, "right")
            log_probs = self._scored(
                torch.cat([prompts, completions], 1), torch.cat([seen, written], 1),
                completions.shape[1],
            )  # fmt: skip
        found = zip(log_probs.float(), answers, strict=True)
        return answers, [row[: len(answer)].tolist() for row, answer in found]

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        if "old_per_token_logps" not in output:  # TRL leaves them out with one update per rollout
            output["old_per_token_logps"] = self._scored(
                torch.cat([output["prompt_ids"], output["completion_ids"]], 1),
                torch.cat([output["prompt_mask"], output["completion_mask"]], 1),
                output["completion_ids"].shape[1],
            )
        gap = output["old_per_token_logps"] - output["sampling_per_token_logps"]
        gap = gap[rows.loss_mask(output)].double()
        sums = self._group.total(torch.stack([k3(gap).sum(), torch.ones_like(gap).sum()]))
        largest = self._group.largest(k2(gap).amax() if len(gap) else gap.sum())
        mode = "train" if self.model.training else "eval"
        self._log("engine/k3", float(sums[0] / sums[1]), mode)
        self._log("engine/max_k2", float(largest), mode)
        return output

    def _padded(self, ids: Sequence[Sequence[int]], side: str) -> tuple[Tensor, Tensor]:
        """Token ids and their mask, laid out as TRL lays out a rollout."""
        found = [torch.tensor(row) for row in ids]
        multiple = self.pad_to_multiple_of
        tokens = pad(found, self._tokenizer.pad_token_id, side, multiple)
        mask = pad([torch.ones_like(row) for row in found], 0, side, multiple)
        return tokens.to(self.accelerator.device), mask.to(self.accelerator.device)

    def _scored(self, ids: Tensor, attention: Tensor, width: int) -> Tensor:
        """Log-probs ``[B, width]`` of the last ``width`` tokens under the weights in place."""
        with torch.no_grad():
            log_probs: Tensor = self._get_per_token_logps_and_entropies(
                self.model, ids, attention, width,
                batch_size=self.args.per_device_train_batch_size,
            )[0]  # fmt: skip
        return log_probs
