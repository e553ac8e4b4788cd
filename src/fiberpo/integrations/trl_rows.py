"""The rows of TRL's batch dictionary, read in fiberpo's terms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..columns import DOMAIN_ALIASES, find_column
from ..errors import DataError
from ..objective import Surrogate


def old_log_probs(inputs: Mapping[str, Any], current: Tensor) -> Tensor:
    """The anchor of the ratio, in float32 at least; TRL leaves it out where it is the current
    policy."""
    old = inputs.get("old_per_token_logps")
    old = current.detach() if old is None else old
    return old if old.dtype == torch.float64 else old.float()


def domains(inputs: Sequence[Mapping[str, Any]], column: str | None) -> list[str]:
    """The domain of every row of data, ``all`` where there is no such column.

    Raises:
        DataError: if the rows lack ``column``, or two columns could be meant.
    """
    if column is None:
        column = find_column(inputs[0], DOMAIN_ALIASES, "the domain")
    elif column not in inputs[0]:
        raise DataError(f"no column {column!r} for the domain; there are {sorted(inputs[0])}")
    return ["all"] * len(inputs) if column is None else [str(x[column]) for x in inputs]


def anchored(inputs: Mapping[str, Any], log_probs: Tensor) -> Tensor:
    """0 where the anchor of the ratio is the current policy itself and nothing else is asked."""
    if {"old_per_token_logps", "sampling_per_token_logps"} & set(inputs):
        return log_probs
    return log_probs - log_probs.detach()


def loss_mask(inputs: Mapping[str, Any]) -> Tensor:
    """True on completion tokens that the model itself wrote."""
    mask = inputs["completion_mask"]
    return (mask if "tool_mask" not in inputs else mask * inputs["tool_mask"]).bool()


def forwarded(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What else goes to the model: images and the like."""
    names = (
        "pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes",
        "num_tiles", "image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids",
    )  # fmt: skip
    return {name: inputs[name] for name in names if name in inputs}


def advantages(inputs: Mapping[str, Any]) -> Tensor:
    """Advantages; the engine correction of TRL is an independent factor on them."""
    values, correction = inputs["advantages"], inputs.get("importance_sampling_ratio")
    wide = values if values.ndim == 2 else values[:, None]
    if correction is not None:
        wide = wide * correction
    return wide.expand(inputs["completion_ids"].shape)


def stopped(surrogate: Surrogate) -> Tensor:
    """``[4]`` counts: tokens whose own gradient is removed or turned round, with A < 0 and A > 0;
    tokens; rows without a loss token."""
    batch = surrogate.batch
    gone = surrogate.weight * surrogate.coefficients <= 0
    low, high = (gone & (batch.advantages < 0)).sum(), (gone & (batch.advantages > 0)).sum()
    return torch.stack([low, high, low * 0 + len(batch), low * 0 + batch.dropped]).cpu()


def shuffle_groups(batch: dict[str, Any]) -> dict[str, Any]:
    """Permute whole prompt groups; the answers of a group stay side by side."""
    groups, index = torch.unique(batch["group_id"], return_inverse=True)
    order = torch.argsort(torch.randperm(len(groups)).to(index.device)[index], stable=True)

    def permute(value: Any) -> Any:
        if value is None or (isinstance(value, Tensor) and value.ndim == 0):
            return value
        return value[order] if isinstance(value, Tensor) else [value[i] for i in order.tolist()]

    return {key: permute(value) for key, value in batch.items()}
