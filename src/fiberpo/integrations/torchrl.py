"""fiberpo inside torchrl: `FiberPOLoss` is torchrl's GRPO loss with any fiberpo objective.

The actor, the masking strategies, the tensordict keys, the entropy bonus and the KL terms are those
of `torchrl.objectives.llm.GRPOLoss`; the policy objective, its weights and its masks are fiberpo's.

A loss module sees one tensordict at a time. Where that is the whole optimizer batch, every gate is
exact. Where it is a part, token and trajectory gates are exact with ``denominators=``, and group
and domain gates with `FiberPOLoss.split`, which runs the two-phase form of `fiberpo.exact`.

Tested with torchrl 0.14.1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor
from torchrl.objectives.llm import GRPOLoss
from torchrl.objectives.llm.grpo import LLMLossOutput

from ..batch import RatioBatch
from ..columns import STRATUM_ALIASES, find_column
from ..errors import ConfigError, DataError, ObjectiveError, ShapeError
from ..exact import Stepper, Window
from ..objective import Objective
from ..weights import Denominators

REPLACED = {
    "clip_epsilon": "the epsilon of the recipe",
    "kl_mask_threshold": "an objective with a mask (fiberpo.MaxDivergence)",
    "aggregation": "the weights of the recipe",
    "reduction": "nothing: the loss is a scalar",
    "clip_value": "nothing: there is no value function",
    "gamma": "nothing: advantages come ready",
}
"""Settings of GRPOLoss that mean nothing here, and what takes their place."""


class FiberPOLossOutput(LLMLossOutput):
    """The fields of torchrl's GRPO loss, and ``metrics``.

    ``metrics`` is a plain dictionary of floats, so that reductions over the output
    (``output.mean(reduce=True)``) do not count it in.
    """

    metrics: dict | None = None


@dataclass(frozen=True, eq=False)
class _Rows:
    """One tensordict in fiberpo's terms; ``[B, T]`` but for the batch."""

    batch: RatioBatch
    current: Tensor
    mask: Tensor
    distribution: Any


class FiberPOLoss(GRPOLoss):
    """`torchrl.objectives.llm.GRPOLoss` with a fiberpo objective.

    One row of the tensordict is one trajectory, unless it has trajectory ids. The anchor of the
    ratio is ``sample_log_prob``, the policy that sampled.

    Args:
        actor_network: as for GRPOLoss.
        objective: what to minimise the negative of.
        kl_to_ref_coeff, kl_to_inference_coeff: add ``coeff * sum_i mu_i k3_i`` against the
            reference and the sampling policy, ``mu`` the objective's own weights.
        entropy_bonus, entropy_coeff: add ``-coeff * sum_i mu_i H_i``.
        **kwargs: the other parameters of GRPOLoss (``masking_strategy``, ``device``, ...).

    Keys (``set_keys``): those of GRPOLoss, and ``domain``, ``group``, ``trajectory``: ids, one a
    row, integers or strings. Without a setting the usual names are looked for (``group_id``,
    ``uid``, ``domain``, ``data_source``, ``trajectory_id``, ...).

    Raises:
        ConfigError: for settings of GRPOLoss that have no effect here.
    """

    output_type = FiberPOLossOutput

    @dataclass
    class _AcceptedKeys(GRPOLoss._AcceptedKeys):
        domain: NestedKey | None = None
        group: NestedKey | None = None
        trajectory: NestedKey | None = None

    def __init__(self, actor_network: Any = None, *, objective: Objective, **kwargs: Any) -> None:
        for name, remedy in REPLACED.items():
            if kwargs.get(name) is not None:
                raise ConfigError(
                    f"{name} = {kwargs[name]!r} has no effect on a fiberpo objective; remove it "
                    f"(in its place: {remedy})"
                )
        super().__init__(actor_network, **kwargs)
        self.objective = objective

    def forward(
        self,
        tensordict: TensorDictBase,
        *,
        denominators: Denominators | None = None,
        window: Window | None = None,
        part: int = 0,
    ) -> FiberPOLossOutput:
        """Losses (``loss_*``, to be added up) and what to log.

        Args:
            tensordict: the whole optimizer batch, or a part of it with one of the following.
            denominators: counts of the whole optimizer batch; losses of the parts add up to those
                of the whole. For objectives with token and trajectory gates only.
            window, part: number ``part`` of an open `fiberpo.exact.Window` (see `split`).

        Raises:
            DataError, FiberPOError: naming the key and the value.
        """
        tensordict = tensordict.copy()
        partial = denominators is not None or window is not None
        rows = self._read(tensordict, allow_empty=partial)
        batch, scale = rows.batch, 1
        metrics: dict[str, float] | None = None
        if window is None:
            plan = self.objective.plan(batch, denominators=denominators)
            surrogate = self.objective(batch, plan=plan)
            loss, mu, metrics = surrogate.loss, plan.mu, surrogate.metrics()
            kept = surrogate.coefficients * batch.advantages > 0
        else:
            loss = window.loss(part, rows.current)
            mu, scale = window.weights[part], window.stepper.scale
            (gradient,) = torch.autograd.grad(loss, rows.current, retain_graph=True)
            kept = -gradient[rows.mask] * batch.advantages > 0
        log_ratio = batch.log_ratio.detach().double()
        stopped = ~kept & (batch.advantages != 0)
        dtype = rows.current.dtype
        out = {
            "loss_objective": loss.to(dtype),
            "clip_fraction": _mean(stopped),
            "kl_approx": _mean(-log_ratio),
            "ESS": _effective_share(log_ratio),
        }
        out.update(self._regularisers(tensordict, rows, mu.to(dtype) * scale))
        found = TensorDict(out)
        found.set_non_tensor("metrics", metrics)
        return self.output_type.from_tensordict(found)

    def split(
        self, stepper: Stepper, parts: Sequence[TensorDictBase], *, fresh: bool = False
    ) -> Iterator[FiberPOLossOutput]:
        """The losses of one optimizer step, part by part: exact for gates of every stratum.

        Backpropagate each output before the next one is taken, and step the optimizer after the
        last. Nothing is to be divided by the number of parts or ranks::

            for out in loss_module.split(stepper, parts):
                sum(v for k, v in out.items() if k.startswith("loss_")).backward()
            optimizer.step()

        Costs one more forward pass of all parts, without graph. The last output has the metrics of
        this rank's whole step.

        Args:
            stepper: made with the same objective, kept for the whole run.
            parts: tensordicts of this rank.
            fresh: nothing has been updated since these rows were sampled.
        """
        if stepper.objective != self.objective:
            raise ObjectiveError(
                f"the stepper optimises {stepper.objective}, this loss {self.objective}; make it "
                "with exact.Stepper(loss_module.objective)"
            )
        with torch.no_grad():
            batches = [self._read(part.copy(), allow_empty=True).batch for part in parts]
        window = stepper.open(batches, fresh=fresh)
        if window.needs_forward:
            window.fill([batch.log_probs for batch in batches])
        for k, part in enumerate(parts):
            out = self(part, window=window, part=k)
            if k == len(parts) - 1:
                out.metrics = window.statistics.compute()
            yield out
        window.close()

    def _read(self, tensordict: TensorDictBase, allow_empty: bool) -> _Rows:
        advantages = tensordict.get(
            self.tensor_keys.advantage, None, as_padded_tensor=True, padding_side="left"
        )
        if advantages is None:
            raise DataError(
                f"no {self.tensor_keys.advantage!r} in the tensordict; there are "
                f"{sorted(map(str, tensordict.keys(True, True)))}. set_keys(advantage=...) names "
                "another key."
            )
        _, distribution, _, mask = self._log_weight(tensordict, adv_shape=advantages.shape[:-1])
        current = tensordict.get("_cur_log_prob")
        old = tensordict.get(
            self.tensor_keys.sample_log_prob, as_padded_tensor=True, padding_side="left"
        )
        # NaN is torchrl's padding; an infinity on a loss token is an error that RatioBatch names
        mask = mask | (distribution.mask & torch.isinf(old))
        for key in self._loss_mask_keys():
            valid = tensordict.get(key, default=None)
            if valid is not None:
                mask = mask & self._expand_loss_mask(valid, mask)
        batch = RatioBatch.from_padded(
            current,
            old,
            _as_rows(self.tensor_keys.advantage, advantages, mask.shape),
            mask,
            labels=self._labels(tensordict, len(mask)),
            rollout_log_probs=old,
            allow_empty=allow_empty,
        )
        return _Rows(batch, current, mask, distribution)

    def _regularisers(
        self, tensordict: TensorDictBase, rows: _Rows, mu: Tensor
    ) -> dict[str, Tensor]:
        """Entropy bonus and KL terms, each ``sum_i mu_i`` of something."""
        out = {}
        if self.entropy_bonus:
            entropy = self._get_entropy(rows.distribution, rows.mask.shape).squeeze(-1)[rows.mask]
            out["entropy"] = _mean(entropy.detach())
            out["loss_entropy"] = -self.entropy_coeff * (mu * entropy).sum()
        for name, key, coefficient in (
            ("ref", self.tensor_keys.ref_log_probs, self.kl_to_ref_coeff),
            ("inference", self.tensor_keys.sample_log_prob, self.kl_to_inference_coeff),
        ):
            if coefficient:
                gap = self._gap(tensordict, key, rows)
                k3 = torch.expm1(gap) - gap
                out[f"kl_to_{name}"] = _mean(k3.detach())
                out[f"loss_kl_to_{name}"] = coefficient * (mu * k3).sum()
        return out

    def _labels(self, tensordict: TensorDictBase, rows: int) -> dict[str, Any]:
        found = {}
        names = [key for key in list(tensordict.keys()) if isinstance(key, str)]
        for stratum, aliases in STRATUM_ALIASES.items():
            key = getattr(self.tensor_keys, stratum)
            if key is None:
                key = find_column(names, aliases, f"the {stratum}")
            elif tensordict.get(key, None) is None:
                raise DataError(
                    f"no {key!r} for the {stratum} in the tensordict; there are {sorted(names)}"
                )
            if key is not None:
                found[stratum] = _ids(key, tensordict.get(key), rows)
        return found

    def _gap(self, tensordict: TensorDictBase, key: NestedKey, rows: _Rows) -> Tensor:
        """``log pi_other - log pi_theta`` of the loss tokens."""
        other = tensordict.get(
            key,
            None,
            as_padded_tensor=True,
            padding_side=self.ref_log_prob_padding_side,
            padding_value=self.ref_log_prob_padding_value,
        )
        if other is None:
            raise DataError(f"no {key!r} in the tensordict, which the KL term compares with")
        if other.ndim == rows.current.ndim + 1:
            other = other.squeeze(-1)
        if other.shape != rows.current.shape:
            raise ShapeError(
                f"{key!r} has shape {tuple(other.shape)}, but the log-probs have "
                f"{tuple(rows.current.shape)}; check the padding of what was stored"
            )
        return other[rows.mask] - rows.current[rows.mask]


def _as_rows(key: NestedKey, values: Tensor, shape: torch.Size) -> Tensor:
    """``[B, T]``, from that, ``[B]``, ``[B, 1]``, or one of them with a last dimension of 1."""
    rows = values.squeeze(-1) if values.ndim == 3 else values
    rows = rows[:, None] if rows.ndim == 1 else rows
    if rows.ndim != 2 or len(rows) != shape[0] or rows.shape[1] not in (1, shape[1]):
        raise ShapeError(
            f"{key!r} has shape {tuple(values.shape)}, but the log-probs have {tuple(shape)}; pass "
            "[B, 1, 1] or [B, T, 1]"
        )
    return rows.expand(shape)


def _ids(key: NestedKey, values: Any, rows: int) -> Any:
    """One id a row, as a tensor or a list of strings."""
    if not isinstance(values, Tensor):
        listed = values.tolist() if hasattr(values, "tolist") else values
        return [listed] * rows if isinstance(listed, str) else listed
    by_row = values.reshape(rows, -1)
    if bool((by_row != by_row[:, :1]).any()):
        row = int((by_row != by_row[:, :1]).any(1).nonzero()[0])
        raise DataError(
            f"{key!r} holds {sorted(set(by_row[row].tolist()))[:4]} in row {row}; it takes one id "
            "a row"
        )
    return by_row[:, 0]


def _mean(values: Tensor) -> Tensor:
    """Mean over the loss tokens, 0 where there are none; float32."""
    return values.float().sum() / max(values.numel(), 1)


def _effective_share(log_ratio: Tensor) -> Tensor:
    """Effective sample size of the token ratios, as a share of their number; float32."""
    if not log_ratio.numel():
        return log_ratio.new_zeros((), dtype=torch.float32)
    size = 2 * log_ratio.logsumexp(0) - (2 * log_ratio).logsumexp(0)
    return (size.exp() / log_ratio.numel()).float()
