"""fiberpo for tinker: an objective as the loss of ``TrainingClient.forward_backward_custom``.

tinker computes the log-probs of all data on its servers, calls ``fn(data, logprobs_list)`` on the
client, and sends ``-d loss / d logprobs`` back as the weights of a linear loss: the two-phase form,
with the coefficients of the objective as weights. The function sees the whole batch, so the gates
of every stratum are exact, whatever chunks the service cuts.

Nothing is imported from tinker: data are read by attribute, so other services with the same call
work as well. Tested with tinker 0.38.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..batch import RatioBatch
from ..columns import STRATUM_ALIASES, find_column
from ..errors import DataError, ShapeError
from ..objective import Objective
from ..weights import Denominators

LossFn = Callable[[Sequence[Any], Sequence[Tensor]], tuple[Tensor, dict[str, float]]]

MASKS = ("mask", "weights")
"""Keys of ``loss_fn_inputs`` that may hold the mask of loss tokens."""


def loss_fn(
    objective: Objective,
    *,
    labels: Mapping[str, Any] | None = None,
    denominators: Denominators | None = None,
) -> LossFn:
    """An objective as ``fn(data, logprobs_list) -> (loss, metrics)``.

    Each datum's ``loss_fn_inputs`` holds, one entry a target token: ``logprobs`` (of the policy
    that sampled, the anchor of the ratio, nats), ``advantages``, and the mask of loss tokens as
    ``mask`` or ``weights`` (0 or 1). Entries that are masked may hold anything.

    Args:
        objective: what to minimise the negative of.
        labels: per stratum one id a datum, in the order of ``data``, strings allowed. A stratum not
            named here is read from ``loss_fn_inputs`` under the usual names (``group_id``, ``uid``,
            ``domain``, ``data_source``, ...), where tinker takes integers only. Data with one
            ``trajectory_id`` are pieces of one trajectory.
        denominators: counts of the whole optimizer step, where it is spread over several calls;
            for objectives with token and trajectory gates only.

    Returns:
        A function whose loss has the exact gradient and whose metrics are floats.

    Raises:
        DataError, ShapeError: by the returned function, naming the datum and the key.
        FiberPOError: what `RatioBatch` and the objective refuse.

    Example:
        >>> from types import SimpleNamespace
        >>> from fiberpo import recipes
        >>> inputs = {"logprobs": torch.tensor([-1.0, -1.0]), "advantages": torch.ones(2),
        ...           "mask": torch.tensor([0.0, 1.0])}
        >>> logprobs = torch.tensor([-3.0, -1.0], requires_grad=True)
        >>> loss, metrics = loss_fn(recipes.grpo())([SimpleNamespace(loss_fn_inputs=inputs)],
        ...                                         [logprobs])
        >>> loss.backward()
        >>> logprobs.grad
        tensor([ 0., -1.])
    """

    def fn(data: Sequence[Any], logprobs_list: Sequence[Tensor]) -> tuple[Tensor, dict[str, float]]:
        if len(data) != len(logprobs_list):
            raise ShapeError(f"{len(data)} data, but log-probs of {len(logprobs_list)}")
        rows = [
            _row(i, datum.loss_fn_inputs, logprobs)
            for i, (datum, logprobs) in enumerate(zip(data, logprobs_list, strict=True))
        ]
        old, advantages, masks = (torch.cat(parts) for parts in zip(*rows, strict=True))
        mask = masks.bool()
        current = torch.cat(list(logprobs_list))[mask]
        batch = RatioBatch.from_packed(
            current,
            old[mask],
            advantages[mask],
            torch.stack([row[2].sum() for row in rows]).long(),
            labels=_labels(data, labels or {}),
            rollout_log_probs=old[mask],
        )
        out = objective(batch, denominators=denominators)
        return out.loss, out.metrics()

    return fn


def _row(i: int, inputs: Mapping[str, Any], logprobs: Tensor) -> list[Tensor]:
    """Old log-probs, advantages and mask of one datum."""
    if logprobs.ndim != 1:
        raise ShapeError(
            f"the log-probs of datum {i} have shape {tuple(logprobs.shape)}; an objective needs "
            "one sampled token a position (target_tokens [T], not top-k targets [T, K])"
        )
    mask = next((key for key in MASKS if key in inputs), None)
    if mask is None:
        raise DataError(
            f"datum {i} has no mask of its loss tokens; put 1 on sampled tokens and 0 on the "
            f"prompt into loss_fn_inputs[{MASKS[0]!r}] (there are {sorted(inputs)})"
        )
    found = []
    for key in ("logprobs", "advantages", mask):
        if key not in inputs:
            raise DataError(f"datum {i} has no loss_fn_inputs[{key!r}]; there are {sorted(inputs)}")
        value = _tensor(inputs[key]).to(logprobs.device)
        if value.shape != logprobs.shape:
            raise ShapeError(
                f"loss_fn_inputs[{key!r}] of datum {i} has shape {tuple(value.shape)}, but there "
                f"are {len(logprobs)} target tokens"
            )
        found.append(value)
    off = (found[2] != 0) & (found[2] != 1)
    if bool(off.any()):
        raise DataError(
            f"loss_fn_inputs[{mask!r}] of datum {i} holds {float(found[2][off][0])}; it is the "
            "mask of loss tokens, 0 or 1 (scale the advantages instead)"
        )
    return found


def _labels(data: Sequence[Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The caller's labels, and for each stratum not among them the ids that the data carry."""
    found = dict(given)
    for stratum, aliases in STRATUM_ALIASES.items():
        keys = {key for datum in data for key in datum.loss_fn_inputs}
        key = find_column(keys, aliases, f"the {stratum}")
        if key is None or stratum in found:
            continue
        found[stratum] = torch.stack([_id(i, d.loss_fn_inputs, key) for i, d in enumerate(data)])
    return found


def _id(i: int, inputs: Mapping[str, Any], key: str) -> Tensor:
    if key not in inputs:
        raise DataError(f"datum {i} has no loss_fn_inputs[{key!r}], which other data have")
    values = _tensor(inputs[key]).flatten()
    if not len(values) or bool((values != values[0]).any()):
        raise DataError(
            f"loss_fn_inputs[{key!r}] of datum {i} is {values.tolist()}; it holds one id, alone or "
            "once a token"
        )
    return values[0]


def _tensor(value: Any) -> Tensor:
    """A tensor, from one or from tinker's ``TensorData``."""
    return torch.as_tensor(value.to_torch() if hasattr(value, "to_torch") else value)
