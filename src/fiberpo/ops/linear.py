"""Log-probs of sampled tokens from hidden states and the output head, without logits in memory.

    log p_i = z_{i, y_i} - log sum_v exp(z_iv),        z_iv = (h_i . W_v + b_v) / T

Logits of a whole batch, ``[N, V]``, are the largest tensor of a training step. Here they exist in
chunks of ``memory`` bytes. An objective sends one coefficient ``c_i`` a token into the log-probs;
what is known of them decides how many matrix products of ``2 N V H`` operations a step takes:

=============  ========  =====================================================================
mode           products  when
=============  ========  =====================================================================
``frozen``     2         the head is not trained (LoRA): ``d log p_i / dh_i = (W_{y_i} - m_i) / T``
                         with the expected embedding ``m_i = sum_v p_iv W_v`` is kept, ``[N, H]``
``resident``   3         coefficients known in advance, or per chunk of whole trajectories
``two-phase``  4         anything: the backward computes the softmax of each chunk again
=============  ========  =====================================================================

All three give the same numbers, those of `fiberpo.ops.linear_reference`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args, overload

import torch
from torch import Tensor

from ..errors import ConfigError, ShapeError
from .linear_head import (
    Coefficients,
    Frozen,
    Head,
    Resident,
    Settings,
    TwoPhase,
    even,
    native_half,
    score,
)

Mode = Literal["auto", "frozen", "resident", "two-phase"]

SMALLEST, LARGEST = 64 << 20, 1 << 30


@overload
def linear_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, *,
    bias: Tensor | None = None, mode: Mode = "auto",
    coefficients: Coefficients | Tensor | None = None,
    lengths: Sequence[int] | Tensor | None = None, entropy: Literal[False] = False,
    memory: int | None = None, skip_zeros: bool | None = None, dtype: torch.dtype | None = None,
) -> Tensor: ...  # fmt: skip


@overload
def linear_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, *,
    bias: Tensor | None = None, mode: Mode = "auto",
    coefficients: Coefficients | Tensor | None = None,
    lengths: Sequence[int] | Tensor | None = None, entropy: Literal[True],
    memory: int | None = None, skip_zeros: bool | None = None, dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def linear_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, *,
    bias: Tensor | None = None, mode: Mode = "auto",
    coefficients: Coefficients | Tensor | None = None,
    lengths: Sequence[int] | Tensor | None = None, entropy: bool,
    memory: int | None = None, skip_zeros: bool | None = None, dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    *,
    bias: Tensor | None = None,
    mode: str = "auto",
    coefficients: Coefficients | Tensor | None = None,
    lengths: Sequence[int] | Tensor | None = None,
    entropy: bool = False,
    memory: int | None = None,
    skip_zeros: bool | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``log softmax((hidden @ weight.T + bias) / temperature)[targets]``, logits never stored.

    Args:
        hidden: ``[N, H]`` last hidden states of the tokens that count (padding left out).
        weight: ``[V, H]`` of the output head.
        targets: ``[N]`` integer ids below ``V``. Their range is checked on the CPU; on a GPU its
            own assertion speaks.
        temperature: above 0; what the tokens were sampled with.
        bias: ``[V]`` of the output head.
        mode: ``"auto"``: frozen where weight and bias need no gradient, resident where
            ``coefficients`` are given and a trajectory fits into ``memory``, else two-phase. A mode
            named here is taken or refused, never replaced.
        coefficients: ``dJ / d log_probs`` for the mode resident: ``[N]``, or a function
            ``(log_probs [n], slice) -> [n]`` that is called once for every chunk of whole
            trajectories (`fiberpo.exact.by_trajectory` makes one). The backward must then send a
            multiple of them into the result, as that of ``(coefficients * log_probs).sum()`` does;
            anything else is refused. The other modes do not look at them.
        lengths: tokens of each trajectory, in order, for a function; None: one trajectory.
        entropy: give ``[N]`` entropies too, in nats; no gradient flows through them.
        memory: bytes for the logits of a chunk; default: the size of ``weight`` in float32, but
            from 64 MiB to 1 GiB.
        skip_zeros: leave tokens with coefficient 0 out of the recompute and of both gradient
            products. Waits for the device to count them, so the default is True on a CPU alone.
        dtype: what the operands of the matrix products are rounded to; default: autocast's where it
            is on, else the wider of ``hidden`` and ``weight``. Products, sums and softmax are in
            float32 in any case (float64 for float64). On a GPU bfloat16 operands are taken as they
            are; elsewhere, and for float16, widened for the time of the call.

    Returns:
        ``[N]`` log-probs, float32 (float64 where ``dtype`` is), in nats; with ``entropy`` a pair.

    Raises:
        ShapeError: for shapes, dtypes, devices or targets that do not fit together.
        ConfigError: for a temperature, mode, memory or dtype that cannot work, with the reason.
        ObjectiveError: in the backward of ``resident``, for a gradient of another direction.

    >>> import torch, fiberpo
    >>> hidden, weight = torch.eye(3), torch.eye(3, requires_grad=True)
    >>> log_probs = fiberpo.linear_logprob(hidden, weight, torch.tensor([0, 1, 1]), temperature=0.5)
    >>> log_probs.detach()
    tensor([-0.2395, -0.2395, -2.2395])
    >>> log_probs.sum().backward()
    >>> weight.grad.shape
    torch.Size([3, 3])
    """
    _check_tensors(hidden, weight, targets, bias)
    if not (isinstance(temperature, (int, float)) and 0 < temperature < math.inf):
        raise ConfigError(
            f"temperature is {temperature!r}; it is the positive number that the tokens were "
            "sampled with"
        )
    if dtype is None:
        dtype = _product_dtype(hidden, weight)
    elif not dtype.is_floating_point:
        raise ConfigError(f"dtype is {dtype}; the products take a floating one")
    wide = 8 if dtype is torch.float64 else 6 if native_half(hidden.device, dtype) else 4
    room = _Room(len(hidden), weight.shape[0], weight.shape[1], wide, memory)
    blocks = room.blocks(coefficients, lengths)
    needs = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (hidden, weight, bias)
    )
    chosen = _choose(mode, weight, bias, coefficients, blocks, room)
    whole = chosen == "resident" and needs
    chunks = room.chunks(blocks) if whole else even(len(hidden), room.rows)
    skips = hidden.device.type == "cpu" if skip_zeros is None else skip_zeros
    settings = Settings(float(temperature), dtype, tuple(chunks), entropy, skips)
    with torch.autocast(hidden.device.type, enabled=False):
        if not needs:
            with torch.no_grad():
                found = score(Head(weight, bias, settings), hidden, targets)
        elif chosen == "resident":
            found = Resident.apply(hidden, weight, bias, targets, settings, _function(coefficients))
        else:
            way = Frozen if chosen == "frozen" else TwoPhase
            found = way.apply(hidden, weight, bias, targets, settings)
    log_probs, entropies = found
    return log_probs if entropies is None else (log_probs, entropies)


def _product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    wider = torch.promote_types(hidden.dtype, weight.dtype)
    device = hidden.device.type
    if wider is not torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return wider


def _check_tensors(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> None:
    shapes = (
        f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, targets "
        f"{tuple(targets.shape)}, bias {None if bias is None else tuple(bias.shape)}"
    )
    if (
        hidden.ndim != 2
        or weight.ndim != 2
        or hidden.shape[1] != weight.shape[1]
        or targets.shape != hidden.shape[:1]
        or not (bias is None or bias.shape == weight.shape[:1])
    ):
        raise ShapeError(
            f"{shapes}; they are [N, H], [V, H], [N] and [V]. Select the tokens that count first: "
            "hidden[mask], targets[mask]"
        )
    if 0 in weight.shape:
        raise ShapeError(f"{shapes}: a head without vocabulary or width has no distribution")
    for name, x in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if x is not None and not x.dtype.is_floating_point:
            raise ShapeError(f"{name} is {x.dtype}; use a floating dtype")
        if x is not None and x.device != targets.device:
            raise ShapeError(f"{name} is on {x.device}, targets on {targets.device}")
    if targets.dtype is not torch.int64:
        raise ShapeError(f"targets is {targets.dtype}; token ids are int64: targets.long()")
    if targets.device.type == "cpu" and len(targets):
        outside = (targets < 0) | (targets >= len(weight))
        if bool(outside.any()):
            token = int(outside.nonzero()[0])
            raise ShapeError(
                f"target {int(targets[token])} of token {token} is not in 0..{len(weight) - 1}; "
                "leave padding out (ids of -100 too) before the call"
            )


@dataclass(frozen=True)
class _Room:
    """How many tokens' logits fit."""

    tokens: int
    vocabulary: int
    width: int
    itemsize: int
    memory: int | None

    @property
    def per_token(self) -> int:
        return self.vocabulary * self.itemsize

    @property
    def rows(self) -> int:
        memory = self.memory
        if memory is None:
            memory = min(max(4 * self.vocabulary * self.width, SMALLEST), LARGEST)
            return max(memory // self.per_token, 1)
        if memory < self.per_token:
            raise ConfigError(
                f"memory = {memory} bytes, but the logits of one token take {self.per_token}; "
                "raise it"
            )
        return memory // self.per_token

    def blocks(
        self, coefficients: Coefficients | Tensor | None, lengths: Sequence[int] | Tensor | None
    ) -> list[int]:
        """Tokens that must share a chunk in the mode resident."""
        if lengths is not None:
            found = lengths.tolist() if isinstance(lengths, Tensor) else list(lengths)
            if sum(found) != self.tokens or any(n < 0 for n in found):
                raise ShapeError(
                    f"lengths {found[:8]}{'...' if len(found) > 8 else ''} add up to {sum(found)}, "
                    f"but there are {self.tokens} tokens"
                )
        else:
            found = [self.tokens]
        if isinstance(coefficients, Tensor):
            if coefficients.shape != (self.tokens,):
                raise ShapeError(
                    f"coefficients has shape {tuple(coefficients.shape)} for {self.tokens} tokens"
                )
            return []
        return found

    def chunks(self, blocks: list[int]) -> list[slice]:
        """Whole blocks to a chunk, as many as fit; any tokens where there are none."""
        if not blocks:
            return even(self.tokens, self.rows)
        bounds, at = [0], 0
        for size in blocks:
            if at + size - bounds[-1] > self.rows and at > bounds[-1]:
                bounds.append(at)
            at += size
        bounds.append(at)
        return [slice(a, b) for a, b in itertools.pairwise(bounds) if b > a]


def _choose(
    mode: str,
    weight: Tensor,
    bias: Tensor | None,
    coefficients: Coefficients | Tensor | None,
    blocks: list[int],
    room: _Room,
) -> str:
    if mode not in get_args(Mode):
        raise ConfigError(f"mode is {mode!r}; it is one of {', '.join(get_args(Mode))}")
    against: dict[str, list[str]] = {"frozen": [], "resident": [], "two-phase": []}
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None and x.requires_grad:
            against["frozen"].append(
                f"{name}.requires_grad is True, and no gradient for it would be made"
            )
    if coefficients is None:
        against["resident"].append("it needs coefficients=, a tensor or a function of a chunk")
    longest = max(blocks, default=0)
    if longest > room.rows:
        against["resident"].append(
            f"{longest} tokens must share a chunk (lengths=), whose logits take "
            f"{longest * room.per_token} bytes; memory holds {room.rows} tokens"
        )
    if mode == "auto":
        return next(name for name, reasons in against.items() if not reasons)
    if against[mode]:
        raise ConfigError(f"mode={mode!r} cannot work here: " + "; ".join(against[mode]))
    return mode


def _function(coefficients: Coefficients | Tensor | None) -> Coefficients:
    if isinstance(coefficients, Tensor):
        known = coefficients
        return lambda log_probs, where: known[where].to(log_probs.device)
    assert coefficients is not None
    return coefficients
