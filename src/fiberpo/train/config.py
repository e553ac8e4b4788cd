"""The one configuration of a training run."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from ..corrections import masked, needs_engine
from ..errors import ConfigError
from ..objective import Objective
from ..recipes import from_name
from .rewards import load_attribute

CONFIG_FILE = "config.yaml"

TRAINING_OBJECTIVE = "fiberstop"
"""What ``fiberpo train`` trains with unless told otherwise; its parameters are the recipe's own."""

TRAINING_PARAMETERS: Mapping[str, Mapping[str, Any]] = {
    "fiberpo_domain": {
        "budgets": {"domain": [0.02, 0.015], "group": [0.04, 0.03], "trajectory": [0.12, 0.05]},
        "epsilon": 0.2,
        "pessimistic": True,
    }
}
"""Objective -> parameters that ``fiberpo train`` gives it unless told otherwise, where they are not
the recipe's own: budgets of the size of the drifts that the embedded run shows, and the pessimistic
form, where the recipe defaults to the printed one."""


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run; ``config.yaml`` in its directory holds them all.

    Args:
        name: directory of the run below ``output``; made from objective, model and seed if None.
        output: where runs are kept.
        model: ``embedded``, ``smollm2``, a local directory, or a hub id.
        tasks: domains: the procedural ones (``sum``, ``sort``, ``reverse``, ``boolean``) or
            ``reasoning_gym:NAME``; all procedural ones if empty.
        data: own prompts (JSONL, JSON, parquet, data set directory, hub id) in place of tasks.
        reward: ``file.py:function`` or ``module:function``, in TRL's signature; by default the
            final answer must equal the data's answer column.
        domain_column: column of ``data`` with the domain.
        domain_weights: share of each domain; by default proportional to the square roots of sizes.
        objective: a recipe of `fiberpo.recipes`, or your own: ``file.py:function`` or
            ``module:function``, a function that returns an `Objective`.
        objective_kwargs: its parameters.
        mask_max, mask_mean: leave out answers with a token beyond this k2, or a mean k3 beyond
            this, in nats, between the policy that sampled them and the current one.
        correction: ``opsm``; with ``engine_noise`` or ``engine_bf16`` also ``tis``, ``masked_is``,
            ``icepop`` and ``geometric_mask``, which do nothing where engine and trainer agree.
        correction_kwargs: its parameters.
        reward_range: lowest and highest possible reward, for the bounds in the log; by default
            0 and 1 for the procedural tasks, and no bounds for other rewards.
        reward_noise: probability in (0, 1] by domain; in training, not on held-out prompts, the
            reward of an answer is with this probability a fair coin between the lowest and the
            highest reward (`fiberpo.train.noise.NoisyReward`).
        engine_noise: answers of training are sampled by a copy of the policy to whose weight
            matrices Gaussian noise was added, by this much of their root mean square, fresh for
            each rollout (`fiberpo.train.mismatch.Engine`); 0 for none.
        engine_bf16: answers of training are sampled by a copy of the policy in bfloat16.
        rollouts: how often answers are sampled.
        prompts: prompts of one rollout.
        generations: answers to each prompt.
        updates_per_rollout: optimizer steps into which a rollout is cut. With 1 (and one pass) no
            gate can act.
        passes_per_rollout: how often each rollout is used.
        micro_batch: answers in one forward pass; None takes a whole update at once.
        split_mode: ``exact``; ``local`` or ``stale`` aggregates over micro-batches, which are not
            (`fiberpo.exact`).
        learning_rate: of AdamW without weight decay, constant after the warm-up.
        warmup_steps: optimizer steps of linear warm-up.
        max_grad_norm: gradient clipping.
        temperature: of sampling, in training and on held-out prompts.
        max_completion_length: tokens of an answer; None takes what the tasks need.
        bf16: compute in bfloat16 (weights stay float32).
        sft_steps: steps of supervised fine-tuning before (``smollm2`` only).
        heldout_prompts: held-out prompts of each domain.
        heldout_every: rollouts between two evaluations.
        save_every: rollouts between two checkpoints; the last one is kept.
        seed: of data, sampling and initialisation.
        tensorboard, trackio: log there too.
        record: keep every optimizer step in ``recording`` below the run's directory, for replay,
            suggest, doctor and report.
    """

    name: str | None = None
    output: str = "runs"
    model: str = "embedded"
    tasks: tuple[str, ...] = ()
    data: str | None = None
    reward: str | None = None
    domain_column: str | None = None
    domain_weights: dict[str, float] | None = None
    objective: str = TRAINING_OBJECTIVE
    objective_kwargs: dict[str, Any] = field(default_factory=dict)
    mask_max: float | None = None
    mask_mean: float | None = None
    correction: str | None = None
    correction_kwargs: dict[str, Any] = field(default_factory=dict)
    reward_range: list[float] | None = None
    reward_noise: dict[str, float] | None = None
    engine_noise: float = 0.0
    engine_bf16: bool = False
    rollouts: int = 60
    prompts: int = 64
    generations: int = 8
    updates_per_rollout: int = 4
    passes_per_rollout: int = 1
    micro_batch: int | None = None
    split_mode: str = "exact"
    learning_rate: float = 1e-4
    warmup_steps: int = 8
    max_grad_norm: float = 1.0
    temperature: float = 1.0
    max_completion_length: int | None = None
    bf16: bool = False
    sft_steps: int = 0
    heldout_prompts: int = 128
    heldout_every: int = 15
    save_every: int = 20
    seed: int = 0
    tensorboard: bool = False
    trackio: bool = False
    record: bool = False

    def __post_init__(self) -> None:
        for name in (
            "rollouts", "prompts", "updates_per_rollout", "passes_per_rollout", "heldout_prompts",
            "heldout_every", "save_every",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.generations < 2:
            raise ConfigError(
                f"generations is {self.generations}; advantages compare the answers to one "
                "prompt, so at least 2 are needed (8 is usual)"
            )
        rows = self.prompts * self.generations
        if rows % self.updates_per_rollout:
            raise ConfigError(
                f"updates_per_rollout = {self.updates_per_rollout} does not divide the "
                f"{rows} answers of a rollout ({self.prompts} prompts x {self.generations})"
            )
        if self.rows_per_update % self.rows_per_forward:
            raise ConfigError(
                f"micro_batch = {self.micro_batch} does not divide the {self.rows_per_update} "
                "answers of an update"
            )
        if self.learning_rate <= 0 or self.temperature <= 0 or self.max_grad_norm <= 0:
            raise ConfigError(
                f"learning_rate = {self.learning_rate}, temperature = {self.temperature}, "
                f"max_grad_norm = {self.max_grad_norm}: all must be positive"
            )
        for domain, share in (self.reward_noise or {}).items():
            number = isinstance(share, (int, float)) and not isinstance(share, bool)
            if not number or not 0 < share <= 1:
                raise ConfigError(
                    f"reward_noise of the domain {domain!r} is {share!r}; it is a probability, "
                    "above 0 and at most 1 (leave out the domains without noise)"
                )
        if not 0 <= self.engine_noise < math.inf:
            raise ConfigError(
                f"engine_noise is {self.engine_noise}; it is a finite number, 0 (no noise) or more"
            )
        if self.split_mode not in ("exact", "local", "stale"):
            raise ConfigError(
                f"split_mode = {self.split_mode!r}; it is 'exact', 'local' or 'stale'"
            )
        if self.data is not None and self.tasks:
            raise ConfigError(f"data = {self.data!r} and tasks = {self.tasks}: give one of them")
        if self.objective != "dr_grpo" or self.max_completion_length is not None:
            self.build_objective()  # dr_grpo takes its length from the tasks where none is given

    @property
    def rows_per_update(self) -> int:
        """Answers in one optimizer step."""
        return self.prompts * self.generations // self.updates_per_rollout

    @property
    def rows_per_forward(self) -> int:
        """Answers in one forward pass."""
        return self.micro_batch or self.rows_per_update

    @property
    def engine_differs(self) -> bool:
        """Whether answers are sampled by another policy than the one that is trained."""
        return self.engine_noise > 0 or self.engine_bf16

    @property
    def updates(self) -> int:
        """Optimizer steps of the whole run."""
        return self.rollouts * self.updates_per_rollout * self.passes_per_rollout

    @property
    def run_name(self) -> str:
        """``name``, or one made of objective, model and seed."""
        objective = self.objective.rpartition(":")[2]
        return self.name or f"{objective}-{Path(self.model).name}-seed{self.seed}"

    @property
    def run_dir(self) -> Path:
        """Directory of the run."""
        return Path(self.output) / self.run_name

    def build_objective(self) -> Objective:
        """The objective, with the training defaults for what was not said about it."""
        parameters = {**TRAINING_PARAMETERS.get(self.objective, {}), **self.objective_kwargs}
        if self.objective == "dr_grpo" and self.max_completion_length:
            parameters.setdefault("length", self.max_completion_length)
        objective = masked(
            self._unmasked(parameters), mask_max=self.mask_max,
            mask_mean=self.mask_mean, correction=self.correction,
            correction_kwargs=self.correction_kwargs,
        )  # fmt: skip
        if needs_engine(objective) and not self.engine_differs:
            raise ConfigError(
                f"correction = {self.correction!r} corrects for a generation engine, but this "
                "program samples with the model that it trains: every ratio would be 1. Leave it "
                "out (mask_max, mask_mean and opsm work here), or make the engine differ with "
                "engine_noise or engine_bf16."
            )
        return objective

    def _unmasked(self, parameters: Mapping[str, Any]) -> Objective:
        if ":" not in self.objective:
            return from_name(self.objective, **parameters)
        made = load_attribute(self.objective, "objective")(**parameters)
        if not isinstance(made, Objective):
            raise ConfigError(
                f"objective {self.objective!r} returned a {type(made).__name__}; it must return a "
                "fiberpo Objective"
            )
        return made

    def replace(self, **changes: Any) -> TrainConfig:
        """A copy with other values."""
        return dataclasses.replace(self, **changes)

    def save(self, path: Path) -> None:
        """Write YAML."""
        values = dataclasses.asdict(self)
        values["tasks"] = list(self.tasks)
        path.write_text(yaml.safe_dump(values, sort_keys=False))


PRESETS: Mapping[str, Mapping[str, Any]] = {
    "embedded": {},
    "smollm2": {
        "rollouts": 14, "prompts": 16, "generations": 8, "updates_per_rollout": 2,
        "learning_rate": 2e-5, "warmup_steps": 2, "bf16": True, "sft_steps": 40,
        "heldout_prompts": 32, "heldout_every": 7, "save_every": 7,
        "max_completion_length": 10,
    },
}  # fmt: skip
"""Values of the settings that fit a bundled model, where they differ from the defaults."""


def make_config(
    file: Path | None = None, overrides: Mapping[str, Any] | None = None
) -> TrainConfig:
    """A configuration from the model's preset, then a YAML file, then single values.

    Raises:
        ConfigError: unknown keys (with a guess at what was meant), values of the wrong type.
    """
    given: dict[str, Any] = {}
    if file is not None:
        try:
            loaded = yaml.safe_load(file.read_text()) or {}
        except FileNotFoundError as error:
            raise ConfigError(f"no configuration file {file}") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file} is not YAML: {error}") from error
        if not isinstance(loaded, Mapping):
            raise ConfigError(f"{file} holds a {type(loaded).__name__}, not settings by name")
        given.update(loaded)
    given.update(overrides or {})
    model = given.get("model", TrainConfig.model)
    values = {**PRESETS.get(str(model), {}), **given}
    hints, known = get_type_hints(TrainConfig), [f.name for f in fields(TrainConfig)]
    for key, value in values.items():
        if key not in known:
            guess = difflib.get_close_matches(key, known, 1)
            hint = f"; did you mean {guess[0]!r}?" if guess else f"; there are {', '.join(known)}"
            raise ConfigError(f"unknown setting {key!r}{hint}")
        values[key] = _cast(key, value, hints[key])
    return TrainConfig(**values)


def _cast(key: str, value: Any, hint: Any) -> Any:
    """YAML and JSON lists become tuples, ints become floats; anything else must fit."""
    if hint == tuple[str, ...]:
        if isinstance(value, str) or not all(isinstance(v, str) for v in value):
            raise ConfigError(f"{key} is {value!r}; it is a list of names")
        return tuple(value)
    if value is None and type(None) in getattr(hint, "__args__", ()):
        return None
    kinds = [k for k in getattr(hint, "__args__", ()) if k is not type(None)] or [hint]
    kind = getattr(kinds[0], "__origin__", kinds[0])
    if hint not in (str, bool) and getattr(hint, "__origin__", None) is dict:
        kind = dict
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-4 as text
        except ValueError:
            pass
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{key} is {value!r}; it must be of type {kind.__name__}")
    return value
