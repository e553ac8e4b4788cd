"""Checks for your own tests: does a loss survive being cut into micro-batches and ranks?

    >>> import torch
    >>> from fiberpo import RatioBatch, recipes
    >>> batch = RatioBatch.from_packed(
    ...     torch.tensor([-1.0, -0.8, -1.3]), -torch.ones(3), torch.tensor([1.0, -1.0]), [2, 1])
    >>> assert_partition_invariant(recipes.grpo(), batch)

A loss of your own is a function of a part and of the counts of the whole. The known bug:

    >>> def token_mean(part, counts):
    ...     return -(part.log_ratio.exp() * part.advantages).sum() / len(part)
    >>> try:
    ...     assert_partition_invariant(token_mean, batch)
    ... except PartitionError as error:
    ...     print(str(error)[:38], "...", str(error)[-87:])
    token 0 (trajectory 0, position 0) has ... loss divides by a count of the part; divide by the
    counts of the whole optimizer batch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from .batch import RatioBatch
from .collective import Ranks
from .errors import ObjectiveError
from .exact import Stepper
from .labels import Label
from .objective import Objective
from .statistics import Statistics
from .weights import Denominators

Loss = Callable[[RatioBatch, Denominators], Tensor]
T = TypeVar("T")
R = TypeVar("R")


class PartitionError(AssertionError):
    """A loss, its gradient or its metrics depend on how a batch is cut."""


class _Meeting:
    """Where the threads of a simulation hand values to each other.

    A reduction is done once, by the thread that comes last, so that it costs O(ranks) and not
    O(ranks^2).
    """

    def __init__(self, size: int, timeout: float) -> None:
        self.size = size
        self.slots: list[tuple[str, Tensor]] = [("", torch.empty(0))] * size
        self.answer: Any = None
        self.barrier = threading.Barrier(size, self._combine, timeout)

    def exchange(self, rank: int, kind: str, values: Tensor) -> Any:
        """What all ranks' ``values`` come to; the same object on every rank."""
        self.slots[rank] = (kind, values.clone())
        self.barrier.wait()
        # nobody comes to the next reduction before everybody has left this one with its answer
        return self.answer

    def _combine(self) -> None:
        parts, kind = [values for _, values in self.slots], self.slots[0][0]
        calls = [k if k == "gather" else f"{k} of {list(v.shape)}" for k, v in self.slots]
        if len(set(calls)) > 1:
            raise ObjectiveError(
                f"the ranks do not make the same calls: {dict(enumerate(calls))} (by rank). Every "
                "rank needs the same labels and the same settings, an empty one too."
            )
        if kind == "gather":
            self.answer = parts
        elif kind == "largest":
            self.answer = torch.stack(parts).amax(0)
        else:
            whole = parts[0].clone()
            for part in parts[1:]:
                whole += part
            self.answer = whole


@dataclass(eq=False)
class SimulatedRanks(Ranks):
    """One of several threads that stand for ranks (see `simulate_ranks`).

    Attributes:
        rank: its number.
        calls: reductions and gathers so far.
        sent: bytes that this rank has handed in so far.
    """

    meeting: _Meeting
    rank: int
    calls: int = field(default=0)
    sent: int = field(default=0)

    @property
    def size(self) -> int:
        """Number of threads."""
        return self.meeting.size

    def _exchange(self, kind: str, values: Tensor) -> Any:
        self.calls += 1
        self.sent += values.numel() * values.element_size()
        return self.meeting.exchange(self.rank, kind, values)

    def total(self, values: Tensor) -> Tensor:
        """Sum in rank order."""
        whole: Tensor = self._exchange("total", values)
        return whole.clone()

    def largest(self, values: Tensor) -> Tensor:
        """Maximum."""
        whole: Tensor = self._exchange("largest", values)
        return whole.clone()

    def gather(self, rows: Tensor) -> list[Tensor]:
        """Everything, in rank order."""
        return list(self._exchange("gather", rows))


def simulate_ranks(
    function: Callable[[T, SimulatedRanks], R], inputs: Sequence[T], *, timeout: float = 60.0
) -> list[R]:
    """``function(inputs[rank], collective)`` on one thread a rank; the results in rank order.

    An exception on any rank ends the others and is raised here.

    Args:
        function: what a rank does.
        inputs: one a rank.
        timeout: seconds that a rank waits for the others in one reduction.

    Raises:
        ObjectiveError: if the ranks do not make the same calls (over a network they would hang).
    """
    meeting = _Meeting(len(inputs), timeout)
    ranks = [SimulatedRanks(meeting, rank) for rank in range(len(inputs))]
    results: dict[int, R] = {}
    errors: list[BaseException] = []

    def work(rank: int) -> None:
        try:
            results[rank] = function(inputs[rank], ranks[rank])
        except threading.BrokenBarrierError as error:
            errors.append(error)
        except BaseException as error:
            errors.insert(0, error)
            meeting.barrier.abort()

    threads = [threading.Thread(target=work, args=(r,)) for r in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors and isinstance(errors[0], threading.BrokenBarrierError):
        raise ObjectiveError(
            f"a rank waited {timeout:g} s in a reduction that another rank did not come to; calls "
            f"by rank: {[rank.calls for rank in ranks]}. Every rank makes the same calls in the "
            "same order, one without tokens too (allow_empty=True)."
        ) from errors[0]
    if errors:
        raise errors[0]
    return [results[r] for r in range(len(inputs))]


def assert_partition_invariant(
    objective_or_loss: Objective | Loss,
    batch: RatioBatch,
    *,
    trials: int = 8,
    ranks: int = 3,
    parts: int = 4,
    split_trajectories: bool = False,
    reduction: str = "sum",
    rtol: float = 1e-6,
    seed: int = 0,
) -> None:
    """Cut a batch at random into micro-batches on simulated ranks, and compare with the whole.

    For an `Objective`, every rank takes the steps of `exact.Stepper` on its micro-batches, and
    loss, coefficients and metrics must be those of one call on the whole batch. For a function,
    the losses of all parts are put together as a trainer does, and loss and gradient must be those
    of one call on the whole.

    Args:
        objective_or_loss: an `Objective`, or ``loss(part, counts)`` of a `RatioBatch` and the
            `Denominators` of the whole optimizer batch.
        batch: at least two trajectories, so that there is something to cut.
        trials: random cuts to try; 1 to ``ranks`` ranks with 1 to ``parts`` micro-batches each,
            some of which may be empty.
        split_trajectories: cut inside trajectories too (context parallelism); objectives only.
        reduction: what the trainer does with the losses of the parts: ``"sum"``, or ``"mean"``
            over the parts that hold a token.
        rtol: relative tolerance, measured against the largest coefficient.
        seed: of the cuts.

    Raises:
        PartitionError: names the first token whose coefficient differs, both values and the cut.
        ObjectiveError: if the batch has nothing to cut, or for arguments that contradict.
    """
    if reduction not in ("sum", "mean"):
        raise ObjectiveError(f"reduction is {reduction!r}; it is 'sum' or 'mean'")
    is_objective = isinstance(objective_or_loss, Objective)
    if split_trajectories and not is_objective:
        raise ObjectiveError("split_trajectories=True needs an Objective, not a function")
    if batch.rows < 2 and not (split_trajectories and len(batch) > 1):
        raise ObjectiveError(f"the batch has {batch.rows} trajectory: nothing to cut")
    # in float64, so that a difference is one of the method and not of rounding
    batch = replace(
        batch,
        log_probs=batch.log_probs.detach().double(),
        old_log_probs=batch.old_log_probs.double(),
    )
    generator = torch.Generator().manual_seed(seed)
    whole = _whole(objective_or_loss, batch)
    for trial in range(trials):
        cut = _Cut.draw(batch, ranks, parts, split_trajectories, generator)
        if isinstance(objective_or_loss, Objective):
            found = _stepped(objective_or_loss, cut)
        else:
            found = _called(objective_or_loss, cut, Denominators.of(batch), reduction)
        _compare(batch, cut, whole, found, rtol, f"cut {trial} of seed {seed}")


@dataclass(frozen=True, eq=False)
class _Result:
    loss: float
    coefficients: Tensor
    metrics: dict[str, float]


@dataclass(frozen=True, eq=False)
class _Cut:
    """Parts of a batch: per rank, its micro-batches and the positions of their tokens."""

    batch: RatioBatch
    parts: list[list[RatioBatch]]
    tokens: list[list[Tensor]]

    @classmethod
    def draw(
        cls, batch: RatioBatch, ranks: int, parts: int, split: bool, generator: torch.Generator
    ) -> _Cut:
        """A random cut."""

        def below(n: int, *shape: int) -> Tensor:
            return torch.randint(n, shape or (1,), generator=generator).to(batch.device)

        batch = _in_pieces(batch, below) if split else batch
        ranks, parts = 1 + int(below(ranks)), 1 + int(below(parts))
        if ranks == parts == 1:
            parts = 2
        place = below(ranks * parts, batch.rows)
        pieces, tokens = [], []
        for rank in range(ranks):
            mine = [(place == rank * parts + k).nonzero().flatten() for k in range(parts)]
            pieces.append([batch.select(rows) for rows in mine])
            tokens.append([torch.isin(batch.row, rows).nonzero().flatten() for rows in mine])
        return cls(batch, pieces, tokens)

    def gather(self, values: list[list[Tensor]]) -> Tensor:
        """``[N]`` in the order of the batch from values of the parts."""
        out = torch.empty(len(self.batch), dtype=torch.float64, device=self.batch.device)
        for mine, at in zip(values, self.tokens, strict=True):
            for value, index in zip(mine, at, strict=True):
                out[index] = value.double()
        return out

    def __str__(self) -> str:
        sizes = [[len(part) for part in mine] for mine in self.parts]
        return f"{len(sizes)} rank(s) with micro-batches of {sizes} tokens"


def _in_pieces(batch: RatioBatch, below: Callable[..., Tensor]) -> RatioBatch:
    """The same tokens with about every second row cut in two; pieces carry their trajectory."""
    lengths, rows = [], []
    for row, length in enumerate(batch.lengths.tolist()):
        at = int(below(length)) if int(below(2)) else 0
        pieces = [n for n in (at, length - at) if n]
        lengths += pieces
        rows += [row] * len(pieces)
    index = torch.tensor(rows, device=batch.device)
    labels = {n: v if v.per_token else v.select(index) for n, v in batch.labels.items()}
    if "trajectory" not in labels:
        ids = torch.arange(batch.rows, device=batch.device)
        labels["trajectory"] = Label("trajectory", index, ids, per_token=False)
    return replace(
        batch, lengths=torch.tensor(lengths, device=batch.device), labels=labels, mask=None,
        given_advantages=batch.advantages, _strata={},
    )  # fmt: skip


def _whole(objective_or_loss: Objective | Loss, batch: RatioBatch) -> _Result:
    if isinstance(objective_or_loss, Objective):
        out = objective_or_loss(batch)
        return _Result(float(out.loss), out.coefficients, out.metrics())
    loss, gradient = _differentiate(objective_or_loss, batch, Denominators.of(batch))
    return _Result(loss, -gradient, {})


def _differentiate(loss: Loss, part: RatioBatch, counts: Denominators) -> tuple[float, Tensor]:
    log_probs = part.log_probs.detach().clone().requires_grad_()
    value = loss(part.with_log_probs(log_probs, part.token_divergence), counts)
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise ObjectiveError(f"the loss returned {value!r}; it must be a scalar tensor")
    (gradient,) = torch.autograd.grad(value, log_probs, allow_unused=True)
    return float(value.detach()), torch.zeros_like(log_probs) if gradient is None else gradient


def _called(loss: Loss, cut: _Cut, counts: Denominators, reduction: str) -> _Result:
    filled = sum(bool(len(part)) for mine in cut.parts for part in mine)
    share = 1.0 / filled if reduction == "mean" else 1.0
    total, coefficients = 0.0, []
    for mine in cut.parts:
        coefficients.append([torch.empty(0, device=cut.batch.device)] * len(mine))
        for k, part in enumerate(mine):
            if len(part):
                value, gradient = _differentiate(loss, part, counts)
                total += share * value
                coefficients[-1][k] = -share * gradient
    return _Result(total, cut.gather(coefficients), {})


def _stepped(objective: Objective, cut: _Cut) -> _Result:
    def work(parts: list[RatioBatch], ranks: SimulatedRanks) -> tuple[float, list[Tensor], Any]:
        leaves = [part.log_probs.detach().clone().requires_grad_() for part in parts]
        stepper = Stepper(objective, collective=ranks, gradients="summed")
        window = stepper.backward(parts, lambda k: leaves[k])
        gradients = [-x.grad if x.grad is not None else torch.zeros_like(x) for x in leaves]
        return float(window.value()), gradients, window.statistics

    outs = simulate_ranks(work, cut.parts)
    statistics: Statistics = outs[0][2]
    for _, _, more in outs[1:]:
        statistics = statistics.merge(more)
    coefficients = cut.gather([gradients for _, gradients, _ in outs])
    return _Result(outs[0][0], coefficients, statistics.compute())


def _compare(
    batch: RatioBatch, cut: _Cut, whole: _Result, found: _Result, rtol: float, where: str
) -> None:
    size = float(whole.coefficients.abs().max()) or 1.0
    apart = (found.coefficients - whole.coefficients).abs() > rtol * size
    if bool(apart.any()):
        token = int(apart.nonzero()[0])
        row = int(batch.row[token])
        position = token - int(batch.lengths[:row].sum())
        raise PartitionError(
            f"token {token} (trajectory {row}, position {position}) has the coefficient "
            f"{float(whole.coefficients[token]):.6g} in the whole batch and "
            f"{float(found.coefficients[token]):.6g} in {cut} ({where}); "
            f"{int(apart.sum())} of {len(batch)} tokens differ.{_hint(cut, whole, found)}"
        )
    if abs(found.loss - whole.loss) > rtol * max(abs(whole.loss), size):
        raise PartitionError(
            f"the loss is {whole.loss:.8g} on the whole batch and {found.loss:.8g} in {cut} "
            f"({where}), with equal gradients"
        )
    for name, value in whole.metrics.items():
        other = found.metrics.get(name)
        if other is None or abs(other - value) > rtol * max(abs(value), 1e-3):
            raise PartitionError(f"{name} is {value:.8g} on the whole batch, {other} in {cut}")


def _hint(cut: _Cut, whole: _Result, found: _Result) -> str:
    """What the pattern of the differences says."""
    factors = []
    for at in (index for mine in cut.tokens for index in mine):
        expected, got = whole.coefficients[at], found.coefficients[at]
        used = expected.abs() > 1e-9 * whole.coefficients.abs().max()
        if not bool(used.any()):
            continue
        ratio = (got / expected)[used]
        if bool((ratio - ratio[0]).abs().max() > 1e-6 * ratio[0].abs()):
            return (
                " The factor differs within a micro-batch: its tokens are coupled to other parts."
            )
        factors.append(float(ratio[0]))
    listed = ", ".join(f"{f:.3g}" for f in factors[:6])
    return (
        f" Every token of a micro-batch is off by one factor ({listed}): the loss divides by a "
        "count of the part; divide by the counts of the whole optimizer batch."
    )
