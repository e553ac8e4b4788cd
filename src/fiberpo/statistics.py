"""Mergeable statistics: every number knows how it is combined and over what it is a mean.

Statistics of parts (micro-batches, ranks, domains) merge to exactly those of the whole; quantiles
come from a histogram with a relative error of 2.5 %.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_BASE, _BINS, _SMALLEST = 1.05, 640, 1e-10


@dataclass(frozen=True, eq=False)
class Moments:
    """Weighted count, sum, sum of squares, minimum and maximum: ``[5]`` float64."""

    values: Tensor

    @classmethod
    def of(cls, x: Tensor, share: Tensor | None = None) -> Moments:
        """Moments of the entries of ``x`` (any shape, possibly empty).

        ``share`` is the part of each entry that is counted here (1 by default): a context that two
        ranks hold is counted by both, by its share of tokens.
        """
        x = x.double().flatten()
        if not x.numel():
            return cls(torch.tensor([0.0, 0.0, 0.0, math.inf, -math.inf]).double().to(x.device))
        share = torch.ones_like(x) if share is None else share.double()
        sums = [share.sum(), (share * x).sum(), (share * x.square()).sum()]
        return cls(torch.stack([*sums, x.min(), x.max()]))

    def merge(self, other: Moments) -> Moments:
        """Moments of both samples together."""
        a, b = self.values, other.values
        return Moments(
            torch.cat([a[:3] + b[:3], torch.minimum(a[3:4], b[3:4]), torch.maximum(a[4:], b[4:])])
        )


@dataclass(frozen=True, eq=False)
class Histogram:
    """Counts of non-negative numbers in bins that grow by 5 %; bin 0 holds what is below 1e-10."""

    counts: Tensor

    @classmethod
    def of(cls, x: Tensor, share: Tensor | None = None) -> Histogram:
        """Histogram of the absolute values of ``x``; ``share`` as in `Moments.of`."""
        x = x.double().abs().flatten()
        bins = torch.ceil(torch.log(x.clamp(min=_SMALLEST) / _SMALLEST) / math.log(_BASE))
        index = bins.clamp(max=_BINS - 1).long()
        weights = torch.ones_like(x) if share is None else share.double()
        return cls(torch.bincount(index, weights, minlength=_BINS))

    def merge(self, other: Histogram) -> Histogram:
        """Histogram of both samples together."""
        return Histogram(self.counts + other.counts)

    def quantile(self, q: float) -> float:
        """The ``q``-quantile to 2.5 % (0 for what is below 1e-10; NaN of an empty sample)."""
        counts = self.counts.tolist()
        total, seen = sum(counts), 0.0
        if not total:
            return math.nan
        for i, count in enumerate(counts):
            seen += count
            if seen >= q * total:
                return 0.0 if i == 0 else _SMALLEST * _BASE ** (i - 0.5)
        return math.nan


@dataclass(frozen=True, eq=False)
class Statistics:
    """Named moments and histograms of one objective call.

    ``merge`` adds the samples of another call; ``compute`` turns everything into floats:
    a name ``x`` in ``means`` becomes ``x``; a drift ``x`` becomes ``x/mean``, ``x/max`` and, with a
    histogram, ``x/p90``.
    """

    means: Mapping[str, Moments]
    drifts: Mapping[str, tuple[Moments, Histogram]]
    ratio: Moments
    gradient: Tensor

    def merge(self, other: Statistics) -> Statistics:
        """Statistics of both calls together (names that only one has are kept)."""
        means = dict(self.means)
        for name, moments in other.means.items():
            means[name] = means[name].merge(moments) if name in means else moments
        drifts = dict(self.drifts)
        for name, (moments, histogram) in other.drifts.items():
            if name in drifts:
                mine = drifts[name]
                drifts[name] = (mine[0].merge(moments), mine[1].merge(histogram))
            else:
                drifts[name] = (moments, histogram)
        return Statistics(
            means, drifts, self.ratio.merge(other.ratio), self.gradient + other.gradient
        )

    def compute(self) -> dict[str, float]:
        """All metrics as floats; one transfer from the device per kind."""
        out: dict[str, float] = {}
        if self.means:
            table = torch.stack([m.values for m in self.means.values()]).tolist()
            for name, (count, total, *_) in zip(self.means, table, strict=True):
                if count:
                    out[name] = total / count
        for name, (moments, histogram) in self.drifts.items():
            count, total, _, _, largest = moments.values.tolist()
            if count:
                stem, at, suffix = name.partition("/domain=")
                out[f"{stem}/mean{at}{suffix}"] = total / count
                out[f"{stem}/p90{at}{suffix}"] = min(histogram.quantile(0.9), largest)
                out[f"{stem}/max{at}{suffix}"] = largest
        count, total, squares, smallest, largest = self.ratio.values.tolist()
        if count:
            out["ratio/mean"], out["ratio/min"] = total / count, smallest
            out["ratio/max"], out["ratio/ess"] = largest, total**2 / (count * squares)
        whole, kept, reversed_, amplified = self.gradient.tolist()
        if whole:
            out["gate/gradient_kept"] = kept / whole
            out["gate/gradient_reversed"] = reversed_ / whole
            out["gate/gradient_amplified"] = amplified / whole
        return out

    def quantiles(self, name: str, levels: tuple[float, ...]) -> list[float]:
        """Quantiles of a drift by its name (``gate/<stratum>/drift_pos``), each to 2.5 %."""
        return [self.drifts[name][1].quantile(q) for q in levels]

    def state(self) -> dict[str, Tensor]:
        """Flat tensors from which `from_state` rebuilds these statistics."""
        out = {f"mean:{k}": v.values for k, v in self.means.items()}
        for name, (moments, histogram) in self.drifts.items():
            out[f"moments:{name}"], out[f"histogram:{name}"] = moments.values, histogram.counts
        out["ratio"], out["gradient"] = self.ratio.values, self.gradient
        return {k: v.cpu() for k, v in out.items()}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Statistics:
        """The inverse of `state`."""
        means, drifts = {}, {}
        for key, value in state.items():
            kind, _, name = key.partition(":")
            if kind == "mean":
                means[name] = Moments(value)
            elif kind == "moments":
                drifts[name] = (Moments(value), Histogram(state[f"histogram:{name}"]))
        return cls(means, drifts, Moments(state["ratio"]), state["gradient"])
