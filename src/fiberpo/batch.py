"""`RatioBatch`: the sampled tokens of one optimizer batch, packed.

Padding exists only here: `RatioBatch.from_padded` removes it (masked positions are dropped, never
multiplied by zero, and may hold anything) and `RatioBatch.to_padded` puts it back.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from . import inputs
from . import strata as strata_module
from .errors import EmptyBatchError, ShapeError, StrataError
from .inputs import Input
from .labels import GLOBAL_TOKEN_LEVEL, Label, order_strata
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
        log_probs: Input,
        old_log_probs: Input,
        advantages: Input,
        lengths: Input,
        *,
        labels: Input = None,
        rollout_log_probs: Input = None,
        token_labels: Collection[str] = (),
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
            token_labels: names of your own labels below the trajectory. Needed only where a batch
                may have as many tokens as trajectories (a rank that holds none, answers of one
                token), since otherwise the length tells.
            allow_empty: accept a batch without a single token (a rank that holds none).

        Raises:
            ShapeError, NonFiniteError, StrataError, EmptyBatchError: all `FiberPOError`, each
                quoting the offending value.
        """
        inputs.check_vector("log_probs", log_probs)
        device, tokens = log_probs.device, log_probs.shape[0]
        lengths = inputs.as_lengths(lengths, tokens, device)
        advantages = inputs.packed_advantages(advantages, tokens, lengths)
        encoded = {
            name: inputs.packed_label(name, ids, len(lengths), tokens, device, token_labels)
            for name, ids in inputs.as_labels(labels).items()
        }
        return cls._checked(
            log_probs, old_log_probs, advantages, lengths, encoded, rollout_log_probs, allow_empty
        )

    @classmethod
    def from_padded(
        cls,
        log_probs: Input,
        old_log_probs: Input,
        advantages: Input,
        mask: Input,
        *,
        labels: Input = None,
        rollout_log_probs: Input = None,
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
        shape = inputs.check_padded(log_probs, old_log_probs, mask, rollout_log_probs)
        device = log_probs.device
        mask = inputs.as_mask(mask).to(device)
        batch = cls._checked(
            log_probs[mask],
            old_log_probs.to(device)[mask],
            inputs.padded_advantages(advantages, shape).to(device)[mask],
            mask.sum(1),
            {
                name: inputs.padded_label(name, ids, shape, mask)
                for name, ids in inputs.as_labels(labels).items()
            },
            None if rollout_log_probs is None else rollout_log_probs.to(device)[mask],
            allow_empty,
        )
        return replace(batch, mask=mask)

    @classmethod
    def _checked(
        cls,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        lengths: Tensor,
        labels: Mapping[str, Label],
        rollout_log_probs: Tensor | None,
        allow_empty: bool,
    ) -> RatioBatch:
        """Drop empty trajectories, widen dtypes, and check what only the whole can show."""
        inputs.check_like("old_log_probs", old_log_probs, log_probs)
        if rollout_log_probs is not None:
            inputs.check_like("rollout_log_probs", rollout_log_probs, log_probs)
            rollout_log_probs = inputs.widen("rollout_log_probs", rollout_log_probs.detach())
        keep = lengths > 0
        batch = cls(
            log_probs=inputs.widen("log_probs", log_probs),
            old_log_probs=inputs.widen("old_log_probs", old_log_probs.detach()),
            advantages=inputs.as_float(advantages.detach().to(log_probs.device)),
            lengths=lengths[keep],
            labels=_ordered({n: v if v.per_token else v.select(keep) for n, v in labels.items()}),
            rollout_log_probs=rollout_log_probs,
            dropped=int((~keep).sum()),
        )
        inputs.check_finite(
            {
                "log_probs": batch.log_probs,
                "old_log_probs": batch.old_log_probs,
                "advantages": batch.advantages,
                "rollout_log_probs": batch.rollout_log_probs,
            },
            lengths,
        )
        if not len(batch) and not allow_empty:
            raise EmptyBatchError(
                f"none of the {len(lengths)} trajectories has a loss token. Check the mask, or "
                "pass allow_empty=True on a rank that may hold nothing."
            )
        nested = [n for n in batch._chain() if n not in GLOBAL_TOKEN_LEVEL]
        if len(nested) > 1:
            batch.strata(nested)  # refuses labels that do not nest
        return batch

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


def _ordered(labels: dict[str, Label]) -> dict[str, Label]:
    above = [n for n, label in labels.items() if not label.per_token]
    below = [n for n, label in labels.items() if label.per_token]
    return {name: labels[name] for name in order_strata([*above, *below])}
