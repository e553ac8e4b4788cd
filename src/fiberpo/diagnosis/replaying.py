"""Replay: what each of several objectives would have done on recorded batches.

Counterfactual for one step only. The tokens, their advantages and the current log-probs of every
step are those that the recorded run produced. Under another objective the first step would have
moved the policy elsewhere, and all later steps would hold other tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import DataError, ObjectiveError
from ..objective import Objective
from .changes import Found, Largest, most_changed
from .pool import WORKERS, in_order
from .tally import MASS, REGIMES, Array, Gradient, Tally, Tokens

CAVEAT = (
    "Counterfactual for one step only: every step is replayed on the tokens, advantages and "
    "log-probs that the recorded run had; under another objective later steps would differ."
)


@dataclass(frozen=True, eq=False)
class Outcome:
    """What one objective would have done.

    Attributes:
        name: as given to `replay`.
        objective: the objective.
        total: sums over the recording.
        steps: step -> its gradient shares, and ``"gated"``: stratum -> share of its contexts whose
            gate leaves PASS.
        trajectories, tokens: those that change most, largest first (`changes.most_changed`).
    """

    name: str
    objective: Objective
    total: Tally
    steps: Mapping[int, dict[str, Any]]
    trajectories: list[dict[str, Any]]
    tokens: list[dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Replay:
    """Several objectives on the steps of one recording.

    Attributes:
        outcomes: one an objective, in the order given.
        gram: ``[objectives, objectives]`` inner products of the coefficient vectors.
        step_cosines: step -> cosines of that step alone, as `cosine`.
        tokens, trajectories: how many were replayed.
        fresh: steps on which every log ratio is 0 (the first update after a rollout).
        idle: stratum -> steps in which its gate cannot act (every context an only child).
        problems: what the recording says was skipped.
    """

    outcomes: tuple[Outcome, ...]
    gram: Array
    step_cosines: Mapping[int, list[list[float | None]]]
    tokens: int
    trajectories: int
    fresh: frozenset[int]
    idle: Mapping[str, int]
    problems: tuple[str, ...]

    @property
    def steps(self) -> list[int]:
        """The steps, in the order of the recording."""
        return list(self.step_cosines)

    def cosine(self, step: int | None = None) -> list[list[float | None]]:
        """Cosines between the coefficient vectors, over all steps laid end to end or in one.

        None where an objective has no gradient.
        """
        return _cosines(self.gram) if step is None else self.step_cosines[step]

    def as_dict(self) -> dict[str, Any]:
        """All of it in plain types, ready for JSON."""
        return {
            "caveat": CAVEAT,
            "tokens": self.tokens,
            "trajectories": self.trajectories,
            "steps": len(self.steps),
            "first_updates": len(self.fresh),
            "idle_steps": dict(self.idle),
            "problems": list(self.problems),
            "objectives": [
                {
                    "name": outcome.name,
                    "objective": str(outcome.objective),
                    "gradient": gradient_shares(outcome.total.mass),
                    "left_out": left_out(outcome.total),
                    "gradient_by_domain": {
                        d: gradient_shares(m) for d, m in outcome.total.mass_by_domain.items()
                    },
                    "regimes": regime_rows(outcome.total),
                    "trajectories": outcome.trajectories,
                    "tokens": outcome.tokens,
                }
                for outcome in self.outcomes
            ],
            "cosine": self.cosine(),
            "series": [self._point(step) for step in self.steps],
        }

    def _point(self, step: int) -> dict[str, Any]:
        """One step, for figures."""
        return {
            "step": step,
            "first_update": step in self.fresh,
            "cosine": self.cosine(step),
            "objectives": {outcome.name: outcome.steps[step] for outcome in self.outcomes},
        }


def _cosines(gram: Array) -> list[list[float | None]]:
    size = np.sqrt(np.diag(gram))
    with np.errstate(invalid="ignore", divide="ignore"):
        found = gram / np.outer(size, size)
    return [[float(x) if math.isfinite(x) else None for x in row] for row in found]


def gradient_shares(mass: Array) -> dict[str, float | None]:
    """Kept, removed, reversed and amplified as shares of the ungated gradient mass.

    >>> gradient_shares(np.array([4.0, 3.0, 0.5, 0.25]))
    {'kept': 0.75, 'removed': 0.25, 'reversed': 0.125, 'amplified': 0.0625}
    """
    whole = float(mass[0])
    if not whole or not math.isfinite(whole):
        return dict.fromkeys(("kept", "removed", *MASS[2:]))
    shares = dict(zip(MASS, (mass / whole).tolist(), strict=True))
    return {
        "kept": shares["kept"], "removed": 1 - shares["kept"],
        "reversed": shares["reversed"], "amplified": shares["amplified"],
    }  # fmt: skip


def left_out(tally: Tally) -> float:
    """Share of the tokens that have an advantage and are dropped by a mask or a stop."""
    lost, tokens = tally.left_out.tolist()
    return lost / tokens if tokens else 0.0


def regime_rows(tally: Tally) -> list[dict[str, Any]]:
    """Rows ``stratum, domain (or None for all), contexts, pass, rollback, zeroed`` (fractions)."""
    found = []
    for stratum, counts in tally.regimes.items():
        found.append(_regime_row(stratum, None, counts))
        for (name, domain), inside in tally.regimes_by_domain.items():
            if name == stratum and inside.sum():
                found.append(_regime_row(stratum, domain, inside))
    return found


def _regime_row(stratum: str, domain: str | None, counts: Array) -> dict[str, Any]:
    number = float(counts.sum())
    words = ("pass", "rollback", "zeroed")
    shares = dict(zip(words, (counts[list(REGIMES)] / number).tolist(), strict=True))
    return {"stratum": stratum, "domain": domain, "contexts": int(number), **shares}


def replay(
    recording: Any,
    objectives: Mapping[str, Objective],
    *,
    steps: list[int] | None = None,
    progress: Callable[[int], None] | None = None,
    workers: int = WORKERS,
) -> Replay:
    """Evaluate objectives on every recorded step, in bounded memory.

    Args:
        recording: `fiberpo.recording.open_recording` of a path.
        objectives: name -> objective; the same tokens are given to each.
        steps: only these.
        progress: called with the number of tokens done so far.
        workers: threads; each works on one step at a time.

    Raises:
        ObjectiveError: without an objective.
        StrataError: where an objective needs labels that the recording lacks.
        DataError: where nothing is recorded.
    """
    if not objectives:
        raise ObjectiveError("no objective to replay; name at least one")
    work = _Work(objectives)
    for done in in_order(recording.iterate(steps), work.evaluate, workers):
        work.collect(done)
        if progress is not None:
            progress(work.tokens)
    if not work.tokens:
        raise DataError("the recording holds no step with a loss token: there is nothing to replay")
    return work.result(tuple(recording.problems))


@dataclass(frozen=True, eq=False)
class _Done:
    """What is left of a step."""

    step: int
    tokens: int
    trajectories: int
    fresh: bool
    idle: tuple[str, ...]
    gram: Array
    tallies: dict[str, Tally]
    found: dict[str, Found]


class _Work:
    """Sums so far."""

    def __init__(self, objectives: Mapping[str, Objective]) -> None:
        self.objectives = dict(objectives)
        self.tokens = self.trajectories = 0
        self.total = {name: Tally.empty() for name in objectives}
        self.steps: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in objectives}
        self.cosines: dict[int, list[list[float | None]]] = {}
        self.gram = np.zeros((len(self.objectives),) * 2)
        self.step: int | None = None
        self.inside: dict[str, Tally] = {}
        self.inside_gram = self.gram
        self.idle: dict[str, int] = {}
        self.moved: set[int] = set()
        self.rows = {name: Largest() for name in objectives}
        self.single = {name: Largest() for name in objectives}

    def evaluate(self, item: Any) -> _Done:
        """In a worker: everything that is done with the tokens themselves."""
        tokens = Tokens.of(item.batch)
        tallies, found, vectors, idle = {}, {}, [], []
        for name, objective in self.objectives.items():
            gradient = Gradient.of(objective, tokens)
            tallies[name] = gradient.tally(tokens)
            bars = self.rows[name].bar, self.single[name].bar  # they only rise
            found[name] = most_changed(item, tokens, gradient, bars)
            vectors.append(gradient.coefficients)
            strata = gradient.surrogate.gated.strata
            idle += [] if strata is None else [n for n in strata.idle if n not in idle]
        gram = np.array([[a @ b for b in vectors] for a in vectors])
        return _Done(
            item.step, len(item.batch), item.batch.rows, tokens.fresh, tuple(idle), gram,
            tallies, found,
        )  # fmt: skip

    def collect(self, done: _Done) -> None:
        """In the calling thread, in the order of the recording."""
        self.tokens += done.tokens
        self.trajectories += done.trajectories
        if not done.fresh:
            self.moved.add(done.step)
        for name in done.idle:
            self.idle[name] = self.idle.get(name, 0) + 1
        if done.step != self.step:
            self._close_step()
            self.step, self.inside_gram = done.step, np.zeros_like(self.gram)
            self.inside = {name: Tally.empty() for name in self.objectives}
        self.inside_gram = self.inside_gram + done.gram
        self.gram = self.gram + done.gram
        for name in self.objectives:
            self.total[name].add(done.tallies[name])
            self.inside[name].add(done.tallies[name])
            self.rows[name].offer(done.found[name].trajectories)
            self.single[name].offer(done.found[name].tokens)

    def _close_step(self) -> None:
        """Keep plain numbers of a step: arrays of other threads would pin their freed memory."""
        if self.step is None:
            return
        self.cosines[self.step] = _cosines(self.inside_gram)
        for name, tally in self.inside.items():
            gated = {
                row["stratum"]: row["rollback"] + row["zeroed"]
                for row in regime_rows(tally)
                if row["domain"] is None
            }
            self.steps[name][self.step] = {**gradient_shares(tally.mass), "gated": gated}

    def result(self, problems: tuple[str, ...]) -> Replay:
        """Everything, once all steps are in."""
        self._close_step()
        outcomes = tuple(
            Outcome(
                name, objective, self.total[name], self.steps[name],
                self.rows[name].ranked(), self.single[name].ranked(),
            )
            for name, objective in self.objectives.items()
        )  # fmt: skip
        fresh = frozenset(set(self.cosines) - self.moved)
        return Replay(
            outcomes,
            self.gram,
            self.cosines,
            self.tokens,
            self.trajectories,
            fresh,
            self.idle,
            problems,
        )
