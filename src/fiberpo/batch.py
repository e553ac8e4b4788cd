"""`RatioBatch`: the sampled tokens of one optimizer batch, packed.

Padding exists only here: `RatioBatch.from_padded` removes it (masked positions are dropped, never
multiplied by zero, and may hold anything) and `RatioBatch.to_padded` puts it back.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from . import strata as strata_module
from .errors import EmptyBatchError, FiberPOWarning, NonFiniteError, ShapeError, StrataError
from .labels import GLOBAL_TOKEN_LEVEL, RESERVED, TOKEN_LEVEL, Label, encode, order_strata
from .ops.segments import Segments
from .strata import Strata


@dataclass(frozen=True, eq=False)
class RatioBatch:
    """Packed tokens with their log-probs, advantages and labels.

    Build one with `from_padded` or `from_packed`; both check everything they are given.

    Attributes:
        log_probs: ``[N]`` log-probs of the sampled tokens under the current policy, in nats; the
            only tensor that carries a gradient.
        old_log_probs: ``[N]`` the same under the anchor of the ratio.
        advantages: ``[N]``.
        lengths: ``[trajectories]`` loss tokens of each trajectory, all >= 1.
        labels: encoded labels, coarse to fine.
        rollout_log_probs: ``[N]`` log-probs of the engine that sampled, or None.
        dropped: trajectories without a loss token that were left out.

    Example:
        >>> batch = RatioBatch.from_packed(
        ...     torch.tensor([-0.9, -1.2, -0.5]), torch.tensor([-1.0, -1.0, -0.5]),
        ...     torch.tensor([1.0, -1.0]), lengths=[2, 1], labels={"group": ["a", "a"]})
        >>> batch.log_ratio
        tensor([ 0.1000, -0.2000,  0.0000])
        >>> len(batch), batch.trajectories
        (3, 2)
    """

    log_probs: Float[Tensor, " N"]
    old_log_probs: Float[Tensor, " N"]
    advantages: Float[Tensor, " N"]
    lengths: Int[Tensor, " trajectories"]
    labels: Mapping[str, Label] = field(default_factory=dict)
    rollout_log_probs: Float[Tensor, " N"] | None = None
    dropped: int = 0
    mask: Tensor | None = None
    _strata: dict[tuple[str, ...], Strata] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return self.log_probs.shape[0]

    @property
    def trajectories(self) -> int:
        """Number of trajectories that have a loss token."""
        return self.lengths.shape[0]

    @property
    def device(self) -> torch.device:  # noqa: D102
        return self.log_probs.device

    @property
    def log_ratio(self) -> Float[Tensor, " N"]:
        """``l_i = log pi_theta - log pi_old`` of every token, in nats; differentiable."""
        return self.log_probs - self.old_log_probs

    @cached_property
    def trajectory(self) -> Int[Tensor, " N"]:
        """Trajectory of every token."""
        rows = torch.arange(self.trajectories, device=self.device)
        return torch.repeat_interleave(rows, self.lengths, output_size=len(self))

    @cached_property
    def by_trajectory(self) -> Segments:
        """Tokens by their trajectory."""
        return Segments(self.trajectory, self.trajectories)

    def strata(self, names: Sequence[str]) -> Strata:
        """The forest of the named strata, coarse to fine in the batch's own order (cached).

        Raises:
            StrataError: unknown or repeated names, or labels that do not nest.
        """
        if len(set(names)) != len(names):
            raise StrataError(f"the strata {tuple(names)} name a stratum twice; name each one once")
        position = {name: i for i, name in enumerate(self._chain())}
        ordered = tuple(sorted(names, key=lambda n: position.get(n, -1)))
        if ordered not in self._strata:
            self._strata[ordered] = strata_module.build(ordered, dict(self.labels), self.lengths)
        return self._strata[ordered]

    def _chain(self) -> tuple[str, ...]:
        above = [n for n, label in self.labels.items() if not label.per_token]
        below = [n for n, label in self.labels.items() if label.per_token]
        return order_strata([*above, "trajectory", *below])

    @classmethod
    def from_packed(
        cls,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        lengths: Any,
        *,
        labels: Mapping[str, Any] | None = None,
        rollout_log_probs: Tensor | None = None,
        allow_empty: bool = False,
    ) -> RatioBatch:
        """A batch from tokens laid end to end.

        Args:
            log_probs: ``[N]`` current policy, nats; the gradient flows into this tensor.
            old_log_probs: ``[N]`` anchor of the ratio, nats.
            advantages: ``[N]``, or ``[trajectories]`` where constant on a trajectory.
            lengths: loss tokens of each trajectory, in order; their sum is N. A trajectory of
                length 0 is dropped and counted in ``dropped``.
            labels: per stratum, one id a trajectory (``domain``, ``group``, any name; coarse to
                fine) or one id a token (``turn`` and other strata below the trajectory, ``state``).
                ``domain``, ``group``, ``trajectory``, ``turn`` are put in this order by themselves.
            rollout_log_probs: ``[N]`` log-probs of the engine that sampled, nats.
            allow_empty: accept a batch without a single token (a rank that holds none).

        Raises:
            ShapeError, NonFiniteError, StrataError, EmptyBatchError: all `FiberPOError`, each
                quoting the offending value.
        """
        _check_vector("log_probs", log_probs)
        device, tokens = log_probs.device, log_probs.shape[0]
        lengths = _lengths(lengths, tokens, device)
        _check_like("old_log_probs", old_log_probs, log_probs)
        if rollout_log_probs is not None:
            _check_like("rollout_log_probs", rollout_log_probs, log_probs)
        advantages = torch.as_tensor(advantages)
        if tuple(advantages.shape) not in {(tokens,), (len(lengths),)}:
            raise ShapeError(
                f"advantages has shape {tuple(advantages.shape)}, but there are {tokens} tokens in "
                f"{len(lengths)} trajectories; pass one value a token or one a trajectory"
            )
        if advantages.shape[0] == len(lengths) != tokens:
            advantages = torch.repeat_interleave(advantages.to(device), lengths)
        keep = lengths > 0
        row = torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths)
        encoded = {
            name: _packed_label(name, ids, keep, tokens, device)
            for name, ids in (labels or {}).items()
        }
        batch = cls(
            log_probs=_wide("log_probs", log_probs),
            old_log_probs=_wide("old_log_probs", old_log_probs.detach()),
            advantages=_float(advantages.detach().to(device)),
            lengths=lengths[keep],
            labels=_ordered(encoded),
            rollout_log_probs=None
            if rollout_log_probs is None
            else _wide("rollout_log_probs", rollout_log_probs.detach()),
            dropped=int((~keep).sum()),
        )
        batch._check_finite(row)
        batch._check_not_empty(allow_empty, len(lengths))
        batch._check_labels()
        return batch

    @classmethod
    def from_padded(
        cls,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        mask: Tensor,
        *,
        labels: Mapping[str, Any] | None = None,
        rollout_log_probs: Tensor | None = None,
        allow_empty: bool = False,
    ) -> RatioBatch:
        """A batch from rows of equal width; one row is one trajectory.

        Args:
            log_probs, old_log_probs, rollout_log_probs: ``[B, T]``, nats. Masked positions may hold
                anything, NaN and infinities included: they are removed.
            advantages: ``[B]`` or ``[B, T]``.
            mask: ``[B, T]``, true (or 1) on loss tokens. Rows without one are dropped and counted.
            labels: as in `from_packed`, with ``[B]`` ids above the trajectory and ``[B, T]`` ids
                below it.
            allow_empty: accept a batch whose mask is false everywhere.

        Raises:
            as `from_packed`.
        """
        if log_probs.ndim != 2:
            raise ShapeError(
                f"log_probs has shape {tuple(log_probs.shape)}; from_padded takes [B, T] (use "
                "from_packed for tokens laid end to end)"
            )
        shape, device = tuple(log_probs.shape), log_probs.device
        others = {"old_log_probs": old_log_probs, "mask": mask}
        if rollout_log_probs is not None:
            others["rollout_log_probs"] = rollout_log_probs
        for name, tensor in others.items():
            if tuple(tensor.shape) != shape:
                raise ShapeError(
                    f"{name} has shape {tuple(tensor.shape)}, but log_probs has {shape}; all "
                    "[B, T] tensors must agree (pass the completion part only, without the prompt)"
                )
        advantages = torch.as_tensor(advantages)
        if tuple(advantages.shape) not in {shape, shape[:1]}:
            raise ShapeError(
                f"advantages has shape {tuple(advantages.shape)}; pass [B] = {shape[:1]} or "
                f"[B, T] = {shape}"
            )
        mask = _boolean(mask).to(device)
        packed = {
            name: _padded_label(name, ids, shape, mask, device)
            for name, ids in (labels or {}).items()
        }
        batch = cls.from_packed(
            log_probs[mask],
            old_log_probs.to(device)[mask],
            advantages.to(device)[mask] if advantages.ndim == 2 else advantages,
            mask.sum(1),
            labels=packed,
            rollout_log_probs=None if rollout_log_probs is None else rollout_log_probs[mask],
            allow_empty=allow_empty,
        )
        return replace(batch, mask=mask)

    def to_padded(self, values: Tensor, fill: float = 0.0) -> Tensor:
        """``[B, T]`` with ``values`` (``[N]``) on the loss tokens and ``fill`` elsewhere.

        Raises:
            ShapeError: if the batch did not come from `from_padded`, or ``values`` is not ``[N]``.
        """
        if self.mask is None:
            raise ShapeError("this batch was packed from the start: it has no [B, T] form to fill")
        if tuple(values.shape) != (len(self),):
            raise ShapeError(f"values has shape {tuple(values.shape)}, expected ({len(self)},)")
        out = values.new_full(self.mask.shape, fill)
        out[self.mask] = values
        return out

    def _check_finite(self, row: Tensor) -> None:
        tensors = {
            "log_probs": self.log_probs,
            "old_log_probs": self.old_log_probs,
            "advantages": self.advantages,
            "rollout_log_probs": self.rollout_log_probs,
        }
        for name, tensor in tensors.items():
            if tensor is None or bool(torch.isfinite(tensor).all()):
                continue
            token = int((~torch.isfinite(tensor)).nonzero()[0])
            trajectory = int(row[token])
            position = token - int((row < trajectory).sum())
            raise NonFiniteError(
                f"{name} is {float(tensor[token].detach())} at loss token {position} of trajectory "
                f"{trajectory} (token {token} of the batch). Mask the token out if it should not "
                "be trained on; otherwise find what made it non-finite (bf16 log-probs of a "
                "forbidden token, a reward of NaN, a group whose rewards have no spread)."
            )

    def _check_not_empty(self, allow_empty: bool, trajectories: int) -> None:
        if not len(self) and not allow_empty:
            raise EmptyBatchError(
                f"none of the {trajectories} trajectories has a loss token. Check the mask, or "
                "pass allow_empty=True on a rank that may hold nothing."
            )

    def _check_labels(self) -> None:
        nested = [n for n in self._chain() if n not in GLOBAL_TOKEN_LEVEL]
        if len(nested) > 1:
            self.strata(nested)


def _check_vector(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor) or tensor.ndim != 1 or not tensor.is_floating_point():
        found = (
            f"shape {tuple(tensor.shape)} and dtype {tensor.dtype}"
            if isinstance(tensor, Tensor)
            else f"type {type(tensor).__name__}"
        )
        raise ShapeError(
            f"{name} has {found}; from_packed takes a floating-point tensor [N] (use from_padded "
            "for [B, T] rows)"
        )


def _check_like(name: str, tensor: Tensor, log_probs: Tensor) -> None:
    _check_vector(name, tensor)
    if tensor.shape != log_probs.shape:
        raise ShapeError(f"{name} has {len(tensor)} tokens, but log_probs has {len(log_probs)}")
    if tensor.device != log_probs.device:
        raise ShapeError(
            f"{name} is on {tensor.device}, but log_probs is on {log_probs.device}; move one of "
            "them with .to(device)"
        )


def _lengths(lengths: Any, tokens: int, device: torch.device) -> Tensor:
    found = torch.as_tensor(lengths)
    if found.ndim != 1 or found.is_floating_point() or bool((found < 0).any()):
        raise ShapeError(f"lengths must be a list of token counts >= 0, not {lengths!r}")
    if int(found.sum()) != tokens:
        raise ShapeError(
            f"lengths add up to {int(found.sum())}, but there are {tokens} tokens. Did you pass "
            "cu_seqlens (offsets) instead of lengths, or padded lengths?"
        )
    return found.to(device=device, dtype=torch.long)


def _boolean(mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return mask
    if not bool(((mask == 0) | (mask == 1)).all()):
        bad = mask[(mask != 0) & (mask != 1)][0]
        raise ShapeError(f"mask holds {float(bad)}; it takes true/false or 1/0 only")
    return mask == 1


def _wide(name: str, tensor: Tensor) -> Tensor:
    if tensor.dtype in (torch.bfloat16, torch.float16):
        warnings.warn(
            f"{name} is {tensor.dtype}: its rounding is of the size of the drifts that the gates "
            "measure. Compute log-probs in float32 (the model may stay in bf16).",
            FiberPOWarning,
            stacklevel=3,
        )
        return tensor.float()
    return tensor


def _float(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def _check_name(name: str) -> None:
    if name in RESERVED:
        raise StrataError(
            f'labels["{name}"] is not needed: every row (or entry of lengths) is one trajectory, '
            "and every loss token one token. Join rows that belong to one trajectory first."
        )


def _packed_label(name: str, ids: Any, keep: Tensor, tokens: int, device: torch.device) -> Label:
    _check_name(name)
    codes, values = ids if isinstance(ids, _Encoded) else encode(name, ids, device)
    if codes.ndim != 1 or len(codes) not in (len(keep), tokens):
        raise StrataError(
            f'labels["{name}"] has shape {tuple(codes.shape)}, but there are {len(keep)} '
            f"trajectories and {tokens} tokens. Pass one id a trajectory, or one a token for a "
            "stratum below the trajectory."
        )
    if name in TOKEN_LEVEL and len(codes) != tokens:
        raise StrataError(
            f'labels["{name}"] has {len(codes)} entries, but "{name}" is a label of tokens and '
            f"there are {tokens} of them"
        )
    per_token = len(codes) == tokens and (name in TOKEN_LEVEL or tokens != len(keep))
    return Label(name, codes, values, per_token).select(
        torch.ones_like(codes, dtype=torch.bool) if per_token else keep
    )


def _padded_label(
    name: str, ids: Any, shape: tuple[int, ...], mask: Tensor, device: torch.device
) -> _Encoded:
    _check_name(name)
    codes, values = encode(name, ids, device)
    if tuple(codes.shape) == shape:
        return _Encoded(codes[mask], values)
    if tuple(codes.shape) != shape[:1]:
        entries = f"{len(codes)} entries" if codes.ndim == 1 else f"shape {tuple(codes.shape)}"
        raise StrataError(
            f'labels["{name}"] has {entries}, but there are {shape[0]} trajectories '
            f"(0..{shape[0] - 1}). Pass one id a row, or [B, T] ids below the trajectory."
        )
    return _Encoded(codes, values)


class _Encoded(NamedTuple):
    """A label that is already encoded, on its way from `from_padded` to `from_packed`."""

    codes: Tensor
    values: Any


def _ordered(labels: dict[str, Label]) -> dict[str, Label]:
    above = [n for n, label in labels.items() if not label.per_token]
    below = [n for n, label in labels.items() if label.per_token]
    return {name: labels[name] for name in order_strata([*above, *below])}
