"""Curves of a run: its metric lines, aggregated over the optimizer steps of each rollout.

Drift starts at zero with the first update on new samples and grows until the last: plotted step by
step, every curve would be a comb.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import chain, groupby
from typing import Any, Literal

import numpy as np

from fiberpo.report.reader import number
from fiberpo.report.tables import stratum_rows

Array = np.ndarray[tuple[int], np.dtype[np.float64]]
Reduction = Literal["mean", "min", "max"]

MAX_POINTS = 200
"""Most points drawn per curve; longer runs are averaged over neighbouring rollouts."""


class RunSeries:
    """Curves of a run: metric lines by optimizer step, and the rows of its strata.

    ``train`` and ``evals`` are the lines of ``metrics.jsonl`` of either kind.  Lines without a
    step are left out; where a step occurs twice (a resumed run), the later line wins.
    ``strata`` are the rows of the same name in ``summary.json``.
    """

    def __init__(
        self,
        train: Sequence[Mapping[str, Any]],
        evals: Sequence[Mapping[str, Any]],
        strata: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self.evals = _by_step(evals)
        self.strata = stratum_rows(strata)
        lines = _by_step(train)
        self._groups = _rollout_groups(lines)
        self._steps = np.array([np.mean([r["step"] for r in g]) for g in self._groups], float)
        records = [*lines, *self.evals]
        self.keys = list(dict.fromkeys(key for record in records for key in record))
        steps = [r["step"] for r in records]
        low, high = min(steps, default=0.0), max(steps, default=1.0)
        low = 0.0 if 0 <= low <= 0.1 * high else low
        self.span = (low, high) if high > low else (low - 0.5, high + 0.5)
        """First and last step of the run, apart from each other, for a common step axis."""

    @cached_property
    def domains(self) -> list[str]:
        """Domain names, in order of their first appearance in the metrics."""
        prefixes = ("heldout/reward/domain=", "reward/domain=")
        names = (key[len(p) :] for p in prefixes for key in self.keys if key.startswith(p))
        return list(dict.fromkeys(names))

    @cached_property
    def stratum_names(self) -> list[str]:
        """Strata, coarsest first: those of the summary, then those only in the metrics."""
        pattern = re.compile(r"gate/([^/]+)/(?:pass_frac|drift_(?:pos|neg)/)")
        seen = [m.group(1) for m in map(pattern.match, self.keys) if m]
        return list(dict.fromkeys([*(row.stratum for row in self.strata), *seen]))

    @cached_property
    def regime_limit(self) -> float:
        """Upper end of the regime axes: the same for all strata, so that they compare."""
        peak = 0.0
        for stratum in self.stratum_names:
            _, shares = self.regimes(stratum)
            peak = max(peak, float(np.max(shares["rollback"] + shares["zeroed"], initial=0.0)))
        return next((top for top in (0.05, 0.1, 0.2, 0.4, 0.6) if 1.1 * peak <= top), 1.0)

    def heldout(self, key: str) -> tuple[Array, Array]:
        """Steps and values of ``key`` in the evaluations."""
        pairs = [(r["step"], v) for r in self.evals if (v := number(r.get(key))) is not None]
        return np.array([p[0] for p in pairs], float), np.array([p[1] for p in pairs], float)

    def per_rollout(
        self, key: str, how: Reduction = "mean", positive: bool = False
    ) -> tuple[Array, Array]:
        """Step and aggregate of ``key`` for each rollout that has a (positive) value."""
        values = self._column(key, how)
        shown = values > 0 if positive else ~np.isnan(values)
        return self._steps[shown], values[shown]

    def _column(self, key: str, how: Reduction = "mean") -> Array:
        """Aggregate of ``key`` for every rollout, NaN where it has no value."""
        values = [[v for r in g if (v := number(r.get(key))) is not None] for g in self._groups]
        return np.array([getattr(np, how)(v) if v else np.nan for v in values], float)

    def regimes(self, stratum: str) -> tuple[Array, dict[str, Array]]:
        """Steps and the share of contexts in each regime; a missing regime counts as none."""
        regimes = ("pass", "rollback", "zeroed")
        columns = {name: self._column(f"gate/{stratum}/{name}_frac") for name in regimes}
        shown = ~np.isnan(columns["pass"])
        return self._steps[shown], {k: np.nan_to_num(v[shown]) for k, v in columns.items()}

    def budgets(self, stratum: str, channel: int, context: str | None = None) -> list[float]:
        """Distinct budgets of a channel, ascending; of one context where it is given."""
        rows = [r for r in self.strata if r.stratum == stratum and context in (None, r.context)]
        found = {row.channels[channel].budget for row in rows}
        return sorted(b for b in found if b is not None and b > 0)

    def drift_key(self, stratum: str, channel: str, context: str | None = None) -> str:
        """Metric name of the 90th percentile of a drift, of one context where it is given."""
        base = f"gate/{stratum}/{channel}/p90"
        if context is None:
            return base
        candidates = [k for k in self.keys if k.startswith(base + "/")]
        ends = (f"={context}", f"/{context}")
        return next((k for k in candidates if k.endswith(ends)), "")

    def drift_contexts(self, stratum: str) -> list[str | None]:
        """Contexts with a drift chart of their own; [None] where one chart serves the stratum."""
        rows = [row for row in self.strata if row.stratum == stratum]
        pairs = {row.context: [channel.budget for channel in row.channels] for row in rows}
        known = {context: tuple(pair) for context, pair in pairs.items() if any(pair)}
        drawable = all(self.drift_key(stratum, "drift_pos", context) for context in known)
        return [*known] if drawable and len(set(known.values())) > 1 else [None]

    def relative_drift(self, stratum: str) -> tuple[Array, Array]:
        """The larger of both channels' drifts; where any budget is known, as a share of its own.

        Budgets that differ by context count with the smallest.
        """
        larger = np.full(len(self._groups), np.nan)
        for index, channel in enumerate(("drift_pos", "drift_neg")):
            limits = self.budgets(stratum, index) if self.any_budget else [1.0]
            if limits:
                drift = self._column(self.drift_key(stratum, channel), "max")
                larger = np.fmax(larger, drift / limits[0])
        shown = larger > 0
        return self._steps[shown], larger[shown]

    @cached_property
    def any_budget(self) -> bool:
        """Whether the budget of any stratum is known."""
        return any(self.budgets(name, channel) for name in self.stratum_names for channel in (0, 1))


def _by_step(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    merged: dict[float, dict[str, Any]] = {}
    for record in records:
        step = number(record.get("step"))
        if step is not None:
            merged.setdefault(step, {}).update({**record, "step": step})
    return [merged[step] for step in sorted(merged)]


def _rollout_groups(train: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Neighbouring lines of one rollout together; long runs are merged to MAX_POINTS groups."""

    def rollout(record: dict[str, Any]) -> object:
        known = record.get("rollout")
        return ("step", record["step"]) if known is None else known

    groups = [list(group) for _, group in groupby(train, rollout)]
    # A rollout cut short lacks its last updates, which drift the most: it joins the one before.
    if len(groups) > 1 and len(groups[-1]) < len(groups[-2]):
        groups[-2:] = [groups[-2] + groups[-1]]
    width = math.ceil(len(groups) / MAX_POINTS) or 1
    return [list(chain(*groups[i : i + width])) for i in range(0, len(groups), width)]


def smooth(values: Array) -> Array:
    """Centred moving average over about a twentieth of the curve."""
    if len(values) < 8:
        return values
    half = max(1, len(values) // 40)
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    smoothed: Array = (total[high] - total[low]) / (high - low)
    return smoothed
