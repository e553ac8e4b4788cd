"""What one objective does to one batch, as sums that add up over batches.

The ungated coefficient of a token is ``p = mu M A r`` (and the objective's other factors), the
gated one ``c = dJ/dlog_prob``. Per row, in units of gradient mass:

    kept       sum of min(|p|, |c|)     where p and c have the same sign
    reversed   sum of |c|               where they have opposite signs
    amplified  sum of max(|c| - |p|, 0) where they have the same sign
    removed    sum of |p|  minus  kept
    changed    sum of |c - p|  =  removed + reversed + amplified

over the tokens with ``p != 0``, as ``gate/gradient_kept`` and its like (`fiberpo.measurement`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..batch import RatioBatch
from ..gates import Regime, Zero
from ..labels import chain
from ..measurement import MOST_DOMAINS
from ..objective import Objective, Surrogate
from ..strata import Strata

Array = NDArray[np.float64]
Codes = NDArray[np.int64]

MASS = ("whole", "kept", "reversed", "amplified")
"""Columns of the sums of gradient mass."""

REGIMES = (Regime.PASS, Regime.ROLLBACK, Regime.ZERO)
"""Columns of the counts of regimes."""


@dataclass(frozen=True, eq=False)
class Tokens:
    """What is the same for all objectives: the tokens of a batch on the host.

    Attributes:
        batch: the tokens.
        ratio: ``[N]`` ``r = exp(l)``.
        starts: ``[rows]`` first token of each row.
        domain: ``[rows]`` index into ``domains`` of each row, -1 for none.
        domains: names of the domains; empty where rows have none, or more than `MOST_DOMAINS`.
        fresh: no log ratio differs from 0 by more than rounding: no gate acts.
    """

    batch: RatioBatch
    ratio: Array
    starts: Codes
    domain: Codes
    domains: tuple[str, ...]
    fresh: bool

    @classmethod
    def of(cls, batch: RatioBatch) -> Tokens:
        """Once a batch."""
        log_ratio = batch.log_ratio.detach().double().cpu().numpy()
        lengths = batch.lengths.cpu().numpy()
        domains, codes = domains_of(batch)
        with np.errstate(over="ignore"):
            ratio = np.exp(log_ratio)
        return cls(
            batch, ratio, lengths.cumsum() - lengths, codes, domains,
            bool(np.abs(log_ratio).max(initial=0.0) <= FRESH),
        )  # fmt: skip

    def per_row(self, values: NDArray) -> NDArray:
        """Sums over each row."""
        return np.add.reduceat(values, self.starts)

    def per_domain(self, rows: NDArray) -> Array:
        """``[domains, ...]`` sums of what is given for each row."""
        out = np.zeros((len(self.domains), *rows.shape[1:]))
        known = self.domain >= 0
        np.add.at(out, self.domain[known], rows[known])
        return out


FRESH = 1e-6
"""Log ratios up to this size, nats, are rounding of float32 log-probs."""


def domains_of(batch: RatioBatch) -> tuple[tuple[str, ...], Codes]:
    """Names of the domains, and the index of each row's; at most `MOST_DOMAINS`, else none."""
    label = batch.labels.get("domain")
    if label is None or label.per_token or label.count > MOST_DOMAINS:
        return (), np.full(batch.rows, -1)
    return label.value_names(), label.codes.cpu().numpy()


def context_domains(batch: RatioBatch, strata: Strata, codes: Codes) -> Codes:
    """The domain of every context, ``[C]``; -1 where the context lies above the domains."""
    order = chain(batch.labels)
    found = np.full(len(strata), -1)
    if not (codes >= 0).any():
        return found
    parent, leaf = strata.parent.cpu().numpy(), strata.leaf.cpu().numpy()
    if any(batch.labels[n].per_token for n in strata.names if n in batch.labels):
        found[leaf] = codes[batch.row.cpu().numpy()]
    else:
        lengths = batch.lengths.cpu().numpy()
        found[leaf[lengths.cumsum() - lengths]] = codes
    for k in range(len(strata.names) - 1, 0, -1):
        here = strata.level(k)
        below = parent[here] >= 0
        found[parent[here][below]] = found[here][below]
    for k, name in enumerate(strata.names):
        if "domain" in order and order.index(name) < order.index("domain"):
            found[strata.level(k)] = -1
    return found


@dataclass(eq=False)
class Tally:
    """Sums of one objective over batches.

    Attributes:
        mass: ``[4]``, `MASS`.
        regimes: stratum -> ``[3]`` counts of contexts (tokens at ``"token"``) by their worst
            channel, `REGIMES`.
        mass_by_domain, regimes_by_domain: the same for each domain.
        left_out: ``[2]`` tokens with an advantage that a mask or a stop drops, and all tokens.
    """

    mass: Array
    regimes: dict[str, Array]
    mass_by_domain: dict[str, Array]
    regimes_by_domain: dict[tuple[str, str], Array]
    left_out: Array = field(default_factory=lambda: np.zeros(2))

    @classmethod
    def empty(cls) -> Tally:
        """Nothing yet."""
        return cls(np.zeros(len(MASS)), {}, {}, {})

    def add(self, other: Tally) -> None:
        """Take in the sums of other batches."""
        self.mass += other.mass
        self.left_out += other.left_out
        for mine, theirs in (
            (self.regimes, other.regimes),
            (self.mass_by_domain, other.mass_by_domain),
            (self.regimes_by_domain, other.regimes_by_domain),
        ):
            for key, values in theirs.items():
                mine[key] = mine[key] + values if key in mine else values.copy()  # type: ignore[index]


@dataclass(frozen=True, eq=False)
class Gradient:
    """Coefficients of one objective on one batch, and what became of its mass.

    Attributes:
        surrogate: the objective's own answer.
        coefficients, plain: ``[N]`` ``c`` and ``p``.
        rows: ``[rows, 4]``, `MASS` of each row.
    """

    surrogate: Surrogate
    coefficients: Array
    plain: Array
    rows: Array

    @classmethod
    def of(cls, objective: Objective, tokens: Tokens) -> Gradient:
        """Evaluate the objective and compare it with its ungated self."""
        surrogate = objective(tokens.batch)
        gated = surrogate.coefficients.detach().cpu().numpy()
        weight = surrogate.weight.detach().cpu().numpy()
        with np.errstate(over="ignore", invalid="ignore"):
            plain = weight * tokens.ratio
        absent = weight == 0
        plain[absent] = 0.0  # left out, never multiplied: a ratio may have overflowed
        size, mass = np.abs(plain), np.abs(gated)
        mass[absent] = 0.0  # coupling reaches tokens without a gradient of their own; not theirs
        along = np.copysign(mass, gated * plain)
        whole = tokens.per_row(size)
        absolute, net = tokens.per_row(mass), tokens.per_row(along)
        along -= size
        amplified = tokens.per_row(np.maximum(along, 0.0, out=along))
        # of the absolute mass, what is not along p is against it; the difference loses digits
        turned = np.maximum(absolute - net, 0.0) / 2
        kept = np.maximum(absolute - turned - amplified, 0.0)
        return cls(surrogate, gated, plain, np.stack([whole, kept, turned, amplified], axis=1))

    @property
    def changed(self) -> Array:
        """``[rows]`` sum of ``|c - p|`` over tokens with ``p != 0``."""
        whole, kept, turned, amplified = self.rows.T
        return whole - kept + turned + amplified

    def tally(self, tokens: Tokens) -> Tally:
        """Everything that adds up."""
        found = Tally.empty()
        found.mass = self.rows.sum(0)
        found.mass_by_domain = dict(zip(tokens.domains, tokens.per_domain(self.rows), strict=True))
        lost = (self.surrogate.weight == 0) & (tokens.batch.advantages != 0)
        found.left_out = np.array([float(lost.sum()), len(lost)])
        for strata, regime in context_regimes(self.surrogate):
            worst = regime.max(0).values.cpu().numpy()
            where = context_domains(tokens.batch, strata, tokens.domain)
            for k, name in enumerate(strata.names):
                if name not in found.regimes:
                    here = strata.level(k)
                    _count(found, name, worst[here], where[here], tokens.domains)
        gated, stops = self.surrogate.gated, self.surrogate.stopped
        if not isinstance(gated.gate_map.token, Zero):
            self._count_tokens(found, tokens, gated.token.regime)
        elif stops:
            self._count_tokens(found, tokens, Regime.ZERO * stops[0].far[None])
        return found

    def _count_tokens(self, found: Tally, tokens: Tokens, regime: Tensor) -> None:
        worst = (regime[0] if len(regime) == 1 else torch.maximum(*regime)).cpu().numpy()
        counts = [tokens.per_row((worst == r).astype(np.int32)) for r in REGIMES[1:]]
        lengths = tokens.batch.lengths.cpu().numpy()
        rows = np.stack([lengths - counts[0] - counts[1], *counts], axis=1).astype(float)
        found.regimes["token"] = rows.sum(0)
        for name, values in zip(tokens.domains, tokens.per_domain(rows), strict=True):
            found.regimes_by_domain["token", name] = values


def context_regimes(surrogate: Surrogate) -> Iterator[tuple[Strata, Tensor]]:
    """Contexts and their regimes ``[channels, C]``: of the gates, then of each stop.

    A context that is out of the budget of a stop counts as zeroed.
    """
    gated = surrogate.gated
    if gated.strata is not None and gated.gated is not None:
        yield gated.strata, gated.gated.regime
    for stop in surrogate.stopped:
        if stop.layout.contexts is not None and stop.beyond is not None:
            yield stop.layout.contexts.strata, Regime.ZERO * stop.beyond


def _count(
    found: Tally, stratum: str, worst: NDArray, where: Codes, domains: Sequence[str]
) -> None:
    kinds = len(REGIMES)
    found.regimes[stratum] = np.bincount(worst, minlength=kinds).astype(float)
    known = where >= 0
    if domains and known.any():
        flat = np.bincount(
            where[known] * kinds + worst[known], minlength=kinds * len(domains)
        ).astype(float)
        for name, counts in zip(domains, flat.reshape(-1, kinds), strict=True):
            found.regimes_by_domain[stratum, name] = counts
