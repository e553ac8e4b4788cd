"""Claims on divergences and their estimates (FiberPO, App. A.3 and Claim 3.5)."""

from __future__ import annotations

import math

import numpy as np

from . import divergences as d
from .claims import Array, Claim, Finding, Verdict, judge
from .language import Language, Walks, random_language

Forms = dict[str, tuple[Array, Array, Array]]


def _forms(language: Language) -> Forms:
    """Divergence -> definition per state, ratio form per state, one-sample term per pair."""
    r, old = language.ratio, language.old
    return {
        "TV": (
            d.total_variation(language.new, old),
            d.ratio_form(d.tv_term(r), old),
            d.tv_term(r),
        ),
        "KL": (d.kl(language.new, old), d.ratio_form(d.kl_term(r), old), d.kl_term(r)),
    }


def _aggregates(value: Array, walks: Walks, states: int) -> Array:
    return np.array(
        [
            d.average(value, walks),
            d.maximum(value, walks.state, states),
            d.trajectory_normalized(value, walks),
            *np.nan_to_num(d.per_state(value, walks.state, states)),
        ]
    )


def ratio_forms(rng: np.random.Generator) -> Finding:
    """Definition against ratio form: exact, by enumeration."""
    worst, tried = 0.0, 60
    for _ in range(tried):
        language = random_language(rng)
        walks, states = language.enumerate(), len(language.old)
        for definition, ratio, _ in _forms(language).values():
            gap = _aggregates(definition[walks.state], walks, states) - _aggregates(
                ratio[walks.state], walks, states
            )
            worst = max(worst, float(np.abs(gap).max()))
    old, new = np.array([0.5, 0.5, 0.0]), np.array([0.4, 0.3, 0.3])
    ratio = np.divide(new, old, out=np.zeros(3), where=old > 0)
    exact, seen = d.total_variation(new, old), d.ratio_form(d.tv_term(ratio), old)
    broken = None
    if exact - seen > 1e-9:
        broken = (
            f"mass 0.3 on a token that the old policy never samples: TV {exact:.2f}, ratio form "
            f"{seen:.2f} (half of that mass is missing)"
        )
    return judge(
        tried, worst, 1e-12, broken=broken, note="needs old > 0 wherever new > 0"
    )  # fmt: skip


def monte_carlo(rng: np.random.Generator) -> Finding:
    """Deviation of sample means from the exact value, in standard errors."""
    worst, tried, count = 0.0, 12, 20_000
    for _ in range(tried):
        language = random_language(rng)
        exact_walks, sample = language.enumerate(), language.sample(count, rng)
        for definition, _, term in _forms(language).values():
            value = term[sample.state, sample.action]
            # a ratio of two means over trajectories
            average = d.average(definition[exact_walks.state], exact_walks)
            spread = (d.per_trajectory(value, sample) - average) * sample.lengths
            worst = max(worst, abs(spread.mean()) / (spread.std() / math.sqrt(count)))
            for s, exact in enumerate(definition):
                seen = value[sample.state == s]
                if len(seen) > 100:
                    error = float(seen.std()) / math.sqrt(len(seen))
                    worst = max(worst, abs(float(seen.mean()) - exact) / error)
    return judge(tried, worst, 5.0, note=f"{count} trajectories each; error in standard errors")


def monte_carlo_normalized(rng: np.random.Generator) -> Finding:
    """Expectation of the trajectory-normalized sample mean, enumerated."""
    worst, apart, tried = 0.0, {"TV": 0.0, "KL": 0.0}, 40
    for _ in range(tried):
        language = random_language(rng)
        for one in (language, _endless(language)):
            walks = one.enumerate()
            for name, (definition, _, term) in _forms(one).items():
                expected = d.trajectory_normalized(term[walks.state, walks.action], walks)
                exact = d.trajectory_normalized(definition[walks.state], walks)
                if one is language:
                    apart[name] = max(apart[name], abs(expected - exact) / exact)
                else:
                    worst = max(worst, abs(expected - exact))
    broken = None
    if apart["TV"] > 0.05 and apart["KL"] > 0.5:
        broken = (
            "where an end token decides the length, 1/T depends on the sampled tokens: off by up "
            f"to {100 * apart['TV']:.0f} % (TV) and {100 * apart['KL']:.0f} % (KL)"
        )
    return judge(tried, worst, 1e-12, broken=broken, note="unbiased for trajectories of one length")


def _endless(language: Language) -> Language:
    """The same without the end token: every trajectory is as long as the horizon."""
    kept = []
    for policy in (language.old, language.new):
        policy = policy[:, 1:]
        kept.append(policy / policy.sum(1, keepdims=True))
    # token 0 stays in the table, with probability 0 under both
    old, new = (np.pad(p, ((0, 0), (1, 0))) for p in kept)
    return Language(old, new, language.following, language.horizon)


def monte_carlo_maximum(rng: np.random.Generator) -> Finding:
    """The largest per-state mean: good where states are visited often, not where once."""
    worst, low, high, tried = 0.0, math.inf, 0.0, 12
    for _ in range(tried):
        language = random_language(rng)
        definition, _, term = _forms(language)["TV"]
        walks = language.sample(40_000, rng)
        exact = float(definition[np.unique(walks.state)].max())
        value = term[walks.state, walks.action]
        worst = max(worst, abs(d.maximum(value, walks.state, len(definition)) - exact) / exact)
        # as for a language model: every context is seen once, so every token is its own state
        alone = d.maximum(value, np.arange(len(value)), len(value)) / exact
        low, high = min(low, alone), max(high, alone)
    broken = None
    if high > 1.5:
        broken = (
            f"with one visit a state the estimate is max |r - 1| / 2, here {low:.1f} to "
            f"{high:.1f} times the largest TV"
        )
    return judge(tried, worst, 0.1, broken=broken, note="relative error; needs many visits")


def conventions(rng: np.random.Generator) -> Finding:
    """``half=False`` is twice the total variation, in every form."""
    worst, tried = 0.0, 60
    for _ in range(tried):
        language = random_language(rng)
        old, new, r = language.old, language.new, language.ratio
        whole = d.total_variation(new, old, half=False)
        by_ratio = d.ratio_form(d.tv_term(r, half=False), old)
        events = np.maximum(new - old, 0).sum(1)  # sup over events of new(E) - old(E)
        worst = max(worst, float(np.abs(whole - 2 * events).max()))
        worst = max(worst, float(np.abs(by_ratio - 2 * events).max()))
    return judge(tried, worst, 1e-12, note="the first paper's TV is twice the usual one, in [0, 2]")


def normalisation(rng: np.random.Generator) -> Finding:
    """Average over tokens against the trajectory-normalized divergence."""
    worst, apart, tried = 0.0, 0.0, 40
    for _ in range(tried):
        language = random_language(rng)
        for one in (language, _endless(language)):
            walks = one.enumerate()
            value = d.total_variation(one.new, one.old)[walks.state]
            average = d.average(value, walks)
            gap = abs(average - d.trajectory_normalized(value, walks))
            if one is language:
                apart = max(apart, gap / average)
            else:
                worst = max(worst, gap)
    broken = f"otherwise up to {100 * apart:.0f} % apart" if apart > 0.01 else None
    return judge(tried, worst, 1e-12, broken=broken, note="equal where all lengths are")


def _channels(language: Language) -> tuple[float, float, Walks]:
    """``E[S- - S+]``, the probability that ``S+ > S-``, and the trajectories."""
    walks = language.enumerate()
    ell = np.log(language.new[walks.state, walks.action] / language.old[walks.state, walks.action])
    plus = d.per_trajectory(np.maximum(ell, 0), walks)
    minus = d.per_trajectory(np.maximum(-ell, 0), walks)
    bias = float(walks.probability @ (minus - plus))
    return bias, float(walks.probability[plus > minus].sum()), walks


def channel_bias(rng: np.random.Generator) -> Finding:
    """``E[S-] - E[S+]`` is the trajectory-normalized KL for trajectories of one length."""
    worst, against, tried = 0.0, 0.0, 40
    for _ in range(tried):
        language = _endless(random_language(rng))
        bias, share, walks = _channels(language)
        exact = d.trajectory_normalized(d.kl(language.new, language.old)[walks.state], walks)
        worst, against = max(worst, abs(bias - exact)), max(against, share)
    # more inclined to end at once; otherwise five tokens on which the policies agree
    old = np.array([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]])
    new = np.array([[0.6, 0.4, 0.0], [0.0, 0.5, 0.5]])
    bias, _, _ = _channels(Language(old, new, np.ones((2, 3), dtype=np.int64), 6))
    broken = None
    if against > 0.1 and bias < -1e-9:
        broken = (
            f"not for single trajectories (S+ > S- with probability up to {against:.2f}), and not "
            "where tokens decide the length: end token from 0.5 to 0.6, otherwise six tokens, "
            f"E[S- - S+] = {bias:.3f}"
        )
    note = "in expectation, for trajectories of one length: the difference is the KL"
    return judge(tried, worst, 1e-12, broken=broken, note=note)


def gspo_population(rng: np.random.Generator) -> Finding:
    """Mean TV against ``sqrt(KL / 2)`` with the expected KL, enumerated (Pinsker and Jensen)."""
    violation, closest, whole, tried = 0.0, 0.0, 0.0, 200
    for _ in range(tried):
        language = random_language(rng)
        walks = language.enumerate()
        tv = d.average(d.total_variation(language.new, language.old)[walks.state], walks)
        bound = math.sqrt(d.average(d.kl(language.new, language.old)[walks.state], walks) / 2)
        violation = max(violation, tv - bound)
        closest, whole = max(closest, tv / bound), max(whole, 2 * tv / bound)
    note = f"TV up to {closest:.2f} of the bound; with TV as twice that it is sqrt(2 e)"
    if whole <= 1:
        note = f"TV up to {closest:.2f} of the bound, with or without the 1/2"
    return judge(tried, violation, 1e-12, note=note)


def gspo_trajectory(rng: np.random.Generator) -> Finding:
    """What one trajectory's ``s`` within its clip says about its own mean ``|r - 1|``."""
    epsilon, worst, tried = 4e-4, 0.0, 200
    for _ in range(tried):
        ell = rng.normal(0, 0.5, 20)
        ell -= ell.mean()  # log s = 0
        worst = max(worst, float(np.abs(np.expm1(ell)).mean()) - math.sqrt(epsilon / 2))
    half = np.repeat([0.5, -0.5], 10)
    s, seen = math.exp(half.mean()), float(np.abs(np.expm1(half)).mean())
    worst = max(worst, seen - math.sqrt(epsilon / 2))
    note = (
        f"half the tokens at +0.5, half at -0.5: log s = {math.log(s):.0f}, mean |r - 1| = "
        f"{seen:.2f} against sqrt(e/2) = {math.sqrt(epsilon / 2):.3f}"
    )
    return judge(tried + 1, worst, 1e-12, note=note)


CLAIMS = (
    Claim(
        "divergences in ratio form", "FiberPO, App. A.3",
        "Per-state, average, maximal and trajectory-normalized TV and KL are expectations of "
        "functions of the ratio under the old policy.",
        ratio_forms, Verdict.CONDITIONAL,
    ),
    Claim(
        "divergences in Monte-Carlo form", "FiberPO, App. A.3",
        "Per-state and average TV and KL are estimated by the means of |r - 1| / 2 and of -log r "
        "over sampled tokens.",
        monte_carlo, Verdict.HOLDS,
    ),
    Claim(
        "trajectory-normalized Monte-Carlo form", "FiberPO, App. A.3",
        "The mean over trajectories of (1/T) sum |r - 1| / 2 (or -log r) estimates the "
        "trajectory-normalized divergence without bias.",
        monte_carlo_normalized, Verdict.CONDITIONAL,
    ),
    Claim(
        "maximal divergence from samples", "FiberPO, App. A.3",
        "The largest per-state sample mean estimates the maximal TV.",
        monte_carlo_maximum, Verdict.CONDITIONAL,
    ),
    Claim(
        "TV without the 1/2", "FiberPO, App. A.3 and D",
        "The estimator (1/T_s) sum n |r - 1| is twice the total variation distance.",
        conventions, Verdict.HOLDS,
    ),
    Claim(
        "trajectory-normalized and average TV", "FiberPO, App. A.3",
        "The trajectory-normalized divergence equals the average over tokens.",
        normalisation, Verdict.CONDITIONAL,
    ),
    Claim(
        "S- exceeds S+", "FiberPO, Def 5.1 (choice of budgets)",
        "S- >= S+, because -mean log r estimates a KL divergence; hence C- < C+.",
        channel_bias, Verdict.CONDITIONAL,
    ),
    Claim(
        "GSPO bounds TV, population", "FiberPO, Claim 3.5",
        "If the expected KL is at most e, the mean TV is at most sqrt(e / 2).",
        gspo_population, Verdict.HOLDS,
    ),
    Claim(
        "GSPO bounds TV, one trajectory", "FiberPO, Claim 3.5",
        "A trajectory whose s lies within the clip has mean |r - 1| at most about sqrt(e / 2).",
        gspo_trajectory, Verdict.FAILS,
    ),
)  # fmt: skip
