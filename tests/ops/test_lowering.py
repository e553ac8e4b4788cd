"""Lowered plans say what the gate classes say: every recipe, every backend that can serve here."""

import dataclasses
import math
import warnings

import numpy as np
import pytest
import torch

import fiberpo
from core.cases import F64, packed, random_case
from fiberpo import gates, recipes
from fiberpo.charts import Log, SignedLog
from fiberpo.errors import ObjectiveError
from fiberpo.gating import GateMap
from fiberpo.ops import dispatch
from fiberpo.ops.plan import GateCode
from fiberpo.testing import simulate_ranks
from fiberpo.weights import Weights

WIDE = {"domain": (0.05, 0.03), "group": (0.06, 0.04), "trajectory": (0.1, 0.05)}
OBJECTIVES = {
    **{name: recipes.from_name(name) for name in recipes.RECIPES if name != "dr_grpo"},
    "dr_grpo": recipes.dr_grpo(7),
    "dual clip": recipes.ppo(0.1, dual_clip=1.5),
    "plain clip": recipes.grpo(0.1, sign_aware=False),
    "gspo plain": recipes.gspo(0.05, sign_aware=False),
    "rolled back": recipes.fiberpo((0.08, 0.05), 0.03, rollback=2.0),
    "pessimistic": recipes.fiberpo((0.08, 0.05), 0.03, pessimistic=True),
    "domain": recipes.fiberpo_domain(WIDE, 0.03, rollback=3.0),
    "domain, tokens": recipes.fiberpo_domain(WIDE, 0.03, measure="token", rollback=1.0),
    "turns": recipes.fiberpo_domain({**WIDE, "turn": (0.05, 0.05)}, 0.03, rollback=2.0),
    "pessimistic domain": recipes.fiberpo_domain(WIDE, 0.03, pessimistic=True),
    "by name": recipes.fiberpo_domain(
        {"domain": {"0": (0.01, 0.01), "*": (0.5, 0.02)}, "group": (0.06, 0.04)}, 0.03
    ),
    "group mean": recipes.grpo(weights="group_mean"),
    "turn mean": recipes.fiberpo((0.08, 0.05), weights="turn_mean"),
    "token aggregate": dataclasses.replace(
        recipes.ppo(), gate_map=GateMap(SignedLog(), {}, gates.AggregateGate((0.1, 0.05), 2.0))
    ),
    "first aggregate": dataclasses.replace(
        recipes.gspo(0.05),
        gate_map=GateMap(
            Log(), {"trajectory": gates.LogClip(0.05)}, first=gates.AggregateGate((0.1, 0.05), 2.0)
        ),
    ),
    "masked": dataclasses.replace(
        recipes.fiberpo((0.08, 0.05)), mask=lambda batch: torch.arange(batch.trajectories) % 3 > 0
    ),
    "factored": dataclasses.replace(
        recipes.gspo(0.05), factors=(lambda batch: (torch.arange(len(batch)) % 4).double(),)
    ),
}


def served(name):
    """Whether a backend is at hand."""
    batch = packed([0.1], [1.0], [1])
    return not dispatch.unsupported(name, recipes.ppo().plan(batch).lowered, batch.log_probs)


BACKENDS = ["torch", *(["cpu"] if served("cpu") else [])]


def case(seed, by_token=False, dtype=F64):
    """A random batch with every label, advantages of both signs and 0."""
    found = random_case(seed)
    rng = np.random.default_rng(seed)
    tokens = len(found.log_ratios)
    advantages = rng.choice([-1.5, 0.0, 1.0], tokens if by_token else len(found.lengths))
    found = dataclasses.replace(found, advantages=advantages.tolist())
    batch = found.batch()
    return dataclasses.replace(
        batch, log_probs=batch.log_probs.to(dtype).requires_grad_(),
        old_log_probs=batch.old_log_probs.to(dtype),
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_backends_are_the_gate_classes(name, backend):
    """Loss, gradient, the loss of each row, and everything that is logged."""
    for seed in range(4):
        batch = case(seed, by_token=seed % 2 == 1)
        expected = OBJECTIVES[name](batch, backend="reference")
        found = OBJECTIVES[name](batch, backend=backend)
        assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-12, abs=1e-15)
        torch.testing.assert_close(found.gradient, expected.gradient, rtol=1e-11, atol=1e-14)
        torch.testing.assert_close(
            found.loss_of_rows(), expected.loss_of_rows(), rtol=1e-11, atol=1e-14
        )
        assert found.metrics() == pytest.approx(expected.metrics(), rel=1e-9, abs=1e-12)
        found.loss.backward()
        torch.testing.assert_close(batch.log_probs.grad, found.gradient)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_float32_log_probs(name, backend):
    """The gradient comes in their dtype, within its precision."""
    batch = case(1, dtype=torch.float32)
    expected = OBJECTIVES[name](batch, backend="reference").gradient
    found = OBJECTIVES[name](batch, backend=backend)
    assert found.gradient.dtype == torch.float32
    assert found.coefficients.dtype == F64
    error = (found.gradient.double() - expected).abs().max() / expected.abs().max()
    assert error < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["fiberpo", "domain", "turns", "group mean", "gspo", "ppo"])
def test_over_ranks(name, backend):
    """Contexts that ranks share are merged between the sweeps."""
    batch = case(2)
    whole = OBJECTIVES[name](batch, backend="reference")
    rows = [torch.arange(batch.rows)[k::2] for k in range(2)]
    parts = [batch.select(r) for r in rows]

    def call(part, collective):
        return OBJECTIVES[name](part, collective=collective, backend=backend).gradient

    found = simulate_ranks(call, parts)
    of_token = batch.row
    for gradient, mine in zip(found, rows, strict=True):
        expected = torch.cat([whole.gradient[of_token == r] for r in mine.tolist()])
        torch.testing.assert_close(gradient, expected, rtol=1e-11, atol=1e-14)


def test_no_graph_where_none_is_wanted():
    """Under ``no_grad`` the loss carries none."""
    batch = case(0)
    with torch.no_grad():
        assert not recipes.fiberpo()(batch).loss.requires_grad
    assert recipes.fiberpo()(batch).loss.requires_grad


def test_an_unknown_backend_is_refused():
    """With the names there are."""
    with pytest.raises(ObjectiveError, match="'cuda'; it is one of auto, cpu, triton, torch"):
        recipes.ppo()(case(0), backend="cuda")


def test_a_named_backend_never_falls_back():
    """What it cannot serve it refuses, with the reason."""
    batch = packed([0.3, -0.3], [1.0], [2], labels={"state": torch.tensor([0, 0])})
    with pytest.raises(ObjectiveError, match="backend='triton' cannot serve this call: .*state"):
        recipes.apc()(batch, backend="triton")


@pytest.mark.skipif(not served("triton"), reason="Triton is not at hand, on a GPU or interpreted")
@pytest.mark.parametrize("name", OBJECTIVES)
def test_triton_is_the_gate_classes(name):
    """In the interpreter where there is no GPU."""
    batch = case(3, by_token=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    labels = {n: dataclasses.replace(v, codes=v.codes.to(device)) for n, v in batch.labels.items()}
    moved = dataclasses.replace(
        batch, log_probs=batch.log_probs.detach().to(device),
        old_log_probs=batch.old_log_probs.to(device),
        given_advantages=batch.given_advantages.to(device), lengths=batch.lengths.to(device),
        labels=labels,
    )  # fmt: skip
    expected = OBJECTIVES[name](batch, backend="reference")
    found = OBJECTIVES[name](moved, backend="triton")
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-11, abs=1e-14)
    torch.testing.assert_close(found.gradient.cpu(), expected.gradient, rtol=1e-10, atol=1e-13)


def test_the_environment_names_the_backend(monkeypatch):
    """For calls that do not."""
    monkeypatch.setenv("FIBERPO_BACKEND", "nonsense")
    with pytest.raises(ObjectiveError, match="'nonsense'"):
        recipes.ppo()(case(0))
    recipes.ppo()(case(0), backend="torch")


class Halving:
    """A gate of a user's own."""

    needs_advantage = False

    def __call__(self, drift, site):
        return gates.Gated(
            drift / 2, torch.full_like(drift, 0.5), torch.zeros_like(drift).to(torch.int8)
        )


def test_own_gates_are_served_by_the_gate_classes():
    """They need no lowered form; a fused backend asked for by name says that it is missing."""
    own = dataclasses.replace(recipes.ppo(), gate_map=GateMap(SignedLog(), {}, Halving()))
    batch = packed([math.log(4.0)], [1.0], [1])
    assert own(batch).loss.item() == pytest.approx(-2.0)
    with pytest.raises(ObjectiveError, match="the token gate Halving has no `lowered` form"):
        own(batch, backend="torch")


def test_every_gate_of_the_library_has_a_code():
    """All codes are reached from recipes: no code without a user, no gate without a code."""
    seen = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for objective in OBJECTIVES.values():
            plan = objective.plan(case(0)).lowered
            seen |= {plan.first.code, plan.token.code}
            seen |= {gate.code for gate in (plan.contexts.gates if plan.contexts else ())}
    assert seen == set(GateCode)


def test_shared_states_lower_too():
    """APC-Obj with tokens that share states."""
    rng = np.random.default_rng(3)
    batch = packed(
        rng.normal(0, 0.3, 12), rng.normal(size=12), [5, 7],
        labels={"state": torch.tensor(rng.integers(0, 4, 12))},
    )  # fmt: skip
    objective = recipes.apc(0.1)
    expected = objective(batch, backend="reference")
    for backend in BACKENDS:
        found = objective(batch, backend=backend)
        torch.testing.assert_close(found.gradient, expected.gradient, rtol=1e-12, atol=1e-15)


def test_weights_that_differ_within_a_row_are_one_a_token():
    """All others are one a row."""
    batch = case(0)
    assert Weights.parse("turn_mean").shares(batch).shape == (len(batch),)
    for name in ("token_mean", "trajectory_mean", "trajectory_sum", "group_mean"):
        assert Weights.parse(name).shares(batch).shape == (batch.rows,)
    assert fiberpo.recipes.grpo().plan(batch).mu.shape == (len(batch),)


def test_weights_of_turns_by_hand():
    """Turns of 1, 2 and 3 tokens weigh the same: 1/3, 1/6 and 1/9 a token."""
    batch = packed([0.0] * 6, [1.0, 1.0], [3, 3], labels={"turn": torch.tensor([0, 1, 1, 0, 0, 0])})
    expected = [1 / 3, 1 / 6, 1 / 6, 1 / 9, 1 / 9, 1 / 9]
    assert Weights.parse("turn_mean").shares(batch).tolist() == pytest.approx(expected)
