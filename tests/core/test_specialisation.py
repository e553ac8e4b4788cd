"""Specialisation theorems: one method with its knobs turned is exactly another one."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fiberpo
from core.cases import packed, random_case
from fiberpo import recipes

seeds = st.integers(0, 10**6)
BUDGET, EPSILON = (0.12, 0.05), 0.04


def agree(one, other, tolerance=1e-12):
    """The same values, coefficients and loss."""
    assert one.log_gated_ratio.tolist() == pytest.approx(
        other.log_gated_ratio.tolist(), abs=tolerance
    )
    assert one.coefficients.tolist() == pytest.approx(other.coefficients.tolist(), abs=tolerance)
    assert one.loss.item() == pytest.approx(other.loss.item(), abs=tolerance)


@given(seeds, st.sampled_from(["tokens", 2.0]), st.booleans())
def test_hierarchy_over_trajectories_alone_is_fiberpo(seed, rollback, pessimistic):
    """n = 1 in Def. 6.2."""
    batch = random_case(seed).batch()
    more = {"rollback": rollback, "pessimistic": pessimistic}
    agree(
        recipes.fiberpo_domain(budgets={"trajectory": BUDGET}, epsilon=EPSILON, **more)(batch),
        recipes.fiberpo(budget=BUDGET, epsilon=EPSILON, **more)(batch),
        0.0,
    )


@given(st.lists(st.floats(-0.14, 0.14), min_size=1, max_size=6), st.booleans())
def test_one_group_in_one_domain_of_one_trajectory_is_fiberpo(ell, open_below):
    """A chain of single children: the root carries the drift, the gates below see 0."""
    labels = {"domain": torch.tensor([0]), "group": torch.tensor([0])}
    batch = packed(ell, [1.0] * len(ell), [len(ell)], labels=labels)
    below = (math.inf, math.inf) if open_below else (0.01, 0.01)
    budgets = {"domain": BUDGET, "group": below, "trajectory": below}
    with pytest.warns(fiberpo.FiberPOWarning, match="only child"):
        chain = recipes.fiberpo_domain(budgets=budgets, epsilon=EPSILON)(batch)
    agree(chain, recipes.fiberpo(budget=BUDGET, epsilon=EPSILON)(batch))


@given(seeds)
def test_one_group_in_one_domain_of_equal_trajectories_is_fiberpo(seed):
    """Where no trajectory differs from its domain, the domain's gate is the only one that acts.

    (Where they differ it is not FiberPO: the base is ``g(S_D) + g(S_tau - S_D)``.)
    """
    case = random_case(seed)
    row = case.trajectories()[0]
    batch = packed(
        row * 3, [1.0] * (3 * len(row)), [len(row)] * 3,
        labels={"domain": torch.zeros(3).long(), "group": torch.zeros(3).long()},
    )  # fmt: skip
    budgets = {"domain": BUDGET, "group": BUDGET, "trajectory": BUDGET}
    slopes = {"domain": float(len(row))}
    with pytest.warns(fiberpo.FiberPOWarning, match='"group"'):
        chain = recipes.fiberpo_domain(budgets=budgets, epsilon=EPSILON, rollback=slopes)(batch)
    single = recipes.fiberpo(budget=BUDGET, epsilon=EPSILON)(batch)
    assert chain.log_gated_ratio.tolist() == pytest.approx(
        single.log_gated_ratio.tolist(), abs=1e-9
    )


@given(seeds)
def test_group_of_one_domain_is_the_chain_without_the_domain(seed):
    """A domain of one group each: dropping the group stratum changes nothing."""
    case = random_case(seed)
    case.labels["domain"] = list(case.labels["group"])
    three = {"domain": BUDGET, "group": (0.01, 0.01), "trajectory": BUDGET}
    two = {"domain": BUDGET, "trajectory": BUDGET}
    batch = case.batch()
    with pytest.warns(fiberpo.FiberPOWarning, match='"group"'):
        chain = recipes.fiberpo_domain(budgets=three, epsilon=EPSILON)(batch)
    agree(chain, recipes.fiberpo_domain(budgets=two, epsilon=EPSILON)(batch))


@given(seeds, st.sampled_from([("trajectory",), ("domain", "group", "trajectory", "turn")]))
def test_open_gates_are_the_identity(seed, strata):
    """``G = r``: the surrogate is the plain importance-weighted one."""
    case = random_case(seed, scale=0.8)
    gate_map = fiberpo.open_gates(strata)
    out = fiberpo.Objective(fiberpo.Weights.trajectory_mean(), gate_map)(case.batch())
    assert out.log_gated_ratio.tolist() == pytest.approx(case.log_ratios, abs=1e-12)
    linear = out.weight * torch.tensor(case.log_ratios, dtype=torch.float64).exp()
    assert out.coefficients.tolist() == pytest.approx(linear.tolist(), abs=1e-12)


@given(seeds, st.booleans())
def test_gspo_is_ratio_clip_at_the_trajectory_and_zero_at_the_token(seed, sign_aware):
    """In the logarithmic chart with one channel."""
    batch = random_case(seed).batch()
    gates = {"trajectory": fiberpo.RatioClip(0.1, 0.15, sign_aware)}
    gate_map = fiberpo.GateMap(fiberpo.Log(), gates, fiberpo.Zero())
    by_hand = fiberpo.Objective(fiberpo.Weights.trajectory_mean(), gate_map)
    agree(recipes.gspo(0.1, 0.15, sign_aware=sign_aware)(batch), by_hand(batch), 0.0)


@given(seeds, st.floats(0.02, 0.5))
def test_apc_with_single_visits_is_plain_ppo(seed, delta):
    """No state label, or a different state for every token: ``epsilon = delta``, no min."""
    case = random_case(seed, scale=0.5)
    plain = recipes.ppo(delta, sign_aware=False)(case.batch())
    agree(recipes.apc(delta)(case.batch()), plain)
    case.labels["state"] = list(range(len(case.log_ratios)))
    agree(recipes.apc(delta)(case.batch()), plain)


@given(seeds)
def test_grpo_is_ppo_with_other_weights(seed):
    """Only mu differs; on equal lengths nothing does."""
    case = random_case(seed)
    batch = case.batch()
    agree(recipes.ppo(0.2, weights="trajectory_mean")(batch), recipes.grpo(0.2)(batch), 0.0)
    agree(recipes.dapo(0.2, 0.28)(batch), recipes.ppo(0.2, 0.28)(batch), 0.0)


def test_gspo_on_single_tokens_is_grpo():
    """T = 1: the mean log ratio is the log ratio."""
    case = random_case(1, scale=0.4)
    tokens = len(case.log_ratios)
    batch = packed(case.log_ratios, case.advantages, [1] * tokens)
    agree(recipes.gspo(0.2, 0.28)(batch), recipes.grpo(0.2, 0.28)(batch))


def test_fiberpo_with_zero_token_gate_gates_the_base_alone():
    """``Zero`` at the token removes the fiber: all tokens of a trajectory share one ratio."""
    case = random_case(2)
    gates = {"trajectory": fiberpo.AggregateGate(BUDGET)}
    batch = case.batch()
    out = fiberpo.GateMap(fiberpo.SignedLog(), gates, fiberpo.Zero())(batch)
    for t in range(12):
        mine = out.log_gated_ratio[batch.trajectory == t]
        assert torch.all(mine == mine[0])


@given(seeds)
def test_wide_budgets_and_epsilon_make_pessimistic_irrelevant(seed):
    """Where G = r the two forms coincide."""
    batch = random_case(seed).batch()
    wide = {"budget": (5.0, 5.0), "epsilon": 5.0}
    agree(recipes.fiberpo(**wide, pessimistic=True)(batch), recipes.fiberpo(**wide)(batch), 1e-12)


@given(seeds, st.sampled_from(["fiberpo", "fiberpo_domain", "gspo", "ppo"]))
def test_padded_is_packed(seed, name):
    """The same tokens, padded with NaN and shuffled masks, give the same numbers."""
    case = random_case(seed)
    rng = torch.Generator().manual_seed(seed)
    width = max(case.lengths) + 2
    mask = torch.zeros(12, width, dtype=torch.bool)
    for t, length in enumerate(case.lengths):
        mask[t, torch.randperm(width, generator=rng)[:length]] = True
    log_probs = torch.full((12, width), math.nan, dtype=torch.float64)
    log_probs[mask] = torch.tensor(case.log_ratios, dtype=torch.float64)
    advantages = torch.full((12, width), math.inf, dtype=torch.float64)
    advantages[mask] = torch.tensor(case.advantages, dtype=torch.float64)
    old = torch.where(mask, 0.0, math.nan).double()
    labels = {k: torch.tensor(v) for k, v in case.labels.items() if k != "turn"}
    padded = fiberpo.RatioBatch.from_padded(log_probs, old, advantages, mask, labels=labels)
    objective = getattr(recipes, name)()
    agree(objective(padded), objective(case.batch()), 0.0)
