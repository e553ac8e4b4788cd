"""FiberPO on trajectories: Definition 5.1, Eqs. 6-16, Propositions 5.2 to 5.5 of arXiv 2603.08239.

The second half says what the gate really does, where a reading of the paper is loose.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fiberpo
from core import oracle
from core.cases import packed, random_case, single
from fiberpo import Regime

BUDGET, EPSILON = (0.12, 0.05), 0.04
log_ratios = st.lists(st.floats(-0.4, 0.4), min_size=1, max_size=6)
budgets = st.tuples(st.floats(0.05, 0.3), st.floats(0.01, 0.05))
rollbacks = st.sampled_from(["tokens", 1, 2.5, 32])


def recipe(budget=BUDGET, epsilon=EPSILON, **more):
    return fiberpo.recipes.fiberpo(budget=budget, epsilon=epsilon, **more)


def jacobian(ell, objective):
    """``d log G_i / d l_j`` by autograd through the gates."""
    batch = single(ell, grad=True)
    out = objective.gate_map(batch).log_gated_ratio
    rows = [torch.autograd.grad(g, batch.log_probs, retain_graph=True)[0] for g in out]
    return torch.stack(rows).numpy()


@given(log_ratios, budgets, st.floats(0.005, 0.1), rollbacks)
def test_gated_ratio_is_def51(ell, budget, epsilon, rollback):
    """``log G = log base + log fiber`` (Eqs. 6-16)."""
    out = recipe(budget, epsilon, rollback=rollback)(single(ell))
    k = None if rollback == "tokens" else rollback
    expected = oracle.fiberpo_def51_eqs6_16(ell, budget, epsilon, k)
    assert out.log_gated_ratio.tolist() == pytest.approx(expected, abs=1e-9)


@given(log_ratios, budgets, st.floats(0.005, 0.1), rollbacks)
def test_autograd_jacobian_is_eq20(ell, budget, epsilon, rollback):
    """Proposition 5.2, kinks included: autograd follows the same piece as Eq. 20."""
    k = None if rollback == "tokens" else rollback
    found = jacobian(ell, recipe(budget, epsilon, rollback=rollback))
    assert found == pytest.approx(oracle.jacobian_eq20(ell, budget, epsilon, k), abs=1e-9)


# four tokens, so the rollback zones are 0.12 < S+ < 0.15 and 0.05 < S- < 0.0625
REGIMES = {
    ("G-I", "L-I"): [0.02, 0.01, -0.01, 0.0],
    ("G-I", "L-II"): [0.2, 0.0, -0.01, 0.0],
    ("G-I", "L-III"): [0.2, 0.2, -0.09, -0.09],
    ("G-II,r", "L-I"): [0.13, 0.13, 0.13, 0.13],
    ("G-II,r", "L-II"): [0.13, 0.13, 0.2, 0.06],
    ("G-II,r", "L-III"): [0.27, 0.27, -0.09, -0.09],
    ("G-II", "L-I"): [0.2, 0.21, 0.2, 0.19],
    ("G-II", "L-III"): [-0.2, -0.2, 0.1, 0.1],
    ("G-III,r", "L-III"): [0.4, 0.4, -0.11, -0.11],
    ("G-III,r", "L-II"): [0.8, 0.0, -0.06, -0.17],
    ("G-III", "L-III"): [0.5, 0.5, -0.3, -0.3],
    ("G-III", "L-II"): [0.8, 0.3, -0.25, -0.32],
}


@pytest.mark.parametrize(("names", "ell"), REGIMES.items(), ids=[" ".join(k) for k in REGIMES])
def test_eq20_in_every_regime(names, ell):
    """Each case lies in the regime it is named after, and its Jacobian is Eq. 20."""
    assert (oracle.global_regime(ell, BUDGET), oracle.local_regime(ell, EPSILON)) == names
    assert jacobian(ell, recipe()) == pytest.approx(
        oracle.jacobian_eq20(ell, BUDGET, EPSILON), abs=1e-12
    )


def test_the_cases_above_show_every_regime():
    """Five global and three local regimes."""
    assert {g for g, _ in REGIMES} == {"G-I", "G-II,r", "G-II", "G-III,r", "G-III"}
    assert {local for _, local in REGIMES} == {"L-I", "L-II", "L-III"}


@pytest.mark.parametrize(("names", "ell"), REGIMES.items(), ids=[" ".join(k) for k in REGIMES])
def test_reported_regimes_are_those_of_the_case(names, ell):
    """``regimes`` has one entry a channel and context, and one a channel and token."""
    out = recipe()(single(ell))
    base = [Regime(r) for r in out.regimes["trajectory"][:, 0].tolist()]
    bad = (base.count(Regime.ROLLBACK), base.count(Regime.ZERO))
    kinds = {(0, 0): "G-I", (1, 0): "G-II,r", (0, 1): "G-II", (1, 1): "G-III,r", (0, 2): "G-III"}
    assert kinds[bad] == names[0]
    own = [0 if x >= 0 else 1 for x in ell]
    beyond = sum(int(out.regimes["token"][c, i]) == Regime.ZERO for i, c in enumerate(own))
    local = {0: "L-I", len(ell): "L-III"}.get(beyond, "L-II")
    assert local == names[1]


def test_jacobian_is_block_diagonal_over_trajectories():
    """Proposition 5.3: no token feels another trajectory."""
    case = random_case(3)
    batch = case.batch(grad=True)
    out = recipe().gate_map(batch).log_gated_ratio
    full = torch.stack([torch.autograd.grad(g, batch.log_probs, retain_graph=True)[0] for g in out])
    same = batch.trajectory[:, None] == batch.trajectory[None, :]
    assert torch.all(full[~same] == 0)
    assert torch.any(full[same] != torch.eye(len(out), dtype=full.dtype)[same])


@given(st.integers(1, 8))
def test_jacobian_is_the_identity_on_policy(length):
    """Proposition 5.4, with the sign label of ``l = 0`` being +1."""
    assert jacobian([0.0] * length, recipe()) == pytest.approx(np.eye(length), abs=1e-15)


@pytest.mark.parametrize("length", [4, 40, 400])
def test_coupling_between_tokens_falls_as_one_over_length(length):
    """Proposition 5.5 (scale separation): off-diagonal entries are (gamma - 1[..]) / T."""
    # one saturated positive token, whose neighbours pass: each entry is (1 - 1)/T or (1 - 0)/T
    ell = [0.06] + [0.0] * (length - 1)
    off = jacobian(ell, recipe(epsilon=0.04))[0, 1:]
    assert off == pytest.approx(np.full(length - 1, 1 / length), abs=1e-12)


# ------------------------------------------------------------------ what the gate really does


@given(log_ratios, budgets, rollbacks)
def test_log_base_stays_between_the_budgets(ell, budget, rollback):
    """``-C- <= log base <= C+`` (token gate removed to see the base alone)."""
    gates = {"trajectory": fiberpo.AggregateGate(budget, rollback)}
    out = fiberpo.GateMap(fiberpo.SignedLog(), gates, fiberpo.Zero())(single(ell))
    assert float(out.log_gated_ratio.max()) <= budget[0] + 1e-12
    assert float(out.log_gated_ratio.min()) >= -budget[1] - 1e-12


@given(st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=6), budgets, st.floats(0.005, 0.1))
def test_log_gated_ratio_is_bounded(ell, budget, epsilon):
    """``|log G| <= max(C+, C-) + 2 epsilon``: nothing overflows, whatever the ratio."""
    out = recipe(budget, epsilon)(single(ell))
    assert float(out.log_gated_ratio.abs().max()) <= max(budget) + 2 * epsilon + 1e-9
    assert math.isfinite(float(out.loss))


# drift 0.13 of every token (zone 0.12 .. 0.15), and -0.055 (zone 0.05 .. 0.0625)
CELLS = [(0.13, 1.0), (0.13, -1.0), (-0.055, 1.0), (-0.055, -1.0)]


@pytest.mark.parametrize(("drift", "advantage"), CELLS)
def test_rollback_restores_only_with_drift_and_advantage_of_one_sign(drift, advantage):
    """A uniform drift in the rollback zone: the step goes against it iff its sign is that of A."""
    out = recipe()(single([drift] * 4, advantage))
    restores = float(out.coefficients.sum()) * drift < 0
    assert restores == (drift * advantage > 0)


@pytest.mark.parametrize(("drift", "advantage"), CELLS)
def test_rollback_is_minus_t_times_the_linear_gradient(drift, advantage):
    """All ``u = 0``: ``dJ/dl_j = mu A G (1 + (-T - 1)) = -T mu A G``; adverse cells amplify."""
    out = recipe()(single([drift] * 4, advantage))
    linear = 0.25 * advantage * math.exp(drift)
    ratio = out.coefficients.numpy() / linear
    # G itself is exp(0.08) or exp(-0.03) against r = exp(0.13) or exp(-0.055)
    gated = oracle.fiberpo_def51_eqs6_16([drift] * 4, BUDGET, EPSILON)[0]
    assert ratio == pytest.approx(np.full(4, -4 * math.exp(gated - drift)), rel=1e-9)
    assert np.all(ratio < -3.5)


@pytest.mark.parametrize(("drift", "advantage"), CELLS)
def test_pessimistic_form_restores_in_all_four_cells(drift, advantage):
    """With ``min(G A, r A)`` the step never enlarges the drift.

    Where A opposes the drift this is the plain gradient of ``r A``.
    """
    out = recipe(pessimistic=True)(single([drift] * 4, advantage))
    assert float(out.coefficients.sum()) * drift < 0


@given(st.integers(0, 10**6))
def test_pessimistic_form_is_the_minimum(seed):
    """``J = sum mu min(G A, r A)``."""
    case = random_case(seed)
    out = recipe(pessimistic=True)(case.batch())
    plain = []
    for row in case.trajectories():
        plain += [math.exp(g) for g in oracle.fiberpo_def51_eqs6_16(row, BUDGET, EPSILON)]
    terms = [
        m * min(g * a, math.exp(x) * a)
        for m, g, a, x in zip(
            oracle.trajectory_mean(case.lengths), plain, case.advantages, case.log_ratios
        )
    ]
    assert float(out.loss) == pytest.approx(-sum(terms), abs=1e-12)


def test_zeroed_base_with_saturated_fiber_has_no_gradient():
    """Half at +0.5, half at -0.5: nothing pulls the policy back or on."""
    out = recipe()(single([0.5, 0.5, -0.5, -0.5]))
    assert out.coefficients.tolist() == [0.0] * 4


@pytest.mark.parametrize(("x", "saturated"), [(0.0799, False), (0.0801, True)])
def test_half_up_half_down_saturates_beyond_two_epsilon(x, saturated):
    """``S+- = x / 2`` divide by T, so ``|u| = x / 2`` exceeds epsilon = 0.04 at x = 0.08."""
    out = recipe()(single([x, x, -x, -x]))
    # positive tokens are read in channel 0, negative ones in channel 1
    own = out.regimes["token"][[0, 0, 1, 1], [0, 1, 2, 3]]
    assert own.tolist() == [Regime.ZERO if saturated else Regime.PASS] * 4


def test_untouched_tokens_feel_the_drift_of_the_others():
    """``S+ = 0.06 > epsilon``: a token with ``l = 0`` gets ``log G = g(S+) - epsilon = 0.02``."""
    out = recipe()(single([0.24, 0.0, 0.0, 0.0]))
    assert out.log_gated_ratio[1:].tolist() == pytest.approx([0.02] * 3)


@pytest.mark.parametrize(("length", "expected"), [(1, 0.1), (4, 0.0)])
def test_residual_is_taken_from_the_ungated_aggregate(length, expected):
    """``l = 0.30`` everywhere, C = epsilon = 0.2.

    The fiber is exactly 0, so log G is the gated base: ``2 * 0.2 - 0.3 = 0.1`` for one token, 0
    for four (zone ends at 0.25). From the *gated* aggregate the residual would be 0.2 or 0.3,
    clipped to 0.2, and one token would get back 0.1 + 0.2 = 0.3 = log r as if nothing gated it.
    """
    out = recipe(budget=(0.2, 0.2), epsilon=0.2)(single([0.3] * length))
    assert out.log_gated_ratio.tolist() == pytest.approx([expected] * length, abs=1e-12)


def test_mean_drift_of_exactly_the_budget_passes():
    """``S+ = C+``: slope 1, ``G = r``."""
    out = recipe(budget=(0.25, 0.125))(single([0.25, 0.25]))
    assert out.regimes["trajectory"].flatten().tolist() == [Regime.PASS, Regime.PASS]
    assert out.log_gated_ratio.tolist() == [0.25, 0.25]


def test_residual_of_exactly_epsilon_is_unsaturated():
    """``l = (0.25, 0)``: ``S+ = u_1 = 0.125 = epsilon`` and ``u_2 = -0.125``; G = r."""
    out = recipe(budget=(0.25, 0.125), epsilon=0.125)(single([0.25, 0.0]))
    assert out.regimes["token"].unique().tolist() == [Regime.PASS]
    assert out.log_gated_ratio.tolist() == [0.25, 0.0]


def test_zero_log_ratio_has_sign_plus_one():
    """With ``gamma(+) = -T`` and ``gamma(-) = 1`` the two labels of ``l = 0`` differ by T + 1.

    Three tokens at 0.2 and one at 0 have S+ = 0.15 on C+ = 0.14 (zone 0.14 .. 0.175); the token at
    0 must roll back with the positive channel: ``-4 * sum a / 4`` and its own terms.
    """
    ell, budget = [0.2, 0.2, 0.2, 0.0], (0.14, 0.05)
    found = jacobian(ell, recipe(budget=budget, epsilon=0.01))
    # row 0 is saturated (u = 0.05 > 0.01): d log G_0 / d l_3 = gamma(+)/T = -1
    assert found[0].tolist() == pytest.approx([-1.0, -1.0, -1.0, -1.0])


def test_closed_form_gives_zero_log_ratio_the_sign_plus_one():
    """The same case in the coefficients: by loops from Eq. 20, with ``sigma(0) = +1``."""
    ell, budget, factor = [0.2, 0.2, 0.2, 0.0], (0.14, 0.05), [0.25] * 4
    out = recipe(budget=budget, epsilon=0.01)(single(ell))
    expected = oracle.fiberpo_gradient(ell, budget, 0.01, factor)
    assert out.coefficients.tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("lengths", [[1], [1, 1, 1], [1, 3]])
def test_trajectories_of_one_token_are_valid(lengths):
    """T = 1: ``S = l`` and the fiber is 0, so ``log G = g(l)``."""
    ell = [0.1] * sum(lengths)
    out = recipe()(packed(ell, [1.0] * len(ell), lengths))
    assert out.log_gated_ratio.tolist() == pytest.approx(ell)


@given(st.lists(st.floats(-1.0, 1.0), min_size=1, max_size=6))
def test_first_order_agreement_with_the_linear_surrogate(direction):
    """Theorem 4.5: along any direction from on-policy, ``J - sum mu r A = o(step)``.

    Everything passes for small steps, so the difference is exactly 0 there.
    """
    step = 0.02
    ell = [step * d for d in direction]
    advantages = np.linspace(-1, 2, len(ell))
    out = recipe()(packed(ell, advantages, [len(ell)]))
    linear = np.mean(np.exp(ell) * advantages)
    assert -float(out.loss) == pytest.approx(linear, abs=1e-12)


@pytest.mark.parametrize(("drift", "expected"), [(0.13, 0.10), (-0.055, -0.045), (0.1, 0.1)])
def test_aggregate_gate_of_a_chart_with_one_channel_takes_the_budget_of_its_sign(drift, expected):
    """In the logarithmic chart the mean itself is gated: k = 2, ``3 C - 2 |x|``."""
    gate_map = fiberpo.GateMap(
        fiberpo.Log(), {"trajectory": fiberpo.AggregateGate((0.12, 0.0516666666))}, fiberpo.Zero()
    )
    out = gate_map(single([drift - 0.5, drift + 0.5]))
    assert out.log_gated_ratio.tolist() == pytest.approx([expected] * 2, abs=1e-8)


def test_open_gates_are_the_identity_for_any_drift():
    """``C = inf`` and an open token gate: ``G = r``."""
    case = random_case(0, scale=1.0)
    out = fiberpo.open_gates()(case.batch())
    assert out.log_gated_ratio.tolist() == pytest.approx(case.log_ratios, abs=1e-12)


def test_scaling_the_log_ratios_and_budgets_together_scales_log_g():
    """Everything on the log scale is homogeneous: units are nats throughout."""
    case = random_case(5)
    small = recipe()(case.batch()).log_gated_ratio
    ell = [2 * x for x in case.log_ratios]
    large = recipe((0.24, 0.10), 0.08)(packed(ell, case.advantages, case.lengths)).log_gated_ratio
    assert large.tolist() == pytest.approx((2 * small).tolist(), abs=1e-12)
