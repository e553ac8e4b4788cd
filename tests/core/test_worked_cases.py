"""Two to four tokens, every number worked out in the comments."""

from math import exp, log

import pytest
import torch

from core.cases import packed, single
from fiberpo import Regime, recipes


def close(*expected):
    return pytest.approx(list(expected), abs=1e-12)


def test_everything_passes():
    """``l = (0.04, -0.02)``, C = (0.12, 0.05), epsilon = 0.04.

    S+ = 0.02, S- = 0.01. Token 0: u = 0.02, v = -0.01; token 1: u = 0.01, v = -0.02: all inside.
    log base = 0.02 - 0.01 = 0.01; log fiber = 0.02 + 0.01 = 0.03 and -(0.01) - 0.02 = -0.03.
    So log G = (0.04, -0.02) = log r, and the gradient is mu A r.
    """
    out = recipes.fiberpo((0.12, 0.05), 0.04)(single([0.04, -0.02]))
    assert out.log_gated_ratio.tolist() == close(0.04, -0.02)
    assert out.coefficients.tolist() == close(exp(0.04) / 2, exp(-0.02) / 2)
    assert out.loss.item() == pytest.approx(-(exp(0.04) + exp(-0.02)) / 2)


def test_one_token_far_out_is_clipped_by_the_fiber():
    """``l = (0.20, 0)``: S+ = 0.10 passes (C+ = 0.12); u = (0.10, -0.10), both beyond 0.04.

    log G = 0.10 + (0.04, -0.04) = (0.14, 0.06). No own terms; each token is moved through the
    base alone: dJ/dl_j = (1/2) sum a, a = exp(log G) / 2, gamma = 1.
    """
    out = recipes.fiberpo((0.12, 0.05), 0.04)(single([0.20, 0.0]))
    through_base = (exp(0.14) + exp(0.06)) / 4
    assert out.log_gated_ratio.tolist() == close(0.14, 0.06)
    assert out.coefficients.tolist() == close(through_base, through_base)


def test_trajectory_in_its_rollback_zone():
    """``l = (0.15, 0.15)``: S+ = 0.15 in (0.12, 0.18) for T = 2.

    log base = 3 * 0.12 - 2 * 0.15 = 0.06, fiber 0: log G = 0.06. With a = exp(0.06) / 2 for both:
    dJ/dl_j = a + (1/2)(-2 * 2 a - 2 a) = -2 a = -exp(0.06).
    """
    out = recipes.fiberpo((0.12, 0.05), 0.04)(single([0.15, 0.15]))
    assert out.log_gated_ratio.tolist() == close(0.06, 0.06)
    assert out.coefficients.tolist() == close(-exp(0.06), -exp(0.06))
    assert out.regimes["trajectory"].tolist() == [[Regime.ROLLBACK], [Regime.PASS]]


def test_trajectory_beyond_its_rollback_zone():
    """``l = (0.20, 0.20)``: S+ = 0.20 > 0.18: base 1, fiber 0, so G = 1.

    dJ/dl_j = a + (1/2)(0 - 2 a) = 0 with a = 1/2.
    """
    out = recipes.fiberpo((0.12, 0.05), 0.04)(single([0.20, 0.20]))
    assert out.log_gated_ratio.tolist() == close(0.0, 0.0)
    assert out.coefficients.tolist() == close(0.0, 0.0)


def test_two_tokens_apart_beyond_the_zone():
    """``l = (0.22, 0.18)``: base zeroed, u = (0.02, -0.02) inside: log G = (0.02, -0.02).

    Only the difference of the two is trained: with a = exp(+-0.02) / 2,
    dJ/dl_0 = a_0 - (a_0 + a_1) / 2 = (a_0 - a_1) / 2, and the opposite for token 1.
    """
    out = recipes.fiberpo((0.12, 0.05), 0.04)(single([0.22, 0.18]))
    half = (exp(0.02) - exp(-0.02)) / 4
    assert out.log_gated_ratio.tolist() == close(0.02, -0.02)
    assert out.coefficients.tolist() == close(half, -half)


def test_channels_have_their_own_budgets():
    """``l = (0.09, -0.09)``: S+- = 0.045; C+ = 0.12 passes, C- = 0.04 rolls back (T = 2).

    g(S-) = 3 * 0.04 - 2 * 0.045 = 0.03, so log base = 0.045 - 0.03 = 0.015.
    u = 0.045 and v = -0.045 saturate at 0.04: log fiber = +-(0.04 + 0.04).
    """
    out = recipes.fiberpo((0.12, 0.04), 0.04)(single([0.09, -0.09]))
    assert out.log_gated_ratio.tolist() == close(0.095, -0.065)
    # gamma = (1, -2); no own terms: dJ/dl_0 = (1/2) sum a, dJ/dl_1 = (1/2)(-2) sum a
    total = (exp(0.095) + exp(-0.065)) / 2
    assert out.coefficients.tolist() == close(total / 2, -total)


def test_negative_drift_and_negative_advantage_mirror_the_positive_ones():
    """With equal budgets, (l, A) -> (-l, A) turns log G to -log G."""
    up = recipes.fiberpo((0.1, 0.1), 0.04)(single([0.2, 0.05, -0.03]))
    down = recipes.fiberpo((0.1, 0.1), 0.04)(single([-0.2, -0.05, 0.03]))
    assert down.log_gated_ratio.tolist() == close(*(-up.log_gated_ratio).tolist())


def test_two_trajectories_of_unequal_length_weigh_the_same():
    """On-policy: mu = 1/2 for the single token, 1/6 for each of three; A = (2, -3)."""
    out = recipes.fiberpo()(packed([0.0] * 4, [2.0, -3.0, -3.0, -3.0], [1, 3]))
    assert out.coefficients.tolist() == close(1.0, -0.5, -0.5, -0.5)
    assert out.loss.item() == pytest.approx(-(1.0 - 1.5))


def test_group_over_two_trajectories():
    """``l = (0.10), (0.02, 0.06)`` in one group; C_g = 0.06, C_tau = 0.12, k = tokens.

    S_tau = (0.10, 0.04), S_g = 0.07 (by trajectories; by tokens it would be 0.06 and pass).
    Group, k = 3: zone 0.06 .. 0.08: g = 4 * 0.06 - 3 * 0.07 = 0.03.
    Trajectories: residuals +0.03 and -0.03 pass. Fiber: 0 and -+0.02.
    log G = 0.03 + 0.03 = 0.06;  0.03 - 0.03 - 0.02 = -0.02;  0.03 - 0.03 + 0.02 = 0.02.
    """
    labels = {"group": torch.tensor([0, 0])}
    data = packed([0.10, 0.02, 0.06], [1.0] * 3, [1, 2], labels=labels)
    budgets = {"group": (0.06, 0.05), "trajectory": (0.12, 0.05)}
    out = recipes.fiberpo_domain(budgets, epsilon=0.04)(data)
    assert out.log_gated_ratio.tolist() == close(0.06, -0.02, 0.02)
    # a = (exp(.06)/2, exp(-.02)/4, exp(.02)/4), A_g = sum a, A_t = per trajectory.
    # dJ/dS_g = -3 A_g - A_g = -4 A_g; dJ/dS_tau = A_t - A_t = 0 (fiber takes what the base gives)
    # dJ/dl_j = a_j + omega_j / mass_g * (-4 A_g), omega = (1, 1/2, 1/2), mass_g = 2
    a = [exp(0.06) / 2, exp(-0.02) / 4, exp(0.02) / 4]
    whole = -4 * sum(a)
    expected = [a[0] + whole / 2, a[1] + whole / 4, a[2] + whole / 4]
    assert out.coefficients.tolist() == close(*expected)


def test_negative_residual_of_a_trajectory_is_gated_too():
    """S_tau = (0.30, 0), S_g = 0.15 (open): residuals +0.15 and -0.15, C_tau = 0.10, T = 1.

    Zone 0.10 .. 0.20: g = +-(2 * 0.10 - 0.15) = +-0.05. log G = 0.15 + 0.05 and 0.15 - 0.05.
    """
    labels = {"group": torch.tensor([0, 0])}
    data = packed([0.30, 0.0], [1.0] * 2, [1, 1], labels=labels)
    inf = float("inf")
    out = recipes.fiberpo_domain({"group": (inf, inf), "trajectory": (0.10, 0.05)})(data)
    assert out.log_gated_ratio.tolist() == close(0.20, 0.10)


def test_grpo_on_three_tokens():
    """r = (1.3, 0.9) with A = 1, and r = 0.7 with A = -1, epsilon = 0.2.

    G A = (1.2, 0.9), (-0.8); mu = (1/4, 1/4, 1/2): J = 2.1 / 4 - 0.4 = 0.125.
    Gradient only on the middle token: 0.9 / 4.
    """
    out = recipes.grpo(0.2)(packed([log(1.3), log(0.9), log(0.7)], [1.0, 1.0, -1.0], [2, 1]))
    assert out.loss.item() == pytest.approx(-0.125)
    assert out.coefficients.tolist() == close(0.0, 0.225, 0.0)


def test_gspo_on_two_tokens():
    """``l = (0.3, 0.1)``: s = exp(0.2) = 1.22, beyond 1.1 with A = 1; inside with A = -1."""
    gated = recipes.gspo(0.1, 0.1)(single([0.3, 0.1]))
    free = recipes.gspo(0.1, 0.1)(single([0.3, 0.1], -1.0))
    assert gated.coefficients.tolist() == close(0.0, 0.0)
    assert free.coefficients.tolist() == close(-exp(0.2) / 2, -exp(0.2) / 2)


def test_apc_on_two_tokens_of_one_state():
    """r = (1.3125, 0.9375), delta = 0.15: T delta = 0.30.

    B_0 = 0.30 - 0.0625 = 0.2375 (rolls back: G = 1.2375), B_1 = 0.30 - 0.3125 < 0 (G = 1).
    B_0 rises with r_1 as long as r_1 < 1: dG_0/dr_1 = 1, and dG_0/dr_0 = 0. dr_1/dl_1 = 0.9375.
    """
    labels = {"state": torch.tensor([0, 0])}
    out = recipes.apc(0.15)(packed([log(1.3125), log(0.9375)], [1.0, 1.0], [2], labels=labels))
    assert out.log_gated_ratio.exp().tolist() == close(1.2375, 1.0)
    assert out.coefficients.tolist() == close(0.0, 0.9375 / 2)
