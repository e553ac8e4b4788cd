"""A short supervised fine-tuning that teaches a model the answer format before reinforcement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fiberpo.errors import ConfigError, DataError, NonFiniteError

__all__ = ["encode_row", "sft_loss", "short_sft"]

IGNORED = -100
"""Label of the tokens without loss: the prompt and the padding."""


def encode_row(
    tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any], index: int = 0
) -> tuple[list[int], list[int]]:
    """Token ids of one row: ``(prompt ids, completion ids)``.

    A chat prompt (a list of messages) goes through the tokenizer's chat template with the opening
    of the assistant's turn; a text prompt is tokenised as it is. The completion is the row's
    ``demonstration`` followed by the end-of-sequence token.

    Errors:
        DataError where ``prompt`` or ``demonstration`` is missing, empty or of another type;
        the message quotes ``index``, the row's number.
    """
    prompt, demonstration = row.get("prompt"), row.get("demonstration")
    if not isinstance(demonstration, str) or not demonstration:
        raise DataError(
            f"row {index} has the demonstration {demonstration!r}; supervised fine-tuning needs a "
            f"text in the column 'demonstration' (columns: {', '.join(map(str, row))})"
        )
    if isinstance(prompt, str) and prompt:
        prompt_ids = tokenizer(prompt)["input_ids"]
    elif isinstance(prompt, Sequence) and prompt and not isinstance(prompt, str):
        encoded: Any = tokenizer.apply_chat_template(
            list(prompt), add_generation_prompt=True, return_dict=True
        )
        prompt_ids = encoded["input_ids"]
    else:
        raise DataError(f"row {index} has the prompt {prompt!r}; use a text or a list of messages")
    completion = tokenizer(demonstration, add_special_tokens=False)["input_ids"]
    return list(prompt_ids), [*completion, tokenizer.eos_token_id]


def sft_loss(
    model: PreTrainedModel, encoded: Sequence[tuple[list[int], list[int]]], pad_id: int
) -> torch.Tensor:
    """Mean negative log-likelihood (nats per token) of the completions of one batch.

    ``-sum_i sum_t log p(y_it | prompt_i, y_i,<t) / sum_i |y_i|``, a scalar in float32. Sequences
    are padded on the left, so that logits are computed for the last positions only.

    Args:
        model: a causal language model.
        encoded: ``(prompt ids, completion ids)`` of each row, see `encode_row`.
        pad_id: token id for the padding; it never gets any loss or attention.
    """
    width = max(len(prompt) + len(completion) for prompt, completion in encoded)
    keep = max(len(completion) for _, completion in encoded)
    shape = (len(encoded), width)
    ids = torch.full(shape, pad_id, dtype=torch.long)
    mask, labels = torch.zeros(shape, dtype=torch.long), torch.full(shape, IGNORED)
    for i, (prompt, completion) in enumerate(encoded):
        ids[i, width - len(prompt) - len(completion) :] = torch.tensor([*prompt, *completion])
        mask[i, width - len(prompt) - len(completion) :] = 1
        labels[i, width - len(completion) :] = torch.tensor(completion)
    device = model.device
    output = model(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        position_ids=(mask.cumsum(1) - 1).clamp_(min=0).to(device),
        logits_to_keep=keep + 1,
        use_cache=False,
    )
    logits = output.logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels[:, width - keep :].flatten().to(device), ignore_index=IGNORED
    )


def short_sft(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows_with_demonstrations: Sequence[Mapping[str, Any]],
    *,
    steps: int = 9,
    batch_size: int = 16,
    lr: float = 2e-4,
    seed: int = 0,
    autocast_dtype: torch.dtype | None = torch.bfloat16,
    progress: bool = True,
) -> list[float]:
    """Fine-tune ``model`` in place on demonstrations; the loss covers the completions only.

    AdamW (no weight decay, gradient norm clipped at 1) with a learning rate that rises linearly to
    ``lr`` in the first third of the steps and falls linearly after that. Rows are drawn in shuffled
    order, each once per epoch. Parameters and optimiser state stay float32; the forward pass
    computes in ``autocast_dtype``.

    Args:
        model: a causal language model with float32 parameters, on any device.
        tokenizer: its tokenizer, with an end-of-sequence token.
        rows_with_demonstrations: rows with ``prompt`` (text or chat) and ``demonstration`` (text).
        steps: number of optimiser steps.
        batch_size: rows in one step.
        lr: largest learning rate.
        seed: seed of the order of the rows; the global random state is left alone.
        autocast_dtype: type of the computation, None for that of the parameters.
        progress: show a progress bar on standard error.

    Returns:
        The loss of every step, nats per token, before that step's update.

    Errors:
        ConfigError for a setting out of its range or parameters that are not float32; DataError for
        rows that cannot be used; NonFiniteError for a loss that is not finite.
    """
    if steps < 0 or batch_size < 1 or not lr > 0:
        raise ConfigError(
            f"short_sft needs steps >= 0, batch_size >= 1 and lr > 0, got steps={steps}, "
            f"batch_size={batch_size}, lr={lr}"
        )
    if wrong := {p.dtype for p in model.parameters() if p.is_floating_point()} - {torch.float32}:
        raise ConfigError(
            f"short_sft needs float32 parameters (it computes in {autocast_dtype}), got "
            f"{', '.join(map(str, wrong))}; load the model with dtype=torch.float32"
        )
    if tokenizer.eos_token_id is None:
        raise ConfigError("the tokenizer has no end-of-sequence token; set tokenizer.eos_token")
    if not rows_with_demonstrations:
        raise DataError("short_sft got no rows; give at least one with a demonstration")
    rows = [encode_row(tokenizer, row, i) for i, row in enumerate(rows_with_demonstrations)]
    pad = tokenizer.pad_token_id
    pad_id = int(tokenizer.eos_token_id if pad is None else pad)
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < steps * batch_size:
        order += torch.randperm(len(rows), generator=generator).tolist()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    warmup = -(-steps // 3)
    was_training = model.training
    model.train()
    losses: list[float] = []
    bar = tqdm(range(steps), desc="supervised fine-tuning", disable=not progress)
    try:
        for step in bar:
            batch = [rows[i] for i in order[step * batch_size : (step + 1) * batch_size]]
            for group in optimizer.param_groups:
                group["lr"] = lr * min((step + 1) / warmup, (steps - step) / (steps - warmup + 1))
            with torch.autocast(
                model.device.type, autocast_dtype, enabled=autocast_dtype is not None
            ):
                loss = sft_loss(model, batch, pad_id)
            value = loss.item()
            if value != value or abs(value) == float("inf"):
                raise NonFiniteError(f"the loss of step {step} is {value}; lower lr (now {lr})")
            losses.append(value)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            bar.set_postfix(loss=f"{value:.3f}")
    finally:
        bar.close()
        optimizer.zero_grad(set_to_none=True)
        model.train(was_training)
    return losses
