"""Closed form = autograd = central differences of an independent value, for every recipe."""

import math

import numpy as np
import pytest
import torch

import fiberpo
from core import oracle
from core.cases import F64, hierarchy_oracle, packed, random_case, random_tree, split
from fiberpo import recipes

CHAIN = {"domain": (0.06, 0.03), "group": (0.08, 0.05), "trajectory": (0.12, 0.05)}
DEEP = {**CHAIN, "turn": (0.10, 0.06)}
BUDGET, EPSILON = (0.12, 0.05), 0.04
LOW, HIGH = 0.2, 0.28


def flat(rows):
    return [x for row in rows for x in row]


def per_trajectory(case, ell, budget=BUDGET, k=None):
    rows = split(ell, case.lengths)
    return flat(oracle.fiberpo_def51_eqs6_16(row, budget, EPSILON, k) for row in rows)


def exp(values):
    return [math.exp(x) for x in values]


def named_budget(case, ell):
    forest = oracle.grow_forest(("domain", "trajectory"), case.lengths, case.labels)
    omega = oracle.measure_per_trajectory(case.lengths)
    named = {0: (0.03, 0.02), 1: (0.3, 0.2)}

    def budget_of(stratum, name):
        return named[name] if stratum == "domain" else (0.12, 0.05)

    return oracle.forest_log_gated_ratio(ell, omega, forest, budget_of, EPSILON)


def forest(budgets, measure="trajectory", k=None):
    def gated(case, ell):
        more = {} if k is None else {"rollback_of": lambda stratum: k}
        return exp(hierarchy_oracle(case, budgets, EPSILON, measure, ell, **more))

    return gated


def pessimistic(gated):
    return lambda case, ell: oracle.pessimistic(gated(case, ell), ell, case.advantages)


def tokens_mean(case):
    return oracle.token_mean(case.lengths)


def trajectories_mean(case):
    return oracle.trajectory_mean(case.lengths)


def domain(budgets, **more):
    return recipes.fiberpo_domain(budgets=budgets, epsilon=EPSILON, **more)


# name -> (objective, G(case, l), mu(case))
RECIPES = {
    "ppo": (
        recipes.ppo(LOW),
        lambda c, ell: oracle.ppo_app_c4(ell, c.advantages, LOW, LOW),
        tokens_mean,
    ),
    "ppo, dual clip": (
        recipes.ppo(LOW, dual_clip=1.3),
        lambda c, ell: oracle.ppo_app_c4(ell, c.advantages, LOW, LOW, 1.3),
        tokens_mean,
    ),
    "ppo, plain": (
        recipes.ppo(LOW, HIGH, sign_aware=False),
        lambda c, ell: oracle.ppo_plain(ell, LOW, HIGH),
        tokens_mean,
    ),
    "grpo": (
        recipes.grpo(LOW, HIGH),
        lambda c, ell: oracle.ppo_app_c4(ell, c.advantages, LOW, HIGH),
        trajectories_mean,
    ),
    "grpo, plain": (
        recipes.grpo(LOW, sign_aware=False),
        lambda c, ell: oracle.ppo_plain(ell, LOW, LOW),
        trajectories_mean,
    ),
    "dr_grpo": (
        recipes.dr_grpo(length=7),
        lambda c, ell: oracle.ppo_app_c4(ell, c.advantages, LOW, LOW),
        lambda c: oracle.constant_length(c.lengths, 7),
    ),
    "dapo": (
        recipes.dapo(),
        lambda c, ell: oracle.ppo_app_c4(ell, c.advantages, LOW, HIGH),
        tokens_mean,
    ),
    "gspo": (
        recipes.gspo(0.1, 0.15),
        lambda c, ell: flat(
            oracle.gspo_app_c4(split(ell, c.lengths), split(c.advantages, c.lengths), 0.1, 0.15)
        ),
        trajectories_mean,
    ),
    "gspo, plain": (
        recipes.gspo(0.1, 0.15, sign_aware=False),
        lambda c, ell: flat(
            oracle.gspo_app_c4(
                split(ell, c.lengths), split(c.advantages, c.lengths), 0.1, 0.15, sign_aware=False
            )
        ),
        trajectories_mean,
    ),
    "apc, single visits": (
        recipes.apc(0.1, states="none"),
        lambda c, ell: oracle.apc_def32(ell, list(range(len(ell))), 0.1),
        tokens_mean,
    ),
    "apc, shared states": (
        recipes.apc(0.2),
        lambda c, ell: oracle.apc_def32(ell, states_of(len(ell)), 0.2),
        tokens_mean,
    ),
    "fiberpo": (
        recipes.fiberpo(BUDGET, EPSILON),
        lambda c, ell: exp(per_trajectory(c, ell)),
        trajectories_mean,
    ),
    "fiberpo, rollback 2": (
        recipes.fiberpo(BUDGET, EPSILON, rollback=2.0),
        lambda c, ell: exp(per_trajectory(c, ell, k=2.0)),
        trajectories_mean,
    ),
    "fiberpo, pessimistic": (
        recipes.fiberpo(BUDGET, EPSILON, rollback=2.0, pessimistic=True),
        pessimistic(lambda c, ell: exp(per_trajectory(c, ell, k=2.0))),
        trajectories_mean,
    ),
    "fiberpo, group mean": (
        recipes.fiberpo(BUDGET, EPSILON, weights="group_mean"),
        lambda c, ell: exp(per_trajectory(c, ell)),
        lambda c: oracle.context_mean(c.lengths, c.labels["group"]),
    ),
    "fiberpo_domain": (domain(CHAIN), forest(CHAIN), trajectories_mean),
    "fiberpo_domain, turns": (domain(DEEP), forest(DEEP), trajectories_mean),
    "fiberpo_domain, token measure": (
        domain(DEEP, measure="token"),
        forest(DEEP, "token"),
        trajectories_mean,
    ),
    "fiberpo_domain, rollback 2": (
        domain(DEEP, rollback=2.0),
        forest(DEEP, k=2.0),
        trajectories_mean,
    ),
    "fiberpo_domain, pessimistic": (
        domain(DEEP, rollback=2.0, pessimistic=True),
        pessimistic(forest(DEEP, k=2.0)),
        trajectories_mean,
    ),
    "fiberpo_domain, pessimistic, token measure": (
        domain(DEEP, rollback=2.0, pessimistic=True, measure="token"),
        pessimistic(forest(DEEP, "token", k=2.0)),
        trajectories_mean,
    ),
    "fiberpo_domain, budgets by name": (
        domain({"domain": {"0": (0.03, 0.02), "*": (0.3, 0.2)}, "trajectory": (0.12, 0.05)}),
        lambda c, ell: exp(named_budget(c, ell)),
        trajectories_mean,
    ),
}


def states_of(tokens):
    """Every state is visited by three tokens of different trajectories."""
    return [i % -(-tokens // 3) for i in range(tokens)]


def make(name, seed, *, tree=False):
    case = random_tree(seed) if tree else random_case(seed)
    if name == "apc, shared states":
        case.labels["state"] = states_of(len(case.log_ratios))
    return case


def value(name, case, ell):
    _, gated, mu = RECIPES[name]
    return oracle.objective_def31(mu(case), gated(case, ell), case.advantages)


every = pytest.mark.parametrize("name", RECIPES)


@every
@pytest.mark.parametrize("seed", [0, 1])
def test_loss_is_minus_j(name, seed):
    """``loss = -sum mu G A`` with G and mu by loops."""
    case = make(name, seed)
    out = RECIPES[name][0](case.batch())
    assert float(out.loss) == pytest.approx(-value(name, case, case.log_ratios), abs=1e-12)


@every
@pytest.mark.parametrize("seed", [0, 1])
def test_coefficients_are_central_differences(name, seed):
    """``coefficients_i = dJ / dl_i``, away from kinks."""
    case = make(name, seed)
    out = RECIPES[name][0](case.batch())
    expected = oracle.central_differences(lambda ell: value(name, case, ell), case.log_ratios)
    assert out.coefficients.numpy() == pytest.approx(expected, rel=1e-5, abs=1e-7)


@every
def test_closed_form_is_autograd_through_the_gates(name):
    """Two ways to the same gradient, and both ways to the same loss."""
    objective, case = RECIPES[name][0], make(name, 2)
    found = {}
    for form in ("closed_form", "autograd"):
        batch = case.batch(grad=True)
        out = objective(batch, gradient=form)
        out.loss.backward()
        found[form] = (out.loss.item(), batch.log_probs.grad)
        assert torch.allclose(out.coefficients, -batch.log_probs.grad, atol=1e-14, rtol=1e-9)
    assert found["closed_form"][0] == pytest.approx(found["autograd"][0], abs=1e-14)


@every
def test_on_policy_the_gradient_is_the_plain_policy_gradient(name):
    """``l = 0``: ``G = 1`` and ``dJ/dl_i = mu_i A_i`` for every method."""
    case = make(name, 3)
    case.log_ratios = [0.0] * len(case.log_ratios)
    out = RECIPES[name][0](case.batch())
    if name.startswith("gspo"):  # the mean over the trajectory mixes its tokens
        case.advantages = flat(
            [sum(row) / len(row)] * len(row) for row in split(case.advantages, case.lengths)
        )
    expected = np.multiply(RECIPES[name][2](case), case.advantages)
    assert out.log_gated_ratio.abs().max() == 0
    assert out.coefficients.numpy() == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("name", [n for n in RECIPES if n.startswith("fiberpo_domain, ")])
def test_gates_of_the_cases_above_do_bind(name):
    """The seeds are not ones in which everything passes: several regimes occur above the token."""
    if name.endswith("by name"):
        expected = {0, 2}
    else:
        expected = {0, 1, 2} if "rollback 2" in name or "pessimistic" in name else {0, 2}
    seen = set()
    for seed in (0, 1):
        regimes = RECIPES[name][0](make(name, seed).batch()).regimes
        for stratum, regime in regimes.items():
            seen |= set(regime.flatten().tolist()) if stratum != "token" else set()
    assert seen >= expected


@pytest.mark.parametrize("measure", ["trajectory", "token"])
@pytest.mark.parametrize("pessimistic_form", [False, True])
@pytest.mark.parametrize("k", [None, 2.0])
def test_trees_have_the_same_gradient_both_ways(measure, pessimistic_form, k):
    """Branches of different depth: central differences and autograd."""
    case = random_tree(11)
    objective = domain(DEEP, measure=measure, pessimistic=pessimistic_form, rollback=k or "tokens")
    gated = forest(DEEP, measure, k)
    gated = pessimistic(gated) if pessimistic_form else gated
    mu = oracle.trajectory_mean(case.lengths)
    expected = oracle.central_differences(
        lambda ell: oracle.objective_def31(mu, gated(case, ell), case.advantages), case.log_ratios
    )
    batch = case.batch(grad=True)
    out = objective(batch, gradient="autograd")
    out.loss.backward()
    assert out.coefficients.numpy() == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert -batch.log_probs.grad.numpy() == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_backward_of_the_coefficients_is_the_gradient_of_the_loss():
    """``backward(-sum c_j logp_j)`` is all that a trainer needs, through any upstream graph."""
    case = random_case(4)
    parameter = torch.tensor(0.7, dtype=F64, requires_grad=True)
    base = torch.tensor(case.log_ratios, dtype=F64)

    def batch():
        log_probs = parameter * base
        old = torch.zeros_like(log_probs)
        return fiberpo.RatioBatch.from_packed(
            log_probs, old, torch.tensor(case.advantages), case.lengths
        )

    out = recipes.fiberpo()(batch())
    (through_loss,) = torch.autograd.grad(out.loss, parameter)
    again = batch()
    linear = -(out.coefficients * again.log_probs).sum()
    assert torch.autograd.grad(linear, parameter)[0] == pytest.approx(through_loss.item())


def test_gradient_scales_with_the_loss():
    """``(3 * loss).backward()`` gives three times the gradient: gradient accumulation."""
    case = random_case(5)
    one, three = case.batch(grad=True), case.batch(grad=True)
    recipes.fiberpo()(one).loss.backward()
    (3 * recipes.fiberpo()(three).loss).backward()
    assert torch.allclose(three.log_probs.grad, 3 * one.log_probs.grad)


def test_old_log_probs_and_advantages_get_no_gradient():
    """Only the current policy is differentiated."""
    log_probs = torch.tensor([-0.9, -1.2], requires_grad=True)
    old = torch.tensor([-1.0, -1.0], requires_grad=True)
    advantages = torch.tensor([1.0, 1.0], requires_grad=True)
    batch = fiberpo.RatioBatch.from_packed(log_probs, old, advantages, [2])
    recipes.fiberpo()(batch, gradient="autograd").loss.backward()
    assert log_probs.grad is not None
    assert old.grad is None
    assert advantages.grad is None


def test_coefficients_are_detached_and_float64():
    """They are the input of a later backward, not part of this graph."""
    out = recipes.fiberpo()(packed([0.1, 0.2], [1.0, 1.0], [2], grad=True), gradient="autograd")
    assert not out.coefficients.requires_grad
    assert out.coefficients.dtype == F64
