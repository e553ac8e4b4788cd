"""The worker behind group and domain gates in verl: two phases over the whole mini-batch.

`FiberPOTrainingWorker` is verl's `TrainingWorker` whose ``engine.train_batch``, for the loss modes
of `fiberpo.integrations.verl`, goes through `fiberpo.exact`: ``uid`` and ``data_source`` of the
rank's mini-batch become labels, the engine's own forward without graph gives the log-probs of phase
1 (left out where they are not needed), sums of contexts cross the data-parallel ranks, and verl's
``ppo_loss`` then runs as ever, with its entropy bonus and KL loss, on a policy loss whose gradient
is that of the undivided mini-batch. For any other loss mode it is `TrainingWorker`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from verl.single_controller.base.decorator import Dispatch, register
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id
from verl.utils.metric import Metric
from verl.utils.torch_functional import allgather_dict_into_dict
from verl.workers.engine.utils import prepare_micro_batches
from verl.workers.engine_workers import ActorRolloutRefWorker, TrainingWorker
from verl.workers.utils.losses import ppo_loss
from verl.workers.utils.padding import no_padding_2_padding

from ..batch import RatioBatch
from ..collective import TorchGroup
from ..errors import ConfigError
from ..exact import Stepper, Window
from ..objective import Objective, Surrogate
from ..statistics import Statistics
from . import verl as plugin
from .hosts import BY_TRAJECTORY
from .verl_record import WorkerRecording

logger = logging.getLogger(__name__)

ROW = "fiberpo_row"
"""Column with the place of each row in the rank's mini-batch."""

STRATEGIES = ("fsdp", "fsdp2")


def install() -> None:
    """Make `FiberPOTrainingWorker` the actor that verl's workers of this process build.

    Sets one class attribute, `ActorRolloutRefWorker.actor_worker_cls`, and only where it is still
    verl's own: a subclass with a worker of its own keeps it.
    """
    if ActorRolloutRefWorker.actor_worker_cls is TrainingWorker:
        ActorRolloutRefWorker.actor_worker_cls = FiberPOTrainingWorker


class FiberPOTrainingWorker(TrainingWorker):
    """`verl.workers.engine_workers.TrainingWorker`, exact for objectives with any strata."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._stepper: Stepper | None = None
        self._recording: WorkerRecording | None = None
        self._first = True
        self._told: set[str] = set()
        self._plain_train_batch = self.engine.train_batch
        self.engine.train_batch = self._train_batch  # called by train_batch, model loaded

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)  # type: ignore[untyped-decorator]
    def set_loss_fn(self, loss_fn: Any) -> None:
        """verl's own, with a look at the settings before anything is sampled.

        Raises:
            ConfigError: for a strategy, loss or setting that cannot go with the loss mode.
        """
        super().set_loss_fn(loss_fn)
        config = getattr(loss_fn, "keywords", {}).get("config")
        settings, self._stepper = plugin.settings_of(config), None
        self._recording = None
        if settings is None:
            return
        objective = plugin.make_objective(settings)
        plugin.check_actor(config, objective)
        needed, obstacle = plugin.needs_worker(objective, settings), self._obstacle(loss_fn)
        if obstacle and needed:
            raise ConfigError(
                f"{obstacle}, but loss_mode={settings.loss_mode!r} looks at the {needed[0]} of "
                "every row, which needs the whole mini-batch (token and trajectory gates do not)"
            )
        if obstacle and settings.get("record_to"):
            raise ConfigError(f"{obstacle}: record_to has no effect; remove it")
        if not obstacle:
            group = self.engine.get_data_parallel_group()
            self._stepper = Stepper(objective, collective=TorchGroup(group))

    def _obstacle(self, loss_fn: Any) -> str:
        """Why only the registered loss will do, a micro-batch at a time; empty where nothing."""
        strategy = self.engine_config.strategy
        if strategy not in STRATEGIES:
            return f"actor.strategy is {strategy!r}, which is not one of {STRATEGIES}"
        if loss_fn.func is not ppo_loss:
            return f"the actor's loss is {loss_fn.func.__name__}, not verl's ppo_loss alone"
        return ""

    def _train_batch(self, data: Any, loss_function: Any) -> Any:
        """``engine.train_batch``: one optimizer step on this rank's mini-batch."""
        if self._stepper is None:
            return self._plain_train_batch(data, loss_function)
        config = loss_function.keywords["config"]
        settings = config.policy_loss
        first, last = self._first, bool(tu.get(data, "update_lr_scheduler", default=False))
        self._first = last  # verl marks the last update of a rollout
        if first and last:
            self._tell_inert(config)
        micro_batches = self._split(data)
        window = self._stepper.open(
            [self._part(x, settings) for x in micro_batches],
            fresh=first and settings.get("skip_first_forward", False),
        )
        if window.needs_forward:
            self._check_dropout()
            window.fill(self._log_probs(data))
        step = _Step(window, [x[ROW] for x in micro_batches], self._scale(data, window))
        _enter(settings, step)
        try:
            outputs = self._plain_train_batch(data, functools.partial(step.run, loss_function))
        finally:
            _enter(settings, None)
            data.pop(ROW)
        window.close()
        self._record(config, window, step.log_probs, micro_batches)
        self._tell_cut_groups(config, window)
        outputs["metrics"].update(self._metrics(window))
        return outputs

    def _record(
        self, config: Any, window: Window, log_probs: list[Tensor], micro_batches: list[Any]
    ) -> None:
        path = config.policy_loss.get("record_to")
        if not path:
            return
        if self._recording is None:
            objective, tokenizer = window.stepper.objective, self.model_config.get("tokenizer")
            self._recording = WorkerRecording(path, objective, self.engine, config, tokenizer)
        self._recording.write(window, log_probs, micro_batches)

    def _split(self, data: Any) -> list[Any]:
        """The micro-batches, as the engine itself will cut them (all ranks call together)."""
        data[ROW] = torch.arange(len(data))
        sequence_parallel = getattr(self.engine, "ulysses_sequence_parallel_size", 1)
        tu.assign_non_tensor(data, sp_size=sequence_parallel)
        micro_batches, _ = prepare_micro_batches(
            data, dp_group=self.engine.get_data_parallel_group(), same_micro_num_in_dp=True
        )
        return list(micro_batches)

    def _part(self, micro_batch: Any, settings: Any) -> RatioBatch:
        assert self._stepper is not None
        tensors = {
            name: _padded(micro_batch[name]).to(get_device_id())
            for name in (
                "old_log_probs", "advantages", "response_mask", "rollout_is_weights",
                "rollout_log_probs",
            )
            if name in micro_batch
        }  # fmt: skip
        old, rollout = tensors["old_log_probs"].float(), tensors.get("rollout_log_probs")
        advantages = plugin.weighted(tensors["advantages"], tensors.get("rollout_is_weights"))
        return RatioBatch.from_padded(
            old,
            old,
            advantages,
            tensors["response_mask"].bool(),
            labels=_labels(micro_batch, settings, self._stepper.objective),
            rollout_log_probs=None if rollout is None else rollout.float(),
            allow_empty=True,
        )

    def _log_probs(self, data: Any) -> list[Tensor]:
        """Phase 1: ``[B, T]`` of every micro-batch, by the engine's forward without graph."""
        found = []

        def record(model_output: Any, data: Any, dp_group: Any = None) -> tuple[Tensor, Any]:
            log_probs = no_padding_2_padding(model_output["log_probs"], data)
            found.append(log_probs)
            return log_probs.new_zeros(()), {}

        lean = data.copy()  # shallow
        tu.assign_non_tensor(lean, calculate_entropy=False, calculate_sum_pi_squared=False)
        self.engine.infer_batch(lean, record)
        return found

    def _scale(self, data: Any, window: Window) -> float:
        """Rows with a loss token over ``global_batch_size``, where ``mu`` counts trajectories.

        verl's denominator counts rows without a loss token too (rejected answers, padding rows);
        so does the registered loss.
        """
        stepper = window.stepper
        if stepper.objective.weights.kind not in BY_TRAJECTORY:
            return 1.0
        rows = torch.tensor([sum(part.rows for part in window.parts)]).double().to(window.device)
        return float(stepper.collective.total(rows)) / tu.get(data, "global_batch_size")

    def _metrics(self, window: Window) -> dict[str, Metric]:
        """Metrics of the mini-batch over all ranks, in the form that verl passes on."""
        group = self.engine.get_data_parallel_group()
        states = allgather_dict_into_dict({"state": window.statistics.state()}, group)["state"]
        merged = functools.reduce(Statistics.merge, map(Statistics.from_state, states))
        difference = window.stepper.collective.largest(window.phase_difference)
        values = {**merged.compute(), "gate/phase_difference": float(difference)}
        return {k: Metric("mean", v) for k, v in values.items() if v == v}  # not NaN

    # -- once ----------------------------------------------------------------------------------

    def _tell(self, what: str, message: str, *values: Any) -> None:
        if what not in self._told and self.rank == 0:
            logger.warning(message, *values)
        self._told.add(what)

    def _tell_inert(self, config: Any) -> None:
        self._tell(
            "inert",
            "GATES ARE INERT: every rollout is used for one optimizer step (ppo_mini_batch_size = "
            "%s covers it, ppo_epochs = %s), so the policy equals its own anchor, every log ratio "
            "is 0 and %s acts like the plain policy gradient. Lower ppo_mini_batch_size below "
            "data.train_batch_size, or raise ppo_epochs.",
            config.ppo_mini_batch_size, config.ppo_epochs, config.policy_loss.loss_mode,
        )  # fmt: skip

    def _tell_cut_groups(self, config: Any, window: Window) -> None:
        known = [found for s in window.surrogates if (found := _answers(s)) is not None]
        if not known:
            return
        answers = torch.cat(known)
        cut = int((answers < config.rollout_n - 0.5).sum())
        if cut:
            self._tell(
                "cut",
                "%d of %d prompt groups on this rank have fewer than rollout.n = %d answers with "
                "loss tokens in this optimizer step: group gates see a part of them. verl reorders "
                "rows across mini-batches (trainer.balance_batch, actor.shuffle); one mini-batch a "
                "rollout with ppo_epochs > 1 keeps groups whole.",
                cut, len(answers), config.rollout_n,
            )  # fmt: skip

    def _check_dropout(self) -> None:
        if "dropout" in self._told:
            return
        for name, module in self.engine.module.named_modules():
            rates = [getattr(module, "p", 0.0)] if isinstance(module, torch.nn.Dropout) else []
            rates.append(getattr(module, "attention_dropout", 0.0))
            for rate in rates:
                if isinstance(rate, float) and rate > 0:
                    raise ConfigError(
                        f"{name} has a dropout of {rate}: the two phases need the same log-probs "
                        "twice. Set it to 0 (actor_rollout_ref.model.override_config)."
                    )
        self._told.add("dropout")


def _enter(settings: Any, step: _Step | None) -> None:
    """Where the registered loss finds the open step; verl's settings are frozen otherwise."""
    object.__setattr__(settings, "step", step)


class _Step:
    """The open optimizer step: which micro-batch the engine is at."""

    def __init__(self, window: Window, rows: list[Tensor], scale: float) -> None:
        self.window = window
        self.rows = rows
        self.scale = scale
        self.log_probs: list[Tensor] = []
        self.next = 0

    def run(self, loss_function: Callable[..., Any], **arguments: Any) -> Any:
        """verl's loss on the next micro-batch."""
        rows = arguments["data"][ROW].cpu()
        expected = self.rows[self.next] if self.next < len(self.rows) else rows[:0]
        if not torch.equal(rows, expected.cpu()):
            raise ConfigError(
                f"micro-batch {self.next} holds rows {rows.tolist()}, expected "
                f"{expected.tolist()}: verl cut the mini-batch in another way than before, so the "
                "coefficients do not belong to it"
            )
        return loss_function(**arguments)

    def loss(self, log_prob: Tensor) -> Tensor:
        """Called by the registered loss, once a micro-batch."""
        k, self.next = self.next, self.next + 1
        self.log_probs.append(log_prob.detach())
        return (self.window.loss(k, log_prob) * self.scale).float()


def _answers(surrogate: Surrogate) -> Tensor | None:
    """Trajectories of every group, over all ranks: the mass of its context.

    None where neither gates nor stops look at groups, or their measure counts tokens.
    """
    plan, objective = surrogate.plan, surrogate.objective
    measures = [objective.gate_map.measure, *(stop.measure for stop in objective.stops)]
    for layout, measure in zip([plan.layout, *plan.stops], measures, strict=True):
        at = layout.contexts
        if at is not None and measure == "trajectory" and "group" in at.strata.names:
            return at.mass[at.strata.level(at.strata.names.index("group"))]
    return None


def _labels(micro_batch: Any, settings: Any, objective: Objective) -> Mapping[str, Any]:
    """Ids of every row (or token) for the strata whose columns are there."""
    columns = {**plugin.LABELS, **settings.get("labels", {})}
    found: dict[str, Any] = {}
    for stratum, names in columns.items():
        several = [names] if isinstance(names, str) else list(names)
        if all(name in micro_batch for name in several):
            found[stratum] = _ids(micro_batch, several)
    needed = plugin.needs_worker(objective, settings)
    missing = [stratum for stratum in needed if stratum not in found]
    if missing:
        raise ConfigError(
            f"{settings.loss_mode} needs the {missing[0]} of every row, but the mini-batch has no "
            f"column {columns.get(missing[0], missing[0])!r}; it has {sorted(micro_batch.keys())}. "
            f"Name the column: policy_loss.labels.{missing[0]}=<column>"
        )
    return found


def _ids(micro_batch: Any, columns: list[str]) -> Any:
    """One id a row; strings, unless the column is a tensor. Several columns make one id."""
    listed = []
    for column in columns:
        values = tu.get(micro_batch, column)
        if isinstance(values, Tensor) and len(columns) == 1:
            return _padded(values)
        if isinstance(values, Tensor):
            values = values.tolist()
        if not isinstance(values, list):  # one value for all rows
            values = [values] * len(micro_batch)
        listed.append(values)
    if len(columns) == 1:
        return [None if value is None else str(value) for value in listed[0]]
    return ["/".join(map(str, values)) for values in zip(*listed, strict=True)]


def _padded(tensor: Tensor) -> Tensor:
    return tensor.to_padded_tensor(0) if tensor.is_nested else tensor
