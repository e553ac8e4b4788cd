"""Corrections of the mismatch between engine and trainer, against loops."""

import dataclasses
import math

import numpy as np
import pytest
import torch

import fiberpo
from core.cases import F64, packed, random_case, split
from fiberpo import MaxDivergence, Renormalised, recipes
from fiberpo.corrections import (
    OPSM,
    GeometricMask,
    IcePop,
    MaskedIS,
    TruncatedIS,
    corrected,
    from_name,
    masked,
    needs_engine,
)
from fiberpo.testing import assert_partition_invariant

LENGTHS = [1, 3, 2, 4]


def engine_batch(seed=0, scale=0.6, advantages=None, **more):
    """``log rho = log pi_old - log pi_rollout`` of random size; the ratio r drifts as well."""
    rng = np.random.default_rng(seed)
    log_rho = rng.normal(0, scale, sum(LENGTHS))
    log_ratios = rng.normal(0, 0.2, sum(LENGTHS))
    signs = rng.choice([-1.0, 1.0], sum(LENGTHS)) if advantages is None else advantages
    # the old log-probs of `packed` are 0
    data = packed(log_ratios, signs, LENGTHS, rollout_log_probs=torch.tensor(-log_rho), **more)
    return data, split(log_rho, LENGTHS), split(log_ratios, LENGTHS)


def level_of(rows, level):
    """``rho`` per token at its level, by loops."""
    found = []
    for row in rows:
        if level == "token":
            found += [math.exp(x) for x in row]
        elif level == "sequence":
            found += [math.prod(math.exp(x) for x in row)] * len(row)
        else:
            found += [math.prod(math.exp(x) for x in row) ** (1 / len(row))] * len(row)
    return found


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
def test_truncated_importance_sampling(level):
    """``min(rho, C)`` of old over rollout; the ratio current over old plays no part."""
    data, rows, _ = engine_batch()
    expected = [min(rho, 1.1) for rho in level_of(rows, level)]
    found = TruncatedIS(1.1, level)(data)
    assert found.dtype == F64
    assert found.tolist() == pytest.approx(expected, rel=1e-12)
    assert 1.1 in found.tolist()
    assert min(expected) < 1.1
    moved = data.with_log_probs(data.log_probs + 0.7)
    assert torch.equal(TruncatedIS(1.1, level)(moved), found)


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
def test_masked_importance_sampling(level):
    """``rho 1[low <= rho <= high]``."""
    data, rows, _ = engine_batch()
    expected = [rho if 0.8 <= rho <= 1.1 else 0.0 for rho in level_of(rows, level)]
    assert MaskedIS(0.8, 1.1, level)(data).tolist() == pytest.approx(expected, rel=1e-12)
    assert 0.0 in expected
    assert max(expected) > 0


def test_icepop_is_the_band_of_the_paper():
    """0.5 to 5, ends included."""
    rho = [0.49, 0.5, 1.0, 5.0, 5.1]
    data = packed(
        [0.0] * 5, [1.0] * 5, [5], rollout_log_probs=-torch.log(torch.tensor(rho).double())
    )
    kept = [x if ok else 0.0 for x, ok in zip(rho, (False, True, True, True, False))]
    # the ends are logs of floats: give them a last bit of room
    assert IcePop(0.5 - 1e-9, 5 + 1e-9)(data).tolist() == pytest.approx(kept)
    assert (IcePop().low, IcePop().high) == (0.5, 5.0)


def test_geometric_mask_does_not_grow_with_length():
    """exp of the mean: ten tokens of 1.05 are 1.05, where their product is 1.63."""
    data, rows, _ = engine_batch(1, 0.3)
    expected = [0.9 <= math.exp(sum(row) / len(row)) <= 1.1 for row in rows]
    assert GeometricMask(0.9, 1.1)(data).tolist() == expected
    assert len(set(expected)) == 2
    long = packed(
        [0.0] * 10, [1.0] * 10, [10], rollout_log_probs=torch.full((10,), -math.log(1.05)).double()
    )
    assert GeometricMask(0.9, 1.1)(long).tolist() == [True]


def test_opsm_compares_rollout_with_the_current_policy():
    """Dropped iff the advantages add up to less than 0 and mean(log mu - log pi) > delta."""
    data, rho, ratios = engine_batch(2)
    advantages = split(data.advantages, LENGTHS)
    expected = []
    for a, x, y in zip(advantages, rho, ratios):
        # log mu - log pi = -(log rho + log r)
        drift = -sum(p + q for p, q in zip(x, y)) / len(x)
        expected.append(not (sum(a) < 0 and drift > 0.1))
    assert OPSM(0.1)(data).tolist() == expected
    falling = packed(
        [-0.3, -0.3, -0.3], [-1.0, 1.0, -1.0], [1, 1, 1], rollout_log_probs=torch.zeros(3).double()
    )
    assert OPSM(0.2)(falling).tolist() == [False, True, False]
    assert OPSM(0.4)(falling).tolist() == [True, True, True]
    rising = falling.with_log_probs(-falling.log_probs)
    assert OPSM(0.2)(rising).tolist() == [True, True, True]


def test_opsm_drops_the_whole_sequence():
    """Tokens of both signs, and of A = 0 in the sum: no token is judged by itself."""
    rollout = torch.zeros(4).double()
    data = packed([-0.5] * 4, [-0.5, 0.25, 0.25, -0.25], [2, 2], rollout_log_probs=rollout)
    assert OPSM(0.1)(data).tolist() == [False, True]


def test_factors_multiply_the_terms():
    """``sum mu rho G A`` and its coefficients; kept gradient direction, denominators unchanged."""
    data, _, _ = engine_batch(3)
    plain = recipes.fiberpo()(data)
    factor = TruncatedIS(1.5)
    out = corrected(recipes.fiberpo(), factors=[factor])(data)
    torch.testing.assert_close(out.weight, plain.weight * factor(data))
    reference = corrected(recipes.fiberpo(), factors=[factor])(data, gradient="autograd")
    torch.testing.assert_close(out.coefficients, reference.coefficients)
    assert out.loss.item() == pytest.approx(
        -(plain.weight * factor(data) * plain.log_gated_ratio.exp()).sum().item()
    )


@pytest.mark.parametrize(
    "part", [TruncatedIS(), MaskedIS(), IcePop(), GeometricMask(0.9, 1.1), OPSM(0.1)],
    ids=lambda p: type(p).__name__,
)  # fmt: skip
def test_missing_rollout_log_probs_are_named(part):
    """The remedy is the argument."""
    with pytest.raises(fiberpo.ObjectiveError, match="pass rollout_log_probs"):
        part(packed([0.0], [1.0], [1]))


@pytest.mark.parametrize(
    ("make", "quoted"),
    [
        (lambda: TruncatedIS(0.0), "limit is 0.0"),
        (lambda: TruncatedIS(2.0, "turn"), "'turn'"),
        (lambda: MaskedIS(1.0, 0.5), "1 to 0.5"),
        (lambda: MaskedIS(-1.0, 0.5), "low is -1.0"),
        (lambda: MaskedIS(0.5, 2.0, "row"), "'row'"),
        (lambda: IcePop(0.5, math.nan), "nan"),
        (lambda: GeometricMask(2.0, 1.0), "2 to 1"),
        (lambda: OPSM(0.0), "delta is 0.0"),
        (lambda: from_name(recipes.grpo(), "tsi"), "'tsi'; there are tis"),
        (lambda: from_name(recipes.grpo(), "opsm"), "needs delta"),
        (lambda: from_name(recipes.grpo(), "tis", cap=2.0), "limit, level"),
        (lambda: masked(recipes.grpo(), correction_kwargs={"delta": 1.0}), "correction = None"),
        (lambda: masked(recipes.grpo(), correction="opsm", correction_kwargs="x"), "'x'"),
        (lambda: masked(recipes.grpo(), mask_max=0.0), "delta is 0.0"),
    ],
)
def test_impossible_corrections_are_refused(make, quoted):
    """The value is quoted."""
    with pytest.raises(fiberpo.FiberPOError, match=quoted):
        make()


def test_by_name_and_settings():
    """What a trainer's settings make; several masks are joined by AND."""
    objective = masked(
        recipes.grpo(), mask_max=0.05, mask_mean=0.001, correction="opsm",
        correction_kwargs={"delta": 0.1},
    )  # fmt: skip
    assert objective.mask == (MaxDivergence(0.05) & fiberpo.MeanDivergence(0.001)) & OPSM(0.1)
    assert objective.factors == ()
    assert masked(recipes.grpo()) == recipes.grpo()
    one = from_name(recipes.grpo(), "icepop", low=0.7)
    assert one.factors == (IcePop(0.7),)
    assert "IcePop" in str(one)


def test_what_needs_an_engine():
    """Without one, ``rho = 1``: factors and the geometric mask do nothing, opsm and TRM do."""
    mask = Renormalised(MaxDivergence(0.1) & GeometricMask(0.9, 1.1))
    objective = corrected(recipes.grpo(mask=mask), factors=[TruncatedIS()])
    assert needs_engine(objective) == ["GeometricMask", "TruncatedIS"]
    assert needs_engine(recipes.grpo(mask=MaxDivergence(0.1) & OPSM(0.1))) == []
    assert needs_engine(recipes.grpo()) == []


def test_citations_follow_the_parts():
    """Each source once, and Trust Region Masking only where it is used."""
    text = fiberpo.citation(recipes.grpo(mask=OPSM(0.1) & MaxDivergence(0.1)))
    assert text.count("2512.02556") == text.count("2512.23075") == 1
    assert "2512.23075" not in fiberpo.citation(recipes.grpo(mask=OPSM(0.1)))
    assert "2510.18855" in fiberpo.citation(from_name(recipes.grpo(), "icepop"))


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
@pytest.mark.parametrize("split_trajectories", [False, True])
@pytest.mark.filterwarnings("ignore::fiberpo.FiberPOWarning")
def test_factors_survive_any_cut(level, split_trajectories):
    """Products and means over trajectories whose pieces lie on several ranks."""
    case = random_case(4)
    rollout = torch.tensor(np.random.default_rng(4).normal(0, 0.3, len(case.log_ratios)))
    data = case.batch(rollout_log_probs=rollout)
    objective = corrected(recipes.fiberpo(), factors=[TruncatedIS(1.1, level)])
    assert_partition_invariant(objective, data, split_trajectories=split_trajectories, trials=3)


def test_pieces_of_a_sequence_ratio_are_refused_where_a_part_is_not_enough():
    """A part of a batch does not know the product over the whole trajectory."""
    data, _, _ = engine_batch(5, labels={"trajectory": ["a", "a", "b", "c"]})
    objective = corrected(recipes.ppo(), factors=[TruncatedIS(2.0, "sequence")])
    with pytest.raises(fiberpo.ObjectiveError, match="trajectory"):
        objective(data, denominators=fiberpo.Denominators(20, 8))


def test_objectives_with_corrections_pickle():
    """As every objective does."""
    import pickle

    objective = corrected(recipes.fiberpo(mask=OPSM(0.1)), factors=[IcePop()])
    again = pickle.loads(pickle.dumps(objective))
    assert (again.mask, again.factors) == (objective.mask, objective.factors)
    assert dataclasses.replace(again, mask=None).factors == objective.factors
