"""`record`: keep what a TRL trainer optimises, for replay, doctor, suggest and report.

    from fiberpo.integrations.trl_record import record

    trainer = GRPOTrainer(...)                     # or FiberPOTrainer; your own subclass
    record(trainer, "runs/mine/recording")
    trainer.train()

Nothing of the training changes: the log-probs are those of the trainer's own forward pass. A
plain `trl.GRPOTrainer` has no ids of groups and domains; groups follow from the place of a row in
its rollout, domains from a column of the data. Where a step cannot be recorded (NaN log-probs, a
full disk), a warning says so and training goes on.

Tested with TRL 1.16.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import trl
from torch import Tensor
from transformers import TrainerCallback
from trl import GRPOTrainer

from .. import recipes
from ..batch import RatioBatch
from ..errors import ConfigError, RecordingError
from ..objective import Objective
from ..recording import Recorder
from . import trl_rows as rows
from .trl_config import REPLACED

Scored = tuple[Tensor, Tensor | None]
"""Log-probs and entropies of a micro-batch, ``[B, T]``."""

SETTINGS = (
    "loss_type", "importance_sampling_level", "epsilon", "epsilon_high", "delta", "beta",
    "scale_rewards", "num_generations", "per_device_train_batch_size",
    "gradient_accumulation_steps", "steps_per_generation", "num_iterations", "learning_rate",
    "max_completion_length", "temperature", "top_p", "top_k", "bf16", "fp16", "use_vllm",
    "vllm_importance_sampling_correction", "mask_truncated_completions", "split_mode",
    "keep_groups_together", "max_steps", "seed",
)  # fmt: skip
"""Settings of the trainer that the manifest keeps."""


def record(
    trainer: GRPOTrainer,
    path: str | Path,
    *,
    domain_column: str | None = None,
    overwrite: bool = False,
) -> TrainerRecording:
    """Record every optimizer step of a trainer; call it before ``trainer.train()``.

    Args:
        trainer: a `trl.GRPOTrainer` or `FiberPOTrainer`, or a subclass of them that computes its
            loss from ``_get_per_token_logps_and_entropies``.
        path: directory of the recording; ``<output_dir>/recording`` is usual.
        domain_column: data column with the domain of a prompt; by default the usual names are
            looked for. (A `FiberPOTrainer` knows its own.)
        overwrite: replace a recording of an earlier run.

    Returns:
        The callback that records, added to the trainer.

    Raises:
        ConfigError: for a trainer of another kind.
    """
    if not isinstance(trainer, GRPOTrainer):
        raise ConfigError(
            f"record takes a GRPOTrainer or FiberPOTrainer, not a {type(trainer).__name__}; call "
            "fiberpo.recording.Recorder yourself where your loss has the log-probs"
        )
    callback = TrainerRecording(trainer, Path(path), domain_column, overwrite)
    trainer.add_callback(callback)
    return callback


def known_objective(trainer: GRPOTrainer) -> Objective | None:
    """The recipe that a trainer optimises; None where fiberpo has none that equals it.

    For plain TRL these are the losses that the parity tests compare (``docs/trl.md``).
    """
    if isinstance(getattr(trainer, "objective", None), Objective):
        return trainer.objective
    args = trainer.args
    if args.off_policy_mask_threshold is not None or args.top_entropy_quantile < 1:
        return None
    low, high = args.epsilon, args.epsilon_high
    if args.importance_sampling_level == "sequence":
        plain = args.loss_type == "grpo" and args.delta is None
        return recipes.gspo(low, low if high is None else high) if plain else None
    if args.loss_type == "grpo":
        return recipes.grpo(low, high, dual_clip=args.delta)
    if args.loss_type == "dapo":
        return recipes.ppo(low, high, dual_clip=args.delta)
    if args.loss_type == "dr_grpo" and args.delta is None:
        return recipes.dr_grpo(args.max_completion_length, low, high)
    return None


class TrainerRecording(TrainerCallback):
    """What `record` adds to a trainer.

    Attributes:
        recorder: the open `Recorder`, between the begin and the end of training.
    """

    def __init__(
        self, trainer: GRPOTrainer, path: Path, domain_column: str | None, overwrite: bool
    ) -> None:
        self.trainer, self.path = trainer, path
        self.domain_column, self.overwrite = domain_column, overwrite
        self.recorder: Recorder | None = None
        self._domains: list[str] = []
        self._rewards = torch.zeros(0)
        self._latest: Scored | None = None
        self._window: list[tuple[dict[str, Any], Scored | None]] = []
        # FiberPOTrainer has a method of its own between its loss and TRL's log-probs
        source = "_log_probs" if hasattr(trainer, "_log_probs") else _LOG_PROBS
        for name, around in (
            ("_generate_and_score_completions", self._generate),
            ("_calculate_rewards", self._reward),
            (source, self._score),
            ("_compute_loss", self._loss),
        ):
            setattr(trainer, name, _bound(around, getattr(trainer, name)))

    # -- around the trainer's methods --------------------------------------------------------

    def _generate(self, inner: Any, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output: dict[str, Any] = inner(inputs)
        trainer = self.trainer
        if self.recorder is None or not trainer.model.training or "group_id" in output:
            return output
        first = trainer.accelerator.process_index * len(inputs)
        device = output["completion_ids"].device
        places = torch.arange(first, first + len(inputs), device=device)
        output["group_id"] = torch.div(places, trainer.num_generations, rounding_mode="floor")
        names = rows.domains(inputs, self.domain_column)
        self._domains += sorted(set(names) - set(self._domains))
        codes = [self._domains.index(name) for name in names]
        output["domain_id"] = torch.tensor(codes, device=device)
        output["raw_reward"] = self._rewards[first : first + len(inputs)]
        return output

    def _reward(self, inner: Any, *args: Any, **kwargs: Any) -> Tensor:
        rewards: Tensor = inner(*args, **kwargs)  # of all processes
        weights = self.trainer.reward_weights.to(rewards.device)
        self._rewards = (rewards * weights).nansum(1)
        return rewards

    def _score(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        found = inner(*args, **kwargs)
        if torch.is_grad_enabled():
            entropies = found[1]
            self._latest = (
                found[0].detach(), None if entropies is None else entropies.detach(),
            )  # fmt: skip
        return found

    def _loss(self, inner: Any, model: Any, inputs: dict[str, Any]) -> Tensor:
        self._latest = None
        loss: Tensor = inner(model, inputs)
        if self.recorder is None or not self.trainer.model.training:
            return loss
        self._window.append((inputs, self._latest))
        if len(self._window) == self.trainer.current_gradient_accumulation_steps:
            window, self._window = self._window, []
            step = self.trainer.state.global_step + 1
            self.recorder.attempt(step, lambda: self._columns(window))
        return loss

    # -- what is kept ------------------------------------------------------------------------

    def _part(self, inputs: dict[str, Any], scored: Scored | None) -> dict[str, Any]:
        """A micro-batch on the CPU."""
        if scored is None:
            raise RecordingError(
                f"{type(self.trainer).__name__} computed its loss without {_LOG_PROBS}, so its "
                "log-probs are not known; call fiberpo.recording.Recorder yourself"
            )
        log_probs, entropies = scored
        log_probs = log_probs if log_probs.dtype == torch.float64 else log_probs.float()
        mask, old = rows.loss_mask(inputs), rows.old_log_probs(inputs, log_probs)
        engine = inputs.get("sampling_per_token_logps")
        rollout = old if engine is None else torch.where(torch.isnan(engine), old, engine.float())
        labels: dict[str, Any] = {}
        if "domain_id" in inputs:
            names = getattr(self.trainer, "_domains", self._domains)
            labels["domain"] = [names[i] for i in inputs["domain_id"].tolist()]
        if "group_id" in inputs:
            labels["group"] = inputs["group_id"].cpu()
        batch = RatioBatch.from_padded(
            log_probs.cpu(), old.cpu(), rows.advantages(inputs).cpu(), mask.cpu(), labels=labels,
            rollout_log_probs=rollout.to(log_probs.dtype).cpu(), allow_empty=True,
        )  # fmt: skip
        kept = mask.any(1)
        rewards = inputs.get("raw_reward")
        return {
            "batch": batch,
            "token_ids": inputs["completion_ids"].cpu(),
            "entropies": None if entropies is None else entropies.float().cpu(),
            "rewards": None if rewards is None else rewards.to(kept.device)[kept].cpu(),
            "prompts": self._prompts(inputs, kept),
        }

    def _prompts(self, inputs: dict[str, Any], kept: Tensor) -> list[str]:
        """Text of the prompts, each decoded once."""
        decode = self.trainer.processing_class.decode
        ids, mask = inputs["prompt_ids"].cpu().numpy(), inputs["prompt_mask"].cpu().numpy() != 0
        known: dict[bytes, str] = {}
        found = []
        for row in kept.nonzero().flatten().tolist():
            prompt = ids[row][mask[row]]
            key = prompt.tobytes()
            if key not in known:
                known[key] = str(decode(prompt.tolist(), skip_special_tokens=True))
            found.append(known[key])
        return found

    def _columns(self, window: list[tuple[dict[str, Any], Scored | None]]) -> dict[str, Any]:
        """The arguments of `Recorder.record` for the micro-batches of an optimizer step."""
        parts = [self._part(inputs, scored) for inputs, scored in window]
        found: dict[str, Any] = {
            name: None if any(part[name] is None for part in parts) else [p[name] for p in parts]
            for name in ("batch", "token_ids", "entropies", "rewards")
        }
        found["prompts"] = [text for part in parts for text in part["prompts"]]
        return found

    # -- callback ----------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the recording; go on with it where training resumes."""
        resumed = state.global_step > 0
        plain = type(self.trainer).__mro__.index(GRPOTrainer) == 0
        ours = isinstance(getattr(self.trainer, "objective", None), Objective)
        unused = REPLACED if ours else ()
        settings = {
            name: getattr(args, name)
            for name in SETTINGS
            if hasattr(args, name) and name not in unused
        }
        if not ours:
            settings["groups"] = (
                "by the place of a row in its rollout; TRL shuffles single answers over the "
                "updates of a rollout, so a group may be in several steps"
            )
        self._window = []
        self.recorder = Recorder(
            self.path,
            known_objective(self.trainer),
            host=f"trl {trl.__version__} {'GRPOTrainer' if plain else type(self.trainer).__name__}",
            settings=settings,
            tokenizer=self.trainer.processing_class,
            rank=self.trainer.accelerator.process_index,
            ranks=self.trainer.accelerator.num_processes,
            overwrite=self.overwrite and not resumed,
            resume=resumed,
        )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the recording; complete where the run reached its last step."""
        if self.recorder is not None:
            self.recorder.close(complete=state.global_step >= state.max_steps)
            self.recorder = None


_LOG_PROBS = "_get_per_token_logps_and_entropies"


def _bound(around: Any, inner: Any) -> Any:
    """The trainer's method with ours around it."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return around(inner, *args, **kwargs)

    return call
