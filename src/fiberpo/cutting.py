"""Taking batches apart and putting them together: the fields of the result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .divergence import TokenDivergence
from .errors import EmptyBatchError, StrataError
from .labels import Label
from .ops.segments import tokens_of

if TYPE_CHECKING:
    from .batch import RatioBatch


def select(batch: RatioBatch, rows: Tensor) -> dict[str, Any]:
    """The tokens of some rows, in the order given."""
    tokens = tokens_of(batch.lengths, rows)
    rollout, divergence = batch.rollout_log_probs, batch.token_divergence
    return {
        "log_probs": batch.log_probs[tokens],
        "old_log_probs": batch.old_log_probs[tokens],
        "given_advantages": batch.given_advantages[rows if batch.by_row else tokens],
        "lengths": batch.lengths[rows],
        "labels": {n: v.select(tokens if v.per_token else rows) for n, v in batch.labels.items()},
        "rollout_log_probs": None if rollout is None else rollout[tokens],
        "token_divergence": None if divergence is None else divergence.select(tokens),
    }


def concatenate(parts: Sequence[RatioBatch]) -> dict[str, Any]:
    """The tokens of several batches with the same labels, one after the other."""
    if not parts:
        raise EmptyBatchError("no parts to concatenate; pass at least one RatioBatch")
    columns = [_columns(part) for part in parts]
    if any(c != columns[0] for c in columns):
        raise StrataError(f"the parts do not carry the same columns: {columns}")
    by_row = all(part.by_row for part in parts)
    rollout = [p.rollout_log_probs for p in parts if p.rollout_log_probs is not None]
    divergence = [p.token_divergence for p in parts if p.token_divergence is not None]
    return {
        "log_probs": torch.cat([p.log_probs for p in parts]),
        "old_log_probs": torch.cat([p.old_log_probs for p in parts]),
        "given_advantages": torch.cat(
            [p.given_advantages if by_row else p.advantages for p in parts]
        ),
        "lengths": torch.cat([p.lengths for p in parts]),
        "labels": {
            name: Label.concatenate([part.labels[name] for part in parts])
            for name in parts[0].labels
        },
        "rollout_log_probs": torch.cat(rollout) if rollout else None,
        "token_divergence": TokenDivergence.concatenate(divergence) if divergence else None,
        "dropped": sum(p.dropped for p in parts),
    }


def _columns(batch: RatioBatch) -> list[str]:
    more = ("rollout_log_probs", "token_divergence")
    return [*sorted(batch.labels), *(n for n in more if getattr(batch, n) is not None)]
