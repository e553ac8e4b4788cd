"""Log-probs of the sampling engine, as TRL's vLLM path hands them over.

The engine is replaced by a script; ratio, clipping and masking of them are TRL's own code.
"""

import functools
import math
import random

import numpy as np
import pytest
import torch

from fiberpo import MeanDivergence, recipes
from integrations.tiny import (
    apart,
    double_model,
    gradients,
    host,
    scripted,
    tiny_model,
    trainer,
    updates,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
]

MODES = ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
WINDOW = {
    "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "steps_per_generation": 2,
    "num_iterations": 3, "max_steps": 3, "vllm_importance_sampling_clip_min": 0.8,
    "vllm_importance_sampling_clip_max": 1.25,
}  # fmt: skip
BUDGET = (0.004, 0.003)
GROUP = recipes.fiberpo_domain({"group": BUDGET, "trajectory": BUDGET}, 0.02, rollback=2.0)


@functools.lru_cache
def starting_model():
    return tiny_model()[0]


def engine(prompt, answer):
    """What the starting model says, with noise; None (not scored) for every ninth token or so."""
    draw = random.Random(repr((list(prompt), answer)))
    ids = torch.tensor([[*prompt, *answer]])
    with torch.no_grad():
        log_probs = starting_model()(ids).logits[0].log_softmax(-1)
    said = log_probs[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None])[:, 0]
    return [None if draw.randrange(9) == 0 else x + draw.uniform(-0.3, 0.3) for x in said.tolist()]


def sampled(run):
    """The trainer as it is with vLLM, whose place the script takes."""
    run.use_vllm = True
    return scripted(run, log_probs=engine)


def ours(tmp_path, objective, **settings):
    run = trainer(
        tmp_path / "ours", objective=objective, model=double_model(), **{**WINDOW, **settings}
    )
    return sampled(run)


@pytest.mark.parametrize(
    ("mode", "level"), [*((mode, "token") for mode in MODES), ("token_mask", "sequence")]
)
def test_corrected_loss_is_the_host_own(tmp_path, mode, level):
    """TRL multiplies its loss by the ratio, we the advantages: one gradient, one loss."""
    settings = {"vllm_importance_sampling_mode": mode}
    recipe = recipes.grpo(0.01) if level == "token" else recipes.gspo(0.01)
    mine = ours(tmp_path, recipe, **settings)
    theirs = host(
        tmp_path / "theirs", loss_type="grpo", epsilon=0.01, model=double_model(),
        importance_sampling_level=level, **{**WINDOW, **settings},
    )  # fmt: skip
    assert apart(gradients(mine), gradients(sampled(theirs))) < 1e-6
    for a, b in zip(updates(mine), updates(theirs), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6, abs=1e-7)
        name = "sampling/importance_sampling_ratio/mean"
        assert a.get(name) == b.get(name)
    assert updates(mine)[2]["gate/active"] > 0.05
    ratios = torch.cat([x["importance_sampling_ratio"].flatten() for x in mine._buffered_inputs])
    width = 1 if mode.startswith("sequence") else mine._buffered_inputs[0]["completion_ids"].size(1)
    assert mine._buffered_inputs[0]["importance_sampling_ratio"].shape == (8, width)
    assert len(ratios.unique()) > 5
    assert (ratios == 0).any() == mode.endswith("mask")


def evaluated(run, objective, corrected):
    """The objective on the micro-batches in use, with TRL's correction or without."""
    outs = []
    for inputs in run._buffered_inputs:
        inputs = {k: v for k, v in inputs.items() if corrected or k != "importance_sampling_ratio"}
        with torch.no_grad():
            log_probs = run._log_probs(run.model, inputs)[0]
        outs.append(objective(run._batch(inputs, log_probs).with_log_probs(log_probs)))
    return outs


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("objective", [recipes.grpo(0.01), GROUP], ids=["grpo", "group"])
def test_correction_is_an_independent_factor(tmp_path, mode, objective):
    """It multiplies the advantages; gated ratios and regimes do not see it (a token whose
    correction is 0 has no advantage left whose sign could matter)."""
    run = ours(tmp_path, objective, vllm_importance_sampling_mode=mode)
    run.train()
    pairs = zip(evaluated(run, objective, True), evaluated(run, objective, False), strict=True)
    for inputs, (with_it, without) in zip(run._buffered_inputs, pairs, strict=True):
        mask = inputs["completion_mask"].bool()
        ratio = inputs["importance_sampling_ratio"].expand(mask.shape)[mask].double()
        seen = ratio > 0
        assert with_it.log_gated_ratio[seen].equal(without.log_gated_ratio[seen])
        for name, regime in without.regimes.items():
            at = seen if name == "token" else slice(None)
            assert with_it.regimes[name][:, at].equal(regime[:, at])
        torch.testing.assert_close(with_it.weight, ratio * without.weight, rtol=1e-6, atol=0)
        if objective is not GROUP:  # no token depends on another one's ratio
            torch.testing.assert_close(
                with_it.coefficients, ratio * without.coefficients, rtol=1e-6, atol=0
            )
        else:
            assert (without.log_gated_ratio != without.batch.log_ratio).any()  # gates do act


def divergences(run):
    """Per answer, the mean k3 between engine and current policy, by loops; unscored: old."""
    found = []
    for inputs in run._buffered_inputs:
        with torch.no_grad():
            now = run._log_probs(run.model, inputs)[0].double().numpy()
        old, said = (
            inputs["old_per_token_logps"].numpy(),
            inputs["sampling_per_token_logps"].numpy(),
        )
        for row, length in enumerate(inputs["completion_mask"].sum(1).tolist()):
            terms = []
            for t in range(length):
                engine_log_prob = old[row, t] if math.isnan(said[row, t]) else said[row, t]
                log_rho = now[row, t] - float(engine_log_prob)
                terms.append(math.exp(log_rho) - 1 - log_rho)
            found.append(terms)
    return found


def test_masks_look_at_the_engine(tmp_path):
    """`MeanDivergence` keeps the answers whose mean k3 against the engine is small; the
    denominators stay."""
    settings = {"vllm_importance_sampling_mode": "token_truncate"}  # whose ratios are never 0
    probe = ours(tmp_path / "probe", recipes.grpo(0.01), **settings)
    probe.train()
    means = sorted(np.mean(terms) for terms in divergences(probe))
    delta = float(means[7] + means[8]) / 2  # half of the 16 answers
    run = ours(tmp_path, recipes.grpo(0.01, mask=MeanDivergence(delta)), **settings)
    run.train()
    outs = evaluated(run, run.objective, True)
    kept = [np.mean(terms) <= delta for terms in divergences(run)]
    assert 4 < sum(kept) < 12
    rows = [out.batch.per_trajectory(out.weight.abs()) > 0 for out in outs]
    assert torch.cat(rows).tolist() == kept
    plain = evaluated(run, recipes.grpo(0.01), True)
    for out, other in zip(outs, plain, strict=True):
        on = out.weight != 0
        assert out.weight[on].equal(other.weight[on])


def test_rollout_metrics(tmp_path):
    """``kl_rollout/*`` compare engine and current policy, also without TRL's correction."""
    for corrected in (True, False):
        run = ours(
            tmp_path / str(corrected), GROUP, vllm_importance_sampling_correction=corrected,
            max_steps=1, learning_rate=0.0,
        )  # fmt: skip
        run.train()
        assert ("importance_sampling_ratio" in run._buffered_inputs[0]) == corrected
        terms = np.concatenate(divergences(run))
        assert updates(run)[0]["kl_rollout/k3"] == pytest.approx(terms.mean(), rel=1e-5)
        assert updates(run)[0]["kl/k3"] == 0


def test_engine_without_correction_and_anchor(tmp_path):
    """One update per rollout: TRL keeps no anchor, the mask still sees engine against policy."""
    settings = {"vllm_importance_sampling_correction": False, "num_iterations": 1, "max_steps": 1}
    plain = ours(tmp_path / "a", recipes.grpo(), **settings)
    wanted = gradients(plain)
    assert "old_per_token_logps" not in plain._buffered_inputs[0]
    assert updates(plain)[0]["kl_rollout/k3"] > 1e-3
    assert updates(plain)[0]["ratio/max"] == 1
    open_mask = ours(tmp_path / "b", recipes.grpo(mask=MeanDivergence(10.0)), **settings)
    assert apart(gradients(open_mask), wanted) < 1e-6
    shut = ours(tmp_path / "c", recipes.grpo(mask=MeanDivergence(1e-9)), **settings)
    assert float(gradients(shut)[0].abs().max()) == 0
