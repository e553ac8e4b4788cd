"""Log-probs from hidden states and head: every mode is the equation, in value and gradient."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import fiberpo
from fiberpo import RatioBatch, exact, linear_logprob, recipes
from fiberpo.errors import ConfigError, ObjectiveError, ShapeError
from fiberpo.ops import linear_reference

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
MODES = ["frozen", "resident", "two-phase"]


def oracle(hidden, weight, targets, temperature, bias, coefficients):
    """Loops in numpy: log-probs, entropies, and the gradients of ``sum_i c_i log p_i``."""
    tokens, width = hidden.shape
    vocabulary = len(weight)
    log_probs, entropies = np.zeros(tokens), np.zeros(tokens)
    for_hidden, for_weight = np.zeros((tokens, width)), np.zeros((vocabulary, width))
    for_bias = np.zeros(vocabulary)
    for i in range(tokens):
        z = [(float(hidden[i] @ weight[v]) + bias[v]) / temperature for v in range(vocabulary)]
        top = max(z)
        log_sum = top + math.log(sum(math.exp(x - top) for x in z))
        log_probs[i] = z[targets[i]] - log_sum
        for v in range(vocabulary):
            p = math.exp(z[v] - log_sum)
            entropies[i] -= p * (z[v] - log_sum)
            slope = coefficients[i] * ((v == targets[i]) - p) / temperature
            for_hidden[i] += slope * weight[v]
            for_weight[v] += slope * hidden[i]
            for_bias[v] += slope
    return log_probs, entropies, for_hidden, for_weight, for_bias


def make(tokens, width, vocabulary, seed=0, scale=1.0, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    hidden, weight, bias = (
        normal(tokens, width) * scale,
        normal(vocabulary, width),
        normal(vocabulary),
    )
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    found = hidden.to(dtype), weight.to(dtype), bias.to(dtype), targets, normal(tokens).to(dtype)
    return [x.to(device) for x in found]


def run(mode, hidden, weight, bias, targets, coefficients, temperature=1.0, **settings):
    """Log-probs, entropies and the gradients of ``sum_i c_i log p_i``."""
    hidden = hidden.detach().clone().requires_grad_()
    trained = mode != "frozen"
    weight = weight.detach().clone().requires_grad_(trained)
    bias = None if bias is None else bias.detach().clone().requires_grad_(trained)
    log_probs, entropies = linear_logprob(
        hidden, weight, targets, temperature, bias=bias, mode=mode, coefficients=coefficients,
        entropy=True, **settings,
    )  # fmt: skip
    (coefficients.to(log_probs.dtype) * log_probs).sum().backward()
    assert not entropies.requires_grad
    return (
        log_probs.detach(), entropies, hidden.grad, weight.grad,
        None if bias is None else bias.grad,
    )  # fmt: skip


def same(found, wanted, **tolerance):
    for name, a, b in zip(("log_probs", "entropy", "hidden", "weight", "bias"), found, wanted):
        if a is not None:
            np.testing.assert_allclose(a.double().cpu(), b, err_msg=name, **tolerance)


zeros = st.sampled_from([0.0, -0.0])


@settings(max_examples=200)
@given(
    mode=st.sampled_from(MODES),
    tokens=st.integers(0, 9),
    width=st.integers(1, 4),
    vocabulary=st.integers(1, 7),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    rows=st.integers(1, 10),
    with_bias=st.booleans(),
    skip_zeros=st.sampled_from([None, True, False]),
    dropped=st.lists(st.tuples(st.integers(0, 8), zeros), max_size=9),
    seed=st.integers(0, 99),
)
@example("two-phase", 0, 2, 3, 1.0, 1, True, None, [], 0)
@example("resident", 0, 2, 3, 1.0, 1, True, None, [], 0)
@example("frozen", 0, 2, 3, 1.0, 1, True, None, [], 0)
@example("frozen", 5, 2, 4, 0.3, 2, True, None, [(1, 0.0)], 0)
@example("two-phase", 5, 2, 3, 0.3, 2, True, True, [(i, 0.0) for i in range(5)], 0)
@example("resident", 5, 2, 3, 0.3, 2, True, True, [(i, -0.0) for i in range(5)], 0)
@example("resident", 7, 3, 5, 0.3, 3, True, True, [(1, 0.0), (2, 0.0), (4, 0.0)], 3)
@example("two-phase", 7, 3, 5, 2.5, 3, True, True, [(0, 0.0), (5, -0.0)], 4)
def test_modes_are_the_loops(
    mode, tokens, width, vocabulary, temperature, rows, with_bias, skip_zeros, dropped, seed
):
    """Any shape, chunk size, temperature and pattern of zero coefficients; few ids, so repeated."""
    hidden, weight, bias, targets, c = make(tokens, width, vocabulary, seed)
    for i, zero in dropped:
        if i < tokens:
            c[i] = zero
    found = run(
        mode, hidden, weight, bias if with_bias else None, targets, c, temperature,
        memory=rows * vocabulary * 8, skip_zeros=skip_zeros,
    )  # fmt: skip
    flat = bias.numpy() if with_bias else np.zeros(vocabulary)
    wanted = oracle(hidden.numpy(), weight.numpy(), targets.tolist(), temperature, flat, c.numpy())
    same(found, wanted, rtol=1e-10, atol=1e-12)


def test_the_reference_is_the_loops():
    """The shipped equation, values and autograd."""
    hidden, weight, bias, targets, c = make(6, 3, 5)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    log_probs, entropies = linear_reference.linear_logprob(hidden, weight, targets, 0.7, bias)
    gradients = torch.autograd.grad((c * log_probs).sum(), leaves)
    wanted = oracle(
        *(x.detach().numpy() for x in (hidden, weight)), targets.tolist(), 0.7,
        bias.detach().numpy(), c.numpy(),
    )  # fmt: skip
    same([log_probs.detach(), entropies.detach(), *gradients], wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("dtype", "exact_products", "tolerance"),
    [(torch.float32, True, 2e-6), (torch.bfloat16, False, 1e-2), (torch.float16, False, 2e-3)],
)
def test_narrow_inputs_give_float32(device, mode, dtype, exact_products, tolerance):
    """Log-probs and entropies to float32 from the rounded inputs; gradients to their own dtype."""
    hidden, weight, bias, targets, c = make(40, 16, 50, dtype=dtype, device=device)
    found = run(mode, hidden, weight, bias, targets, c, 0.7, memory=13 * 50 * 6)
    assert found[0].dtype is found[1].dtype is torch.float32
    assert found[2].dtype is dtype
    leaves = [x.double().requires_grad_() for x in (hidden, weight, bias)]
    log_probs, entropies = linear_reference.linear_logprob(
        leaves[0], leaves[1], targets, 0.7, leaves[2]
    )
    wanted = torch.autograd.grad((c.double() * log_probs).sum(), leaves)
    values = [x.detach().cpu() for x in (log_probs, entropies)]
    same(found[:2], values, rtol=1e-5, atol=1e-5)
    size = max(float(g.abs().max()) for g in wanted)
    same(found, [*values, *(g.cpu() for g in wanted)], rtol=tolerance, atol=tolerance * size)


def test_bfloat16_gradients_of_the_weight_add_up_in_float32():
    """4,000 equal tokens: sums of bfloat16 would stop growing at 256 addends."""
    hidden, weight = torch.ones(4000, 2).bfloat16(), torch.zeros(2, 2).bfloat16().requires_grad_()
    targets = torch.zeros(4000, dtype=torch.long)
    linear_logprob(hidden, weight, targets, memory=100 * 2 * 4).sum().backward()
    torch.testing.assert_close(weight.grad.float(), torch.tensor([[2000.0] * 2, [-2000.0] * 2]))


@pytest.mark.parametrize("mode", MODES)
def test_huge_logits_do_not_overflow(mode):
    """Logits of +-1e4 in float32."""
    hidden, weight, bias, targets, c = make(12, 4, 9, scale=4000.0, dtype=torch.float32)
    found = run(mode, hidden, weight, bias, targets, c, 0.5, memory=5 * 9 * 4)
    assert float((hidden @ weight.T).abs().max()) > 1e4
    wanted = oracle(
        *(x.double().numpy() for x in (hidden, weight)), targets.tolist(), 0.5,
        bias.double().numpy(), c.double().numpy(),
    )  # fmt: skip
    assert all(bool(x.isfinite().all()) for x in found if x is not None)
    same(found[:2], wanted[:2], rtol=1e-6, atol=1e-2)
    same(found, wanted, rtol=2e-3, atol=2e-2 * 4000)


def test_confident_rows_keep_their_log_prob():
    """A target that is all but certain, and one that is all but impossible."""
    weight = torch.eye(3)
    hidden = torch.tensor([[60.0, 0, 0], [60.0, 0, 0]])
    log_probs, entropies = linear_logprob(hidden, weight, torch.tensor([0, 1]), entropy=True)
    torch.testing.assert_close(log_probs, torch.tensor([0.0, -60.0]))
    torch.testing.assert_close(entropies, torch.zeros(2))


def test_gradcheck():
    """Finite differences of every input."""
    hidden, weight, bias, targets, _ = make(5, 3, 4)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]

    def trained(h, w, b):
        return linear_logprob(h, w, targets, 0.8, bias=b, memory=2 * 4 * 8)

    def frozen(h):
        return linear_logprob(h, weight.detach(), targets, 0.8, mode="frozen", memory=2 * 4 * 8)

    assert torch.autograd.gradcheck(trained, leaves)
    assert torch.autograd.gradcheck(frozen, leaves[:1])


@pytest.mark.parametrize(
    ("trained", "given", "kind"),
    [
        (False, False, "Frozen"), (False, True, "Frozen"), (True, False, "TwoPhase"),
        (True, True, "Resident"),
    ],
)  # fmt: skip
def test_the_mode_follows_from_what_is_known(trained, given, kind):
    """The graph says which one was taken."""
    hidden, weight, _, targets, c = make(4, 3, 5)
    out = linear_logprob(
        hidden.requires_grad_(), weight.requires_grad_(trained), targets,
        coefficients=c if given else None,
    )  # fmt: skip
    assert out.grad_fn.name() == f"{kind}Backward"


def test_long_trajectories_are_not_resident():
    """A function of whole trajectories, one of which is longer than a chunk."""
    hidden, weight, _, targets, c = make(6, 3, 5)
    weight.requires_grad_()
    settings = {"coefficients": lambda log_probs, where: c[where], "lengths": [2, 4]}
    fits = linear_logprob(hidden, weight, targets, **settings, memory=4 * 5 * 8)
    assert fits.grad_fn.name() == "ResidentBackward"
    too_long = linear_logprob(hidden, weight, targets, **settings, memory=3 * 5 * 8)
    assert too_long.grad_fn.name() == "TwoPhaseBackward"
    with pytest.raises(ConfigError, match=r"4 tokens must share a chunk.*160 bytes.*holds 3"):
        linear_logprob(hidden, weight, targets, **settings, memory=3 * 5 * 8, mode="resident")


def test_no_graph_where_none_is_asked():
    """Phase 1: the same numbers in whatever mode, and nothing kept."""
    hidden, weight, bias, targets, c = make(8, 3, 5)
    weight.requires_grad_()
    with_graph = linear_logprob(hidden, weight, targets, bias=bias)
    with torch.no_grad():
        without = linear_logprob(hidden, weight, targets, bias=bias, coefficients=c)
    assert with_graph.requires_grad
    assert not without.requires_grad
    assert torch.equal(with_graph, without)
    assert not linear_logprob(hidden, weight.detach(), targets).requires_grad


def test_zero_coefficients_cost_nothing(monkeypatch):
    """The recompute sees the tokens that count, and no others; without the skip it sees all."""
    from fiberpo.ops import linear_head

    seen, walk = [], linear_head.Head.walk

    def spy(self, hidden, targets, chunks):
        seen.append(len(hidden))
        return walk(self, hidden, targets, chunks)

    monkeypatch.setattr(linear_head.Head, "walk", spy)
    hidden, weight, bias, targets, c = make(10, 3, 5)
    c[[1, 2, 3, 7]] = 0
    run("two-phase", hidden, weight, bias, targets, c)
    run("two-phase", hidden, weight, bias, targets, c, skip_zeros=False)
    assert seen == [10, 6, 10, 10]

    rows = []
    add = linear_head.Gradients.add
    monkeypatch.setattr(
        linear_head.Gradients, "add",
        lambda self, chunk, at, c: (rows.append(len(chunk.error)), add(self, chunk, at, c))[1],
    )  # fmt: skip
    run("resident", hidden, weight, bias, targets, c, memory=4 * 5 * 8)
    assert sum(rows) == 6


def test_resident_takes_any_multiple_and_nothing_else():
    """Its gradients are made before the backward says which are wanted."""
    hidden, weight, bias, targets, c = make(6, 3, 5)

    def log_probs(h, w):
        return linear_logprob(h, w, targets, bias=bias, coefficients=c, mode="resident")

    leaves = hidden.requires_grad_(), weight.requires_grad_()
    once = torch.autograd.grad((c * log_probs(*leaves)).sum(), leaves)
    scaled = torch.autograd.grad((-2.5 * c * log_probs(*leaves)).sum(), leaves)
    for a, b in zip(scaled, once, strict=True):
        torch.testing.assert_close(a, -2.5 * b)
    wrong = c.clone()
    wrong[4] += 0.01
    with pytest.raises(ObjectiveError, match=r"for token 4.*mode='two-phase'"):
        (wrong * log_probs(*leaves)).sum().backward()
    kept = log_probs(*leaves)
    (c * kept).sum().backward(retain_graph=True)
    with pytest.raises(ObjectiveError, match="have been handed out"):
        (c * kept).sum().backward()


def test_resident_without_a_single_coefficient():
    """All 0: gradients of 0; but not if something comes back all the same."""
    hidden, weight, _, targets, c = make(6, 3, 5)
    weight.requires_grad_()
    c = torch.zeros_like(c)
    (c * linear_logprob(hidden, weight, targets, coefficients=c)).sum().backward()
    assert bool((weight.grad == 0).all())
    with pytest.raises(ObjectiveError, match="for token"):
        linear_logprob(hidden, weight, targets, coefficients=c).sum().backward()


def test_autocast_sets_the_dtype_of_the_products():
    """As `torch.nn.functional.linear`, but with float32 results."""
    hidden, weight, _, targets, _ = make(6, 8, 5, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = linear_logprob(hidden, weight, targets)
        chosen = linear_logprob(hidden, weight, targets, dtype=torch.float32)
    rounded = linear_logprob(hidden.bfloat16(), weight.bfloat16(), targets)
    assert torch.equal(inside, rounded)
    assert torch.equal(chosen, linear_logprob(hidden, weight, targets))
    assert not torch.equal(inside, chosen)
    assert inside.dtype is torch.float32


GOOD = {
    "hidden": torch.zeros(4, 3), "weight": torch.zeros(5, 3), "targets": torch.zeros(4).long(),
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "error", "quoted"),
    [
        ({"hidden": torch.zeros(2, 4, 3)}, ShapeError, r"hidden \(2, 4, 3\)"),
        ({"weight": torch.zeros(5, 2)}, ShapeError, r"weight \(5, 2\)"),
        ({"weight": torch.zeros(0, 3)}, ShapeError, "without vocabulary"),
        ({"targets": torch.zeros(3).long()}, ShapeError, r"targets \(3,\)"),
        ({"targets": torch.zeros(4)}, ShapeError, r"float32.*targets.long\(\)"),
        ({"targets": torch.tensor([0, 1, 5, 0])}, ShapeError, r"target 5 of token 2.*0\.\.4"),
        ({"targets": torch.tensor([0, -100, 1, 0])}, ShapeError, "target -100 of token 1"),
        ({"bias": torch.zeros(4)}, ShapeError, r"bias \(4,\)"),
        ({"hidden": torch.zeros(4, 3).long()}, ShapeError, "hidden is torch.int64"),
        ({"weight": torch.zeros(5, 3, device="meta")}, ShapeError, "weight is on meta"),
        ({"temperature": 0.0}, ConfigError, "temperature is 0.0"),
        ({"temperature": -1.0}, ConfigError, "temperature is -1.0"),
        ({"temperature": math.inf}, ConfigError, "temperature is inf"),
        ({"temperature": math.nan}, ConfigError, "temperature is nan"),
        ({"mode": "fast"}, ConfigError, "'fast'; it is one of auto, frozen"),
        ({"mode": "frozen"}, ConfigError, "weight.requires_grad is True"),
        ({"mode": "resident"}, ConfigError, "needs coefficients="),
        ({"memory": 19}, ConfigError, "memory = 19 bytes.*take 20"),
        ({"dtype": torch.int8}, ConfigError, "dtype is torch.int8"),
        ({"coefficients": torch.zeros(3)}, ShapeError, r"coefficients has shape \(3,\)"),
        ({"lengths": [2, 3]}, ShapeError, "add up to 5"),
        ({"lengths": [5, -1]}, ShapeError, "lengths"),
        ({"coefficients": lambda x, where: x[:2]}, ShapeError, r"gave shape \(2,\) for 4"),
    ],
)  # fmt: skip
def test_refusals(change, error, quoted):
    """The message quotes what was given."""
    arguments = {**GOOD, **change}
    if arguments["weight"].device.type == "cpu":
        arguments["weight"] = arguments["weight"].clone().requires_grad_()
    with pytest.raises(error, match=quoted):
        linear_logprob(**arguments)
    assert issubclass(error, fiberpo.FiberPOError)


def test_a_trained_bias_is_not_frozen():
    """The weight alone does not decide."""
    hidden, weight, bias, targets, _ = make(4, 3, 5)
    out = linear_logprob(hidden, weight, targets, bias=bias.requires_grad_())
    assert out.grad_fn.name() == "TwoPhaseBackward"
    with pytest.raises(ConfigError, match="bias.requires_grad"):
        linear_logprob(hidden, weight, targets, bias=bias, mode="frozen")


# -- with objectives ---------------------------------------------------------------------------

LENGTHS = [3, 1, 5, 2, 4, 3]
TRAJECTORY = [
    recipes.fiberpo(budget=(0.02, 0.015), epsilon=0.03), recipes.grpo(), recipes.gspo(),
    recipes.ppo(), recipes.dr_grpo(length=8),
]  # fmt: skip
COUPLED = recipes.fiberpo_domain(
    {"group": (0.02, 0.015), "trajectory": (0.02, 0.015)}, epsilon=0.03
)


def scene():
    hidden, weight, _, targets, _ = make(sum(LENGTHS), 4, 11, scale=0.5)
    old = linear_logprob(hidden, weight, targets, 0.9)
    generator = torch.Generator().manual_seed(1)
    moved = hidden + 0.1 * torch.randn(hidden.shape, generator=generator, dtype=torch.float64)
    advantages = torch.tensor([1.0, -1.0, 0.0, 0.5, -2.0, 1.5]).double()
    batch = RatioBatch.from_packed(
        old, old, advantages, LENGTHS, labels={"group": ["a", "a", "b", "b", "c", "c"]}
    )
    return batch, moved, weight, targets


def wanted(objective, batch, moved, weight, targets):
    """Autograd through logits in memory and the gates, and the coefficients."""
    leaves = [x.detach().clone().requires_grad_() for x in (moved, weight)]
    log_probs, _ = linear_reference.linear_logprob(*leaves, targets, 0.9)
    out = objective(batch.with_log_probs(log_probs), gradient="autograd")
    return torch.autograd.grad(out.loss, leaves), out


@pytest.mark.parametrize("objective", TRAJECTORY, ids=lambda o: o.name)
def test_trajectory_objectives_are_resident(objective):
    """Coefficients made chunk by chunk are those of the whole; gradients exact in 3 products."""
    batch, moved, weight, targets = scene()
    expected, out = wanted(objective, batch, moved, weight, targets)
    assert out.coefficients.abs().max() > 0
    leaves = [x.detach().clone().requires_grad_() for x in (moved, weight)]
    made = []
    rule = exact.by_trajectory(objective, batch)

    def coefficients(log_probs, where):
        made.append(where)
        return rule(log_probs, where)

    log_probs = linear_logprob(
        *leaves, targets, 0.9, coefficients=coefficients, lengths=batch.lengths, mode="resident",
        memory=6 * 11 * 8,
    )  # fmt: skip
    assert [(w.start, w.stop) for w in made] == [(0, 4), (4, 9), (9, 15), (15, 18)]
    objective(batch.with_log_probs(log_probs)).loss.backward()
    for leaf, gradient in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, gradient)


def test_coupled_objectives_are_refused():
    """A prompt group reaches beyond one trajectory; so does a counted denominator."""
    batch, *_ = scene()
    with pytest.raises(ObjectiveError, match=r"fiberpo_domain couples.*\['group'\]"):
        exact.by_trajectory(COUPLED, batch)
    counted = recipes.grpo(mask=fiberpo.Renormalised(fiberpo.MaxDivergence(0.05)))
    with pytest.raises(ObjectiveError, match="Renormalised"):
        exact.by_trajectory(counted, batch)
    rule = exact.by_trajectory(TRAJECTORY[0], batch)
    with pytest.raises(ObjectiveError, match="tokens 0 to 5 are not whole"):
        rule(batch.log_probs[:5], slice(0, 5))


@pytest.mark.parametrize("known", [False, True])
def test_an_exact_step_over_micro_batches(known):
    """Two phases with a group gate across three parts, with the coefficients known or not."""
    batch, moved, weight, targets = scene()
    expected, out = wanted(COUPLED, batch, moved, weight, targets)
    assert float(out.metrics()["gate/active"]) > 0.3
    leaves = [x.detach().clone().requires_grad_() for x in (moved, weight)]
    rows = [torch.tensor([0, 2]), torch.tensor([1, 4]), torch.tensor([3, 5])]
    tokens = [torch.cat([(batch.row == r).nonzero()[:, 0] for r in part]) for part in rows]
    window = exact.Stepper(COUPLED).open([batch.select(part) for part in rows])
    assert window.route is exact.Route.TWO_PHASE
    assert window.coefficients(0) is None
    local = exact.Stepper(COUPLED, mode="local", check_every=1).open(window.parts)
    local.fill([part.log_probs for part in window.parts])
    assert local.coefficients(0) is None  # what it will use is not what it compares with

    def forward(k, coefficients=None):
        return linear_logprob(
            leaves[0][tokens[k]], leaves[1], targets[tokens[k]], 0.9, coefficients=coefficients
        )

    with torch.no_grad():
        window.fill([forward(k) for k in range(3)])
    for k in range(3):
        log_probs = forward(k, window.coefficients(k) if known else None)
        assert log_probs.grad_fn.name() == ("ResidentBackward" if known else "TwoPhaseBackward")
        window.loss(k, log_probs).backward()
    for leaf, gradient in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, gradient)
