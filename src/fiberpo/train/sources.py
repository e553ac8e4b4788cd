"""What a run trains on: model, prompts of training and held-out prompts, reward."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ..errors import ConfigError
from .config import TrainConfig
from .data import load_data
from .embedded import load_embedded
from .gym import ReasoningGymReward, reasoning_gym_rows
from .mixing import mix_indices, split_held_out
from .noise import NoisyReward
from .rewards import load_function
from .sft import short_sft
from .smollm import load_smollm, text_rows
from .tasks import DOMAINS, MAX_COMPLETION_TOKENS, exact_answer, make_rows

Row = dict[str, Any]
Reward = Callable[..., list[Any]]

GYM = "reasoning_gym:"
ROWS_PER_DOMAIN = 20_000
"""Problems of a procedural domain that a run can draw from."""


@dataclass(frozen=True)
class Source:
    """Prompts and reward of a run.

    Attributes:
        train: data set of the whole run in the order of use, ``prompts`` rows a rollout.
        heldout: held-out rows by domain.
        reward: reward function in TRL's signature; that of training is `training_reward`.
        max_completion_length: tokens that an answer may take.
    """

    train: Dataset
    heldout: dict[str, list[Row]]
    reward: Reward
    max_completion_length: int

    @property
    def domains(self) -> list[str]:
        """Names of the domains."""
        return list(self.heldout)

    def reward_range(self, config: TrainConfig) -> list[float] | None:
        """Lowest and highest reward: as configured, or 0 and 1 where answers are right or wrong."""
        return config.reward_range or ([0.0, 1.0] if self.reward is exact_answer else None)

    def training_reward(self, config: TrainConfig) -> Reward:
        """The reward that training sees: ``reward``, with the noise that was asked for.

        Raises:
            ConfigError: for noise in a domain that is not there, or without a known range.
        """
        if not config.reward_noise:
            return self.reward
        return NoisyReward(
            self.reward, config.reward_noise, domains=self.domains,
            reward_range=self.reward_range(config), seed=config.seed,
            updates_per_rollout=config.updates_per_rollout * config.passes_per_rollout,
        )  # fmt: skip


def load_model(config: TrainConfig) -> tuple[PreTrainedModel, Any]:
    """Model and tokenizer; a bundled one is brought to the start of its run.

    Raises:
        ConfigError: for a model that cannot be loaded.
    """
    if config.model == "embedded":
        return load_embedded()
    if config.model == "smollm2":
        return copy.deepcopy(_smollm(config.sft_steps, config.seed))
    try:
        model = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(config.model, padding_side="left")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"cannot load the model {config.model!r}: {error}. Use embedded, smollm2, a local "
            "directory with a transformers model, or a hub id (with network access)."
        ) from error
    return model, tokenizer


@functools.lru_cache(maxsize=1)
def _smollm(sft_steps: int, seed: int) -> tuple[PreTrainedModel, Any]:
    """SmolLM2 at the start of a run; kept, since the runs of a study often start alike."""
    model, tokenizer = load_smollm(torch.float32)
    if sft_steps:
        rows = [r for d in DOMAINS for r in text_rows(d, seed, 4 * sft_steps)]
        short_sft(model, tokenizer, rows, steps=sft_steps, seed=seed)
    return model, tokenizer


def load_source(config: TrainConfig, *, words: bool) -> Source:
    """Prompts and reward; ``words`` puts the procedural tasks into words, for language models.

    Raises:
        ConfigError, DataError: for tasks, files or rewards that cannot be used.
    """
    if config.data is not None:
        return _own_data(config)
    tasks = config.tasks or tuple(DOMAINS)
    gym = [t.removeprefix(GYM) for t in tasks if t.startswith(GYM)]
    unknown = [t for t in tasks if t not in DOMAINS and not t.startswith(GYM)]
    if unknown:
        raise ConfigError(
            f"unknown task {unknown[0]!r}; there are {', '.join(DOMAINS)} and {GYM}NAME"
        )
    if gym and len(gym) != len(tasks):
        raise ConfigError(f"tasks {tasks} mix procedural and reasoning_gym domains; use one kind")
    if gym:
        count = max(64, config.prompts * config.rollouts // len(gym))
        train = reasoning_gym_rows(gym, config.seed, count)
        heldout = reasoning_gym_rows(gym, config.seed, config.heldout_prompts, held_out=True)
        reward: Reward = ReasoningGymReward()
    else:
        make = _in_words if words else make_rows
        size = min(ROWS_PER_DOMAIN, config.prompts * config.rollouts)
        train = [row for task in tasks for row in make(task, config.seed, size)]
        heldout = [row for t in tasks for row in make(t, 0, config.heldout_prompts, held_out=True)]
        reward = exact_answer
    if config.reward is not None:
        reward = load_function(config.reward)
    longest = 256 if gym else MAX_COMPLETION_TOKENS
    return _source(config, train, heldout, reward, longest)


def _in_words(task: str, seed: int, count: int, *, held_out: bool = False) -> list[Row]:
    rows = text_rows(task, seed, count, held_out=held_out)
    return [{k: v for k, v in row.items() if k != "demonstration"} for row in rows]


def _own_data(config: TrainConfig) -> Source:
    assert config.data is not None
    rows = load_data(
        config.data, domain_column=config.domain_column, need_answer=config.reward is None
    )
    train, heldout = split_held_out(rows, config.heldout_prompts, config.seed)
    reward = exact_answer if config.reward is None else load_function(config.reward)
    return _source(config, train, heldout, reward, 256)


def _source(
    config: TrainConfig,
    train: Sequence[Row],
    heldout: Sequence[Row],
    reward: Reward,
    longest: int,
) -> Source:
    by_domain: dict[str, list[Row]] = {}
    for row in train:
        by_domain.setdefault(row["domain"], []).append(row)
    sizes = {domain: len(rows) for domain, rows in by_domain.items()}
    plan = mix_indices(sizes, config.domain_weights, config.prompts * config.rollouts, config.seed)
    held: dict[str, list[Row]] = {domain: [] for domain in by_domain}
    for row in heldout:
        held[row["domain"]].append(row)
    source = Source(
        Dataset.from_list([by_domain[domain][i] for domain, i in plan]),
        held,
        reward,
        config.max_completion_length or longest,
    )
    source.training_reward(config)  # refused here, before anything is written
    return source


def check_directory(path: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse to write into a run that is already there.

    Raises:
        ConfigError: naming the three ways out.
    """
    if path.exists() and any(path.iterdir()) and not (resume or overwrite):
        raise ConfigError(
            f"{path} already holds a run: continue it with --resume {path}, replace it with "
            "--overwrite, or choose another --name"
        )
