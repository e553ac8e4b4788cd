"""The two-phase optimizer step: the exact gradient however a batch is cut.

An objective with group or domain gates couples all micro-batches and ranks of an optimizer step.
It depends on the parameters only through the log-probs, so the graph is split there:

1. log-probs of the whole window without graph -> sums per context, two all-reduces of numbers per
   *context* -> one coefficient ``c_i = dJ / d log_probs_i`` a token;
2. per micro-batch, backward of ``-(c * log_probs).sum()``.

This is the gradient of the objective on the undivided batch, for any gate, any cut, any number of
ranks. The forward of phase 1 is left out where it is not needed: in the first update after a
rollout (every log ratio is 0), and where no context reaches beyond one micro-batch.

    >>> import torch, fiberpo
    >>> from fiberpo import RatioBatch, exact
    >>> old = torch.tensor([-1.0, -1.0]), torch.tensor([-1.0])
    >>> parts = [RatioBatch.from_packed(o, o, torch.ones(1), [len(o)], labels={"group": ["p"]})
    ...          for o in old]                            # one prompt group in two micro-batches
    >>> policy = [torch.tensor([-0.7, -1.1], requires_grad=True),
    ...           torch.tensor([-0.9], requires_grad=True)]
    >>> objective = fiberpo.recipes.fiberpo_domain(
    ...     {"group": (0.12, 0.05), "trajectory": (0.12, 0.05)}, epsilon=0.04)
    >>> window = exact.Stepper(objective).backward(parts, lambda k: policy[k])
    >>> window.route.value, [x.grad is not None for x in policy]
    ('two-phase', [True, True])
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from .batch import RatioBatch
from .collective import LOCAL, Collective, Match
from .errors import ObjectiveError
from .masks import Renormalised
from .memory import Memory
from .objective import Objective, Plan, Surrogate
from .statistics import Statistics
from .strata import Strata


class Route(enum.Enum):
    """How a window gets its coefficients."""

    FRESH = "fresh"  # first update after a rollout: phase 1 is known, every log ratio is 0
    CONTAINED = "contained"  # no context reaches beyond its micro-batch: one pass is exact
    SINGLE = "single"  # one micro-batch a rank: its own forward is phase 1
    TWO_PHASE = "two-phase"  # an extra forward of the whole window without graph
    LOCAL = "local"  # aggregates of each micro-batch alone: not exact
    STALE = "stale"  # aggregates from the last window that held the context: not exact


class Stepper:
    """Optimizer steps of one training run.

    Args:
        objective: what to optimise.
        collective: the ranks that share an optimizer step.
        mode: ``"exact"``; or, cheaper and wrong by as much as they report, ``"local"`` (each
            micro-batch takes its own aggregates for those of the window) and ``"stale"`` (contexts
            take the sums of the last window of this rollout that held them, others are local).
        check_every: in the modes ``"local"`` and ``"stale"``, compare with the exact coefficients
            in every so many windows (an extra forward each); 0 never does.
        gradients: what the engine does with the gradients of the ranks: ``"averaged"`` (DDP, FSDP,
            accelerate, DeepSpeed) or ``"summed"``.

    Raises:
        ObjectiveError: for an unknown mode.
    """

    def __init__(
        self,
        objective: Objective,
        *,
        collective: Collective = LOCAL,
        mode: str = "exact",
        check_every: int = 0,
        gradients: str = "averaged",
    ) -> None:
        if mode not in ("exact", "local", "stale"):
            raise ObjectiveError(f"mode is {mode!r}; it is 'exact', 'local' or 'stale'")
        if gradients not in ("averaged", "summed"):
            raise ObjectiveError(f"gradients is {gradients!r}; it is 'averaged' or 'summed'")
        if check_every < 0:
            raise ObjectiveError(f"check_every is {check_every}; it is 0 (never) or more")
        self.objective = objective
        self.collective = collective
        self.mode = mode
        self.check_every = check_every
        self.scale = collective.size if gradients == "averaged" else 1
        self.memory = Memory(collective)
        self.windows = 0

    def open(self, parts: Sequence[RatioBatch], *, fresh: bool = False) -> Window:
        """Begin an optimizer step; all ranks call together.

        Args:
            parts: this rank's micro-batches, at least one (possibly empty: ``allow_empty=True``).
                Their ``log_probs`` are not looked at; a ``token_divergence`` is that of the policy
                before this step. Label ids mean the same on every rank.
            fresh: nothing has been updated since these tokens were sampled and scored.

        Raises:
            StrataError: if labels do not nest over all parts and ranks.
        """
        if fresh:
            self.memory.clear()
        window = Window(self, parts, fresh)
        self.windows += 1
        return window

    def backward(
        self,
        parts: Sequence[RatioBatch],
        forward: Callable[[int], Tensor],
        *,
        fresh: bool = False,
    ) -> Window:
        """A whole optimizer step up to the gradients.

        Args:
            parts: as in `open`.
            forward: ``k -> log_probs`` of micro-batch ``k`` under the current policy, ``[N_k]``, or
                ``[B, T]`` where the part came from `RatioBatch.from_padded`. Called once a part,
                and once more before, without graph, where `Window.needs_forward`.
            fresh: as in `open`.
        """
        window = self.open(parts, fresh=fresh)
        if window.needs_forward:
            with torch.no_grad():
                window.fill([forward(k) for k in range(len(parts))])
        for k in range(len(parts)):
            window.loss(k, forward(k)).backward()
        window.close()
        return window


class Window:
    """One optimizer step: `fill` where `needs_forward`, `loss` for every part, `close`.

    Attributes:
        parts: the micro-batches of this rank.
        route: where the coefficients come from.
        needs_forward: whether `fill` must be called with the log-probs of all parts.
        weights: per part, ``mu_i`` of its tokens, over the denominators of the whole step.
        surrogates: the objective on this rank's window, once it is known: one for the whole, or, in
            routes that go part by part, one for each part so far.
        phase_difference: largest ``|log_probs - log_probs of phase 1|`` on this rank so far; what
            a forward pass that is not deterministic (dropout, other kernels) shows.
    """

    def __init__(self, stepper: Stepper, parts: Sequence[RatioBatch], fresh: bool) -> None:
        self.stepper = stepper
        self.parts = list(parts)
        self._sizes = [len(part) for part in parts]
        whole = RatioBatch.concatenate(parts)
        self._whole = whole
        self._plan = stepper.objective.plan(whole, collective=stepper.collective)
        shares = self._plan.shares
        by_row = len(shares) == whole.rows
        self._shares = list(shares.split([p.rows for p in parts] if by_row else self._sizes))
        self.weights = [part.spread(share) for part, share in zip(parts, self._shares, strict=True)]
        self.route = self._route(fresh)
        every = stepper.check_every
        self._checks = self._approximate and every > 0 and stepper.windows % every == 0
        self.needs_forward = self.route is Route.TWO_PHASE or self._checks
        self.surrogates: list[Surrogate] = []
        self.phase_difference = torch.zeros((), dtype=torch.float64, device=whole.device)
        self._phase_one: list[Tensor] = []
        self._gradients: list[Tensor] = []
        self._values: dict[int, Tensor] = {}
        self._whole_values: list[Tensor] = []
        self._error = torch.zeros(2, dtype=torch.float64, device=whole.device)
        if self.route is Route.FRESH:
            self._evaluate(whole.old_log_probs)

    @property
    def device(self) -> torch.device:  # noqa: D102
        return self._whole.device

    @property
    def _approximate(self) -> bool:
        return self.route in (Route.LOCAL, Route.STALE)

    def _route(self, fresh: bool) -> Route:
        shared = self._shared()
        coupled = isinstance(self.stepper.objective.mask, Renormalised)  # by its denominator
        if not shared and not coupled:  # the same on every rank
            return Route.CONTAINED
        inside = not coupled and self._inside(shared)
        contained, single = self._everywhere(inside, len(self.parts) == 1)
        if contained:
            return Route.CONTAINED
        if self.stepper.mode != "exact":
            if "trajectory" in self._whole.labels:
                raise ObjectiveError(
                    f"mode={self.stepper.mode!r} needs whole trajectories, but the batch joins "
                    'pieces by labels["trajectory"]; use mode="exact"'
                )
            return Route.LOCAL if self.stepper.mode == "local" else Route.STALE
        if fresh:
            return Route.FRESH
        return Route.SINGLE if single else Route.TWO_PHASE

    def _shared(self) -> list[tuple[Strata, Match]]:
        """The contexts that the objective looks at and that may reach beyond one part."""
        whole, layouts = self._plan.batch, [self._plan.layout, *self._plan.stops]
        found = [x for at in layouts if at is not None for x in (at.contexts, at.states)]
        pairs = [(x.strata, x.match) for x in found if x is not None]
        if self.stepper.objective.by_trajectory and "trajectory" in whole.labels:
            pairs.append((whole.strata(["trajectory"]), whole.pieces))
        return [(strata, match) for strata, match in pairs if any(strata.shared)]

    def _inside(self, shared: list[tuple[Strata, Match]]) -> bool:
        """Whether on this rank none of them does."""
        sizes = torch.tensor(self._sizes)
        part = torch.repeat_interleave(torch.arange(len(sizes)), sizes).to(self.device)
        inside = True
        for strata, match in shared:
            low, high = strata.range(part)
            inside = inside and not match.width and not bool((low < high).any())
        return inside

    def _everywhere(self, *conditions: bool) -> list[bool]:
        """Whether each holds on all ranks; one reduction."""
        flags = torch.tensor(conditions, dtype=torch.float64).to(self._whole.device)
        collective = self.stepper.collective
        return (collective.total(flags) == collective.size).tolist()

    def fill(self, log_probs: Sequence[Tensor]) -> None:
        """Phase 1: log-probs of all parts under the current policy; their graph is not used.

        Raises:
            ObjectiveError: if the window needs none, or their number is not that of the parts.
        """
        if not self.needs_forward:
            raise ObjectiveError(
                f"this window takes the route {self.route.value!r} and needs no log-probs before "
                "the backward passes; call fill only where window.needs_forward"
            )
        if len(log_probs) != len(self.parts):
            raise ObjectiveError(f"{len(log_probs)} log-probs for {len(self.parts)} parts")
        pairs = zip(self.parts, log_probs, strict=True)
        self._phase_one = [part.with_log_probs(x.detach()).log_probs for part, x in pairs]
        self._evaluate(torch.cat(self._phase_one))

    def _evaluate(self, log_probs: Tensor) -> None:
        whole = self._whole.with_log_probs(log_probs, self._whole.token_divergence)
        surrogate = self.stepper.objective(whole, plan=self._plan)
        self._gradients = list(surrogate.gradient.split(self._sizes))
        self._whole_values = list(surrogate.loss_of_rows().split([p.rows for p in self.parts]))
        if not self._approximate:
            self.surrogates = [surrogate]

    def coefficients(self, k: int) -> Float[Tensor, " N_k"] | None:
        """``dJ / d log_probs`` of part ``k`` where that is known before its forward, else None.

        It is in the routes ``fresh`` and ``two-phase`` (after `fill`); `fiberpo.linear_logprob`
        then takes three matrix products in place of four.
        """
        known = self._gradients and self.route in (Route.FRESH, Route.TWO_PHASE)
        return -self._gradients[k].double() if known else None

    def loss(self, k: int, log_probs: Float[Tensor, "..."]) -> Float[Tensor, ""]:
        """What to call ``backward`` on for part ``k``.

        Its gradient is that of the objective with respect to this part's tokens (times the number
        of ranks, where the engine averages); its value is this part's share of the loss (times the
        same), so that the mean over ranks of the sum over parts is the loss.

        Args:
            k: number of the part; each once.
            log_probs: with graph, ``[N_k]`` or ``[B, T]`` as the part was made.

        Raises:
            ObjectiveError: if `fill` was left out, or ``k`` comes twice.
        """
        if k in self._values or not 0 <= k < len(self.parts):
            raise ObjectiveError(
                f"part {k} of a window of {len(self.parts)} parts"
                + (" has had its loss already; open a new window" if k in self._values else "")
            )
        part = self.parts[k].with_log_probs(log_probs, self.parts[k].token_divergence)
        if self.needs_forward and not self._phase_one:
            raise ObjectiveError(
                "this window needs the log-probs of all its parts first: window.fill(...) without "
                "graph, then window.loss(k, ...)"
            )
        gradient, value = self._part(k, part)
        if self._phase_one and len(part):
            gap = (part.log_probs.detach() - self._phase_one[k]).abs().max().double()
            self.phase_difference = torch.maximum(self.phase_difference, gap)
        self._values[k] = value.detach().double()
        scale = self.stepper.scale
        pulled = (gradient.to(part.log_probs.dtype) * part.log_probs).sum() * scale
        return pulled - pulled.detach() + (self._values[k] * scale).to(pulled.dtype)

    def _part(self, k: int, part: RatioBatch) -> tuple[Tensor, Tensor]:
        """Gradient and share of the loss of one part."""
        detached = part.with_log_probs(part.log_probs.detach(), part.token_divergence)
        if self.route is Route.SINGLE and not self._gradients:
            self._evaluate(detached.log_probs)
        if self.route in (Route.FRESH, Route.SINGLE, Route.TWO_PHASE):
            return self._gradients[k], self._whole_values[k].sum()
        surrogate = self.stepper.objective(detached, plan=self._part_plan(k, detached))
        self.surrogates.append(surrogate)
        if self._checks:
            exact = self._gradients[k].double()
            apart = (surrogate.gradient - exact).square().sum()
            self._error += torch.stack([apart, exact.square().sum()])
        return surrogate.gradient, surrogate.loss.detach()

    def _part_plan(self, k: int, part: RatioBatch) -> Plan:
        """Of one part by itself, with the weights that it has in the whole step."""
        collective = self.stepper.memory.open_part() if self.route is Route.STALE else LOCAL
        return self.stepper.objective.plan(part, collective=collective, mu=self._shares[k])

    def close(self) -> None:
        """End the step; all ranks call together (the mode ``"stale"`` exchanges its sums here)."""
        if self.route is Route.STALE:
            self.stepper.memory.turn_over()

    @property
    def statistics(self) -> Statistics:
        """`Statistics` of this rank's tokens; those of all ranks merge to the whole's."""
        if not self.surrogates:
            raise ObjectiveError("nothing has been evaluated in this window yet")
        return functools.reduce(Statistics.merge, (s.statistics for s in self.surrogates))

    def value(self) -> Float[Tensor, ""]:
        """The loss of the whole optimizer step, over all ranks (which call together); float64."""
        here = sum(self._values.values(), torch.zeros_like(self.phase_difference))
        return self.stepper.collective.total(here)

    def split_error(self) -> Float[Tensor, ""] | None:
        """``|c - c_exact| / |c_exact|`` over all ranks, where this window checks it."""
        if not self._checks:
            return None
        apart, size = self.stepper.collective.total(self._error)
        return (apart / size).sqrt() if bool(size > 0) else apart.sqrt()


def by_trajectory(
    objective: Objective, batch: RatioBatch
) -> Callable[[Tensor, slice], Float[Tensor, " n"]]:
    """Coefficients of whole trajectories as soon as their own log-probs are known.

    For `fiberpo.linear_logprob` in the mode ``"resident"``: an objective whose Jacobian is
    block-diagonal over trajectories (FiberPO with trajectory gates alone, GSPO, GRPO, PPO) needs
    nothing from the others but their number, which is in the weights.

    Args:
        objective: without a context that can hold several trajectories.
        batch: all trajectories; its ``log_probs`` are not looked at.

    Returns:
        ``(log_probs [n], slice of the packed tokens) -> dJ / d log_probs [n]``, float64.

    Raises:
        ObjectiveError: if trajectories are coupled, naming by what.
    """
    window = Window(Stepper(objective), [batch], fresh=False)
    levels = [zip(x.names, x.shared, strict=True) for x, _ in window._shared()]
    coupled = [name for level in levels for name, shared in level if shared]
    if isinstance(objective.mask, Renormalised):
        coupled.append("the denominator of Renormalised")
    if coupled:
        raise ObjectiveError(
            f"{objective.name} couples trajectories by {coupled}: the coefficients of one are not "
            "known before the log-probs of the others. Take the two phases of an exact step, or "
            "mode='two-phase' of linear_logprob"
        )
    place = {start: row for row, start in enumerate([0, *batch.lengths.cumsum(0).tolist()])}

    def coefficients(log_probs: Tensor, where: slice) -> Tensor:
        if where.start not in place or where.stop not in place:
            raise ObjectiveError(
                f"tokens {where.start} to {where.stop} are not whole trajectories of the batch; "
                "pass lengths=batch.lengths"
            )
        rows = torch.arange(place[where.start], place[where.stop], device=batch.device)
        part = batch.select(rows).with_log_probs(log_probs)
        plan = objective.plan(part, mu=window.weights[0][where])
        return objective(part, plan=plan).coefficients

    return coefficients
