"""PPO, dual clip, GRPO, Dr. GRPO, DAPO, GSPO and APC-Obj: App. C.4 and Def. 3.2."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fiberpo
from core import oracle
from core.cases import packed, random_case, split
from fiberpo import Regime, recipes

seeds = st.integers(0, 10**6)
log = math.log


def gated(objective, case):
    return objective(case.batch()).log_gated_ratio.exp().tolist()


@given(seeds, st.floats(0.05, 0.5), st.floats(0.05, 0.5), st.none() | st.floats(1.05, 3.0))
def test_sign_aware_ppo_is_the_minimum(seed, low, high, dual):
    """``G A = min(r A, clip(r) A)``; dual clip: also ``G <= c`` where ``A < 0``."""
    case = random_case(seed, scale=0.6)
    found = gated(recipes.ppo(low, high, dual_clip=dual), case)
    expected = oracle.ppo_app_c4(case.log_ratios, case.advantages, low, high, dual)
    assert found == pytest.approx(expected, rel=1e-12)


@given(seeds, st.floats(0.05, 0.5), st.floats(0.05, 0.5))
def test_plain_ppo_is_the_clip(seed, low, high):
    """Remark C.5: no min, both sides clipped whatever the advantage."""
    case = random_case(seed, scale=0.6)
    found = gated(recipes.ppo(low, high, sign_aware=False), case)
    assert found == pytest.approx(oracle.ppo_plain(case.log_ratios, low, high), rel=1e-12)


@pytest.mark.parametrize(
    ("r", "advantage", "expected", "slope"),
    [
        (1.5, +1.0, 1.2, 0.0),  # too high and rewarded: clipped
        (1.5, -1.0, 1.5, 1.5),  # too high and punished: the gradient brings it back
        (0.5, +1.0, 0.5, 0.5),  # too low and rewarded: the gradient brings it back
        (0.5, -1.0, 0.8, 0.0),  # too low and punished: clipped
        (1.1, +1.0, 1.1, 1.1),
        (0.9, -1.0, 0.9, 0.9),
    ],
)
def test_ppo_by_hand(r, advantage, expected, slope):
    """epsilon = 0.2, one token."""
    out = recipes.ppo(0.2)(packed([log(r)], [advantage], [1]))
    assert out.log_gated_ratio.exp().item() == pytest.approx(expected)
    assert out.coefficients.item() == pytest.approx(slope * advantage)


@pytest.mark.parametrize(("advantage", "expected", "slope"), [(-1.0, 3.0, 0.0), (1.0, 1.2, 0.0)])
def test_dual_clip_bounds_the_punished_side_only(advantage, expected, slope):
    """r = 5, c = 3: where A < 0 the ratio stops at 3, where A > 0 at 1.2 as ever."""
    out = recipes.ppo(0.2, dual_clip=3.0)(packed([log(5.0)], [advantage], [1]))
    assert out.log_gated_ratio.exp().item() == pytest.approx(expected)
    assert out.coefficients.item() == pytest.approx(slope)


def test_dual_clip_leaves_moderate_ratios_alone():
    """r = 2, A = -1, c = 3: nothing is clipped."""
    out = recipes.ppo(0.2, dual_clip=3.0)(packed([log(2.0)], [-1.0], [1]))
    assert out.coefficients.item() == pytest.approx(-2.0)


def test_clipping_is_reported():
    """The token regime is ZERO exactly where the gradient stops."""
    out = recipes.ppo(0.2)(packed([log(1.5), log(1.5), 0.0], [1.0, -1.0, 1.0], [3]))
    assert out.regimes["token"].tolist() == [[Regime.ZERO, Regime.PASS, Regime.PASS]]
    assert set(out.regimes) == {"token"}


def test_dapo_defaults_are_its_paper():
    """``[1 - 0.2, 1 + 0.28]``, token mean."""
    case = random_case(1, scale=0.6)
    out = recipes.dapo()(case.batch())
    expected = oracle.ppo_app_c4(case.log_ratios, case.advantages, 0.2, 0.28)
    assert out.log_gated_ratio.exp().tolist() == pytest.approx(expected)
    mu = torch.tensor(oracle.token_mean(case.lengths))
    assert torch.allclose(out.weight, mu.double() * torch.tensor(case.advantages).double())


@pytest.mark.parametrize(
    ("objective", "mu"),
    [
        (recipes.ppo(), oracle.token_mean),
        (recipes.grpo(), oracle.trajectory_mean),
        (recipes.dr_grpo(length=16), lambda lengths: oracle.constant_length(lengths, 16)),
        (recipes.dapo(), oracle.token_mean),
        (recipes.gspo(), oracle.trajectory_mean),
        (recipes.apc(), oracle.token_mean),
        (recipes.fiberpo(), oracle.trajectory_mean),
    ],
    ids=lambda v: getattr(v, "name", ""),
)
def test_aggregation_weights_of_the_methods(objective, mu):
    """The column mu of App. C.4."""
    case = random_case(2)
    case.advantages = [1.0] * len(case.advantages)
    assert objective(case.batch()).weight.tolist() == pytest.approx(mu(case.lengths))


@given(seeds, st.booleans(), st.floats(0.01, 0.3), st.floats(0.01, 0.3))
def test_gspo_is_the_clipped_geometric_mean(seed, sign_aware, low, high):
    """Every token of a trajectory gets ``clip(exp(mean l))``; sign of the summed advantage."""
    case = random_case(seed)
    found = gated(recipes.gspo(low, high, sign_aware=sign_aware), case)
    rows = oracle.gspo_app_c4(
        case.trajectories(), split(case.advantages, case.lengths), low, high, sign_aware
    )
    assert found == pytest.approx([x for row in rows for x in row], rel=1e-12)


def test_gspo_takes_the_sign_from_the_sum_of_the_advantages():
    """Advantages (3, -1): their sum is positive, so only the upper side is clipped."""
    up = recipes.gspo(0.1, 0.1)(packed([0.3, 0.3], [3.0, -1.0], [2]))
    down = recipes.gspo(0.1, 0.1)(packed([-0.3, -0.3], [3.0, -1.0], [2]))
    assert up.log_gated_ratio.tolist() == pytest.approx([log(1.1)] * 2)
    assert down.log_gated_ratio.tolist() == pytest.approx([-0.3] * 2)


def test_gspo_spreads_the_gradient_over_the_trajectory():
    """``dJ/dl_j = s sum A / (trajectories T^2)``: here s = exp(0.05), A = (1, 0)."""
    out = recipes.gspo(0.1, 0.1)(packed([0.1, 0.0], [1.0, 0.0], [2]))
    assert out.coefficients.tolist() == pytest.approx([math.exp(0.05) / 4] * 2)


def test_gspo_clips_whole_trajectories():
    """Beyond the bound there is no gradient for any of its tokens, inside it for all."""
    out = recipes.gspo(0.1, 0.1)(packed([0.4, 0.1, 0.1, 0.0], [1.0] * 4, [2, 2]))
    assert out.regimes["trajectory"].tolist() == [[Regime.ZERO, Regime.PASS]]
    assert out.coefficients[:2].tolist() == [0.0, 0.0]
    assert float(out.coefficients[2:].min()) > 0


def test_gspo_defaults_are_its_paper():
    """3e-4 below, 4e-4 above."""
    plain = recipes.gspo(sign_aware=False)(packed([0.1, -0.1], [1.0, 1.0], [1, 1]))
    assert plain.log_gated_ratio.exp().tolist() == pytest.approx([1.0004, 0.9997], abs=1e-12)


def test_one_clipped_mean_bounds_no_token():
    """Half at +0.5, half at -0.5: s = 1 passes GSPO, yet the mean ``|r - 1|`` is 0.52."""
    ell = [0.5, -0.5]
    out = recipes.gspo()(packed(ell, [1.0, 1.0], [2]))
    assert out.regimes["trajectory"].tolist() == [[Regime.PASS]]
    assert sum(abs(math.exp(x) - 1) for x in ell) / 2 == pytest.approx(0.52, abs=2e-3)


@given(seeds, st.floats(0.02, 0.5))
def test_apc_is_def32(seed, delta):
    """Tokens of the same state share ``T_s delta``."""
    case = random_case(seed)
    case.labels = {"state": [i % 7 for i in range(len(case.log_ratios))]}
    found = gated(recipes.apc(delta), case)
    expected = oracle.apc_def32(case.log_ratios, case.labels["state"], delta)
    assert found == pytest.approx(expected, abs=1e-12)


def test_apc_states_span_trajectories():
    """The same state id in two trajectories is one state."""
    labels = {"state": torch.tensor([5, 5])}
    out = recipes.apc(0.1)(packed([log(1.3), log(0.9)], [1.0, 1.0], [1, 1], labels=labels))
    # budget 2 * 0.1; the other one uses 0.1 and 0.3: bounds 0.1 and 0 (-0.1)
    assert out.log_gated_ratio.exp().tolist() == pytest.approx([1.1, 1.0])
    assert out.regimes["token"].tolist() == [[Regime.ROLLBACK, Regime.ZERO]]


def test_apc_own_copies_count():
    """Two copies of one sampled pair at r = 1.2, delta = 0.15: B = 0.3 - 0.2 = 0.1 for each."""
    labels = {"state": torch.tensor([0, 0])}
    out = recipes.apc(0.15)(packed([log(1.2)] * 2, [1.0, 1.0], [2], labels=labels))
    assert out.log_gated_ratio.exp().tolist() == pytest.approx([1.1, 1.1])


@pytest.mark.parametrize("x", [0.0, 1e-7, -1e-7])
def test_apc_exhausted_state_holds_its_unmoved_tokens(x):
    """Regime (Z) of Eq. 63: where the others alone exhaust the budget, G is 1 *around* ``l = 0``.

    Others use 2 * 0.5 of 3 * 0.1. Both sides of l = 0 have slope 0, so l = 0 itself must too.
    """
    labels = {"state": torch.tensor([0, 0, 0])}
    ell = [x, log(1.5), log(1.5)]
    out = recipes.apc(0.1)(packed(ell, [1.0] * 3, [3], labels=labels))
    assert out.coefficients[0].item() == 0.0
    assert out.regimes["token"][0, 0] == Regime.ZERO


def test_parameters_are_shown():
    """Objectives print what they are."""
    assert "epsilon=0.1" in str(recipes.grpo(0.1))
    assert recipes.grpo(0.1).name == "grpo"


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_recipe_has_a_name(name):
    """``from_name`` is the recipe itself."""
    more = {"length": 8} if name == "dr_grpo" else {}
    case = random_case(3)
    named = recipes.from_name(name, **more)(case.batch()).coefficients
    direct = getattr(recipes, name)(**more)(case.batch()).coefficients
    assert torch.equal(named, direct)


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("trpo", {}, "'trpo'.*fiberpo_domain"),
        ("ppo", {"epsilom": 0.1}, "'epsilom'.*epsilon"),
        ("dr_grpo", {}, "'length'"),
    ],
)
def test_unknown_recipes_and_parameters_are_refused(name, parameters, message):
    """The message quotes the name and lists what there is."""
    with pytest.raises(fiberpo.ObjectiveError, match=message) as caught:
        recipes.from_name(name, **parameters)
    assert isinstance(caught.value, fiberpo.FiberPOError)
