"""`RatioBatch`: the sampled tokens of one optimizer batch, packed.

Padding exists only here: `RatioBatch.from_padded` removes it (masked positions are dropped, never
multiplied by zero, and may hold anything) and `RatioBatch.to_padded` puts it back.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from . import cutting, inputs
from . import strata as strata_module
from .collective import LOCAL, Collective, Match
from .divergence import TokenDivergence, check_divergence
from .errors import EmptyBatchError, ShapeError, StrataError
from .inputs import Input
from .labels import GLOBAL_TOKEN_LEVEL, Label, chain, ordered
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
        given_advantages: ``[rows]`` where constant on a row, or ``[N]``; see `advantages`.
        lengths: ``[rows]`` loss tokens of each row, all >= 1. A row is a trajectory, or one piece
            of a trajectory where ``trajectory`` is among the labels.
        labels: encoded labels, coarse to fine.
        rollout_log_probs: ``[N]`` log-probs of the engine that sampled, or None.
        token_divergence: ``[N]`` KL of that policy to the current one (`divergence`), or None.
        dropped: rows without a loss token that were left out.
        mask: ``[B, T]`` where the tokens came from, or None.
        pieces, whole_lengths: which of the trajectories other ranks hold pieces of, and the token
            counts of the whole ones (see `joined`).

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
    given_advantages: Float[Tensor, "..."]
    lengths: Int[Tensor, " rows"]
    labels: Mapping[str, Label] = field(default_factory=dict)
    rollout_log_probs: Float[Tensor, " N"] | None = None
    token_divergence: TokenDivergence | None = None
    dropped: int = 0
    mask: Tensor | None = None
    pieces: Match = field(default=LOCAL, repr=False)
    whole_lengths: Tensor | None = field(default=None, repr=False)
    _strata: dict[tuple[str, ...], Strata] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return self.log_probs.shape[0]

    @property
    def rows(self) -> int:
        """Number of rows that have a loss token."""
        return self.lengths.shape[0]

    @property
    def trajectories(self) -> int:
        """Number of trajectories that have a loss token here."""
        pieces = self.labels.get("trajectory")
        return self.rows if pieces is None else pieces.count

    @property
    def device(self) -> torch.device:  # noqa: D102
        return self.log_probs.device

    @property
    def log_ratio(self) -> Float[Tensor, " N"]:
        """``l_i = log pi_theta - log pi_old`` of every token, in nats; differentiable."""
        return self.log_probs - self.old_log_probs

    @cached_property
    def row(self) -> Int[Tensor, " N"]:
        """Row of every token."""
        rows = torch.arange(self.rows, device=self.device)
        return torch.repeat_interleave(rows, self.lengths, output_size=len(self))

    @cached_property
    def advantages(self) -> Float[Tensor, " N"]:
        """Advantage of every token."""
        return self.spread(self.given_advantages)

    def spread(self, values: Float[Tensor, "..."]) -> Float[Tensor, " N"]:
        """Of every token, from one value a row or one a token."""
        return values[self.row] if len(values) == self.rows else values

    @property
    def by_row(self) -> bool:
        """Whether the advantages are constant on each row."""
        return len(self.given_advantages) == len(self.lengths)

    @cached_property
    def trajectory(self) -> Int[Tensor, " N"]:
        """Trajectory of every token."""
        pieces = self.labels.get("trajectory")
        return self.row if pieces is None else pieces.codes[self.row]

    def of_rows(self, values: Shaped[Tensor, " trajectories"]) -> Shaped[Tensor, " rows"]:
        """``values`` of the trajectory of each row."""
        pieces = self.labels.get("trajectory")
        return values if pieces is None else values[pieces.codes]

    @cached_property
    def by_trajectory(self) -> Segments:
        """Tokens by their trajectory."""
        return Segments(self.trajectory, self.trajectories)

    def per_trajectory(self, values: Float[Tensor, " N"]) -> Float[Tensor, " trajectories"]:
        """Sum over each whole trajectory, its pieces on other ranks included (see `joined`)."""
        return self.pieces.merge(self.by_trajectory.sum(values)[None])[0]

    @property
    def trajectory_lengths(self) -> Float[Tensor, " trajectories"]:
        """``T_tau``: loss tokens of each whole trajectory, float64 (see `joined`)."""
        if "trajectory" not in self.labels:
            return self.lengths.double()
        if self.whole_lengths is not None:
            return self.whole_lengths
        ones = torch.ones(len(self), dtype=torch.float64, device=self.device)
        return self.by_trajectory.sum(ones)

    @property
    def trajectory_share(self) -> Float[Tensor, ""]:
        """Trajectories held here, a piece counted by its share of the tokens; float64."""
        if "trajectory" not in self.labels:
            return torch.tensor(float(self.rows), dtype=torch.float64, device=self.device)
        return (1.0 / self.trajectory_lengths[self.trajectory]).sum()

    def joined(self, collective: Collective) -> RatioBatch:
        """This batch, knowing the pieces of its trajectories that other ranks hold.

        Nothing is exchanged where ``trajectory`` is not among the labels. An objective does this
        by itself.
        """
        if "trajectory" not in self.labels or collective.size == 1:
            return self
        found = replace(self, pieces=collective.match(self.strata(["trajectory"])))
        return replace(found, whole_lengths=found.pieces.merge(self.trajectory_lengths[None])[0])

    def joined_like(self, other: RatioBatch) -> RatioBatch:
        """This batch with what `joined` found for the same tokens before."""
        if other.pieces is self.pieces:
            return self
        return replace(self, pieces=other.pieces, whole_lengths=other.whole_lengths)

    def with_log_probs(
        self, log_probs: Tensor, token_divergence: TokenDivergence | None = None
    ) -> RatioBatch:
        """The same tokens under another current policy; nothing is encoded again.

        Args:
            log_probs: ``[N]``, or ``[B, T]`` where the batch came from `from_padded`.
            token_divergence: ``[N]``, of this policy; that of the policy before is not kept.

        Raises:
            ShapeError, NonFiniteError: as `from_packed`.
        """
        if self.mask is not None and isinstance(log_probs, Tensor) and log_probs.ndim == 2:
            if log_probs.shape != self.mask.shape:
                raise ShapeError(
                    f"log_probs has shape {tuple(log_probs.shape)}, but the batch was made from "
                    f"{tuple(self.mask.shape)}"
                )
            log_probs = log_probs[self.mask]
        inputs.check_like("log_probs", log_probs, self.old_log_probs)
        inputs.check_finite({"log_probs": log_probs}, self.lengths)
        found = check_divergence(token_divergence, log_probs, self.lengths)
        log_probs = inputs.widen("log_probs", log_probs)
        return replace(self, log_probs=log_probs, token_divergence=found)

    def select(self, rows: Int[Tensor, " k"]) -> RatioBatch:
        """The tokens of some rows, in the order given (a packed batch: `to_padded` is gone)."""
        return RatioBatch(**cutting.select(self, rows))

    @classmethod
    def concatenate(cls, parts: Sequence[RatioBatch]) -> RatioBatch:
        """The tokens of several batches with the same labels, one after the other.

        Raises:
            EmptyBatchError: for no parts.
            StrataError: if labels differ in kind, or do not nest over the whole.
        """
        whole = cls(**cutting.concatenate(parts))
        whole._check_nesting()
        return whole

    def _check_nesting(self) -> None:
        nested = [n for n in chain(self.labels) if n not in GLOBAL_TOKEN_LEVEL]
        if len(nested) > 1:
            self.strata(nested)  # refuses labels that do not nest

    def strata(self, names: Sequence[str]) -> Strata:
        """The forest of the named strata, coarse to fine in the batch's own order (cached).

        Raises:
            StrataError: unknown or repeated names, or labels that do not nest.
        """
        if len(set(names)) != len(names):
            raise StrataError(f"the strata {tuple(names)} name a stratum twice; name each one once")
        position = {name: i for i, name in enumerate(chain(self.labels))}
        wanted = tuple(sorted(names, key=lambda n: position.get(n, -1)))
        if wanted not in self._strata:
            self._strata[wanted] = strata_module.build(wanted, dict(self.labels), self.lengths)
        return self._strata[wanted]

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
        token_divergence: Input = None,
        token_labels: Collection[str] = (),
        allow_empty: bool = False,
    ) -> RatioBatch:
        """A batch from tokens laid end to end.

        Args:
            log_probs: ``[N]`` current policy, nats; the gradient flows into this tensor.
            old_log_probs: ``[N]`` anchor of the ratio, nats.
            advantages: ``[N]``, or ``[rows]`` where constant on a row.
            lengths: loss tokens of each row, in order; their sum is N. A row of length 0 is
                dropped and counted in ``dropped``.
            labels: per stratum, one id a row (``domain``, ``group``, any name; coarse to fine) or
                one id a token (``turn`` and other strata below the trajectory, ``state``).
                ``domain``, ``group``, ``trajectory``, ``turn`` are put in this order by themselves.
                A row is one trajectory; rows with the same ``trajectory`` id are pieces of one,
                here or on another rank (context parallelism, rollouts of several rows).
            rollout_log_probs: ``[N]`` log-probs of the engine that sampled, nats.
            token_divergence: ``[N]`` from `divergence.full_divergence` or `top_k_divergence`.
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
            log_probs, old_log_probs, advantages, lengths, encoded, rollout_log_probs,
            check_divergence(token_divergence, log_probs, lengths), allow_empty,
        )  # fmt: skip

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
        token_divergence: Input = None,
        allow_empty: bool = False,
    ) -> RatioBatch:
        """A batch from rows of equal width; one row is one trajectory.

        Args:
            log_probs, old_log_probs, rollout_log_probs: ``[B, T]``, nats. Masked positions may hold
                anything, NaN and infinities included: they are removed.
            token_divergence: ``[B, T]``, likewise.
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
            inputs.padded_advantages(advantages, shape, mask),
            mask.sum(1),
            {
                name: inputs.padded_label(name, ids, shape, mask)
                for name, ids in inputs.as_labels(labels).items()
            },
            None if rollout_log_probs is None else rollout_log_probs.to(device)[mask],
            check_divergence(token_divergence, log_probs, mask.sum(1), mask),
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
        token_divergence: TokenDivergence | None,
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
            given_advantages=inputs.as_float(advantages.detach().to(log_probs.device)),
            lengths=lengths[keep],
            labels=ordered({n: v if v.per_token else v.select(keep) for n, v in labels.items()}),
            rollout_log_probs=rollout_log_probs,
            token_divergence=token_divergence,
            dropped=int((~keep).sum()),
        )
        inputs.check_finite(
            {
                "log_probs": batch.log_probs,
                "old_log_probs": batch.old_log_probs,
                **({} if torch.isfinite(advantages).all() else {"advantages": batch.advantages}),
                "rollout_log_probs": batch.rollout_log_probs,
            },
            lengths,
        )
        if not len(batch) and not allow_empty:
            raise EmptyBatchError(
                f"none of the {len(lengths)} trajectories has a loss token. Check the mask, or "
                "pass allow_empty=True on a rank that may hold nothing."
            )
        inputs.check_pieces(batch.labels.get("trajectory"))
        batch._check_nesting()
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
