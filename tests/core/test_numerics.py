"""Long sequences, many trajectories, float32 inputs and repeatability."""

import numpy as np
import pytest
import torch

import fiberpo
from core import oracle
from core.cases import packed, random_case
from fiberpo import RatioBatch, Regime, recipes

LENGTH = 131_072
EPSILON = 0.04


@pytest.fixture(scope="module")
def long_sequence():
    """float32 log-probs, and their exact difference."""
    rng = np.random.default_rng(0)
    old = (-rng.exponential(1.0, LENGTH)).astype(np.float32)
    new = (old + rng.normal(0.02, 0.1, LENGTH)).astype(np.float32)
    batch = RatioBatch.from_packed(
        torch.from_numpy(new), torch.from_numpy(old), torch.ones(1), [LENGTH]
    )
    return batch, (new.astype(np.float64) - old).tolist()


def budget_for(log_ratios, zone):
    """Budgets that put S+ in the given zone of the gate; S- always passes."""
    plus, minus = oracle.aggregates_eq9(log_ratios)
    part = {"pass": -0.1, "rollback": 0.5, "zeroed": 3.0}[zone]
    return plus / (1 + part / LENGTH) if zone != "pass" else 1.1 * plus, 1.1 * minus


@pytest.mark.parametrize(
    ("zone", "regime"),
    [("pass", Regime.PASS), ("rollback", Regime.ROLLBACK), ("zeroed", Regime.ZERO)],
)
def test_long_sequences_in_float32(long_sequence, zone, regime):
    """T = 131072: coefficients within 1e-5 of a float64 oracle, the steep rollback included."""
    batch, log_ratios = long_sequence
    budget = budget_for(log_ratios, zone)
    out = recipes.fiberpo(budget, EPSILON)(batch)
    assert out.regimes["trajectory"][0].item() == regime
    factor = [1.0 / LENGTH] * LENGTH
    expected = np.array(oracle.fiberpo_gradient(log_ratios, budget, EPSILON, factor))
    error = np.abs(out.coefficients.numpy() - expected).max() / np.abs(expected).max()
    assert error < 1e-5


def test_oracle_of_the_test_above_is_eq20():
    """The O(T) gradient by loops equals the Jacobian by loops, in a mixed case."""
    rng = np.random.default_rng(1)
    for _ in range(20):
        ell = rng.normal(0.05, 0.15, 6).tolist()
        factor = rng.normal(size=6).tolist()
        a = np.multiply(factor, np.exp(oracle.fiberpo_def51_eqs6_16(ell, (0.12, 0.05), EPSILON)))
        jacobian = oracle.jacobian_eq20(ell, (0.12, 0.05), EPSILON)
        found = oracle.fiberpo_gradient(ell, (0.12, 0.05), EPSILON, factor)
        assert found == pytest.approx((a @ jacobian).tolist(), abs=1e-12)


def test_aggregates_are_summed_in_float64(long_sequence):
    """A float32 sum of 131072 terms would miss the rollback zone, which is C / T wide."""
    batch, log_ratios = long_sequence
    out = recipes.fiberpo((0.12, 0.05), EPSILON)(batch)
    plus, minus = oracle.aggregates_eq9(log_ratios)
    assert out.gated.mean.flatten().tolist() == pytest.approx([plus, minus], rel=1e-12)


@pytest.mark.parametrize("name", ["fiberpo", "fiberpo_domain", "grpo", "gspo", "apc"])
def test_the_same_call_twice_is_bitwise_equal(name):
    """No atomics: loss, values, coefficients and regimes."""
    rng = np.random.default_rng(2)
    lengths = rng.integers(1, 400, 64).tolist()
    tokens = sum(lengths)
    ell = rng.normal(0, 0.1, tokens)
    labels = {"group": torch.arange(64) // 4, "domain": torch.arange(64) // 16}
    outs = []
    for _ in range(2):
        batch = packed(ell, np.ones(tokens), lengths, labels=labels)
        outs.append(getattr(recipes, name)()(batch))
    one, two = outs
    assert torch.equal(one.loss, two.loss)
    assert torch.equal(one.coefficients, two.coefficients)
    assert torch.equal(one.log_gated_ratio, two.log_gated_ratio)
    assert all(torch.equal(one.regimes[k], two.regimes[k]) for k in one.regimes)


def test_a_million_trajectories_of_one_token():
    """Runs, and is the gate of every single token: ``log G = g(l)``."""
    count = 1_000_000
    ell = torch.linspace(-0.3, 0.3, count, dtype=torch.float64)
    batch = RatioBatch.from_packed(
        ell, torch.zeros_like(ell), torch.ones(count), torch.ones(count).long()
    )
    out = recipes.fiberpo((0.12, 0.05), EPSILON)(batch)
    for i in (0, 420_000, 500_000, 650_000, 720_000, count - 1):
        x = ell[i].item()
        limit = 0.12 if x >= 0 else 0.05
        expected = oracle.aggregate_gate_eq10(x, limit, 1)
        assert out.log_gated_ratio[i].item() == pytest.approx(expected, abs=1e-12)


def test_float32_inputs_give_float32_gradients():
    """The gates are float64 inside; the gradient has the dtype of the log-probs."""
    case = random_case(0)
    log_probs = torch.tensor(case.log_ratios, dtype=torch.float32, requires_grad=True)
    batch = RatioBatch.from_packed(
        log_probs, torch.zeros_like(log_probs), torch.ones(12), case.lengths
    )
    out = recipes.fiberpo()(batch)
    out.loss.backward()
    assert out.log_gated_ratio.dtype == torch.float64
    assert log_probs.grad.dtype == torch.float32
    assert torch.equal(log_probs.grad, -out.coefficients.float())


@pytest.mark.parametrize("size", [50.0, 700.0, 1e6])
def test_huge_log_ratios_do_not_overflow_fiberpo(size):
    """Only ``l`` enters, never ``r``: loss and gradient stay finite."""
    batch = packed([size, -size, 0.0, size], [1.0, -1.0, 1.0, -1.0], [3, 1])
    out = recipes.fiberpo()(batch)
    assert torch.isfinite(out.loss)
    assert torch.isfinite(out.coefficients).all()


def test_objectives_do_not_modify_their_batch():
    """Called twice or after another objective, the answer is the same."""
    batch = random_case(0).batch()
    first = recipes.fiberpo_domain()(batch).coefficients.clone()
    for name in ("ppo", "gspo", "fiberpo", "apc"):
        getattr(recipes, name)()(batch)
    assert torch.equal(recipes.fiberpo_domain()(batch).coefficients, first)


def test_empty_parts_have_no_graph_leak():
    """A rank without tokens contributes loss 0 and can still call backward."""
    log_probs = torch.zeros(0, dtype=torch.float64, requires_grad=True)
    batch = RatioBatch.from_packed(
        log_probs, torch.zeros(0).double(), torch.zeros(0), torch.zeros(0).long(), allow_empty=True
    )
    out = recipes.fiberpo()(batch, denominators=fiberpo.Denominators(5, 2))
    out.loss.backward()
    assert log_probs.grad.shape == (0,)
