"""Log-probs of the TRL trainer by `fiberpo.linear_logprob`, in the place of TRL's own fused head.

TRL calls ``model(..., labels=labels, fused_lm_head=True)`` wherever it needs log-probs: of the
policy in training, of the anchor, of the reference model. `LinearHead` answers these calls, so that
all of them are scored by the same code. Generation and every other call go on to TRL's forward.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl.trainer.utils import FusedCausalLMOutput

from ..errors import ConfigError
from ..ops.linear import linear_logprob

logger = logging.getLogger(__name__)

SMALL_VOCABULARY = 4096
"""Below it the logits of a batch are of the size of its hidden states, and nothing is gained."""

PROBE = 8
"""Tokens on which the head is compared with the model's own logits."""


class LinearHead:
    """Scores the labels of a model's calls with ``fused_lm_head=True``.

    Args:
        temperature: of the sampling, over the model's own logit scale.
        dtype: of the operands of the head's products; None: autocast's, or their own.
    """

    def __init__(self, temperature: float, dtype: torch.dtype | None) -> None:
        self.temperature = temperature
        self.dtype = dtype
        self._mask: Tensor | None = None
        self._entropy = False
        self._coefficients: Tensor | None = None

    @contextlib.contextmanager
    def asked(self, mask: Tensor, entropy: bool, coefficients: Tensor | None) -> Iterator[None]:
        """Within, score the completion tokens of ``mask`` (``[B, T]``) alone.

        Args:
            mask: loss tokens; the others get a log-prob of 0.
            entropy: whether their entropies are wanted.
            coefficients: what the backward will send into the log-probs of the loss tokens, up to
                a factor, where that is known.
        """
        self._mask, self._entropy, self._coefficients = mask, entropy, coefficients
        try:
            yield
        finally:
            self._mask, self._entropy, self._coefficients = None, False, None

    def install(self, model: Any) -> None:
        """Answer the calls to ``model`` from now on."""
        before, head = model.forward, self

        @functools.wraps(type(model).forward)  # generation reads the signature
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            ours = kwargs.get("fused_lm_head") and kwargs.get("shift_labels") is None
            if not ours:
                return before(*args, **kwargs)
            del kwargs["fused_lm_head"]
            return head.score(self, *args, **kwargs)

        model.forward = types.MethodType(forward, model)

    def score(self, model: Any, *args: Any, labels: Tensor, **kwargs: Any) -> FusedCausalLMOutput:
        """Log-probs and entropies ``[B, T - 1]`` of the labels that are not -100, 0 elsewhere."""
        kwargs["use_cache"] = False
        states = model.base_model(*args, **kwargs).last_hidden_state[:, :-1]
        head = model.get_output_embeddings()
        labels = labels[:, 1:].to(head.weight.device)
        mask = labels != -100
        if self._mask is not None:
            mask[:, -self._mask.shape[1] :] &= self._mask.to(mask.device)
        found = linear_logprob(
            states.to(mask.device)[mask], head.weight, labels[mask], self.temperature,
            bias=head.bias, entropy=self._entropy, dtype=self.dtype,
            coefficients=self._coefficients,
        )  # fmt: skip
        log_probs, entropy = found if isinstance(found, tuple) else (found, None)
        return FusedCausalLMOutput(
            log_probs=_spread(log_probs, mask), label_mask=mask,
            entropy=None if entropy is None else _spread(entropy, mask),
        )  # fmt: skip


def _spread(values: Tensor, mask: Tensor) -> Tensor:
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def attach(trainer: Any) -> LinearHead | None:
    """Put a `LinearHead` into the models of a trainer where ``linear_log_probs`` says so.

    Raises:
        ConfigError: if it is True and cannot work, with the reasons.
    """
    wanted = trainer.args.linear_log_probs
    if wanted is False:
        return None
    models = [trainer.accelerator.unwrap_model(trainer.model)]
    if trainer.ref_model is not None:
        models.append(trainer.accelerator.unwrap_model(trainer.ref_model))
    models = [m.get_base_model() if hasattr(m, "get_base_model") else m for m in models]
    reasons = unsupported(models[0], trainer)
    if wanted and reasons:
        raise ConfigError("linear_log_probs = True cannot work here: " + "; ".join(reasons))
    if not wanted and not reasons:
        reasons = without_gain(models[0].get_output_embeddings().weight)
    if reasons:
        logger.info("linear_log_probs is off: %s", "; ".join(reasons))
        return None
    dtype = torch.float32 if trainer.args.cast_lm_head_to_fp32 else None
    head = LinearHead(trainer.temperature / logit_scale(models[0].config), dtype)
    for model in models:
        head.install(model)
    return head


def unsupported(model: Any, trainer: Any) -> list[str]:
    """Why the log-probs of ``model`` are not those of a plain linear head; empty if they are."""
    if trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled():
        return ["the parameters are sharded (FSDP or ZeRO-3)"]
    if trainer.aux_loss_enabled:
        return ["the router loss of a mixture of experts comes with TRL's own head"]
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        return [f"the output head is a {type(head).__name__}, not a plain torch.nn.Linear"]
    if "forward" in vars(head) and not trainer.args.cast_lm_head_to_fp32:
        return ["the forward of the output head has been replaced"]
    if head._forward_hooks or head._forward_pre_hooks:
        return ["the output head has hooks, which would not run"]
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    if cap is not None:
        return [f"the model caps its logits (final_logit_softcapping = {cap})"]
    scale = logit_scale(model.config)
    if not scale > 0:
        return [f"the logit scale of the model is {scale}"]
    try:
        gap, size = probe(model, scale)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        return [f"the model gives no logits for {PROBE} token ids alone ({error!r:.200})"]
    if not gap <= 2e-2 * size:
        return [
            f"on {PROBE} tokens the model's logits differ by {gap:.3g} (of {size:.3g}) from those "
            "of its head: it does something to them that is not known here"
        ]
    return []


def without_gain(weight: Tensor) -> list[str]:
    """Why it is left off by default although it could work."""
    found = []
    if weight.shape[0] < SMALL_VOCABULARY:
        found.append(f"a vocabulary of {weight.shape[0]} is below {SMALL_VOCABULARY}")
    if weight.device.type != "cpu":
        found.append(
            f"on {weight.device.type} TRL's own head may run as a Triton kernel, with which this "
            "one has not been compared"
        )
    return found


def logit_scale(config: Any) -> float:
    """What a model multiplies its logits by, under the names that the families give it."""
    text = config.get_text_config()
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(text, name, None) is not None:
            return float(getattr(text, name))
    scaling = getattr(text, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return float(scaling) if text.model_type == "hyperclovax" else 1 / float(scaling)


def probe(model: Any, scale: float) -> tuple[float, float]:
    """Largest gap between the model's logits and its head's, and the largest logit."""
    head, training = model.get_output_embeddings(), model.training
    ids = torch.arange(PROBE, device=head.weight.device)[None] % head.weight.shape[0]
    model.eval()
    try:
        with torch.no_grad():
            logits = model(input_ids=ids).logits.float()
            states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            found = head(states.to(head.weight.dtype)).float() * scale
    finally:
        model.train(training)
    return float((logits - found).abs().max()), float(logits.abs().max())
