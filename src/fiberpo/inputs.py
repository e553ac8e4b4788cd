"""What a `RatioBatch` accepts: every check of the caller's tensors, each with a remedy."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import FiberPOWarning, NonFiniteError, ShapeError, StrataError
from .labels import RESERVED, ROW_LEVEL, TOKEN_LEVEL, Label, encode

Input = Any
"""What a caller may hand in: checked here, with messages of its own, and not by annotations."""


def check_vector(name: str, tensor: Input) -> None:
    """Floating point, one dimension."""
    if not isinstance(tensor, Tensor) or tensor.ndim != 1 or not tensor.is_floating_point():
        found = f"type {type(tensor).__name__}"
        if isinstance(tensor, Tensor):
            found = f"shape {tuple(tensor.shape)} and dtype {tensor.dtype}"
        raise ShapeError(
            f"{name} has {found}; from_packed takes a floating-point tensor [N] (use from_padded "
            "for [B, T] rows)"
        )


def check_like(name: str, tensor: Input, log_probs: Tensor) -> None:
    """As long as ``log_probs`` and on its device."""
    check_vector(name, tensor)
    if tensor.shape != log_probs.shape:
        raise ShapeError(f"{name} has {len(tensor)} tokens, but log_probs has {len(log_probs)}")
    if tensor.device != log_probs.device:
        raise ShapeError(
            f"{name} is on {tensor.device}, but log_probs is on {log_probs.device}; move one of "
            "them with .to(device)"
        )


def check_padded(
    log_probs: Input, old_log_probs: Input, mask: Input, rollout_log_probs: Input
) -> tuple[int, ...]:
    """The common shape ``(B, T)``."""
    others = {"old_log_probs": old_log_probs, "mask": mask, "rollout_log_probs": rollout_log_probs}
    for name, tensor in {"log_probs": log_probs, **others}.items():
        if not isinstance(tensor, Tensor) and not (tensor is None and name == "rollout_log_probs"):
            raise ShapeError(f"{name} is a {type(tensor).__name__}; pass a torch tensor [B, T]")
    if log_probs.ndim != 2:
        raise ShapeError(
            f"log_probs has shape {tuple(log_probs.shape)}; from_padded takes [B, T] (use "
            "from_packed for tokens laid end to end)"
        )
    for name, tensor in others.items():
        if tensor is not None and tensor.shape != log_probs.shape:
            raise ShapeError(
                f"{name} has shape {tuple(tensor.shape)}, but log_probs has "
                f"{tuple(log_probs.shape)}; all [B, T] tensors must agree (pass the completion "
                "part only, without the prompt)"
            )
    return tuple(log_probs.shape)


def as_lengths(lengths: Any, tokens: int, device: torch.device) -> Tensor:
    """Token counts that add up."""
    found = _tensor("lengths", lengths)
    if not found.numel():
        found = found.long()
    if found.ndim != 1 or found.is_floating_point() or bool((found < 0).any()):
        raise ShapeError(f"lengths must be a list of token counts >= 0, not {lengths!r}")
    if int(found.sum()) != tokens:
        raise ShapeError(
            f"lengths add up to {int(found.sum())}, but there are {tokens} tokens. Did you pass "
            "cu_seqlens (offsets) instead of lengths, or padded lengths?"
        )
    return found.to(device=device, dtype=torch.long)


def as_mask(mask: Tensor) -> Tensor:
    """Booleans; 1 and 0 count as such."""
    if mask.dtype == torch.bool:
        return mask
    if not bool(((mask == 0) | (mask == 1)).all()):
        bad = mask[(mask != 0) & (mask != 1)][0]
        raise ShapeError(f"mask holds {float(bad)}; it takes true/false or 1/0 only")
    return mask == 1


def packed_advantages(advantages: Any, tokens: int, lengths: Tensor) -> Tensor:
    """One advantage a token, or one for each row that has a token."""
    advantages = _tensor("advantages", advantages)
    if tuple(advantages.shape) not in {(tokens,), (len(lengths),)}:
        raise ShapeError(
            f"advantages has shape {tuple(advantages.shape)}, but there are {tokens} tokens in "
            f"{len(lengths)} trajectories; pass one value a token or one a trajectory"
        )
    if len(lengths) != tokens:
        if len(advantages) == tokens:
            return advantages
        return advantages.to(lengths.device)[lengths > 0]
    if bool((lengths == 0).any()):
        raise ShapeError(
            f"{tokens} advantages for {tokens} tokens in {len(lengths)} trajectories, some of them "
            "empty: one a token, or one a trajectory? Remove the empty trajectories from lengths, "
            "labels and advantages."
        )
    return advantages


def padded_advantages(advantages: Any, shape: tuple[int, ...], mask: Tensor) -> Tensor:
    """One advantage a loss token, or one for each row that has one."""
    advantages = _tensor("advantages", advantages)
    if tuple(advantages.shape) not in {shape, shape[:1]}:
        raise ShapeError(
            f"advantages has shape {tuple(advantages.shape)}; pass [B] = {shape[:1]} or "
            f"[B, T] = {shape}"
        )
    advantages = advantages.to(mask.device)
    return advantages[mask] if advantages.ndim == 2 else advantages[mask.any(1)]


def widen(name: str, tensor: Tensor) -> Tensor:
    """At least float32, with a warning where something is lost already."""
    if tensor.dtype in (torch.bfloat16, torch.float16):
        warnings.warn(
            f"{name} is {tensor.dtype}: its rounding is of the size of the drifts that the gates "
            "measure. Compute log-probs in float32 (the model may stay in bf16).",
            FiberPOWarning,
            stacklevel=4,
        )
        return tensor.float()
    return tensor


def as_float(tensor: Tensor) -> Tensor:
    """Float32 or float64."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def check_finite(tensors: Mapping[str, Tensor | None], lengths: Tensor) -> None:
    """No NaN or infinity on a loss token; ``lengths`` with the empty trajectories."""
    for name, tensor in tensors.items():
        # a finite sum has finite terms; one that overflows says nothing
        if tensor is None or bool(torch.isfinite(tensor.detach().sum())):
            continue
        if bool(torch.isfinite(tensor).all()):
            continue
        token = int((~torch.isfinite(tensor)).nonzero()[0])
        ends = lengths.cumsum(0)
        trajectory = int((ends <= token).sum())
        position = token - int(ends[trajectory] - lengths[trajectory])
        raise NonFiniteError(
            f"{name} is {float(tensor[token].detach())} at loss token {position} of trajectory "
            f"{trajectory} (token {token} of the batch). Mask the token out if it should not be "
            "trained on; otherwise find what made it non-finite (log-probs of a forbidden token, "
            "a reward of NaN, a group whose rewards have no spread)."
        )


def as_labels(labels: Any) -> Mapping[str, Any]:
    """A mapping from stratum to ids; None is none."""
    if labels is None:
        return {}
    if not isinstance(labels, Mapping):
        raise StrataError(
            f"labels is a {type(labels).__name__}; it maps names of strata to ids, "
            'labels={"group": ids}'
        )
    return labels


def packed_label(
    name: str,
    ids: Any,
    trajectories: int,
    tokens: int,
    device: torch.device,
    token_labels: Collection[str],
) -> Label:
    """A label with one id a trajectory or one a token.

    The length tells which, but for a batch with as many tokens as trajectories, where only the
    names in ``TOKEN_LEVEL`` and ``token_labels`` are read as one a token.
    """
    _check_name(name)
    codes, values = encode(name, ids, device)
    if codes.ndim != 1 or len(codes) not in (trajectories, tokens):
        raise StrataError(
            f'labels["{name}"] has {_entries(codes)}, but there are {trajectories} trajectories '
            f"and {tokens} tokens. Pass one id a trajectory, or one a token for a stratum below "
            "the trajectory."
        )
    declared = name in TOKEN_LEVEL or name in token_labels
    expected = tokens if declared else trajectories if name in ROW_LEVEL else len(codes)
    if len(codes) != expected:
        kind = "tokens" if declared else "trajectories"
        raise StrataError(
            f'labels["{name}"] has {len(codes)} entries, but "{name}" is a label of {kind} and '
            f"there are {expected} of them"
        )
    per_token = declared or len(codes) == tokens != trajectories
    return Label(name, codes, values, per_token)


def padded_label(name: str, ids: Any, shape: tuple[int, ...], mask: Tensor) -> Label:
    """A label with one id a row, or ``[B, T]`` ids."""
    _check_name(name)
    if _shape(ids) == shape and name not in ROW_LEVEL:
        return Label(name, *encode(name, _under(mask, ids), mask.device), per_token=True)
    codes, values = encode(name, ids, mask.device)
    if tuple(codes.shape) != shape[:1] or name in TOKEN_LEVEL:
        raise StrataError(
            f'labels["{name}"] has {_entries(codes)}, but there are {shape[0]} trajectories '
            f"(0..{shape[0] - 1}). Pass one id a row, or [B, T] ids below the trajectory."
        )
    return Label(name, codes, values, per_token=False)


def check_pieces(label: Label | None) -> None:
    """Every row belongs to a trajectory."""
    if label is not None and bool((label.codes < 0).any()):
        row = int((label.codes < 0).nonzero()[0])
        raise StrataError(
            f'labels["trajectory"] has no id for row {row}; give every row the id of the '
            "trajectory that it is (a piece of)"
        )


def _shape(ids: Any) -> tuple[int, ...]:
    if isinstance(ids, (Tensor, np.ndarray)):
        return tuple(ids.shape)
    if ids and isinstance(ids[0], (list, tuple)):
        widths = {len(row) for row in ids}
        return (len(ids), *widths) if len(widths) == 1 else ()
    return (len(ids),)


def _under(mask: Tensor, ids: Any) -> Any:
    """The ids on loss tokens: what stands under the mask may be anything."""
    if isinstance(ids, Tensor):
        return ids.to(mask.device)[mask]
    if isinstance(ids, np.ndarray):
        return ids[mask.cpu().numpy()]
    rows = zip(ids, mask.tolist(), strict=True)
    return [e for row, kept in rows for e, k in zip(row, kept, strict=True) if k]


def _tensor(name: str, values: Any) -> Tensor:
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ShapeError(f"{name} is {values!r}; pass numbers, as a tensor or a list") from error


def _entries(codes: Tensor) -> str:
    return f"{len(codes)} entries" if codes.ndim == 1 else f"shape {tuple(codes.shape)}"


def _check_name(name: str) -> None:
    if name in RESERVED:
        raise StrataError(
            f'labels["{name}"] is not needed: every loss token is one token. Strata between the '
            "trajectory and the token have names of their own (turn, segment, ...)."
        )
