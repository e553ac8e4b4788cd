"""Claims on sequence masks: what the estimators see, lengths, denominators.

Reference: *Trust Region Masking for Long-Horizon LLM Reinforcement Learning*, arXiv 2512.23075.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch

from ..batch import RatioBatch
from ..gating import open_gates
from ..masks import MaxDivergence
from ..objective import Objective
from ..weights import Weights
from .bounds import drift_of_steps
from .claims import Array, Claim, Finding, Verdict, judge
from .enumeration import Pair, Policy


def _k3(ell: Array) -> Array:
    return np.expm1(ell) - ell


def k1_fooled(rng: np.random.Generator) -> Finding:
    """Sequences whose ``-log rho`` sum to 0, and how far they are from the rollout policy."""
    worst, tried = 0.0, 200
    for _ in range(tried):
        ell = rng.normal(0, 0.5, 2 * int(rng.integers(1, 50)))
        ell -= ell.mean()
        worst = max(worst, float(_k3(ell).mean()) - 1e-3)
    half = np.repeat([0.5, -0.5], 10)
    note = (
        f"half the tokens at +0.5, half at -0.5: mean k1 = {abs(half.mean()):.0f}, mean k3 = "
        f"{_k3(half).mean():.3f}, largest k2 = {(half**2 / 2).max():.3f}"
    )
    return judge(tried, worst, 0.0, note=note)


def k2_k3_not_fooled(rng: np.random.Generator) -> Finding:
    """No token of a sequence within its thresholds is far off, whatever the others do."""
    worst, tried = 0.0, 500
    for _ in range(tried):
        ell = rng.normal(0, rng.exponential(), int(rng.integers(1, 50)))
        largest, mean = float((ell**2).max()) / 2, float(_k3(ell).mean())
        worst = max(worst, float(abs(ell).max()) - math.sqrt(2 * largest))
        worst = max(worst, float(_k3(ell).max()) - len(ell) * mean)
        worst = max(worst, -float(_k3(ell).min()))
    note = "k2 <= delta gives |log rho| <= sqrt(2 delta); mean k3 <= delta gives k3 <= T delta"
    return judge(tried, worst, 1e-9, note=note)


def k3_unbiased(rng: np.random.Generator) -> Finding:
    """Expectations of k3 and k2 under the rollout policy, exact."""
    worst, apart, tried = 0.0, 0.0, 300
    for _ in range(tried):
        p, q = (row / row.sum() for row in rng.dirichlet(np.ones(4), size=2) + 1e-3)
        ell, kl = np.log(q / p), float((p * np.log(p / q)).sum())
        worst = max(worst, abs(float(p @ _k3(ell)) - kl))
        apart = max(apart, abs(float(p @ ell**2) / 2 / kl - 1))
    broken = f"k2 is off by up to {100 * apart:.0f} %" if apart > 0.05 else None
    return judge(tried, worst, 1e-10, broken=broken, note="k3 is unbiased where theta << roll")


def max_by_length(rng: np.random.Generator) -> Finding:
    """Probability that no context of the first t tokens exceeds delta, enumerated."""
    worst, first, last, tried = 0.0, 0.0, 0.0, 100
    for _ in range(tried):
        pair = Pair(Policy.random(rng, 2, 6), Policy.random(rng, 2, 6))
        delta = float(np.quantile(np.concatenate(pair.token_kl), 0.8))
        kept, rates = np.ones(1, dtype=np.bool_), []
        for t, kl in enumerate(pair.token_kl):
            kept = np.repeat(kept & (kl <= delta), 2)
            rates.append(float(pair.roll.prefixes[t + 1] @ kept))
        worst = max(worst, float(np.diff(rates).max()))
        first, last = first + rates[0] / tried, last + rates[-1] / tried
    note = f"delta at the 80 % quantile: 1 token {first:.2f} kept, 6 tokens {last:.2f}"
    return judge(tried, worst, 1e-12, note=note)


def mean_by_length(rng: np.random.Generator) -> Finding:
    """Expectation of ``W / sum w`` for independent tokens of every length, enumerated."""
    worst, growth, tried = 0.0, 0.0, 30
    for _ in range(tried):
        rows = rng.dirichlet(np.ones(2), size=2)
        expected = abs(rows[0] - rows[1]).sum()
        tops = []
        for length in range(2, 7):
            tables = [tuple(np.tile(r, (2**t, 1)) for t in range(length)) for r in rows]
            pair = Pair(Policy(tables[0]), Policy(tables[1]))
            distance = abs(pair.ratios - 1)
            weights = drift_of_steps(np.arange(length)[::-1].astype(float), 0.2, 0.05)
            mean = float(pair.roll.sequences @ (weights @ distance)) / weights.sum()
            worst = max(worst, abs(mean - expected))
            tops.append(float(pair.roll.sequences @ distance.max(0)))
        growth = max(growth, tops[-1] / tops[0])
    note = f"the largest |rho - 1| grows by up to {growth:.1f} times from 2 to 6 tokens"
    return judge(tried, worst, 1e-12, note=note)


def _library_gradient(pair: Pair, drawn: Array, rewards: Array, delta: float) -> tuple[Array, ...]:
    """Coefficients of the library's masked surrogate on drawn sequences, and the mask."""
    length, words = pair.roll.length, pair.roll.words
    log_rho = np.log(pair.ratios[:, drawn.astype(int)]).T.ravel()
    old = torch.full((len(log_rho),), -math.log(words), dtype=torch.float64)
    batch = RatioBatch.from_packed(
        old + torch.from_numpy(log_rho), old, torch.from_numpy(rewards[drawn.astype(int)]),
        [length] * len(drawn), rollout_log_probs=old,
    )  # fmt: skip
    mask = MaxDivergence(delta)
    out = Objective(Weights.trajectory_sum(), open_gates(), mask)(batch)
    return out.coefficients.numpy().reshape(-1, length), mask(batch).numpy(), np.exp(log_rho)


def total_denominator(rng: np.random.Generator) -> Finding:
    """The library's coefficients against ``(1/N_total) M A rho``, masked or not."""
    worst, dropped, tried = 0.0, 0, 50
    for _ in range(tried):
        pair = Pair(Policy.random(rng, 2, 4), Policy.random(rng, 2, 4))
        drawn = rng.choice(16, size=12, p=pair.roll.sequences).astype(np.float64)
        advantages = rng.standard_normal(16)
        got, kept, rho = _library_gradient(pair, drawn, advantages, 0.3)
        scale = kept * advantages[drawn.astype(int)] / 12
        worst = max(worst, float(abs(got - scale[:, None] * rho.reshape(-1, 4)).max()))
        dropped += len(kept) - int(kept.sum())
    error = worst if dropped else math.nan
    return judge(tried, error, 1e-12, note=f"{dropped} of {12 * tried} sequences were masked")


def renormalised(rng: np.random.Generator) -> Finding:
    """Expectation over all samples of three sequences: divided by 3, and by the number kept."""
    total, kept_only, tried = 0.0, 0.0, 20
    for _ in range(tried):
        pair = Pair(Policy.random(rng, 2, 2), Policy.random(rng, 2, 2))
        value = rng.standard_normal(4) * (pair.ratios - 1).sum(0)
        mask = (np.log(pair.ratios) ** 2).max(0) / 2 <= 0.5
        if mask.all() or not mask.any():
            continue
        p, exact = pair.roll.sequences, float(pair.roll.sequences @ (mask * value))
        by_total, by_kept = 0.0, 0.0
        for drawn in itertools.product(range(4), repeat=3):
            i = list(drawn)
            summed, chance = float((mask * value)[i].sum()), float(np.prod(p[i]))
            by_total += chance * summed / 3
            by_kept += chance * summed / max(int(mask[i].sum()), 1)
        total = max(total, abs(by_total - exact))
        kept_only = max(kept_only, abs(by_kept / exact - 1))
    note = f"off by up to {100 * kept_only:.0f} %; with the total number by {total:.0e}"
    return judge(tried, kept_only, 1e-9, note=note)


CLAIMS = (
    Claim(
        "mask on k1", "TRM, masks",
        "A sequence with mean k1 = mean(-log rho) near 0 is near the rollout policy.",
        k1_fooled, Verdict.FAILS,
    ),
    Claim(
        "masks on k2 and k3", "TRM, masks",
        "Thresholds on the largest k2 and on the mean k3 bound every token's ratio: neither "
        "estimator is signed, so nothing cancels.",
        k2_k3_not_fooled, Verdict.HOLDS,
    ),
    Claim(
        "k2 and k3 estimate the KL", "TRM, masks",
        "The expectations of k2 and k3 under the rollout policy are its KL from theta.",
        k3_unbiased, Verdict.CONDITIONAL,
    ),
    Claim(
        "max form and length", "TRM, masks",
        "The max form of the mask keeps a sequence the less often, the longer it is.",
        max_by_length, Verdict.HOLDS,
    ),
    Claim(
        "length-neutral form", "TRM, masks",
        "The expectation of W / sum w does not depend on the length, for tokens that are alike.",
        mean_by_length, Verdict.HOLDS,
    ),
    Claim(
        "mask with the total denominator", "TRM, masked gradient",
        "The library's masked gradient is (1/N_total) sum M A sum_t rho grad log pi.",
        total_denominator, Verdict.HOLDS,
    ),
    Claim(
        "mask that renormalises", "TRM, masked gradient",
        "Dividing by the number of sequences that were kept estimates the same gradient.",
        renormalised, Verdict.FAILS,
    ),
)  # fmt: skip

__all__ = ["CLAIMS"]
