"""The names that users rely on, and random ragged batches through them."""

import inspect
import math

import pytest
import torch

import fiberpo
from core import oracle
from core.cases import hierarchy_oracle, random_case
from fiberpo import RatioBatch, recipes

BUDGETS = {"domain": (0.06, 0.03), "group": (0.08, 0.05), "trajectory": (0.12, 0.05)}


@pytest.mark.parametrize("name", fiberpo.__all__)
def test_public_names_exist(name):
    """Everything in ``__all__`` can be imported from the top."""
    assert getattr(fiberpo, name) is not None


def test_unknown_names_are_attribute_errors():
    """Lazy imports do not hide misspellings."""
    with pytest.raises(AttributeError, match="RatioBach"):
        _ = fiberpo.RatioBach


@pytest.mark.parametrize(
    ("constructor", "positional"),
    [
        ("from_padded", ["log_probs", "old_log_probs", "advantages", "mask"]),
        ("from_packed", ["log_probs", "old_log_probs", "advantages", "lengths"]),
    ],
)
def test_constructors_take_what_they_promise(constructor, positional):
    """Four positional arguments, then keywords only."""
    parameters = inspect.signature(getattr(RatioBatch, constructor)).parameters
    kinds = {name: p.kind for name, p in parameters.items()}
    assert [n for n, k in kinds.items() if k is inspect.Parameter.POSITIONAL_OR_KEYWORD] == (
        positional
    )
    keywords = {n for n, k in kinds.items() if k is inspect.Parameter.KEYWORD_ONLY}
    assert keywords >= {"labels", "rollout_log_probs"}


@pytest.mark.parametrize("name", [n for n in fiberpo.__all__ if n.endswith("Error")])
def test_every_error_has_the_one_root(name):
    """And that root is a ValueError."""
    assert issubclass(getattr(fiberpo, name), fiberpo.FiberPOError)
    assert issubclass(fiberpo.FiberPOError, ValueError)


@pytest.mark.parametrize("seed", range(5))
def test_ragged_batches_through_the_padded_door(seed):
    """2 domains x 2 groups x 3 trajectories in float64: log G to 1e-9, dJ/dl by differences."""
    case = random_case(seed, longest=4)
    width = max(case.lengths)
    log_probs, old, mask = (torch.zeros(12, width).double() for _ in range(3))
    advantages = torch.linspace(-1, 2, 12).double()
    for t, row in enumerate(case.trajectories()):
        mask[t, : len(row)] = 1
        old[t, : len(row)] = -1.5 - 0.1 * torch.arange(len(row))
        log_probs[t, : len(row)] = old[t, : len(row)] + torch.tensor(row).double()
    labels = {"group": case.labels["group"], "domain": [f"d{d}" for d in case.labels["domain"]]}
    batch = RatioBatch.from_padded(log_probs, old, advantages, mask, labels=labels)
    out = recipes.fiberpo_domain(budgets=BUDGETS, epsilon=0.04)(batch)

    case.log_ratios = batch.log_ratio.tolist()
    expected = hierarchy_oracle(case, BUDGETS, 0.04)
    assert out.log_gated_ratio.tolist() == pytest.approx(expected, abs=1e-9)
    mu, a = oracle.trajectory_mean(case.lengths), advantages[batch.trajectory].tolist()

    def value(ell):
        gated = [math.exp(x) for x in hierarchy_oracle(case, BUDGETS, 0.04, log_ratios=ell)]
        return oracle.objective_def31(mu, gated, a)

    slopes = oracle.central_differences(value, case.log_ratios)
    assert out.coefficients.numpy() == pytest.approx(slopes, rel=1e-5, abs=1e-7)


@pytest.fixture
def out():
    return recipes.fiberpo_domain(budgets=BUDGETS)(random_case(0).batch(grad=True))


def test_surrogate_has_a_scalar_loss(out):
    """To minimise; it carries the graph."""
    assert out.loss.shape == ()
    assert out.loss.requires_grad


def test_surrogate_has_one_value_and_one_coefficient_a_token(out):
    """``[N]`` each."""
    assert out.log_gated_ratio.shape == out.coefficients.shape == (len(out.batch),)


def test_surrogate_has_regimes_per_stratum(out):
    """Coarse to fine, the token last, two channels each."""
    shapes = {name: tuple(r.shape) for name, r in out.regimes.items()}
    assert list(shapes.items()) == [
        ("domain", (2, 2)), ("group", (2, 4)), ("trajectory", (2, 12)),
        ("token", (2, len(out.batch))),
    ]  # fmt: skip


def test_unknown_gradient_form_is_refused():
    """Quoted with the two that exist."""
    with pytest.raises((fiberpo.ObjectiveError, TypeError)):
        recipes.ppo()(random_case(0).batch(), gradient="numerical")


def test_unknown_measure_is_refused():
    """Same."""
    with pytest.raises((fiberpo.ObjectiveError, TypeError)):
        recipes.fiberpo_domain(BUDGETS, measure="domain")


def test_citations_name_the_papers():
    """What to cite for an objective."""
    assert "2603.08239" in fiberpo.citation(recipes.fiberpo())
    assert "2402.03300" in fiberpo.citation(recipes.grpo())


def test_one_label_serves_objectives_of_different_depth():
    """The same batch under a trajectory, a group and a domain objective."""
    batch = random_case(1).batch()
    for strata in (("trajectory",), ("group", "trajectory"), ("domain", "group", "trajectory")):
        out = recipes.fiberpo_domain({name: BUDGETS[name] for name in strata})(batch)
        assert list(out.regimes) == [*strata, "token"]
