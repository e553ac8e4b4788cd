"""Rewards of training that are partly coin flips."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import ConfigError


class NoisyReward:
    """A reward function, in TRL's signature, that replaces some rewards by a fair coin.

    With probability ``p`` of its domain, a reward becomes the lowest or the highest possible one,
    each with probability 1/2, whatever the answer was. Rewards of domains without a probability
    stay as they are, and so does None.

    The draw for an answer is a function of (seed, rollout, prompt, place of the answer among those
    to this prompt) and of nothing else: it neither reads nor moves any random state, a resumed run
    goes on with the draws that it would have had, every rollout has draws of its own, and runs of
    one seed meet the same coins at the same places, whatever their objectives.

    Args:
        reward: the reward function without noise.
        probabilities: domain -> ``p`` in (0, 1].
        domains: the domains that there are.
        reward_range: lowest and highest reward.
        seed: of the draws.
        updates_per_rollout: optimizer steps taken on each rollout, over all passes.

    Raises:
        ConfigError: for a domain that is not there, or a range that is not known or not one.
    """

    def __init__(
        self,
        reward: Callable[..., Sequence[Any]],
        probabilities: Mapping[str, float],
        *,
        domains: Sequence[str],
        reward_range: Sequence[float] | None,
        seed: int,
        updates_per_rollout: int,
    ) -> None:
        unknown = [name for name in probabilities if name not in domains]
        if unknown:
            raise ConfigError(
                f"reward_noise names the domain {unknown[0]!r}; there are {', '.join(domains)}"
            )
        if reward_range is None:
            raise ConfigError(
                "reward_noise replaces rewards by the lowest or the highest possible one, and "
                "these are not known for this reward: give reward_range, as [0, 1]"
            )
        if len(reward_range) != 2 or not reward_range[0] < reward_range[1]:
            raise ConfigError(
                f"reward_range is {list(reward_range)}; it is the lowest and the highest reward"
            )
        self.reward, self.probabilities = reward, dict(probabilities)
        self.ends = (float(reward_range[0]), float(reward_range[1]))
        self.seed, self.updates_per_rollout = seed, updates_per_rollout
        self.__name__ = getattr(reward, "__name__", type(reward).__name__)

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        domain: Sequence[str],
        trainer_state: Any,
        **columns: Any,
    ) -> list[Any]:
        """The reward of every completion; ``trainer_state.global_step`` tells the rollout."""
        rewards = self.reward(
            prompts=prompts, completions=completions, domain=domain, trainer_state=trainer_state,
            **columns,
        )  # fmt: skip
        rollout = trainer_state.global_step // self.updates_per_rollout
        places: Counter[str] = Counter()
        out = []
        for reward, prompt, name in zip(rewards, prompts, domain, strict=True):
            text = prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)
            coin = self._coin(self.probabilities.get(name, 0.0), rollout, text, places[text])
            places[text] += 1
            out.append(reward if coin is None or reward is None else coin)
        return out

    def _coin(self, probability: float, rollout: int, prompt: str, place: int) -> float | None:
        draw = random.Random(f"reward noise:{self.seed}:{rollout}:{place}:{prompt}")
        return self.ends[draw.random() < 0.5] if draw.random() < probability else None
