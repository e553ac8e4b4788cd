"""CISPO, SAPO, GMPO, DPPO, CPPO, SPO, TOPR, Truly PPO, and what the engine has for them."""

import math
import pickle
import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fiberpo
from core import oracle, peer_oracle
from core.cases import F64, packed, single
from fiberpo import Regime, exact, recipes
from fiberpo.charts import Deviation, Log
from fiberpo.gates import Pass, Site
from fiberpo.gating import GateMap
from fiberpo.peer_gates import (
    QuadraticGate,
    RollbackClip,
    SignedLogClip,
    SoftGate,
    Taper,
    WeightClip,
)
from fiberpo.peers import PEERS
from fiberpo.testing import assert_partition_invariant
from fiberpo.token_masks import DivergenceMask, PrefixMask, binary_divergence

log, inf = math.log, math.inf


@dataclass
class Sample:
    """Log-probs that belong to probabilities, advantages of both signs."""

    new: list
    old: list
    advantages: list
    lengths: list

    def batch(self, new=None, **more):
        new = torch.as_tensor(self.new if new is None else new, dtype=F64)
        old, advantages = (torch.tensor(x, dtype=F64) for x in (self.old, self.advantages))
        return fiberpo.RatioBatch.from_packed(new, old, advantages, self.lengths, **more)

    def ratios(self):
        return [math.exp(n - o) for n, o in zip(self.new, self.old)]


def sample(seed, drift=0.4, per_token=False):
    """12 trajectories of 1 to 6 tokens; advantages are constant on each unless ``per_token``."""
    rng = np.random.default_rng(seed)
    lengths = [1, *rng.integers(2, 7, 11).tolist()]
    tokens = sum(lengths)
    old = -np.exp(rng.normal(-0.7, 1.0, tokens))
    new = old * np.exp(rng.normal(0, drift, tokens))
    advantages = rng.normal(0, 1, tokens)
    if not per_token:
        advantages = np.repeat(rng.normal(0, 1, 12), lengths)
    return Sample(new.tolist(), old.tolist(), advantages.tolist(), lengths)


def tokens(lengths):
    return oracle.token_mean(lengths)


def means(lengths):
    return oracle.trajectory_mean(lengths)


def sums(lengths):
    return [1 / len(lengths)] * sum(lengths)


# name -> (objective, terms by loops, mu)
CASES = {
    "cispo": (recipes.cispo(0.3, 0.2), (peer_oracle.cispo, 0.3, 0.2), tokens),
    "cispo, open below": (recipes.cispo(None, 0.1), (peer_oracle.cispo, None, 0.1), tokens),
    "sapo": (recipes.sapo(), (peer_oracle.sapo, 1.0, 1.05), means),
    "sapo, sharp": (recipes.sapo(3.0, 8.0), (peer_oracle.sapo, 3.0, 8.0), means),
    "gmpo": (recipes.gmpo(0.1), (peer_oracle.gmpo, 0.1, 0.1), means),
    "gmpo, higher": (recipes.gmpo(0.05, 0.3), (peer_oracle.gmpo, 0.05, 0.3), means),
    "dppo, tv": (recipes.dppo(0.05), (peer_oracle.dppo, 0.05, "tv"), tokens),
    "dppo, kl": (recipes.dppo(0.01, "kl"), (peer_oracle.dppo, 0.01, "kl"), tokens),
    "cppo": (recipes.cppo(0.08, 0.7, 0.03), (peer_oracle.cppo, 0.08, 0.7, 0.03), tokens),
    "cppo, kl": (
        recipes.cppo(0.03, 1.0, 0.01, "kl"), (peer_oracle.cppo, 0.03, 1.0, 0.01, "kl"), tokens,
    ),
    "spo": (recipes.spo(0.15), (peer_oracle.spo, 0.15), tokens),
    "topr": (recipes.topr(), (peer_oracle.topr,), sums),
    "truly_ppo": (recipes.truly_ppo(0.1, 0.3), (peer_oracle.truly_ppo, 0.1, 0.3), tokens),
}  # fmt: skip
every = pytest.mark.parametrize("name", CASES)
DETACHED = {name for name in CASES if name.startswith(("cispo", "topr"))}
WHOLE = {name for name in CASES if name.startswith("cppo")}


def value(name, s, new):
    """``J`` with every stopped gradient taken at the sample's own log-probs."""
    _, (terms, *parameters), mu = CASES[name]
    found = terms(new, s.new, s.old, s.advantages, s.lengths, *parameters)
    return math.fsum(m * t for m, t in zip(mu(s.lengths), found))


def test_there_is_a_case_for_every_peer():
    assert {name.split(",")[0] for name in CASES} == set(PEERS)


@every
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_loss_is_minus_j(name, seed, per_token):
    """Value by loops, advantages per trajectory and per token."""
    s = sample(seed, per_token=per_token)
    assert float(CASES[name][0](s.batch()).loss) == pytest.approx(-value(name, s, s.new), rel=1e-11)


@every
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_coefficients_are_central_differences(name, seed, per_token):
    """``coefficients_i = dJ / d log pi_i`` with stopped gradients held, away from kinks."""
    s = sample(seed, per_token=per_token)
    expected = oracle.central_differences(lambda new: value(name, s, new), s.new)
    found = CASES[name][0](s.batch()).coefficients.numpy()
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-7)


@every
def test_something_is_gated_in_the_cases_above(name):
    """The samples are not ones in which every method is the plain policy gradient."""
    s = sample(0)
    out, mu = CASES[name][0](s.batch()), CASES[name][2](s.lengths)
    plain = np.multiply(mu, s.advantages) * s.ratios()
    changed = np.abs(out.coefficients.numpy() - plain) > 1e-6 * np.abs(plain)
    assert changed.mean() > 0.1


@every
def test_closed_form_is_autograd_through_the_gates(name):
    found = {}
    for form in ("closed_form", "autograd"):
        s = sample(2, per_token=True)
        leaf = torch.tensor(s.new, dtype=F64, requires_grad=True)
        out = CASES[name][0](s.batch(leaf), gradient=form)
        out.loss.backward()
        assert torch.allclose(out.coefficients, -leaf.grad, atol=1e-14, rtol=1e-9)
        assert out.values.sum().item() == pytest.approx(out.loss.item(), rel=1e-12)
        found[form] = out.loss.item()
    assert found["closed_form"] == pytest.approx(found["autograd"], rel=1e-13)


@every
def test_on_policy_the_gradient_is_the_policy_gradient(name):
    """``mu A``; GMPO, whose tokens share their ratio, averages ``A`` over the trajectory."""
    s = sample(3, per_token=True)
    s.new = list(s.old)
    advantages = list(s.advantages)
    if name.startswith("gmpo"):
        advantages = []
        for begin, end in zip(peer_oracle.starts(s.lengths), peer_oracle.starts(s.lengths)[1:]):
            advantages += [sum(s.advantages[begin:end]) / (end - begin)] * (end - begin)
    expected = np.multiply(CASES[name][2](s.lengths), advantages)
    out = CASES[name][0](s.batch())
    assert out.coefficients.numpy() == pytest.approx(expected, abs=1e-15)
    assert out.metrics()["gate/left_out"] == 0


@every
def test_first_update_of_a_rollout_needs_no_forward(name):
    """The route that takes the old log-probs for the current ones gives the same gradient."""
    s = sample(4)
    s.new = list(s.old)
    leaf = torch.tensor(s.new, dtype=F64, requires_grad=True)
    stepper = exact.Stepper(CASES[name][0])
    window = stepper.backward([s.batch()], lambda k: leaf, fresh=True)
    whole = CASES[name][0](s.batch())
    assert torch.allclose(-leaf.grad, whole.coefficients, rtol=1e-12)
    assert float(window.value()) == pytest.approx(float(whole.loss), rel=1e-12)


@every
@pytest.mark.parametrize("split", [False, True], ids=["whole", "pieces"])
def test_partition_invariant(name, split):
    """Micro-batches, ranks, and pieces of trajectories where the method can be cut there."""
    batch, objective = sample(5).batch(), CASES[name][0]
    if split and name in WHOLE:
        with pytest.raises(fiberpo.ObjectiveError, match="whole trajectories without that label"):
            assert_partition_invariant(objective, batch, trials=1, split_trajectories=True)
    else:
        assert_partition_invariant(objective, batch, trials=4, split_trajectories=split, rtol=1e-9)


@every
@pytest.mark.parametrize("lost", ["no advantage", "masked"])
def test_overflowing_ratios_without_weight_do_no_harm(name, lost):
    """``r = inf`` where ``A = 0``, or where a sequence mask drops the trajectory."""
    new, old = [-1.0, -1.2, -0.5, -1.0], [-1.05, -1.2, -900.0, -1.0]
    advantages = [1.0, -0.25, 0.0 if lost == "no advantage" else 1.0, -0.5]
    batch = Sample(new, old, advantages, [2, 1, 1]).batch(
        rollout_log_probs=torch.tensor(old, dtype=F64)
    )
    plain = CASES[name][0]
    mask = fiberpo.MaxDivergence(1.0)
    objective = fiberpo.Objective(plain.weights, plain.gate_map, mask, factors=plain.factors)
    out = (plain if lost == "no advantage" else objective)(batch)
    assert math.isfinite(out.loss.item())
    assert bool(torch.isfinite(out.coefficients).all())
    assert out.coefficients[2] == 0
    assert out.coefficients[0] != 0


# ------------------------------------------------------------------------------- edges, by hand


@pytest.mark.parametrize(
    ("objective", "r", "a", "factor", "slope", "regime"),
    [
        (recipes.cispo(0.5, 0.5), 1.5, 1.0, 1.5, None, Regime.PASS),  # exactly at the bound
        (recipes.cispo(0.5, 0.5), 3.0, 1.0, 1.5, None, Regime.ZERO),
        (recipes.cispo(0.5, 0.5), 0.25, -1.0, 0.5, None, Regime.ZERO),
        (recipes.cispo(), 6.0, 1.0, 5.0, None, Regime.ZERO),
        (recipes.cispo(), 1e-3, 1.0, 1e-3, None, Regime.PASS),
        (recipes.sapo(), 1.0, 1.0, 2.0, 1.0, Regime.PASS),
        (recipes.sapo(1.0, 2.0), 1.0, -1.0, 1.0, 1.0, Regime.PASS),
        (recipes.sapo(1.0, 2.0), 1.0, 0.0, 1.0, 0.0, Regime.PASS),
        (recipes.sapo(1.0, 2.0), 2.0, -1.0, 2 / (1 + math.exp(-2.0)),
         8 * math.exp(-2.0) / (1 + math.exp(-2.0)) ** 2, Regime.PASS),
        (recipes.spo(0.5), 1.5, 1.0, 1.25, 0.0, Regime.ZERO),
        (recipes.spo(0.5), 0.5, -1.0, 0.75, 0.0, Regime.ZERO),
        (recipes.spo(0.5), 2.0, 1.0, 1.0, -2.0, Regime.ROLLBACK),
        (recipes.spo(0.5), 2.0, -1.0, 3.0, 6.0, Regime.PASS),
        (recipes.spo(0.5), 4.0, 1.0, -5.0, -20.0, Regime.ROLLBACK),  # a negative gated ratio
        (recipes.truly_ppo(0.5, 0.25), 1.5, 1.0, 1.5, 1.5, Regime.PASS),  # exactly at the band
        (recipes.truly_ppo(0.5, 0.25), 2.0, 1.0, 1.375, -0.5, Regime.ROLLBACK),
        (recipes.truly_ppo(0.5, 0.25), 2.0, -1.0, 2.0, 2.0, Regime.PASS),
        (recipes.truly_ppo(0.5, 0.25), 0.25, -1.0, 0.5625, -0.0625, Regime.ROLLBACK),
        (recipes.truly_ppo(0.5, 0.25), 0.25, 1.0, 0.25, 0.25, Regime.PASS),
        (recipes.truly_ppo(0.5, 0.25), 12.0, 1.0, -1.125, -3.0, Regime.ROLLBACK),
    ],
)  # fmt: skip
def test_one_token(objective, r, a, factor, slope, regime):
    """``G``, ``dG/dl`` (for CISPO the weight itself) and the regime of one token."""
    out = objective(packed([log(r)], [a], [1]))
    expected = a * (factor if slope is None else slope)
    found = out.gated.factor(torch.tensor([False])).item()
    assert found == pytest.approx(factor, abs=1e-14)
    assert out.coefficients.item() == pytest.approx(expected, abs=1e-14)
    assert out.regimes["token"].item() == regime


def test_gmpo_clips_before_the_mean():
    """Log ratios 0.4 (at the clip), 1.0 (clipped), -2.0 (the side that A > 0 leaves open)."""
    out = recipes.gmpo(0.4)(single([0.4, 1.0, -2.0]))
    g = math.exp((0.4 + 0.4 - 2.0) / 3)
    assert out.log_gated_ratio.tolist() == pytest.approx([-0.4] * 3)
    assert out.coefficients.tolist() == pytest.approx([g / 3, 0.0, g / 3])
    assert out.gated.first.regime.tolist() == [[Regime.PASS, Regime.ZERO, Regime.PASS]]
    assert out.metrics()["gate/active"] == pytest.approx(1 / 3)
    punished = recipes.gmpo(0.4)(single([0.4, 1.0, -2.0], advantage=-1.0))
    assert punished.log_gated_ratio.tolist() == pytest.approx([(0.4 + 1.0 - 0.4) / 3] * 3)


def dppo_batch(pairs, advantage):
    new, old = zip(*pairs, strict=True)
    return Sample(
        [log(p) for p in new], [log(p) for p in old], [advantage] * len(new), [len(new)]
    ).batch()


def test_dppo_drops_what_leads_away_and_nothing_else():
    """delta = 0.25 and p_old = 0.5: a shift of exactly delta stays."""
    pairs = [(0.75, 0.5), (0.76, 0.5), (0.25, 0.5), (0.1, 0.5), (0.003, 0.001)]
    up = recipes.dppo(0.25)(dppo_batch(pairs, 1.0))
    assert (up.coefficients == 0).tolist() == [False, True, False, False, False]
    assert up.coefficients[4].item() == pytest.approx(3 / 5)  # a rare token may triple
    down = recipes.dppo(0.25)(dppo_batch(pairs, -1.0))
    assert (down.coefficients == 0).tolist() == [False, False, False, True, False]
    assert down.metrics()["gate/left_out"] == pytest.approx(0.2)
    assert float(up.weight.sum()) == pytest.approx(0.8)  # no denominator changes


def test_binary_kl_is_from_old_to_current():
    """KL(0.5, 0.75) = 0.1438 is not KL(0.75, 0.5) = 0.1308: delta 0.137 tells them apart."""
    pairs = [(0.75, 0.5), (0.5, 0.75)]
    kl = binary_divergence(dppo_batch(pairs, 1.0), "kl").tolist()
    first = 0.5 * log(0.5 / 0.75) + 0.5 * log(0.5 / 0.25)
    second = 0.75 * log(0.75 / 0.5) + 0.25 * log(0.25 / 0.5)
    assert kl == pytest.approx([first, second], rel=1e-14)
    out = recipes.dppo(0.137, "kl")(dppo_batch(pairs, 1.0))
    assert out.coefficients[0] == 0


def test_binary_divergences_of_certain_tokens():
    """p or p_old of 1, both of 1, a log-prob above 0 by rounding, underflow."""
    new, old = [0.0, log(0.5), 0.0, 1e-9, -0.5], [log(0.5), 0.0, 0.0, 0.0, -900.0]
    batch = Sample(new, old, [1.0] * 5, [5]).batch()
    assert binary_divergence(batch, "tv").tolist() == pytest.approx(
        [0.5, 0.5, 0.0, 0.0, math.exp(-0.5)]
    )
    kl = binary_divergence(batch, "kl").tolist()
    assert kl == pytest.approx([inf, log(2), 0.0, 0.0, -math.log1p(-math.exp(-0.5))])


probabilities = st.floats(1e-6, 1 - 1e-6)


@given(probabilities, probabilities)
def test_binary_divergences_are_those_of_two_point_distributions(p, q):
    """Loops; Pinsker: ``KL >= 2 TV^2``."""
    batch = Sample([log(p)], [log(q)], [1.0], [1]).batch()
    tv, kl = (binary_divergence(batch, kind).item() for kind in ("tv", "kl"))
    assert tv == pytest.approx(peer_oracle.divergence("tv", log(p), log(q)), abs=1e-12)
    assert kl == pytest.approx(peer_oracle.divergence("kl", log(p), log(q)), abs=1e-9)
    assert kl >= 2 * tv**2 - 1e-9


def test_cppo_prefix_by_hand():
    """p_old = 0.5, delta = 0.25, w = 1, delta_b = 0.0625: what is used up narrows the bound."""
    pairs = [(0.75, 0.5), (0.625, 0.5), (0.5625, 0.5), (0.515625, 0.5)]
    # bounds 0.25, 0.0625 = 0.25 + 0.0625 - 0.25, 0 = 0.25 + 0.125 - 0.375, and 0 again
    out = recipes.cppo(0.25, 1.0, 0.0625)(dppo_batch(pairs, 1.0))
    assert (out.coefficients == 0).tolist() == [False, True, True, True]
    falling = recipes.cppo(0.25, 1.0, 0.0625)(dppo_batch(pairs, -1.0))
    assert bool((falling.coefficients < 0).all())


def test_cppo_is_stricter_with_early_tokens():
    """The same shift of 0.25 at the first and the last of three tokens; w = 1, 0.75, 0.5."""
    pairs = [(0.75, 0.5), (0.5, 0.5), (0.75, 0.5)]
    out = recipes.cppo(0.2, 0.5, 1.0)(dppo_batch(pairs, 1.0))
    assert (out.coefficients == 0).tolist() == [True, False, False]


@given(st.integers(0, 10**6), st.floats(0.01, 0.3), st.floats(0.1, 1.0), st.floats(0.001, 0.1))
def test_cppo_mask_is_the_loop(seed, delta, w_min, delta_b):
    """Any trajectories, one of a single token among them."""
    s = sample(seed, per_token=True)
    found = PrefixMask(delta, w_min, delta_b)(s.batch())
    terms = peer_oracle.cppo(
        s.new, s.new, s.old, s.advantages, s.lengths, delta, w_min, delta_b
    )  # fmt: skip
    assert (found == 0).tolist() == [t == 0 for t in terms]


def test_topr_takes_the_ratio_of_the_whole_answer():
    """Two tokens at log(0.5) each: 0.25, not their mean 0.5; at most 1; 1 where rewarded."""
    half = [log(0.5), log(0.5)]
    assert recipes.topr()(single(half, -1.0)).coefficients.tolist() == pytest.approx([-0.25] * 2)
    assert recipes.topr()(single(half, 1.0)).coefficients.tolist() == pytest.approx([1.0] * 2)
    up = recipes.topr()(single([0.5, -0.4], -1.0))
    assert up.coefficients.tolist() == pytest.approx([-1.0] * 2)
    assert up.regimes["trajectory"].item() == Regime.ZERO
    still = recipes.topr()(single([0.5, -0.5], -1.0))
    assert still.regimes["trajectory"].item() == Regime.PASS


# ------------------------------------------------------------------------------ specialisations


def plain(weights="token_mean"):
    """The ungated objective ``mu r A``."""
    return fiberpo.Objective(fiberpo.Weights.parse(weights), GateMap(Log(), {}, Pass()))


def coefficients(objective, seed=7, **more):
    return objective(sample(seed, **more).batch()).coefficients.numpy()


def test_dppo_with_infinite_radius_is_ungated():
    for kind in ("tv", "kl"):
        assert np.array_equal(coefficients(recipes.dppo(inf, kind)), coefficients(plain()))


def test_cppo_without_weights_and_with_a_wide_budget_is_dppo():
    found = coefficients(recipes.cppo(0.05, 1.0, 1.0))
    assert np.array_equal(found, coefficients(recipes.dppo(0.05)))
    assert (found == 0).sum() > 3


def test_cispo_gradient_is_the_weight():
    """``c = mu w A``; unclipped it is the gradient of the ungated objective."""
    s = sample(8)
    out = recipes.cispo(0.1, 0.1)(s.batch())
    weights = [peer_oracle.clip(r, 0.9, 1.1) for r in s.ratios()]
    expected = np.multiply(weights, s.advantages) / sum(s.lengths)
    assert out.coefficients.numpy() == pytest.approx(expected, rel=1e-12)
    assert coefficients(recipes.cispo(None, 1e6)) == pytest.approx(coefficients(plain()))


def test_topr_of_rewarded_answers_is_reinforce():
    s = sample(9)
    s.advantages = [abs(a) for a in s.advantages]
    out = recipes.topr()(s.batch())
    assert out.coefficients.numpy() == pytest.approx(np.divide(s.advantages, len(s.lengths)))


@pytest.mark.parametrize("objective", [recipes.spo(0.2), recipes.sapo(weights="token_mean")])
def test_small_drifts_are_ungated_to_first_order(objective):
    """The gradient differs from the ungated one by O(drift)."""
    drift = 1e-4
    found, free = (coefficients(o, drift=drift) for o in (objective, plain()))
    assert np.abs(found / free - 1).max() < 100 * drift
    assert np.abs(found / free - 1).max() > 0


def test_truly_ppo_with_a_flat_rollback_is_ppo():
    found = coefficients(recipes.truly_ppo(0.2, 1e-12))
    assert found == pytest.approx(coefficients(recipes.ppo(0.2)), abs=1e-12)


def test_gmpo_without_a_clip_is_gspo_without_a_clip():
    found = coefficients(recipes.gmpo(50.0))
    assert found == pytest.approx(coefficients(recipes.gspo(0.999999, 1e9)), rel=1e-12)


# ------------------------------------------------------------------------- engine and its parts


def test_a_detached_map_is_a_weighted_policy_gradient():
    """Any gate map can be detached: same weights, no gradient through them."""
    gates = {"trajectory": fiberpo.AggregateGate((0.05, 0.03))}
    s = sample(10)
    gated = GateMap(fiberpo.SignedLog(), gates, fiberpo.LogClip(0.04))
    detached = GateMap(fiberpo.SignedLog(), gates, fiberpo.LogClip(0.04), detached=True)
    mu = fiberpo.Weights.token_mean()
    weight = fiberpo.Objective(mu, gated)(s.batch()).log_gated_ratio.exp()
    out = fiberpo.Objective(mu, detached)(s.batch())
    expected = weight.numpy() * np.array(s.advantages) / sum(s.lengths)
    assert out.coefficients.numpy() == pytest.approx(expected, rel=1e-12)
    assert float(out.loss) == pytest.approx(-float((expected * np.array(s.new)).sum()), rel=1e-12)


def test_a_first_gate_stands_before_every_aggregate():
    """FiberPO on log ratios that a clip has bounded: values and gradients by autograd."""
    gates = {"trajectory": fiberpo.AggregateGate((0.12, 0.05), 2.0)}
    clipped = GateMap(fiberpo.SignedLog(), gates, fiberpo.LogClip(0.04), first=fiberpo.LogClip(0.1))
    plain_map = GateMap(fiberpo.SignedLog(), gates, fiberpo.LogClip(0.04))
    ell = [0.3, 0.05, -0.02, -0.4]
    bounded = [0.1, 0.05, -0.02, -0.1]
    mu = fiberpo.Weights.token_mean()
    first = fiberpo.Objective(mu, clipped)(single(ell))
    then = fiberpo.Objective(mu, plain_map)(single(bounded))
    assert torch.allclose(first.log_gated_ratio, then.log_gated_ratio)
    inside = torch.tensor([0.0, 1.0, 1.0, 0.0], dtype=F64)
    assert torch.allclose(first.coefficients, inside * then.coefficients)


def test_maps_survive_pickling():
    for objective in (recipes.gmpo(), recipes.topr(), recipes.sapo(), recipes.cppo()):
        again = pickle.loads(pickle.dumps(objective))
        assert again.gate_map == objective.gate_map
        assert again.factors == objective.factors


def test_factors_multiply():
    """Any callable that gives ``[N]`` numbers; two of them; a denominator never changes."""

    def double(batch):
        return torch.full((len(batch),), 2.0, dtype=F64)

    base = recipes.grpo()
    both = fiberpo.Objective(base.weights, base.gate_map, factors=(double, DivergenceMask(0.05)))
    s = sample(11)
    expected = 2 * base(s.batch()).coefficients * DivergenceMask(0.05)(s.batch())
    assert torch.allclose(both(s.batch()).coefficients, expected)


def test_a_negative_gated_ratio_is_carried_through():
    """SPO at r = 4: ``G = -5`` has no log, and both gradients and the loss are right."""
    for form in ("closed_form", "autograd"):
        batch = packed([log(4.0), 0.0], [1.0, 1.0], [2], grad=True)
        out = recipes.spo(0.5)(batch, gradient=form)
        out.loss.backward()
        assert out.loss.item() == pytest.approx((5.0 - 1.0) / 2)
        assert batch.log_probs.grad.tolist() == pytest.approx([10.0, -0.5])
        assert math.isnan(out.log_gated_ratio[0].item())


@pytest.mark.parametrize("detached", [False, True])
def test_pessimistic_maps_take_the_ratio(detached):
    """``factor`` is ``min(G A, r A) / A``, also where the map is detached."""
    gate_map = GateMap(
        Deviation(), {}, fiberpo.BudgetClip(0.1), pessimistic=True, detached=detached
    )
    out = fiberpo.Objective(fiberpo.Weights.token_mean(), gate_map)(
        packed([log(1.5), log(0.5)], [1.0, 1.0], [2])
    )
    assert out.gated.factor(torch.zeros(2, dtype=torch.bool)).tolist() == pytest.approx([1.1, 0.5])


@pytest.mark.parametrize(
    "gate",
    [SignedLogClip(0.1), SoftGate(1.0, 1.0), QuadraticGate(0.1), RollbackClip(0.1, 0.3), Taper()],
)
def test_gates_that_need_the_sign_say_so(gate):
    assert gate.needs_advantage
    one = torch.ones(1, dtype=F64)
    with pytest.raises(fiberpo.ObjectiveError, match=f"{type(gate).__name__} needs the sign"):
        gate(one[None], Site("token", one))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: recipes.cispo(1.0), "epsilon_low is 1.0"),
        (lambda: recipes.cispo(0.1, 0.0), "epsilon_high is 0.0"),
        (lambda: recipes.sapo(0.0), "tau_pos is 0.0"),
        (lambda: recipes.sapo(1.0, -1.0), "tau_neg is -1.0"),
        (lambda: recipes.gmpo(0.0), "epsilon is 0.0"),
        (lambda: recipes.gmpo(0.1, -0.1), "epsilon_high is -0.1"),
        (lambda: recipes.dppo(-0.1), "delta is -0.1"),
        (lambda: recipes.dppo(0.1, "js"), "divergence is 'js'"),
        (lambda: recipes.dppo(divergence="js"), "divergence is 'js'"),
        (lambda: recipes.cppo(0.0), "delta is 0.0"),
        (lambda: recipes.cppo(0.1, 1.1), "w_min is 1.1"),
        (lambda: recipes.cppo(0.1, 0.5, 0.0), "delta_b is 0.0"),
        (lambda: recipes.cppo(divergence="js"), "divergence is 'js'"),
        (lambda: recipes.spo(0.0), "epsilon is 0.0"),
        (lambda: recipes.truly_ppo(1.0), "epsilon is 1.0"),
        (lambda: recipes.truly_ppo(0.1, 0.0), "alpha is 0.0"),
        (lambda: WeightClip(0.1, inf), "epsilon_high is inf"),
        (lambda: recipes.from_name("topr", epsilon=0.1), "topr has no parameter 'epsilon'"),
    ],
)
def test_impossible_parameters_are_refused(make, message):
    with pytest.raises(fiberpo.FiberPOError, match=message):
        make()


def test_defaults_are_those_of_the_papers():
    assert recipes.dppo().factors == (DivergenceMask(0.15, "tv"),)
    assert recipes.dppo(divergence="kl").factors == (DivergenceMask(0.05, "kl"),)
    assert recipes.cppo().factors == (PrefixMask(0.15, 0.8, 0.015),)
    assert recipes.gmpo().gate_map.first == SignedLogClip(0.4)
    assert recipes.truly_ppo().gate_map.token == RollbackClip(0.2, 0.3)
    assert str(recipes.dppo()) == "dppo(delta=0.15, divergence='tv', weights='token_mean')"


@pytest.mark.parametrize("name", PEERS)
def test_papers_are_cited(name):
    assert "arXiv" in fiberpo.citation(PEERS[name]())
    assert recipes.RECIPES[name] is PEERS[name]


def test_an_empty_part_has_no_tokens_to_mask():
    empty = fiberpo.RatioBatch.from_packed(
        torch.empty(0), torch.empty(0), torch.empty(0), [], allow_empty=True
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fiberpo.FiberPOWarning)
        assert recipes.cppo()(empty, denominators=fiberpo.Denominators(4.0, 2.0)).loss == 0
