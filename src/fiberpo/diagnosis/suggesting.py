"""Suggested budgets: quantiles of the drifts that a recorded run showed.

The drift of a context does not depend on any budget (it is taken from ungated aggregates), so the
share of contexts beyond a number can be read off a recording, and an objective with these budgets
gates that share of the same recording. The budgets of gates bound the *residual* drift of a
context, those of stops (`recipes.fiberstop`) its own drift.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml

from ..batch import RatioBatch
from ..budgets import OTHERS, check_positive
from ..errors import DataError
from ..gates import AggregateGate
from ..gating import GatedRatio, open_gates
from ..labels import GLOBAL_TOKEN_LEVEL, chain
from ..objective import Objective
from .pool import WORKERS, in_order
from .quantiles import Array, Sample, budget_at, clip_at, gated_share
from .tally import FRESH, context_domains, domains_of

LEVELS = {"p50": 0.5, "p90": 0.9, "p99": 0.99}

FEW = 10
"""Fewer gated contexts than this are too few for a quantile."""


@dataclass(frozen=True)
class DriftRow:
    """Drifts of the contexts of a stratum (in one domain), and the budget that follows.

    Attributes:
        stratum: ``"token"`` for single tokens.
        domain: None for all domains together.
        contexts: how many were seen.
        acting: how many of them can have a residual (are not the only child of their parent).
        positive, negative: p50, p90, p99 of the size of the residual drift, nats per token.
        budget: the pair that is suggested; None where there is none.
        activity: share of the contexts that it gates.
    """

    stratum: str
    domain: str | None
    contexts: int
    acting: int
    positive: dict[str, float]
    negative: dict[str, float]
    budget: tuple[float, float] | None
    activity: float | None


@dataclass(frozen=True)
class Suggestion:
    """Budgets at a target activity, with the numbers behind them.

    Attributes:
        activity, token_activity: what was asked for.
        rows: drifts and budgets; those with a domain for the table, or for ``per_domain``.
        budgets: stratum -> pair, or -> context name -> pair for domains.
        epsilon: of the token gate, nats; None where no token drifts.
        steps, excluded: steps used, and steps left out since every log ratio is 0 in them.
        notes: what limits the suggestion.
        pessimistic: as in the recorded objective.
        stops: whether the budgets are for `recipes.fiberstop`.
    """

    activity: float
    token_activity: float
    rows: tuple[DriftRow, ...]
    budgets: dict[str, Any]
    epsilon: float | None
    steps: int
    excluded: int
    notes: tuple[str, ...]
    pessimistic: bool = False
    stops: bool = False

    @property
    def recipe(self) -> str:
        """Name of the recipe that the budgets are for."""
        if self.stops:
            return "fiberstop"
        return "fiberpo" if set(self.budgets) == {"trajectory"} else "fiberpo_domain"

    @property
    def parameters(self) -> dict[str, Any]:
        """What to pass to the recipe."""
        found: dict[str, Any] = {"budgets": self.budgets}
        if self.recipe == "fiberpo":
            found = {"budget": self.budgets["trajectory"]}
        if self.epsilon is not None:
            found["epsilon"] = self.epsilon
        return {**found, "pessimistic": True} if self.pessimistic else found

    def yaml(self) -> str:
        """The lines of a ``config.yaml`` of ``fiberpo train``."""
        values = {"objective": self.recipe, "objective_kwargs": _lists(self.parameters)}
        return yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=100)

    def flags(self) -> str:
        """The options of ``fiberpo train``."""
        found = [f"--objective {self.recipe}"]
        for stratum, budget in self.budgets.items():
            named = budget if isinstance(budget, dict) else {"": budget}
            for name, pair in named.items():
                place = f"{stratum}:{name}" if name else stratum
                text = f"{place}={pair[0]!r},{pair[1]!r}"
                found.append(f"--budget {_quoted(text)}")
        if self.epsilon is not None:
            found.append(f"--epsilon {self.epsilon!r}")
        return " ".join([*found, *(["--pessimistic"] if self.pessimistic else [])])

    def python(self) -> str:
        """The call that makes the objective (its arguments are TRL's ``objective_kwargs``)."""
        inside = ", ".join(f"{k}={v!r}" for k, v in self.parameters.items())
        return f"fiberpo.recipes.{self.recipe}({inside})"

    def as_dict(self) -> dict[str, Any]:
        """All of it in plain types, ready for JSON."""
        return {
            "activity": self.activity,
            "token_activity": self.token_activity,
            "objective": self.recipe,
            "objective_kwargs": _lists(self.parameters),
            "steps": self.steps,
            "excluded_steps": self.excluded,
            "drift": "own" if self.stops else "residual",
            "drifts": [_lists(vars(row)) for row in self.rows],
            "notes": list(self.notes),
        }


def _lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _lists(v) for k, v in value.items()}
    return [_lists(v) for v in value] if isinstance(value, (list, tuple)) else value


def _quoted(text: str) -> str:
    return text if all(c.isalnum() or c in "=:,._-" for c in text) else f"'{text}'"


def suggest(
    recording: Any,
    *,
    activity: float = 0.1,
    token_activity: float | None = None,
    strata: Sequence[str] | None = None,
    stops: bool | None = None,
    per_domain: bool = False,
    progress: Callable[[int], None] | None = None,
    workers: int = WORKERS,
) -> Suggestion:
    """Budgets per stratum at which a share of the contexts is gated, or out of its budget.

    Args:
        recording: `fiberpo.recording.open_recording` of a path.
        activity: share of the contexts of every stratum whose gate is to leave PASS, in (0, 1).
        token_activity: share of the tokens beyond epsilon; ``activity`` by default.
        strata: those that are to have a budget, ``trajectory`` among them; by default those of the
            recorded objective, and where it has none, all that the recording has labels for.
        stops: True for budgets of `recipes.fiberstop`, False for those of gates; by default those
            of gates where the recorded objective has gates with budgets, else those of stops.
        per_domain: one pair for each domain at the stratum ``domain``.
        progress: called with the number of tokens done so far.
        workers: threads.

    Raises:
        BudgetError: for an activity outside (0, 1).
        StrataError: for a stratum that is not in the recording.
        DataError: where no step has a log ratio other than 0.
    """
    token_activity = activity if token_activity is None else token_activity
    for name, value in (("activity", activity), ("token_activity", token_activity)):
        check_positive(name, value, below=1.0)
    work = _Work(strata, recording.objective(), stops)
    for done in in_order(recording.iterate(), work.measure, workers):
        work.collect(*done)
        if progress is not None:
            progress(work.tokens)
    if not work.steps and not work.fresh:
        raise DataError(f"{recording.path} has no loss token, so there is no drift to measure")
    if not work.steps:
        raise DataError(
            f"every log ratio is 0 in all {len(work.fresh)} recorded steps, so there is no drift "
            "to take a quantile of: every rollout was used for one optimizer step. Record a run "
            "with several updates per rollout"
        )
    return work.result(activity, token_activity, per_domain, recording.manifest.settings)


class _Work:
    """Drifts so far."""

    def __init__(
        self, strata: Sequence[str] | None, objective: Objective | None, stops: bool | None
    ) -> None:
        self.objective = objective
        gates = [] if objective is None else [*objective.gate_map.gates.values()]
        budgeted = all(isinstance(gate, AggregateGate) for gate in gates)
        self.stops = not (gates and budgeted) if stops is None else stops
        self.names: tuple[str, ...] | None = None if strata is None else tuple(strata)
        if strata is None and objective is not None and objective.strata and budgeted:
            self.names = objective.strata
        self.samples: dict[str, Sample] = {}
        self.domains: dict[str, int] = {}
        self.fresh: set[int] = set()
        self.steps: set[int] = set()
        self.tokens = 0

    def measure(self, item: Any) -> tuple[int, int, GatedRatio | None, RatioBatch]:
        """In a worker: drifts of one step with open gates."""
        batch: RatioBatch = item.batch
        size = len(batch)
        if float(batch.log_ratio.detach().abs().max()) <= FRESH:
            return item.step, size, None, batch
        names = self.names
        if names is None:
            names = tuple(n for n in chain(batch.labels) if n not in GLOBAL_TOKEN_LEVEL)
        return item.step, size, open_gates(names)(batch), batch

    def collect(self, step: int, size: int, gated: GatedRatio | None, batch: RatioBatch) -> None:
        """In the calling thread."""
        self.tokens += size
        if gated is None or gated.strata is None or gated.residual is None:
            self.fresh.add(step)
            return
        self.steps.add(step)
        strata, contexts = gated.strata, gated.layout.contexts
        assert contexts is not None
        names, codes = domains_of(batch)
        table = np.array([self.domains.setdefault(n, len(self.domains)) for n in names] + [-1])
        where = table[context_domains(batch, strata, codes)]
        count = contexts.count[None]
        acting = (count != strata.of_parent(count))[0].cpu().numpy() | self.stops
        bounded = gated.mean if self.stops else gated.residual
        assert bounded is not None
        drift = bounded.cpu().numpy()
        for k, name in enumerate(strata.names):
            here = strata.level(k)
            self._sample(name).add(drift[:, here], where[here], int(acting[here].sum()))
        token = (gated.first.value if self.stops else gated.token_drift).detach().cpu().numpy()
        rows = table[codes].repeat(batch.lengths.cpu().numpy())
        self._sample("token").add(token, rows, token.shape[1])

    def _sample(self, name: str) -> Sample:
        return self.samples.setdefault(name, Sample())

    def result(
        self, activity: float, token_activity: float, per_domain: bool, settings: Any
    ) -> Suggestion:
        """Quantiles and budgets of all strata."""
        notes: list[str] = []
        rows: list[DriftRow] = []
        budgets: dict[str, Any] = {}
        for name, sample in self.samples.items():
            if name == "token":
                continue
            whole = _row(name, None, sample, *sample.values(), activity)
            parts = self._by_domain(name, sample, activity) if len(self.domains) > 1 else []
            rows += [whole, *parts]
            notes += _notes(whole, activity)
            if whole.budget is None:
                continue
            budgets[name] = whole.budget
            named = {r.domain: r.budget for r in parts if r.budget is not None}
            if per_domain and name == "domain" and named:
                budgets[name] = {**named, OTHERS: whole.budget}
                notes += [n for r in parts for n in _notes(r, activity)]
        token = _row("token", None, self.samples["token"], *self.samples["token"].values(),
                     token_activity)  # fmt: skip
        rows.append(token)
        notes += self._settings_notes(settings, per_domain)
        if not budgets:
            raise DataError("no stratum has a drift that a budget could bound: " + " ".join(notes))
        pessimistic = self.objective is not None and self.objective.gate_map.pessimistic
        return Suggestion(
            activity, token_activity, tuple(rows), budgets,
            None if token.budget is None else token.budget[0],
            len(self.steps), len(self.fresh - self.steps), tuple(notes),
            pessimistic and not self.stops, self.stops,
        )  # fmt: skip

    def _by_domain(self, name: str, sample: Sample, activity: float) -> list[DriftRow]:
        drift, where = sample.values()
        found = []
        for domain, code in self.domains.items():
            mine = where == code
            if mine.any():
                found.append(_row(name, domain, sample, drift[:, mine], where[mine], activity))
        return found

    def _settings_notes(self, settings: Any, per_domain: bool) -> list[str]:
        notes = []
        excluded = len(self.fresh - self.steps)
        if excluded:
            notes.append(
                f"in {excluded} of {excluded + len(self.steps)} steps every log ratio is 0 (the "
                "first update after a rollout, a learning rate that is still 0); they were left "
                "out, since nothing is gated or stopped there, whatever the budget."
            )
        mode = settings.get("split_mode", "exact")
        if mode != "exact":
            notes.append(
                f"split_mode = {mode!r}: in the run the contexts above the trajectory were taken "
                "per micro-batch, so that what has a budget there saw other drifts. Use "
                "split_mode='exact' with budgets for groups and domains."
            )
        if per_domain and "domain" not in self.samples:
            notes.append(
                "per_domain has no effect: the stratum domain takes no part. Only the contexts of "
                "domain have names that stay the same from step to step."
            )
        return notes


def _row(
    name: str, domain: str | None, sample: Sample, drift: Array, where: Any, activity: float
) -> DriftRow:
    at = [dict(zip(LEVELS, np.quantile(d, list(LEVELS.values())).tolist(), strict=True))
          for d in drift]  # fmt: skip
    whole = domain is None
    seen = sample.seen if whole else drift.shape[1]
    pair: tuple[float, float] | None
    if name == "token":
        half = clip_at(drift, activity)
        pair = None if half is None else (half, half)
    else:
        pair = budget_at(drift, activity)
        moving = drift[:, drift.max(0) > 0]
        if pair is None and moving.shape[1]:
            pair = budget_at(moving, activity)
    return DriftRow(
        name, domain, seen, sample.acting if whole else int((drift.max(0) > 0).sum()), at[0], at[1],
        pair, None if pair is None else gated_share(drift, pair),
    )  # fmt: skip


def _notes(row: DriftRow, activity: float) -> list[str]:
    place = row.stratum if row.domain is None else f"{row.stratum} in {row.domain}"
    if not row.acting or row.budget is None:
        return [
            f"{place}: its gate cannot act, every one of its {row.contexts} contexts is the only "
            "child of its parent or does not move (one prompt group a domain, one answer a "
            "group, micro-batches recorded one by one). No budget is suggested."
        ]
    found = []
    if row.acting < row.contexts * activity:
        found.append(
            f"{place}: only {row.acting} of {row.contexts} contexts can act (the others are the "
            f"only child of their parent), so {activity:.0%} cannot be reached; the budget is at "
            f"that quantile of those that can, and gates {row.activity or 0:.1%} of all."
        )
    gated = round(activity * row.contexts)
    if gated < FEW:
        found.append(
            f"{place}: {row.contexts} contexts put {gated} beyond the budget, too few for a "
            "quantile; record more steps."
        )
    return found
