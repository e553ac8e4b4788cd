"""Supervised warm start: rebuilds the embedded checkpoint from nothing but a seed.

The model is trained on demonstrations, a share of which has one character of the completion
replaced by a wrong one. The result answers most problems greedily, yet when sampled at temperature
1 it reproduces those slips. Reinforcement learning can remove them, which raises the reward
quickly.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fiberpo.errors import ConfigError
from fiberpo.train.embedded import build_model, build_tokenizer
from fiberpo.train.generate import sample_completions
from fiberpo.train.tasks import (
    DOMAINS,
    MAX_COMPLETION_TOKENS,
    exact_answer,
    get_domain,
    make_problem,
    make_rows,
)

IGNORED = -100
"""Label of a token that takes no part in the cross-entropy."""

Example = tuple[list[int], int]
"""Token ids of prompt and completion, and how many of them belong to the prompt."""


def corrupt(completion: str, domain: str, rng: random.Random, rate: float) -> str:
    """With probability ``rate``, replace one character of a completion by a wrong one.

    Position and replacement are uniform, the latter over the alphabet of the domain less the
    character that stands there, so that a corrupted completion always differs in exactly one place.

    Raises:
        ConfigError: ``rate`` is outside [0, 1] or the domain is unknown.
    """
    if not 0.0 <= rate <= 1.0:
        raise ConfigError(f"corruption must be in [0, 1], got {rate}: use 0.6 for the default")
    alphabet = get_domain(domain).alphabet
    if not completion or rng.random() >= rate:
        return completion
    place = rng.randrange(len(completion))
    wrong = rng.choice([c for c in alphabet if c != completion[place]])
    return completion[:place] + wrong + completion[place + 1 :]


def _examples(
    tokenizer: PreTrainedTokenizerBase, seed: int, start: int, count: int, corruption: float
) -> list[Example]:
    """Tokenise training problems ``start`` to ``start + count - 1``, the domains in turn."""
    names = list(DOMAINS)
    prompts, completions = [], []
    for i in range(start, start + count):
        domain = names[i % len(names)]
        problem = make_problem(domain, seed, i)
        rng = random.Random(f"corrupt:{seed}:{i}")
        prompts.append(problem.prompt)
        completions.append(corrupt(problem.demonstration, domain, rng, corruption))
    heads = tokenizer(prompts)["input_ids"]
    tails = tokenizer(completions, add_special_tokens=False)["input_ids"]
    eos = [tokenizer.eos_token_id]
    return [(head + tail + eos, len(head)) for head, tail in zip(heads, tails, strict=True)]


def _collate(examples: list[Example], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad examples on the right to (input ids, labels), both [batch, length] of int64."""
    length = max(len(ids) for ids, _ in examples)
    inputs = torch.full((len(examples), length), pad)
    labels = torch.full((len(examples), length), IGNORED)
    for row, (ids, prompt_length) in enumerate(examples):
        tokens = torch.tensor(ids)
        inputs[row, : len(ids)] = tokens
        labels[row, prompt_length : len(ids)] = tokens[prompt_length:]
    return inputs, labels


def _batches(
    tokenizer: PreTrainedTokenizerBase, seed: int, steps: int, batch_size: int, corruption: float
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield ``steps`` batches of fresh problems, every batch a mixture of all domains.

    Batches of rows of like length would pad less, but length gives the domain away: such batches
    hold one domain each, and learning slows down several times.
    """
    for step in range(steps):
        examples = _examples(tokenizer, seed, step * batch_size, batch_size, corruption)
        yield _collate(examples, tokenizer.pad_token_id)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    count: int = 256,
    temperature: float = 1.0,
    seed: int = 0,
) -> dict[str, float]:
    """Return the share of right final answers on held-out prompts, per domain and as ``"mean"``.

    Args:
        model: Model to test.
        tokenizer: Its tokenizer.
        count: Held-out prompts per domain, one completion each.
        temperature: Sampling temperature, 0 for greedy.
        seed: Seed of the prompts and of the sampling.

    Raises:
        ConfigError: ``count`` is below 1.
    """
    if count < 1:
        raise ConfigError(f"count must be 1 or more, got {count}: use 256 for an error near 0.03")
    rows = [row for name in DOMAINS for row in make_rows(name, seed, count, held_out=True)]
    prompts = [row["prompt"] for row in rows]
    completions = sample_completions(
        model,
        tokenizer,
        prompts,
        max_new_tokens=MAX_COMPLETION_TOKENS,
        temperature=temperature,
        seed=seed,
    )
    rewards = exact_answer(prompts, completions, [row["answer"] for row in rows])
    accuracy = {
        name: sum(rewards[i * count : (i + 1) * count]) / count for i, name in enumerate(DOMAINS)
    }
    accuracy["mean"] = sum(accuracy.values()) / len(DOMAINS)
    return accuracy


def warmstart(
    output_dir: str | Path,
    *,
    seed: int = 0,
    steps: int = 650,
    batch_size: int = 64,
    learning_rate: float = 3e-3,
    corruption: float = 0.6,
    bf16: bool = True,
    eval_count: int = 512,
    progress: bool = True,
) -> dict[str, Any]:
    """Train the embedded model from random weights and save it.

    The loss is the mean cross-entropy of the completion tokens, end of sequence included. AdamW
    (betas 0.9 and 0.98, weight decay 0.01, gradient norm clipped at 1) follows a linear warm-up
    over the first 5 % of the steps, then a cosine down to 0.

    Args:
        output_dir: Directory that receives model.safetensors (float16), config.json, the tokenizer
            files and provenance.json; it is created where missing.
        seed: Seed of the weights and of the problems.
        steps: Optimizer steps.
        batch_size: Completions per step.
        learning_rate: Highest learning rate.
        corruption: Share of the demonstrations with one wrong character.
        bf16: Multiply matrices in bfloat16 (weights stay float32), 1.5 times as fast where the
            processor has the instructions for it.
        eval_count: Held-out prompts per domain in the closing evaluation.
        progress: Show a progress bar.

    Returns:
        The content of provenance.json: the settings, the versions, the seconds of training, the
        last loss, and the held-out accuracies, greedy and sampled at temperature 1, of the saved
        weights.

    Raises:
        ConfigError: A setting is out of its range.
    """
    for name, value in (("steps", steps), ("batch_size", batch_size), ("eval_count", eval_count)):
        if value < 1:
            raise ConfigError(f"{name} must be 1 or more, got {value}: omit it for the default")
    if not 0.0 < learning_rate < float("inf"):
        raise ConfigError(f"learning_rate must be positive, got {learning_rate}: use 3e-3")
    if not 0.0 <= corruption <= 1.0:
        raise ConfigError(f"corruption must be in [0, 1], got {corruption}: use 0.6")

    if Path(output_dir).exists() and not Path(output_dir).is_dir():
        raise ConfigError(f"{output_dir} is a file: name a directory for the checkpoint")

    tokenizer = build_tokenizer()
    model = build_model(seed).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    warmup = max(1, steps // 20)

    def scale(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
    started = time.perf_counter()
    loss_value = float("nan")
    batches = _batches(tokenizer, seed, steps, batch_size, corruption)
    with tqdm(batches, total=steps, desc="warm start", disable=not progress) as bar:
        for inputs, labels in bar:
            # Padding is on the right and attention is causal: no mask is needed.
            wanted = labels[:, 1:]
            chosen = wanted != IGNORED
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state[:, :-1]
                logits = model.lm_head(hidden[chosen])
            loss = torch.nn.functional.cross_entropy(logits.float(), wanted[chosen])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            loss_value = float(loss.detach())
            bar.set_postfix(loss=f"{loss_value:.3f}", refresh=False)
    seconds = time.perf_counter() - started

    directory = Path(output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    model.half().eval()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    model.float()
    provenance = {
        "made_by": "fiberpo.train.warmstart.warmstart",
        "settings": {
            "seed": seed,
            "steps": steps,
            "batch_size": batch_size,
            "learning_rate": learning_rate,
            "corruption": corruption,
            "bf16": bf16,
        },
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "training_seconds": round(seconds, 1),
        "last_loss": round(loss_value, 4),
        "held_out_prompts_per_domain": eval_count,
        "greedy_accuracy": evaluate(model, tokenizer, count=eval_count, temperature=0.0),
        "sampled_accuracy": evaluate(model, tokenizer, count=eval_count, temperature=1.0),
    }
    text = json.dumps(provenance, indent=2) + "\n"
    (directory / "provenance.json").write_text(text, encoding="utf-8")
    return provenance
