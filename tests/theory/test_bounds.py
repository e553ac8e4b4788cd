"""The bounds of Trust Region Masking (arXiv 2512.23075) as numbers, against loops."""

import math
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fiberpo import BoundError
from fiberpo.theory import bounds as b

NAMES = ["classical", "coupling", "pm_kl", "pm_tv", "mixed_kl", "mixed_tv", "adaptive"]
REFERENCE = [
    ({"kl_max": 1e-4, "kl_seq": 0.01}, "classical", 1677.312, 3),
    ({"kl_max": 1e-4, "kl_seq": 0.01}, "coupling", 113.838, 3),
    ({"kl_max": 1e-4, "kl_seq": 0.01}, "pm_kl", 34.946, 3),
    ({"kl_max": 1e-4, "kl_seq": 0.01}, "mixed_kl", 8.192, 3),
    ({"kl_max": 1e-4, "tv_max": 5e-3}, "classical", 838.656, 3),
    ({"kl_max": 1e-4, "tv_max": 5e-3}, "coupling", 79.910, 3),
    ({"kl_max": 1e-4, "tv_max": 5e-3}, "pm_tv", 24.711, 3),
    ({"tv_max": 5e-3, "tv_seq": 0.05}, "mixed_tv", 4.096, 3),
    ({"kl_max": 1.0, "kl_seq": 1.0}, "pm_kl", 11581.58, 2),
    ({"kl_max": 1.0, "kl_seq": 1.0}, "mixed_kl", 8192, 2),
    ({"kl_max": 0.01}, "pm_kl", 1139.52, 2),
]


def oracle(name, length, eps, delta, kl_seq, tv_seq, mean_tv, factor=4, product=False):
    """The formulas with loops over t = 1 .. T."""

    def linear(s):
        return 1 - (1 - eps) ** s if product else min(1, s * eps)

    def root(s):
        return min(1, math.sqrt(s * delta / 2))

    tokens = range(1, length + 1)
    token_kl = min(1, math.sqrt(delta / 2))
    if name == "classical":
        return factor / 2 * length * (length - 1) * eps**2
    if name == "coupling":
        return factor * min(1, eps) * math.fsum(linear(t - 1) for t in tokens)
    if name == "pm_kl":
        return factor * token_kl * math.fsum(root(t - 1) for t in tokens)
    if name == "pm_tv":
        return factor * min(1, eps) * math.fsum(root(t - 1) for t in tokens)
    if name == "mixed_kl":
        return factor * length * token_kl * min(1, math.sqrt(kl_seq / 2))
    if name == "mixed_tv":
        return factor * length * min(1, eps) * min(1, tv_seq)
    return factor * math.fsum(
        mean_tv[t - 1] * min(1, linear(length - t), root(length - t)) for t in tokens
    )


@pytest.mark.parametrize(("given", "name", "value", "digits"), REFERENCE)
def test_numbers_at_4096_tokens(given, name, value, digits):
    """To the printed digits."""
    assert round(b.bounds(4096, **given).known[name], digits) == value


def test_smallest_at_4096_tokens():
    """With KL and TV known, the mixed TV bound is B*; with KL alone the mixed KL bound."""
    found = b.bounds(4096, kl_max=1e-4, kl_seq=0.01, tv_max=5e-3, tv_seq=0.05)
    assert (found.tightest, round(found.best, 3)) == ("mixed_tv", 4.096)
    assert b.bounds(4096, kl_max=1e-4, kl_seq=0.01).tightest == "mixed_kl"


@given(
    length=st.integers(1, 60), eps=st.floats(0, 1), above=st.floats(0, 3),
    shares=st.tuples(st.floats(0, 1), st.floats(0, 1)), seed=st.integers(0, 99),
    factor=st.sampled_from([2, 4]), product=st.booleans(), width=st.floats(0.1, 10),
)  # fmt: skip
def test_all_bounds_are_the_loops(length, eps, above, shares, seed, factor, product, width):
    """Every bound, both constants, any reward range; KL large enough for the TV (Pinsker)."""
    delta = 2 * eps**2 + above
    kl_seq, tv_seq = shares[0] * length * delta, min(1.0, shares[1] * length * eps)
    mean_tv = eps * np.random.default_rng(seed).random(length)
    found = b.bounds(
        length, kl_max=delta, kl_seq=kl_seq, tv_max=eps, tv_seq=tv_seq, mean_tv=mean_tv,
        reward_range=(-1.0, width - 1.0), factor=factor, product=product,
    )  # fmt: skip
    assert list(found.known) == NAMES
    for name in NAMES:
        expected = oracle(name, length, eps, delta, kl_seq, tv_seq, mean_tv, factor, product)
        assert found.known[name] == pytest.approx(width * expected, rel=1e-9, abs=1e-12), name


@pytest.mark.parametrize("name", ["classical", "coupling"])
@pytest.mark.parametrize(("tv_max", "eps"), [(None, 0.1), (0.5, 0.1), (0.04, 0.04)])
def test_eps_is_the_smaller_of_tv_and_pinsker(name, tv_max, eps):
    """``kl_max = 0.02`` gives 0.1; a larger TV is no help, a smaller one is."""
    found = b.bounds(7, kl_max=0.02, tv_max=tv_max)
    assert found.eps == pytest.approx(eps)
    assert found.known[name] == pytest.approx(oracle(name, 7, eps, 0.02, 0, 0, []))


@pytest.mark.parametrize(
    ("given", "known"),
    [
        ({"kl_max": 0.1}, {"classical", "coupling", "pm_kl"}),
        ({"tv_max": 0.1}, {"classical", "coupling"}),
        ({"tv_max": 0.1, "kl_seq": 0.1}, {"classical", "coupling"}),
        ({"tv_max": 0.1, "tv_seq": 0.1}, {"classical", "coupling", "mixed_tv"}),
        ({"kl_max": 0.1, "kl_seq": 0.1}, {"classical", "coupling", "pm_kl", "mixed_kl"}),
        ({"kl_max": 0.1, "tv_seq": 0.1}, {"classical", "coupling", "pm_kl"}),
        ({"kl_max": 0.1, "tv_max": 0.1}, {"classical", "coupling", "pm_kl", "pm_tv"}),
        ({"tv_max": 0.1, "mean_tv": [0.1] * 9}, {"classical", "coupling", "adaptive"}),
        ({"kl_max": 0.1, "mean_tv": [0.1] * 9}, {"classical", "coupling", "pm_kl", "adaptive"}),
    ],
)
def test_missing_inputs_leave_a_bound_out(given, known):
    """None in the dictionary, and not in the minimum; what a bound needs is on record."""
    found = b.bounds(9, **given)
    assert set(found.known) == known
    values = found.as_dict()
    assert list(values) == [*NAMES, "best", "tightest"]
    assert {name for name in NAMES if values[name] is not None} == known
    for name in set(NAMES) - known:
        assert not set(b.NEEDS[name]) <= set(given)
    assert values["best"] == min(found.known.values())
    assert found.known[values["tightest"]] == pytest.approx(values["best"])


@pytest.mark.parametrize("name", ["classical", "coupling", "pm_kl", "pm_tv", "adaptive"])
@pytest.mark.parametrize("tight", [False, True])
def test_one_token_has_no_error(name, tight):
    """T = 1: zero, not merely small."""
    found = b.bounds(1, kl_max=0.5, tv_max=0.5, mean_tv=[0.5], tight=tight)
    assert found.known[name] == 0.0
    assert "single token" in found.why


def test_tight_is_factor_two_and_product_form():
    """``tight`` is both at once, and lowers every bound."""
    given = {"kl_max": 0.5, "kl_seq": 0.1, "tv_max": 0.09, "tv_seq": 0.2, "mean_tv": [0.05] * 30}
    plain, tight = b.bounds(30, **given), b.bounds(30, **given, tight=True)
    assert tight == b.bounds(30, **given, factor=2, product=True)
    for name in NAMES:
        ratio = tight.known[name] / plain.known[name]
        assert ratio == pytest.approx(0.5) if name not in ("coupling", "adaptive") else ratio < 0.5


def test_product_form_of_the_coupling_in_closed_form():
    """``sum_t 1 - (1-eps)^(t-1) = T - (1 - (1-eps)^T) / eps``; exact for eps of any size."""
    for eps in (1e-12, 1e-7, 0.01, 0.5):
        e, length = Fraction(eps), 40
        exact = 4 * e * (length - (1 - (1 - e) ** length) / e)
        assert b.coupling(length, eps, product=True) == pytest.approx(float(exact), rel=1e-12)
    assert b.coupling(5, 1.0, product=True) == b.coupling(5, 1.0) == 16.0


def test_a_million_tokens():
    """Every sum, accurate: the three laws of drift against exact sums."""
    length, delta, eps = 10**6, 1e-6, 5e-4
    found = b.bounds(length, kl_max=delta, tv_max=eps, mean_tv=np.full(length, 2e-4))
    linear = math.fsum(min(1.0, s * eps) for s in range(length))
    root = math.fsum(min(1.0, math.sqrt(s * delta / 2)) for s in range(length))
    both = math.fsum(min(1.0, s * eps, math.sqrt(s * delta / 2)) for s in range(length))
    assert found.coupling == pytest.approx(4 * eps * linear, rel=1e-13)
    assert found.pm_kl == pytest.approx(4 * math.sqrt(delta / 2) * root, rel=1e-13)
    assert found.pm_tv == pytest.approx(4 * eps * root, rel=1e-13)
    assert found.adaptive == pytest.approx(4 * 2e-4 * both, rel=1e-13)
    assert found.classical == 2 * length * (length - 1) * eps**2


@given(
    length=st.integers(1, 40), eps=st.floats(0, 0.5), delta=st.floats(0, 1),
    more=st.floats(1, 2), factor=st.sampled_from([2, 4]), product=st.booleans(),
)  # fmt: skip
def test_bounds_grow_with_length_and_divergence(length, eps, delta, more, factor, product):
    """Any upper bound may stand for a divergence."""
    options = {"factor": factor, "product": product}

    def values(tokens, times):
        return b.bounds(
            tokens, kl_max=times * delta, kl_seq=times * delta / 2, tv_max=times * eps,
            tv_seq=times * eps / 2, mean_tv=[times * eps / 3] * tokens, **options,
        ).known  # fmt: skip

    base = values(length, 1.0)
    for larger in (values(length + 1, 1.0), values(length, more)):
        for name in NAMES:
            assert larger[name] >= base[name] * (1 - 1e-12), name


@given(length=st.integers(1, 3000), delta=st.floats(0, 1))
def test_simplified_form_is_above_pm_kl(length, delta):
    """``(4/3) T^1.5 kl_max``."""
    assert b.pm_simplified(length, delta) == pytest.approx(4 / 3 * length**1.5 * delta)
    assert b.pm_simplified(length, delta) >= b.pm_kl(length, delta) * (1 - 1e-12)


def test_adaptive_forms_keep_their_term():
    """KL only, TV only, both; the future of token t has T - t tokens."""
    means = [0.1, 0.05, 0.02]
    by_tv = b.adaptive(means, tv_max=0.1)
    by_kl = b.adaptive(means, kl_max=0.005)
    assert by_tv == pytest.approx(4 * (0.1 * 0.2 + 0.05 * 0.1))
    assert by_kl == pytest.approx(4 * (0.1 * math.sqrt(0.005) + 0.05 * 0.05))
    assert b.adaptive(means, tv_max=0.1, kl_max=0.005) == min(by_tv, by_kl) == by_kl
    mixed = b.adaptive(means, tv_max=0.1, kl_max=0.0225)  # 0.106 at one step, 0.15 at two
    assert mixed == pytest.approx(4 * (0.1 * 0.15 + 0.05 * 0.1))
    assert b.adaptive(means, tv_max=0.1, product=True) == pytest.approx(
        4 * (0.1 * 0.19 + 0.05 * 0.1)
    )


def test_pinsker_is_capped():
    """``sqrt(2 / 2) = 1`` is the largest total variation."""
    assert b.pinsker(0.5) == 0.5
    assert b.pinsker(2.0) == b.pinsker(50.0) == 1.0


@pytest.mark.parametrize(
    ("given", "tightest", "words"),
    [
        ({"kl_max": 1e-4, "kl_seq": 0.01}, "mixed_kl", "whole sequence, 0.07071"),
        ({"tv_max": 1e-3, "tv_seq": 0.01}, "mixed_tv", "whole sequence, 0.01;"),
        ({"kl_max": 1e-4}, "pm_kl", "sqrt((t-1) kl_max/2) and stays below 1"),
        ({"kl_max": 0.01}, "pm_kl", "capped at 1 from token 201 on"),
        ({"kl_max": 0.01, "tv_max": 0.06}, "pm_tv", "capped at 1 from token 201 on"),
        ({"tv_max": 0.01}, "coupling", "(t-1) eps and is capped at 1 from token 101 on"),
        ({"tv_max": 0.01, "product": True}, "coupling", "1 - (1-eps)^(t-1)"),
        ({"tv_max": 2**-12}, "classical", "(t-1) eps and stays below 1"),
        ({"tv_max": 0.01, "mean_tv": [0.001] * 4096}, "adaptive", "the others charge the largest"),
    ],
)  # fmt: skip
def test_the_reason_is_given(given, tightest, words):
    """Which one is the tightest at 4096 tokens, and what makes it so."""
    found = b.bounds(4096, **given)
    assert found.tightest == tightest
    assert words in found.why


def test_first_token_at_the_cap():
    """eps = 1/4: the prefix of token 5 has four tokens, and their drift reaches 1."""
    assert "capped at 1 from token 5 on" in b.bounds(9, tv_max=0.25).why


def test_of_equal_bounds_the_first_is_named():
    """Three tokens without a cap: classical and coupling agree, up to rounding."""
    for tv in np.linspace(0.01, 0.49, 30):
        assert b.bounds(3, tv_max=float(tv)).tightest == "classical"


def test_certifying_needs_more_than_the_bound():
    """``L' > B*``, strictly."""
    found = b.bounds(2, tv_max=0.1)
    assert found.best == pytest.approx(0.04)
    assert not found.certifies(found.best)
    assert found.certifies(np.nextafter(found.best, 1))


@pytest.mark.parametrize(
    ("given", "reach"),
    [
        ({"tv_max": 0.01}, 1.0),
        ({"tv_max": 0.01, "kl_max": 0.01, "kl_seq": 0.005}, 0.5),
        ({"tv_max": 0.01, "mean_tv": [0.001] * 100}, 0.1),
        ({"tv_max": 0.01, "mean_tv": [0.001] * 100, "reward_range": (-1, 1)}, 0.2),
    ],
)
def test_reach_of_the_surrogate(given, reach):
    """The least of ``T eps``, ``sqrt(T kl_seq / 2)`` and the sum of means, times ``b - a``."""
    found = b.bounds(100, **given)
    assert found.reach == pytest.approx(reach)
    assert found.vacuous == (found.best >= found.reach)


@pytest.mark.parametrize(("delta", "vacuous"), [(0.0012, False), (0.0013, True)])
def test_mixed_kl_certifies_only_below_an_eighth(delta, vacuous):
    """``T kl_max < 1/8``: at 100 tokens, ``kl_max < 0.00125``."""
    found = b.bounds(100, kl_max=delta, kl_seq=1e-4)
    assert found.tightest == "mixed_kl"
    assert found.vacuous is vacuous


@pytest.mark.parametrize(
    ("length", "given", "message"),
    [
        (0, {"tv_max": 0.1}, "length is 0; a sequence has 1 to"),
        (-3, {"tv_max": 0.1}, "length is -3"),
        (10**9, {"tv_max": 0.1}, "length is 1000000000"),
        (2.0, {"tv_max": 0.1}, r"length is 2\.0; it must be a whole number"),
        (True, {"tv_max": 0.1}, "length is True"),
        (4, {}, "neither tv_max nor kl_max"),
        (4, {"kl_seq": 0.1, "tv_seq": 0.1}, "neither tv_max nor kl_max"),
        (4, {"tv_max": 1.1}, r"tv_max is 1\.1; a total variation"),
        (4, {"tv_max": -0.1}, r"tv_max is -0\.1"),
        (4, {"tv_max": 0.1, "tv_seq": 1.5}, r"tv_seq is 1\.5"),
        (4, {"kl_max": 0.1, "tv_seq": 1.5}, r"tv_seq is 1\.5"),
        (4, {"kl_max": -0.1}, r"kl_max is -0\.1; a KL divergence is never negative"),
        (4, {"tv_max": 0.1, "kl_seq": -1.0}, "kl_seq is -1"),
        (4, {"kl_max": math.inf}, "kl_max is inf; it must be a finite number"),
        (4, {"tv_max": math.nan}, "tv_max is nan"),
        (4, {"tv_max": "0.1"}, r"tv_max is '0\.1'"),
        (4, {"kl_max": 0.1, "kl_seq": 0.41}, r"kl_seq is 0\.41, but 4 tokens .* contradict"),
        (4, {"tv_max": 0.1, "tv_seq": 0.41}, r"tv_seq is 0\.41, but 4 tokens .* contradict"),
        (4, {"tv_max": 0.1, "mean_tv": [0.1] * 3}, r"mean_tv has shape \(3,\); .* \[4\]"),
        (4, {"tv_max": 0.1, "mean_tv": 0.1}, r"mean_tv has shape \(\)"),
        (4, {"tv_max": 0.1, "mean_tv": [0.1, 0.2, 0, 0]}, r"mean_tv\[1\] is 0\.2, above tv_max"),
        (4, {"kl_max": 0.1, "mean_tv": [0.1, 0, 0, -1]}, r"mean_tv\[3\] is -1"),
        (4, {"kl_max": 0.1, "mean_tv": [0.1, math.nan, 0, 0]}, r"mean_tv\[1\] is nan"),
        (4, {"tv_max": 0.1, "reward_range": (1, 0)}, r"reward_range is \(1, 0\)"),
        (4, {"tv_max": 0.1, "reward_range": (1, 1)}, r"reward_range is \(1, 1\)"),
        (4, {"tv_max": 0.1, "reward_range": (0, 1, 2)}, r"pair \(lowest, highest\)"),
        (4, {"tv_max": 0.1, "reward_range": (0, math.inf)}, "reward_range is inf"),
        (4, {"tv_max": 0.1, "factor": 1}, "factor is 1; 4"),
    ],
)
def test_impossible_inputs_are_refused(length, given, message):
    """The value is quoted, and what would be possible is said."""
    with pytest.raises(BoundError, match=message):
        b.bounds(length, **given)


def test_adaptive_by_itself_refuses():
    """Nothing to bound the future with; no positions."""
    with pytest.raises(BoundError, match="neither tv_max nor kl_max"):
        b.adaptive([0.1, 0.1])
    with pytest.raises(BoundError, match="length is 0"):
        b.adaptive([], tv_max=0.1)
    with pytest.raises(BoundError, match=r"shape \(1, 2\)"):
        b.adaptive([[0.1, 0.1]], tv_max=0.1)


def test_sequence_divergence_of_exactly_the_sum_is_possible():
    """Also where the sum rounds up: six times 0.01."""
    total = 0.0
    for _ in range(6):
        total += 0.01
    assert total > 6 * 0.01
    assert b.mixed_kl(6, 0.01, total) == pytest.approx(24 * math.sqrt(0.005 * 0.03))


def test_bounds_need_no_torch():
    """The command line answers at once."""
    code = "import sys, fiberpo.theory.bounds; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
