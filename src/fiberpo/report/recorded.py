"""What the report takes from a recording: curves, the most gated trajectories, points of the map.

A recording may hold far more than a page can: steps are read evenly spaced up to `MOST_READ`
tokens. Kept are at most `MOST_GATED` trajectories (`PER_STEP` of one step) and `MOST_OTHERS` more,
of `MOST_TOKENS` tokens each, and `MOST_POINTS` points a stratum. The page says so where that left
something out.
"""

from __future__ import annotations

import heapq
import math
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from torch import Tensor

from ..batch import RatioBatch
from ..charts import SignedLog
from ..errors import FiberPOError, FiberPOWarning
from ..gates import AggregateGate, LogClip
from ..gating import GatedRatio
from ..objective import Objective, Surrogate
from ..recipes import fiberpo
from ..recording import Recording
from ..statistics import Statistics
from .strata import strata_table

MOST_READ = 5_000_000
MOST_STEPS = 300
MOST_GATED, MOST_OTHERS, PER_STEP = 20, 12, 3
MOST_TOKENS = 1500
MOST_POINTS = 2500

Row = dict[str, Any]


@dataclass
class Recorded:
    """What was taken from a recording.

    Attributes:
        objective: what gated the tokens, as text.
        settings: strata, budgets, epsilon, rollback counts of the FiberPO form shown.
        own: whether that form is the recording's own objective.
        metrics: one record per step, with the names of ``metrics.jsonl``.
        strata: rows of the strata table, over the steps read.
        gated, others: trajectories, the most gated first; then some taken at random.
        points: per stratum, residual drifts ``[plus, minus]`` of contexts.
        notes: what was left out and why.
    """

    objective: str
    settings: dict[str, Any]
    own: bool
    steps_read: int
    steps: int
    metrics: list[Row] = field(default_factory=list)
    strata: list[Row] = field(default_factory=list)
    gated: list[Row] = field(default_factory=list)
    others: list[Row] = field(default_factory=list)
    points: list[list[list[float | None]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_recorded(
    recording: Recording,
    *,
    curves: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Recorded:
    """Stream a recording and keep what the page shows of it.

    Args:
        recording: where from.
        curves: whether metrics and strata are needed too; a run's own files hold them already.
        progress: called with the tokens read so far, and about how many there are to read.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FiberPOWarning)  # the doctor says the same, as findings
        return _Reader(recording).read(curves, progress or _silent)


def _silent(done: int, total: int) -> None:
    pass


def is_fiberpo(objective: Objective) -> bool:
    """Whether an objective has the form that the explorer redraws."""
    gates = objective.gate_map
    return (
        isinstance(gates.chart, SignedLog)
        and isinstance(gates.token, LogClip)
        and bool(gates.gates)
        and all(isinstance(gate, AggregateGate) for gate in gates.gates.values())
    )


def form(objective: Objective) -> dict[str, Any]:
    """Budgets, rollback counts and epsilon of a FiberPO objective, for the explorer."""
    strata = []
    for name, gate in objective.gate_map.gates.items():
        assert isinstance(gate, AggregateGate)
        others = gate.budget.others
        pair = gate.budget.named[0][1] if others is None else others
        rollback = None if isinstance(gate.rollback, str) else float(gate.rollback)
        strata.append({"name": name, "budget": _open(pair), "rollback": rollback})
    token = objective.gate_map.token
    assert isinstance(token, LogClip)
    return {
        "strata": strata,
        "epsilon": token.epsilon,
        "pessimistic": objective.gate_map.pessimistic,
    }


class _Reader:
    """One pass over a recording."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self.notes: list[str] = []
        objective = recording.objective()
        if objective is None:
            named, objective = recording.manifest.objective, fiberpo()
            what = f"names {named}, which" if named else "names no objective that"
            self.notes.append(
                f"The recording {what} can be built here: its tokens are shown as {objective} "
                "would gate them."
            )
        self.objective = objective
        self.own = is_fiberpo(objective)
        self.view = objective if self.own else fiberpo()
        if not self.own:
            self.notes.append(
                f"The regime explorer shows the form of FiberPO; {objective.name} is of another "
                f"form, so it starts from {self.view} on the recorded tokens."
            )
        self.random = random.Random(0)
        self.ticket = count()
        self.gated: list[tuple[float, int, Row]] = []
        self.others: list[Row] = []
        self.seen = 0
        self.points: list[list[list[float | None]]] = [[] for _ in self.view.gate_map.gates]
        self.points_seen = [0] * len(self.points)
        self.cut = 0

    def read(self, curves: bool, progress: Callable[[int, int], None]) -> Recorded:
        recording = self.recording
        # the steps of a foreign recording may be known only from reading it
        steps = spread(recording.steps, recording.tokens) or None
        share = len(steps) / len(recording.steps) if steps else 1.0
        tokens, expected = 0, round(recording.tokens * share)
        metrics: dict[int, tuple[Statistics, Row]] = {}
        seen: set[int] = set()
        whole: Statistics | None = None
        for item in recording.iterate(steps):
            try:
                out = self.objective(item.batch)
            except FiberPOError as error:
                raise type(error)(
                    f"step {item.step} of the recording cannot be gated by "
                    f"{self.objective.name}: {error}"
                ) from error
            view = out if self.own else self.view(item.batch)
            seen.add(item.step)
            if curves:
                statistics, extra = out.statistics, _extra(item)
                whole = statistics if whole is None else whole.merge(statistics)
                if item.step in metrics:  # a step in several pieces
                    before, extra = metrics[item.step]
                    statistics = before.merge(statistics)
                metrics[item.step] = statistics, extra
            self._take(item, out, view.gated)
            tokens += len(item.batch)
            progress(tokens, expected)
            if tokens > 2 * MOST_READ:
                self.notes.append(f"Reading stopped at step {item.step}, {tokens:,} tokens in.")
                break
        self.notes += [f"Recording: {problem}." for problem in recording.problems]
        if steps is not None and len(steps) < len(recording.steps):
            self.notes.append(
                f"{len(steps)} of the {len(recording.steps)} recorded steps were read, evenly "
                "spaced."
            )
        if self.cut:
            self.notes.append(
                f"{self.cut} of the trajectories shown are longer than {MOST_TOKENS:,} tokens; "
                "the page holds the beginning of each, with the drifts of the whole."
            )
        gated = [row for _, _, row in sorted(self.gated, key=lambda e: e[:2], reverse=True)]
        return Recorded(
            objective=str(self.objective),
            settings=form(self.view),
            own=self.own,
            steps_read=len(seen),
            steps=max(len(recording.steps), len(seen)),
            metrics=[
                {"kind": "train", "step": step, **found.compute(), **extra}
                for step, (found, extra) in sorted(metrics.items())
            ],
            strata=strata_table(self.objective, whole),
            gated=gated,
            others=self.others,
            points=self.points,
            notes=self.notes,
        )

    def _take(self, item: Any, out: Surrogate, view: GatedRatio) -> None:
        """Trajectories and points of one step."""
        batch = item.batch
        change = out.gated.log_factor() - out.gated.log_ratio
        if out.stopped and out.objective.gate_map.detached:
            # there is no gated ratio: shown are the tokens without a gradient
            kept = torch.stack([stop.kept for stop in out.stopped]).amin(0)
            change = torch.where(kept == 0, change, 0.0)
        # a negative gated ratio has no log: it counts as the largest change there is
        size = torch.nan_to_num(change.abs(), nan=20.0, posinf=20.0)
        ends = torch.cumsum(batch.lengths, 0)
        total = torch.cat([size.new_zeros(1), torch.cumsum(size, 0)])
        mean = (total[ends] - total[ends - batch.lengths]) / batch.lengths
        best = torch.topk(mean, min(PER_STEP, len(mean)))
        for score, row in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            if score <= 1e-12 or (len(self.gated) == MOST_GATED and score <= self.gated[0][0]):
                break
            entry = (score, -next(self.ticket), self._row(item, out, view, row, change))
            push = heapq.heappush if len(self.gated) < MOST_GATED else heapq.heappushpop
            push(self.gated, entry)
        for row in self.random.sample(range(batch.rows), min(2, batch.rows)):
            self.seen += 1
            slot = self.random.randrange(self.seen)
            if len(self.others) < MOST_OTHERS:
                self.others.append(self._row(item, out, view, row, change))
            elif slot < MOST_OTHERS:
                self.others[slot] = self._row(item, out, view, row, change)
        self._points(view)

    def _points(self, view: GatedRatio) -> None:
        """Residual drifts of contexts, a uniform sample over all steps."""
        assert view.strata is not None
        assert view.residual is not None
        for k, kept in enumerate(self.points):
            drifts = view.residual[:, view.strata.level(k)].T.tolist()
            for pair in drifts if len(drifts) < 500 else self.random.sample(drifts, 500):
                self.points_seen[k] += 1
                slot = self.random.randrange(self.points_seen[k])
                shown = [_short(x) for x in pair]
                if len(kept) < MOST_POINTS:
                    kept.append(shown)
                elif slot < MOST_POINTS:
                    kept[slot] = shown

    def _row(self, item: Any, out: Surrogate, view: GatedRatio, row: int, change: Tensor) -> Row:
        """One trajectory: its tokens, its contexts, and what the objective did to it."""
        batch: RatioBatch = item.batch
        end = int(batch.lengths[: row + 1].sum())
        length = int(batch.lengths[row])
        own = slice(end - length, end)
        shown = slice(end - length, end - length + min(length, MOST_TOKENS))
        self.cut += length > MOST_TOKENS
        advantages = batch.advantages[own]
        plain = out.weight[own] * out.gated.log_ratio[own].exp()
        given = out.coefficients[own]
        kept = torch.where(plain * given > 0, torch.minimum(plain.abs(), given.abs()), 0.0)
        mass = float(plain.abs().sum())
        contexts, leaf = _contexts(view, own)
        text = item.text(row)
        if text is None and item.token_ids is not None:
            text = [f"#{i}" for i in item.token_ids[own].tolist()]
        prompts = getattr(item, "prompts", None)
        return {
            "step": int(item.step),
            "row": row,
            "labels": {
                name: label.value(int(label.codes[row]))
                for name, label in batch.labels.items()
                if not label.per_token and int(label.codes[row]) >= 0
            },
            "length": length,
            "reward": None if item.rewards is None else _short(float(item.rewards[row])),
            "prompt": None if not prompts or prompts[row] is None else str(prompts[row])[:600],
            "l": [_short(x) for x in out.gated.log_ratio[shown].tolist()],
            "change": [_short(x) for x in change[shown].tolist()],
            "a": (
                _short(float(advantages[0]))
                if bool((advantages == advantages[0]).all())
                else [_short(x) for x in batch.advantages[shown].tolist()]
            ),
            "text": None if text is None else [str(t)[:60] for t in text[:MOST_TOKENS]],
            "contexts": contexts,
            "leaf": leaf[:MOST_TOKENS] if isinstance(leaf, list) else leaf,
            "kept": float(kept.sum()) / mass if mass else None,
            "masked": bool(mass == 0 and (advantages != 0).any()),
            "stopped": any(bool((stop.kept[own] == 0).any()) for stop in out.stopped),
            "mean_change": _short(float(torch.nan_to_num(change[own].abs(), nan=20.0).mean())),
        }


def _contexts(view: GatedRatio, tokens: slice) -> tuple[list[Row], int | list[int]]:
    """The contexts over some tokens, coarse to fine, and the place of each token among them."""
    strata, at, mean = view.strata, view.layout.contexts, view.mean
    assert strata is not None
    assert at is not None
    assert mean is not None
    leaves = strata.leaf[tokens].tolist()
    needed: set[int] = set()
    for context in set(leaves):
        while context != strata.NO_PARENT:
            needed.add(context)
            context = int(strata.parent[context])
    order = sorted(needed)
    place = {context: i for i, context in enumerate(order)}
    found: list[Row] = []
    assert view.gated is not None
    for context in order:
        k = int(strata.stratum[context])
        name = strata.context_names[k](context - strata.bounds[k])
        gate = view.gate_map.gates[strata.names[k]]
        assert isinstance(gate, AggregateGate)
        found.append(
            {
                "s": k, "name": name[:60], "up": place.get(int(strata.parent[context]), -1),
                "p": _short(float(mean[0, context]), 9), "m": _short(float(mean[1, context]), 9),
                "k": float(at.count[context]), "r": view.gated.regime[:, context].tolist(),
                "c": _open(gate.budget.for_context(strata.names[k], name)),
            }
        )  # fmt: skip
    return found, place[leaves[0]] if len(set(leaves)) == 1 else [place[c] for c in leaves]


def _extra(item: Any) -> Row:
    """Metrics of a step that only the recording knows."""
    batch: RatioBatch = item.batch
    extra: Row = {"completions/mean_length": float(batch.lengths.double().mean())}
    if item.entropies is not None:
        extra["entropy"] = float(item.entropies.double().mean())
    if item.rewards is not None:
        rewards = item.rewards.double()
        extra["reward"] = float(rewards.mean())
        domain = batch.labels.get("domain")
        if domain is not None and not domain.per_token and domain.count <= 64:
            for code in range(domain.count):
                mine = rewards[domain.codes == code]
                if len(mine):
                    extra[f"reward/domain={domain.value(code)}"] = float(mine.mean())
    return extra


def spread(steps: list[int], tokens: int) -> list[int]:
    """Evenly spaced steps, the last among them, of at most about `MOST_READ` tokens together.

    >>> spread(list(range(10)), 10 * MOST_READ // 4)
    [2, 4, 7, 9]
    """
    if not steps:
        return []
    room = min(MOST_STEPS, max(1, int(MOST_READ * len(steps) / max(tokens, 1))))
    if len(steps) <= room:
        return list(steps)
    return [steps[math.ceil((i + 1) * len(steps) / room) - 1] for i in range(room)]


def _short(value: float, digits: int = 5) -> float | None:
    """A few significant digits; None for what JSON cannot hold."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


def _open(pair: tuple[float, float]) -> list[float | None]:
    """A budget for JSON; None where the gate is open."""
    return [c if math.isfinite(c) else None for c in pair]
