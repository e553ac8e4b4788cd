"""What a host's settings say before anything has run.

Three hosts are told apart by their keys: ``fiberpo train``, TRL, and verl (nested, or with dotted
names). Settings that are not given are taken at the host's own defaults; verl's ``rollout.n``,
whose default of 1 belongs to its default of GAE, is left open.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigError, FiberPOError
from ..gates import AggregateGate, LogClip
from ..objective import Objective
from ..recipes import RECIPES, from_name
from ..weights import ALIASES
from .findings import Finding, ranked
from .limits import limits_of

_TRAIN = {"updates_per_rollout", "passes_per_rollout", "rollouts", "heldout_prompts"}
_TRL = {"steps_per_generation", "num_generations", "num_iterations", "per_device_train_batch_size",
        "gradient_accumulation_steps", "generation_batch_size"}  # fmt: skip
_VERL = {"actor_rollout_ref", "actor", "algorithm"}

TRL_DEFAULTS: Mapping[str, Any] = {
    "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "num_iterations": 1,
    "num_generations": 8, "fp16": False, "cast_lm_head_to_fp32": False,
}  # fmt: skip
"""`trl.GRPOConfig` of TRL 1.16; its ``bf16`` is ``not fp16`` where it is not set."""

VERL_DEFAULTS: Mapping[str, Any] = {
    "data.train_batch_size": 1024, "actor.ppo_mini_batch_size": 256, "actor.ppo_epochs": 1,
    "actor.loss_agg_mode": "token-mean",
}  # fmt: skip
"""verl's ``trainer/config/_generated_ppo_trainer.yaml``, without ``actor_rollout_ref``."""


@dataclass(frozen=True)
class HostSettings:
    """Settings in the terms that the checks need; None where they are not known.

    Attributes:
        host: ``"fiberpo train"``, ``"trl"``, ``"verl"``, or ``""``.
        updates: optimizer steps on each rollout.
        cause: the settings that ``updates`` comes from, with their values.
        remedy: which of them to raise.
        generations: answers to a prompt, where the settings say.
        window: answers in one optimizer step (of one process).
        cuts: into how many optimizer steps the answers of a rollout are cut.
        raw: everything as given, with the host's defaults.
    """

    host: str = ""
    updates: float | None = None
    cause: str = ""
    remedy: str = "take several optimizer steps on each rollout"
    generations: int | None = None
    window: int | None = None
    cuts: float = 1.0
    raw: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, settings: Mapping[str, Any]) -> HostSettings:
        """Recognise the host by its keys.

        Raises:
            ConfigError: where a setting that is needed is no number.
        """
        flat = _flat(settings)
        names = {key.split(".")[0] for key in flat}
        if names & _VERL or any(k.startswith("data.train_batch_size") for k in flat):
            return _verl(flat)
        if names & _TRAIN:
            return _train(flat)
        return _trl(flat) if names & _TRL else cls(raw=flat)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings by dotted names; parameters of objectives stay mappings."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        nested = isinstance(value, Mapping) and not str(key).endswith("_kwargs")
        if nested and not _is_budget(value):
            found.update(_flat(value, f"{name}."))
        else:
            found[name] = value
    return found


def _is_budget(value: Mapping[str, Any]) -> bool:
    return any(isinstance(v, (list, tuple)) for v in value.values())


def _given(settings: Mapping[str, Any], name: str) -> float | None:
    value = settings.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
        raise ConfigError(f"{name} is {value!r}; it must be a number > 0")
    return value


def _number(settings: Mapping[str, Any], name: str, default: float = 1) -> float:
    value = _given(settings, name)
    return default if value is None else value


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


def _train(flat: Mapping[str, Any]) -> HostSettings:
    updates = _number(flat, "updates_per_rollout", 4)
    passes = _number(flat, "passes_per_rollout", 1)
    prompts, generations = _number(flat, "prompts", 64), _number(flat, "generations", 8)
    return HostSettings(
        "fiberpo train", updates * passes,
        f"updates_per_rollout = {updates:g}, passes_per_rollout = {passes:g}",
        "Raise updates_per_rollout.", _whole(_given(flat, "generations")),
        int(prompts * generations // updates), updates, flat,
    )  # fmt: skip


def _filled(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    return {**defaults, **{name: value for name, value in given.items() if value is not None}}


def _trl(given: Mapping[str, Any]) -> HostSettings:
    flat = _filled(TRL_DEFAULTS, given)
    flat.setdefault("bf16", not flat["fp16"])
    accumulation = _number(flat, "gradient_accumulation_steps")
    size = _number(flat, "per_device_train_batch_size")
    iterations = _number(flat, "num_iterations")
    whole = _given(flat, "generation_batch_size")
    implied = accumulation if whole is None else whole / (size * _number(flat, "world_size", 1))
    steps = _number(flat, "steps_per_generation", implied)
    return HostSettings(
        "trl", steps * iterations / accumulation,
        f"steps_per_generation = {steps:g}, num_iterations = {iterations:g}, "
        f"gradient_accumulation_steps = {accumulation:g}",
        "Raise steps_per_generation or num_iterations.",
        _whole(_given(flat, "num_generations")), int(size * accumulation), steps / accumulation,
        flat,
    )  # fmt: skip


def _verl(flat: Mapping[str, Any]) -> HostSettings:
    given = {k.removeprefix("actor_rollout_ref."): v for k, v in flat.items()}
    short = _filled(VERL_DEFAULTS, given)
    train, mini = (
        _number(short, "data.train_batch_size"),
        _number(short, "actor.ppo_mini_batch_size"),
    )
    epochs, generations = _number(short, "actor.ppo_epochs"), _given(short, "rollout.n")
    bypassed = short.get("algorithm.rollout_correction.bypass_mode")
    window = int(mini * generations) if generations else None
    return HostSettings(
        "verl", None if bypassed else train / mini * epochs,
        f"data.train_batch_size = {train:g}, actor.ppo_mini_batch_size = {mini:g}, "
        f"actor.ppo_epochs = {epochs:g}",
        "Lower actor.ppo_mini_batch_size, or raise actor.ppo_epochs.",
        _whole(generations), window, 1.0, short,
    )  # fmt: skip


def examine_config(
    settings: Mapping[str, Any], *, objective: Objective | None = None
) -> list[Finding]:
    """Findings from settings alone.

    Args:
        settings: of ``fiberpo train``, TRL or verl, as a mapping.
        objective: what they amount to, where the caller knows; else built from the settings.

    Raises:
        ConfigError: for settings that are no mapping of names, or of a host that is not known.
    """
    if not isinstance(settings, Mapping) or not settings:
        raise ConfigError(
            f"the settings are {settings!r:.80}; the doctor reads a mapping from names to values"
        )
    host = HostSettings.read(settings)
    if not host.host:
        raise ConfigError(
            f"cannot tell whose settings these are: {', '.join(sorted(host.raw))[:200]}. Known are "
            "those of fiberpo train (updates_per_rollout, ...), TRL (steps_per_generation, ...) "
            "and verl (actor_rollout_ref.actor.ppo_mini_batch_size, ...)"
        )
    found: list[Finding] = []
    if objective is None:
        try:
            objective = objective_of(host)
        except FiberPOError as error:
            found.append(
                Finding(
                    "objective-refused", "error", f"{error}.".replace("..", "."),
                    "The run would end before its first step.", "Correct the parameter.",
                )
            )  # fmt: skip
    found += [*inert(host, objective), *_groups(host, objective), *_division(host, objective)]
    found += [*_bf16(host), *_local(host, objective)]
    return ranked([*found, *token_clip(objective)])


def objective_of(host: HostSettings) -> Objective | None:
    """The objective that settings name; None where they name none of ours.

    Raises:
        FiberPOError: from the recipe.
    """
    raw = host.raw
    if host.host == "verl":
        mode = str(raw.get("actor.policy_loss.loss_mode"))
        recipe = mode if mode in RECIPES else mode.removeprefix("fiberpo_")
        if not mode.startswith("fiber") or recipe not in RECIPES:
            return None
        inside = {
            name: raw[f"actor.policy_loss.{name}"]
            for name in ("budget", "budgets", "epsilon", "pessimistic", "objective_kwargs")
            if raw.get(f"actor.policy_loss.{name}") is not None
        }
        return from_name(recipe, **{**inside.pop("objective_kwargs", {}), **inside})
    name, parameters = raw.get("objective"), raw.get("objective_kwargs") or {}
    if name is None or not isinstance(parameters, Mapping):
        return None
    if name == "dr_grpo" and "length" not in parameters:
        parameters = {"length": raw.get("max_completion_length") or 1, **parameters}
    return from_name(str(name), **parameters)


def inert(host: HostSettings, objective: Objective | None = None) -> list[Finding]:
    """One update per rollout."""
    if host.updates is None or host.updates > 1:
        return []
    name = "every objective" if objective is None else objective.name
    return [
        Finding(
            "inert-gates", "error",
            f"GATES ARE INERT: every rollout is used for one optimizer step ({host.cause}).",
            "The policy equals its own anchor, every log ratio is 0, no gate can act, and "
            f"{name} is the plain policy gradient.",
            host.remedy, {"updates_per_rollout": host.updates},
        )
    ]  # fmt: skip


def _groups(host: HostSettings, objective: Objective | None) -> list[Finding]:
    found = []
    if host.generations == 1:
        found.append(
            Finding(
                "group-of-one", "error", "Every prompt is answered once.",
                "An advantage that is centred in its group is 0, and a trajectory that is alone in "
                "its group has no residual drift: its gate cannot act.",
                "Sample at least 2 answers to a prompt (8 is usual).", {"generations": 1},
            )
        )  # fmt: skip
        return found
    apart = host.raw.get("keep_groups_together") is False
    torn = apart or bool(host.window and host.generations and host.window % host.generations)
    if host.cuts > 1 and host.generations and torn:
        how = "answers are shuffled one by one (keep_groups_together = False)"
        if not apart:
            how = f"num_generations is {host.generations}, and does not divide it"
        found.append(
            Finding(
                "cut-groups", "warning" if _gates(objective, "group") or not apart else "note",
                f"An optimizer window has {host.window} answers a process; {how}.",
                "prompt groups are cut, and group gates see parts of them.",
                "Make the window a multiple of num_generations, with keep_groups_together = True.",
                {"window": host.window, "generations": host.generations},
            )
        )  # fmt: skip
    tasks = host.raw.get("tasks")
    if host.host == "fiberpo train" and host.window and host.generations and tasks is not None:
        groups, domains = host.window // host.generations, len(tasks) or 4
        gates = set() if objective is None else set(objective.gate_map.gates)
        both = {"group", "domain"} <= gates  # a stop looks at the drift of a context itself
        if both and groups <= domains and host.raw.get("data") is None:
            found.append(
                Finding(
                    "idle-stratum", "warning",
                    f"An optimizer step has {groups} prompt groups in {domains} domains.",
                    "A group that is alone in its domain has residual drift 0: its gate cannot "
                    "act.",
                    "Take more prompts, or fewer updates per rollout.",
                    {"stratum": "group", "groups": groups, "domains": domains},
                )
            )  # fmt: skip
    return found


def _gates(objective: Objective | None, stratum: str) -> bool:
    return objective is not None and stratum in objective.strata


def _division(host: HostSettings, objective: Objective | None) -> list[Finding]:
    """Denominators that the host applies and that are not those of the weights."""
    if objective is None:
        return []
    kind, raw = objective.weights.kind, host.raw
    mode = raw.get("actor.loss_agg_mode")
    if host.host != "verl" or ALIASES.get(str(mode)) == kind:
        return []
    name = next((theirs for theirs, ours in ALIASES.items() if ours == kind), None)
    change = f"Set actor.loss_agg_mode={name}." if name else "Use weights that verl knows."
    return [
        Finding(
            "double-division", "error",
            f"actor.loss_agg_mode is {mode!r}, and {objective.name} aggregates with {kind}.",
            "The host divides by a count of its own on top of the weights of the objective: the "
            "loss would be scaled, answer by answer.",
            change, {"weights": kind},
        )
    ]  # fmt: skip


def _bf16(host: HostSettings) -> list[Finding]:
    raw = host.raw
    if host.host != "trl" or not raw["bf16"] or raw["cast_lm_head_to_fp32"]:
        return []
    return [
        Finding(
            "bf16-log-probs", "warning",
            "bf16 = True with cast_lm_head_to_fp32 = False (TRL's defaults where neither is set).",
            "Logits in bf16 round log-probs by up to 2^-8 of their size, which is of the size of "
            "the drifts that gates above the token measure.",
            "Set cast_lm_head_to_fp32=True; the rest of the model may stay in bf16.",
        )
    ]  # fmt: skip


def _local(host: HostSettings, objective: Objective | None) -> list[Finding]:
    mode = host.raw.get("split_mode", "exact")
    above = [] if objective is None else [n for n in objective.strata if n != "trajectory"]
    if mode == "exact" or not above:
        return []
    return [
        Finding(
            "local-aggregates", "warning", f"split_mode = {mode!r} with gates on {above}.",
            "Their drifts are taken per micro-batch (or from the step before): the gates see other "
            "numbers than the objective defines, and gate/split_error says by how much.",
            "Use split_mode='exact'.", {"strata": above},
        )
    ]  # fmt: skip


def token_clip(objective: Objective | None) -> list[Finding]:
    """An epsilon of the token above the negative budget of the finest stratum."""
    if objective is None or not isinstance(objective.gate_map.token, LogClip):
        return []
    gates = list(objective.gate_map.gates.items())
    if not gates or not isinstance(gates[-1][1], AggregateGate):
        return []
    stratum, gate = gates[-1]
    pairs = [pair for _, pair in limits_of(gate) if pair is not None]
    lowest, epsilon = min(pair[1] for pair in pairs), objective.gate_map.token.epsilon
    if epsilon <= lowest:
        return []
    return [
        Finding(
            "epsilon-above-budget", "note",
            f"epsilon = {epsilon:g} is above C- = {lowest:g} of the {stratum}.",
            "A trajectory that moves as one uses up its budget before any token is clipped: the "
            "token gate is left to single tokens that stand out. The paper takes epsilon well "
            "below C+ + C-.",
            "Nothing, if that is meant; else lower epsilon below C-.",
            {"epsilon": epsilon, "budget_negative": lowest, "stratum": stratum},
        )
    ]  # fmt: skip
