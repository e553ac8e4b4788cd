"""Evaluation on held-out prompts: one sampled answer each, mean reward per domain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .generate import sample_completions
from .sources import Reward, Row


@dataclass(frozen=True)
class Heldout:
    """Result of one evaluation.

    Attributes:
        rewards: mean reward by domain, and ``"mean"`` over the domains.
        answers: by domain, ``(completion, reward)`` of every held-out row.
    """

    rewards: dict[str, float]
    answers: dict[str, list[tuple[str, float]]]

    def metrics(self) -> dict[str, float]:
        """``heldout/reward`` and ``heldout/reward/domain=<name>``."""
        out = {"heldout/reward": self.rewards["mean"]}
        for domain, value in self.rewards.items():
            if domain != "mean":
                out[f"heldout/reward/domain={domain}"] = value
        return out


def render(tokenizer: Any, prompt: Any) -> str:
    """The text the model sees: chat prompts through the chat template."""
    if isinstance(prompt, str):
        return prompt
    return tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)


def evaluate_heldout(
    model: Any,
    tokenizer: Any,
    rows: Mapping[str, Sequence[Row]],
    reward: Reward,
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    batch_size: int = 512,
) -> Heldout:
    """Sample one answer to every held-out prompt and score it; the random state is left alone.

    Args:
        model, tokenizer: what answers.
        rows: held-out rows by domain.
        reward: reward function in TRL's signature; None counts as 0.
        max_new_tokens, temperature, seed, batch_size: of sampling.
    """
    flat = [row for domain in rows.values() for row in domain]
    texts = sample_completions(
        model,
        tokenizer,
        [render(tokenizer, row["prompt"]) for row in flat],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        batch_size=batch_size,
    )
    chat = bool(flat) and not isinstance(flat[0]["prompt"], str)
    completions: list[Any] = [[{"role": "assistant", "content": t}] if chat else t for t in texts]
    names = {name for row in flat for name in row if name != "prompt"}
    columns = {name: [row.get(name) for row in flat] for name in sorted(names)}
    scores = reward(prompts=[row["prompt"] for row in flat], completions=completions, **columns)
    answers: dict[str, list[tuple[str, float]]] = {}
    for row, text, score in zip(flat, texts, scores, strict=True):
        answers.setdefault(row["domain"], []).append((text, float(score or 0.0)))
    means = {d: sum(s for _, s in found) / len(found) for d, found in answers.items()}
    means["mean"] = sum(means.values()) / len(means)
    return Heldout(means, answers)
