"""Recipes of other methods equal verl's losses of the same name; every difference has a size.

verl's own functions are called on random padded batches, masked positions included.
"""

import math

import pytest
import torch
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.workers.config import ActorConfig

import fiberpo
from fiberpo import recipes

F64 = torch.float64


def actor(**settings):
    return ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_mini_batch_size=8, ppo_micro_batch_size_per_gpu=8,
        **settings,
    )  # fmt: skip


def draw(seed, per_token=False):
    """Log-probs of probabilities, ``[8, 9]``, 2 to 9 loss tokens a row, some in between masked."""
    generator = torch.Generator().manual_seed(seed)
    old = -torch.randn(8, 9, generator=generator, dtype=F64).exp()
    new = old * (0.5 * torch.randn(8, 9, generator=generator, dtype=F64)).exp()
    lengths = torch.randint(2, 10, (8, 1), generator=generator)
    mask = torch.arange(9) < lengths
    mask[0, 1] = False
    advantages = torch.randn(8, 9 if per_token else 1, generator=generator, dtype=F64).expand(8, 9)
    return new, old, advantages, mask


def of_verl(name, config, drawn, mode):
    """Loss and its gradient with respect to the log-probs."""
    new, old, advantages, mask = drawn
    leaf = new.clone().requires_grad_()
    loss, metrics = get_policy_loss_fn(name)(
        old_log_prob=old, log_prob=leaf, advantages=advantages, response_mask=mask.to(F64),
        loss_agg_mode=mode, config=config,
    )  # fmt: skip
    loss.backward()
    return loss.item(), leaf.grad, metrics


def of_ours(objective, drawn):
    new, old, advantages, mask = drawn
    leaf = new.clone().requires_grad_()
    out = objective(fiberpo.RatioBatch.from_padded(leaf, old, advantages, mask))
    out.loss.backward()
    return out.loss.item(), leaf.grad, out.metrics()


CLIPS = {"clip_ratio_low": 0.1, "clip_ratio_high": 0.15}
UNTRUNCATED = {"clip_ratio_c": 1e12}
PAIRS = {
    "cispo": (
        recipes.cispo(0.1, 0.15), "cispo", CLIPS, "token-mean",
    ),
    "cispo by sequences": (
        recipes.cispo(0.1, 0.15, weights="seq-mean-token-mean"), "cispo", CLIPS,
        "seq-mean-token-mean",
    ),
    "sapo": (
        recipes.sapo(1.5, 4.0), "sapo", {"tau_pos": 1.5, "tau_neg": 4.0}, "seq-mean-token-mean",
    ),
    "geo_mean": (recipes.gmpo(0.1, 0.15), "geo_mean", CLIPS, "token-mean"),
    "dppo_tv": (
        recipes.dppo(0.04), "dppo_tv",
        {"clip_ratio": 0.04, "clip_ratio_low": 0.04, "clip_ratio_high": 0.04, **UNTRUNCATED},
        "token-mean",
    ),
    "dppo_kl": (
        recipes.dppo(0.02, "kl"), "dppo_kl",
        {"clip_ratio": 0.02, "clip_ratio_low": 0.02, "clip_ratio_high": 0.02, **UNTRUNCATED},
        "token-mean",
    ),
}  # fmt: skip
every = pytest.mark.parametrize("name", PAIRS)


@every
@pytest.mark.parametrize("per_token", [False, True], ids=["by row", "by token"])
@pytest.mark.parametrize("seed", range(3))
def test_gradients_are_equal(name, seed, per_token):
    """To 1e-8 (verl adds that to its counts of tokens), and the method is not the plain one."""
    objective, theirs, settings, mode = PAIRS[name]
    drawn = draw(seed, per_token)
    _, expected, _ = of_verl(theirs, actor(**settings), drawn, mode)
    _, found, metrics = of_ours(objective, drawn)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
    assert metrics["gate/gradient_kept"] < 0.99 or metrics["gate/left_out"] > 0


@every
@pytest.mark.parametrize("seed", range(3))
def test_values_are_equal_where_verl_keeps_the_surrogate(name, seed):
    """verl's DPPO has the gradient of ``r A`` but the value of ``sg(r) A log pi``."""
    objective, theirs, settings, mode = PAIRS[name]
    drawn = draw(seed)
    loss, _, _ = of_verl(theirs, actor(**settings), drawn, mode)
    mine, _, _ = of_ours(objective, drawn)
    if name.startswith("dppo"):
        new, old, advantages, mask = drawn
        batch = fiberpo.RatioBatch.from_padded(*drawn[:2], advantages, mask)
        kept = batch.to_padded(objective.factors[0](batch))
        value = (kept * (new - old).exp() * advantages * new)[mask].sum() / mask.sum()
        assert loss == pytest.approx(-value.item(), rel=1e-9)
        assert abs(loss - mine) > 1e-2
    else:
        assert mine == pytest.approx(loss, rel=1e-7)


def one(log_ratio, advantage, old=-1.0):
    """A row of two tokens: one that moves, one that stays."""
    return (
        torch.tensor([[old + log_ratio, -1.0]], dtype=F64), torch.tensor([[old, -1.0]], dtype=F64),
        torch.full((1, 2), advantage, dtype=F64), torch.ones(1, 2, dtype=torch.bool),
    )  # fmt: skip


@pytest.mark.parametrize("theirs", ["dppo_tv", "dppo_kl"])
def test_verl_truncates_the_ratio_of_dppo_at_3(theirs):
    """``clip_ratio_c`` is 3 unless set: a rare token with r = 5 gets 3/5 of our gradient."""
    drawn = one(math.log(5), 1.0, old=-8.0)
    _, expected, _ = of_verl(theirs, actor(), drawn, "token-mean")
    objective = recipes.dppo(0.2, theirs.removeprefix("dppo_"))
    _, found, _ = of_ours(objective, drawn)
    assert (expected[0, 0] / found[0, 0]).item() == pytest.approx(3 / 5)


def test_verl_clamps_log_ratios_at_20():
    """A log ratio of -25 counts as -20 in SAPO: its gradient stops, which ours does not."""
    drawn = one(-25.0, 1.0)
    _, expected, _ = of_verl("sapo", actor(), drawn, "seq-mean-token-mean")
    _, found, _ = of_ours(recipes.sapo(), drawn)
    assert expected[0, 0] == 0
    assert found[0, 0].item() == pytest.approx(-0.5 * 0.786 * math.exp(-25.0), rel=1e-3)


def test_verl_softens_the_binary_kl_of_certain_tokens():
    """1e-8 in verl's logarithms: from p_old = 0.5 to p = 1 its KL is 8.5 nats, ours infinite."""
    new, old = torch.zeros(1, 2, dtype=F64), torch.full((1, 2), math.log(0.5), dtype=F64)
    drawn = (new, old, torch.ones(1, 2, dtype=F64), torch.ones(1, 2, dtype=torch.bool))
    kept = {}
    for delta in (8.51, 8.53):
        settings = {"clip_ratio": delta, "clip_ratio_low": delta, "clip_ratio_high": delta}
        _, gradient, _ = of_verl("dppo_kl", actor(**settings), drawn, "token-mean")
        kept[delta] = bool((gradient != 0).any())
        assert (of_ours(recipes.dppo(delta, "kl"), drawn)[1] == 0).all()
    assert kept == {8.51: False, 8.53: True}


def test_verl_ignores_tokens_without_advantage_in_the_geometric_mean():
    """Its clip multiplies by sign(A): a token with A = 0 has the log ratio 0, in ours its own."""
    drawn = one(0.05, 1.0)
    drawn[2][0, 0] = 0.0
    _, _, settings, mode = PAIRS["geo_mean"]
    loss, _, _ = of_verl("geo_mean", actor(**settings), drawn, mode)
    mine, _, _ = of_ours(recipes.gmpo(0.1, 0.15), drawn)
    assert loss == pytest.approx(-0.5)
    assert mine == pytest.approx(-0.5 * math.exp(0.05 / 2))


def test_verl_counts_empty_rows_in_the_geometric_mean():
    """``torch.mean`` over all rows: with one of two rows masked its loss is half of ours."""
    new, old, advantages, mask = one(0.05, 1.0)
    drawn = (new.repeat(2, 1), old.repeat(2, 1), advantages.repeat(2, 1), mask.repeat(2, 1))
    drawn[3][1] = False
    _, _, settings, mode = PAIRS["geo_mean"]
    loss, _, _ = of_verl("geo_mean", actor(**settings), drawn, mode)
    mine, _, _ = of_ours(recipes.gmpo(0.1, 0.15), drawn)
    assert mine == pytest.approx(2 * loss)
