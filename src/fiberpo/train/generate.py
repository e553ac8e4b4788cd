"""Batched generation that leaves the model's mode and the random state as they were."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from fiberpo.errors import ConfigError


@torch.no_grad()
def sample_completions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 512,
) -> list[str]:
    """Return one completion per prompt, in the order of the prompts.

    Tokens are drawn from softmax(logits / temperature) over the whole vocabulary; temperature 0
    takes the most probable token. The result is a function of the arguments: the draw is seeded
    inside a fork of the random state, which is restored on return, like train or eval mode.

    Args:
        model: Causal language model; it generates in eval mode, on its own device.
        tokenizer: Its tokenizer, with a pad and an end-of-sequence token.
        prompts: Prompt texts.
        max_new_tokens: Longest completion, in tokens.
        temperature: Softmax temperature, 0 for greedy.
        seed: Seed of the draw; unused in greedy generation.
        batch_size: Prompts per call of ``model.generate``.

    Returns:
        The completions as text, special tokens left out.

    Raises:
        ConfigError: A length or batch size below 1, or a negative or infinite temperature.
    """
    if max_new_tokens < 1 or batch_size < 1:
        raise ConfigError(
            f"max_new_tokens and batch_size must be 1 or more, got {max_new_tokens}, {batch_size}"
        )
    if not 0.0 <= temperature < float("inf"):
        raise ConfigError(f"temperature must be finite and >= 0, got {temperature}: use 1.0")
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **(
            {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
            if temperature > 0
            else {"do_sample": False}
        ),
    )
    # Prompts of like length share a batch, which keeps the padding short.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    completions = [""] * len(prompts)
    device = model.device
    was_training = model.training
    generate: Any = model.generate
    model.eval()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                batch = tokenizer(
                    [prompts[i] for i in chosen],
                    return_tensors="pt",
                    padding=True,
                    padding_side="left",
                    return_token_type_ids=False,
                ).to(device)
                output = generate(**batch, generation_config=settings)
                texts = tokenizer.batch_decode(
                    output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
                )
                for i, text in zip(chosen, texts, strict=True):
                    completions[i] = text
    finally:
        model.train(was_training)
    return completions
