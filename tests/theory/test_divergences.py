"""Divergences: tables by hand, aggregates by loops over enumerated trajectories."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fiberpo.theory import divergences as d
from fiberpo.theory.language import END, Language, random_language

seeds = st.integers(0, 10**6)


def by_recursion(language, value, state=0, length=0):
    """Per trajectory ``(probability, [value(s, a), ...])``, depth first."""
    found = []
    for token, p in enumerate(language.old[state]):
        if p == 0:
            continue
        here = value(state, token)
        if token == END or length + 1 == language.horizon:
            found.append((p, [here]))
            continue
        after = int(language.following[state, token])
        for q, rest in by_recursion(language, value, after, length + 1):
            found.append((p * q, [here, *rest]))
    return found


def test_total_variation_and_kl_by_hand():
    """(0.5, 0.5) to (0.8, 0.2): TV 0.3; KL = -0.5 log(1.6) - 0.5 log(0.4)."""
    old, new = np.array([0.5, 0.5]), np.array([0.8, 0.2])
    assert d.total_variation(new, old) == pytest.approx(0.3)
    assert d.total_variation(new, old, half=False) == pytest.approx(0.6)
    assert d.kl(new, old) == pytest.approx(-0.5 * math.log(1.6) - 0.5 * math.log(0.4))


def test_kl_where_one_of_them_has_no_mass():
    """Tokens that the old policy never samples cost nothing; those the new one drops, infinity."""
    assert d.kl(np.array([0.5, 0.5]), np.array([1.0, 0.0])) == pytest.approx(math.log(2))
    assert d.kl(np.array([1.0, 0.0]), np.array([0.5, 0.5])) == math.inf


@given(seeds)
def test_ratio_forms_are_sums_over_the_old_policy(seed):
    language = random_language(np.random.default_rng(seed))
    for s, (old, new) in enumerate(zip(language.old, language.new)):
        tv = sum(p * abs(q / p - 1) / 2 for p, q in zip(old, new))
        kl = sum(-p * math.log(q / p) for p, q in zip(old, new))
        row = language.ratio[s]
        assert d.ratio_form(d.tv_term(row), old) == pytest.approx(tv)
        assert d.ratio_form(d.kl_term(row), old) == pytest.approx(kl)
        assert d.total_variation(new, old) == pytest.approx(tv)
        assert d.kl(new, old) == pytest.approx(kl)


@given(seeds)
def test_aggregates_are_loops_over_trajectories(seed):
    """Average weighs tokens, the trajectory-normalized form trajectories."""
    language = random_language(np.random.default_rng(seed))
    walks = language.enumerate()
    table = d.total_variation(language.new, language.old)
    paths = by_recursion(language, lambda s, a: table[s])
    assert sum(p for p, _ in paths) == pytest.approx(1)
    tokens = sum(p * len(path) for p, path in paths)
    average = sum(p * sum(path) for p, path in paths) / tokens
    normalized = sum(p * sum(path) / len(path) for p, path in paths)
    assert d.average(table[walks.state], walks) == pytest.approx(average)
    assert d.trajectory_normalized(table[walks.state], walks) == pytest.approx(normalized)
    seen = set(walks.state.tolist())
    assert d.maximum(table[walks.state], walks.state, 3) == pytest.approx(max(table[list(seen)]))


def test_per_state_means_of_samples():
    value, state = np.array([1.0, 3.0, 5.0]), np.array([0, 0, 2])
    found = d.per_state(value, state, 3)
    assert found[[0, 2]].tolist() == [2.0, 5.0]
    assert math.isnan(found[1])
    assert d.maximum(value, state, 3) == 5.0


def test_a_sample_follows_the_policy():
    """Frequencies of whole trajectories against their probabilities."""
    rng = np.random.default_rng(0)
    language = random_language(rng, horizon=3)
    exact, sample = language.enumerate(), language.sample(20_000, rng)
    paths = by_recursion(language, lambda s, a: a)
    assert exact.probability.sum() == pytest.approx(1)
    assert len(paths) == len(exact.probability)
    counted = {}
    for t in range(20_000):
        key = tuple(sample.action[sample.trajectory == t]) if t < 300 else None
        counted[key] = counted.get(key, 0) + 1
    assert set(counted) - {None} <= {tuple(path) for _, path in paths}
    lengths = np.bincount(sample.lengths.astype(int), minlength=4) / 20_000
    expected = [sum(p for p, path in paths if len(path) == n) for n in range(4)]
    assert lengths == pytest.approx(expected, abs=0.02)


def test_length_and_tokens_are_confounded():
    """E[(1/T) sum -log r] is negative though every KL is not: 0.5 (-log 1.2) + 0.5 (-log 0.8)/2."""
    old = np.array([[0.5, 0.5], [0.0, 1.0]])
    new = np.array([[0.6, 0.4], [0.0, 1.0]])
    language = Language(old, new, np.ones((2, 2), dtype=np.int64), 2)
    walks = language.enumerate()
    term = d.kl_term(language.ratio)[walks.state, walks.action]
    expected = 0.5 * -math.log(1.2) + 0.5 * -math.log(0.8) / 2
    assert d.trajectory_normalized(term, walks) == pytest.approx(expected)
    assert expected < 0 < d.average(term, walks)
