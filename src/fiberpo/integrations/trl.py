"""fiberpo inside TRL: `FiberPOTrainer` is a `trl.GRPOTrainer` with any fiberpo objective.

TRL does rollouts, rewards, optimisation, checkpoints and logging. This subclass carries group and
domain ids along and replaces the loss by the exact form over the whole *optimizer window* (all
micro-batches of all ranks between two optimizer steps; see
`fiberpo.exact`). The gradient is that of the objective on the undivided window, however it is cut.
The extra forward that this takes is left out in the first window after a rollout, and wherever no
context of the objective reaches beyond one micro-batch (trajectory gates, whole groups).

Tested with TRL 1.16.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from trl import GRPOTrainer
from trl.trainer.utils import (
    split_pixel_values_by_grid,
    split_tensor_dict,
    unsplit_pixel_values_by_grid,
)

from .. import recipes
from ..batch import RatioBatch
from ..collective import LOCAL, Collective, TorchGroup
from ..corrections import masked
from ..errors import ConfigError, DataError
from ..exact import Stepper, Window
from ..objective import Objective
from ..statistics import Statistics
from . import trl_linear as linear
from . import trl_masks as masks
from . import trl_rows as rows
from .trl_config import FiberPOConfig as FiberPOConfig
from .trl_config import check_config, check_model
from .trl_doctor import FirstSteps
from .trl_record import record

STATE_FILE = "fiberpo_state_rank{rank}.pt"


class FiberPOTrainer(GRPOTrainer):
    """`trl.GRPOTrainer` with a fiberpo objective, exact over micro-batches and ranks.

    Args:
        model, reward_funcs, args, **kwargs: as for `trl.GRPOTrainer`; ``args`` is a
            `FiberPOConfig`.
        objective: an `Objective`, in place of the recipe that ``args`` names.

    Attributes:
        objective: the objective in use.
        run_statistics: `Statistics` of all windows so far.
        last_window: the last training window (`exact.Window`) of this rank.

    Raises:
        ConfigError: for settings that cannot work or that have no effect here.
    """

    _tag_names = ["trl", "fiberpo"]

    def __init__(
        self,
        model: Any,
        reward_funcs: Any,
        args: FiberPOConfig,
        *,
        objective: Objective | None = None,
        **kwargs: Any,
    ) -> None:
        check_config(args)
        if objective is None:
            parameters = args.objective_kwargs or {}
            if not isinstance(parameters, Mapping):
                raise ConfigError(f"objective_kwargs is {parameters!r}; it must be a dictionary")
            if args.objective == "dr_grpo":
                parameters = {"length": args.max_completion_length, **parameters}
            objective = recipes.from_name(args.objective, **parameters)
        self.objective = masked(
            objective, mask_max=args.mask_max, mask_mean=args.mask_mean,
            correction=args.correction, correction_kwargs=args.correction_kwargs,
        )  # fmt: skip
        masks.check_corrections(self.objective, args)
        self.run_statistics: Statistics | None = None
        self.last_window: Window | None = None
        self._domains: list[str] = []
        self._place = 0
        self._sums: dict[str, Tensor] = {}
        self._buffered_inputs: Any = None
        self._last_update_of_rollout = 0
        self._raw_rewards = self._window_rewards = torch.zeros(0)
        super().__init__(model, reward_funcs, args=args, **kwargs)
        check_model(self.model, args)
        self._head = linear.attach(self)
        self._group: Collective = TorchGroup() if self.accelerator.num_processes > 1 else LOCAL
        self._stepper = Stepper(
            self.objective,
            collective=self._group,
            mode=args.split_mode,
            check_every=args.split_check_every,
        )
        self.add_callback(FirstSteps(self))
        if args.record_to is not None:
            record(self, args.record_to)

    @property
    def updates_per_rollout(self) -> int:
        """Optimizer steps taken on each rollout; with 1, every log ratio is 0."""
        micro = self.args.steps_per_generation * self.num_iterations
        return int(micro // self.args.gradient_accumulation_steps)

    # -- ids ---------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        training = self.model.training
        device = output["completion_ids"].device
        per_group = self.num_generations if training else self.num_generations_eval
        first = self.accelerator.process_index * len(inputs)
        indices = torch.arange(first, first + len(inputs), device=device)
        output["raw_reward"] = self._raw_rewards[first : first + len(inputs)]
        output["group_id"] = torch.div(indices, per_group, rounding_mode="floor")
        names = rows.domains(inputs, self.args.domain_column)
        for name in sorted(set(gather_object(names)) - set(self._domains)):
            self._domains.append(name)
        position = {name: i for i, name in enumerate(self._domains)}
        output["domain_id"] = torch.tensor([position[n] for n in names], device=device)
        if training:
            self._last_update_of_rollout = self.state.global_step
            self._log_rewards_by_domain(names)
        return output

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        rewards: Tensor = super()._calculate_rewards(*args, **kwargs)  # of all processes
        self._raw_rewards = (rewards * self.reward_weights.to(rewards.device)).nansum(1)
        return rewards

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        # sample in the precision that scores: faster in bf16, and the same policy
        with self.accelerator.autocast():
            return super()._generate_single_turn(*args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As TRL's; begins with a new rollout unless it resumes from a checkpoint."""
        self._step, self._place, self._buffered_inputs = 0, 0, None
        return super().train(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """As TRL's; training then goes on with the random numbers that it would have had."""
        device = self.accelerator.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            return super().evaluate(*args, **kwargs)

    def _log_rewards_by_domain(self, names: Sequence[str]) -> None:
        names = gather_object(list(names))
        for name in sorted(set(names)):
            mine = torch.tensor([n == name for n in names]).to(self._raw_rewards.device)
            self._log(f"reward/domain={name}", float(self._raw_rewards[mine].double().mean()))

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        if not (self.model.training and self.args.keep_groups_together):
            return super()._prepare_inputs(generation_batch)
        generate_every = self.args.steps_per_generation * self.num_iterations
        if self._step % generate_every == 0 or self._buffered_inputs is None:
            batch = self._generate_and_score_completions(generation_batch)
            batch = rows.shuffle_groups(split_pixel_values_by_grid(batch))
            parts = split_tensor_dict(batch, self.args.steps_per_generation)
            self._buffered_inputs = [unsplit_pixel_values_by_grid(part) for part in parts]
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    # -- loss --------------------------------------------------------------------------------

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        if not self.model.training:
            return self._eval_loss(model, inputs)
        place, size = self._place, self.current_gradient_accumulation_steps
        self._place = (place + 1) % size
        if place == 0:
            self.last_window = self._open_window(model, size)
        window = self.last_window
        assert window is not None
        known = window.coefficients(place) if self.beta == 0.0 else None
        log_probs, entropies, aux_loss = self._log_probs(model, inputs, True, known)
        mask = rows.loss_mask(inputs)
        assert entropies is not None
        loss = window.loss(place, rows.anchored(inputs, log_probs))
        if self.beta != 0.0:
            penalty = self._reference_kl(inputs, log_probs, mask, window.weights[place])
            loss = loss + self.beta * penalty * self.accelerator.num_processes
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * aux_loss / size
        self._count("entropy", entropies[mask])
        if place == size - 1:
            window.close()
            self._log_window(window)
        return loss

    def _eval_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """The objective on the eval batch of all ranks."""
        log_probs, entropies, _ = self._log_probs(model, inputs, True)
        log_probs, self._sums = log_probs.detach(), {}
        assert entropies is not None
        self._count("entropy", entropies[rows.loss_mask(inputs)])
        self._log_means("eval")
        batch = self._batch(inputs, log_probs).with_log_probs(log_probs)
        share = self.objective(batch, collective=self._group).loss
        return self._group.total(share.detach()).to(log_probs.dtype)

    def _open_window(self, model: Any, size: int) -> Window:
        start = self._step % self.args.steps_per_generation
        inputs = self._buffered_inputs[start : start + size]
        if len(inputs) < size:
            raise DataError(
                f"a window of {size} micro-batches begins at micro-batch {start} of a rollout of "
                f"{self.args.steps_per_generation}: the epoch before ended within a rollout. Use a "
                "sampler that yields whole rollouts, as TRL's own does, or train one epoch."
            )
        self._sums = {}
        fresh = self.state.global_step == self._last_update_of_rollout
        fresh = fresh or "old_per_token_logps" not in inputs[0]
        if self.args.reward_range is not None:
            self._window_rewards = masks.rewards_of(inputs)
        window = self._stepper.open(
            [self._batch(x, self._anchor(x, model)) for x in inputs], fresh=fresh
        )
        if window.needs_forward:
            with torch.no_grad():
                window.fill([self._log_probs(model, x)[0] for x in inputs])
        return window

    def _anchor(self, inputs: dict[str, Any], model: Any) -> Tensor:
        """The current policy where TRL leaves out the anchor; 0 where nothing looks at it."""
        if "old_per_token_logps" in inputs or "sampling_per_token_logps" not in inputs:
            return torch.zeros(inputs["completion_ids"].shape, device=self.accelerator.device)
        with torch.no_grad():  # a mask compares the rollout with the log-probs themselves
            return self._log_probs(model, inputs)[0]

    def _batch(self, inputs: dict[str, Any], anchor: Tensor) -> RatioBatch:
        """The loss tokens of a micro-batch at the anchor of the ratio."""
        mask, old = rows.loss_mask(inputs), rows.old_log_probs(inputs, anchor)
        return RatioBatch.from_padded(
            old,
            old,
            rows.advantages(inputs),
            mask,
            labels={
                "domain": [self._domains[i] for i in inputs["domain_id"].tolist()],
                "group": inputs["group_id"],
            },
            rollout_log_probs=masks.rollout_log_probs(self.objective, inputs, old),
            allow_empty=True,
        )

    def _reference_kl(
        self, inputs: dict[str, Any], log_probs: Tensor, mask: Tensor, mu: Tensor
    ) -> Tensor:
        """``sum_i mu_i k_i`` with ``k = exp(g) - g - 1``, ``g = ref - log_probs``.

        Times the policy ratio where TRL's ``use_bias_correction_kl`` is on (its default).
        """
        gap = (inputs["ref_per_token_logps"] - log_probs)[mask].double()
        penalty = torch.expm1(gap) - gap
        self._count("kl", penalty)
        if self.args.use_bias_correction_kl:
            log_ratio = (log_probs - rows.old_log_probs(inputs, log_probs))[mask]
            penalty = penalty * log_ratio.double().exp()
        return (mu * penalty).sum()

    def _log_probs(
        self, model: Any, inputs: dict[str, Any], with_extras: bool = False,
        known: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
        input_ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        mask = rows.loss_mask(inputs)
        head = self._head.asked(mask, with_extras, known) if self._head else nullcontext()
        with head:
            return self._get_per_token_logps_and_entropies(
                model, input_ids, attention, inputs["completion_ids"].size(1),
                compute_entropy=with_extras,
                compute_aux_loss=with_extras and self.aux_loss_enabled,
                **rows.forwarded(inputs),
            )  # fmt: skip

    # -- logging -----------------------------------------------------------------------------

    def _log(self, name: str, value: float, mode: str = "train") -> None:
        self._metrics[mode][name].append(value)

    def _count(self, name: str, values: Tensor) -> None:
        """Add the values of tokens to a mean of the window."""
        values = values.detach().double()
        sums = torch.stack([values.sum(), torch.ones_like(values).sum()])
        self._sums[name] = self._sums.get(name, 0) + sums

    def _log_means(self, mode: str) -> None:
        for name, sums in self._sums.items():
            total, count = self._group.total(sums).tolist()
            if count:
                self._log(name, total / count, mode)

    def _log_window(self, window: Window) -> None:
        parts = gather_object([window.statistics.state()])
        merged = functools.reduce(Statistics.merge, map(Statistics.from_state, parts))
        before = self.run_statistics
        self.run_statistics = merged if before is None else before.merge(merged)
        for name, value in merged.compute().items():
            self._log(name, value)
        self._log_means("train")
        if window.needs_forward:
            gap = self._group.largest(window.phase_difference)
            self._log("gate/phase_difference", float(gap))
        error = window.split_error()
        if error is not None:
            self._log("gate/split_error", float(error))
        if self.args.reward_range is not None:
            found = masks.bound_metrics(
                window.surrogates, self._window_rewards, self.args.reward_range
            )
            for name, value in found.items():
                self._log(name, value)
        # the host's own panel: tokens whose own gradient is removed or turned round
        counts = sum(map(rows.stopped, window.surrogates), torch.zeros(4, dtype=torch.long))
        low, high, tokens, dropped = self._group.total(counts.to(window.device)).tolist()
        self._log("clip_ratio/low_mean", low / max(tokens, 1))
        self._log("clip_ratio/high_mean", high / max(tokens, 1))
        self._log("clip_ratio/region_mean", (low + high) / max(tokens, 1))
        self._log("trajectories_dropped", float(dropped))

    # -- checkpoints -------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        folder = f"checkpoint-{self.state.global_step}"
        path = os.path.join(self._get_output_dir(trial=trial), folder, self._state_file)
        statistics = self.run_statistics
        torch.save(
            {
                "micro_step": self._step,
                "buffered_inputs": self._buffered_inputs,
                "domains": self._domains,
                "rollout_step": self._last_update_of_rollout,
                "statistics": None if statistics is None else statistics.state(),
            },
            path,
        )

    @property
    def _state_file(self) -> str:
        return STATE_FILE.format(rank=self.accelerator.process_index)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = os.path.join(checkpoint, self._state_file)
        if not os.path.exists(path):
            raise ConfigError(
                f"{checkpoint} has no {self._state_file}: it was not saved by this trainer with "
                "as many processes, so the rollout in use cannot be continued. Resume with the "
                "same number of processes, or load the model and start a new run."
            )
        device = self.accelerator.device  # "cpu:1" on the second rank without a GPU
        where = "cpu" if device.type == "cpu" else device
        state = torch.load(path, map_location=where, weights_only=True)
        self._step = state["micro_step"]
        self._buffered_inputs = state["buffered_inputs"]
        self._domains = state["domains"]
        self._last_update_of_rollout = state["rollout_step"]
        if state["statistics"] is not None:
            self.run_statistics = Statistics.from_state(state["statistics"])
