"""Masks, corrections and the bound in the TRL trainer."""

import functools

import pytest
import torch

import fiberpo
from fiberpo import MaxDivergence, recipes
from fiberpo.corrections import OPSM, TruncatedIS, corrected
from fiberpo.errors import BoundError, ConfigError
from fiberpo.integrations import trl_rows
from fiberpo.integrations.trl_masks import check_corrections
from fiberpo.theory.certificate import certificate
from integrations.tiny import trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
]


def history(run, name):
    return [h[name] for h in run.state.log_history if name in h]


def engine(run, noise):
    """Make the rollouts carry log-probs of an engine that differs from the trainer by noise."""
    original = run._generate_and_score_completions

    @functools.wraps(original)
    def patched(inputs):
        output = original(inputs)
        old = output.get("old_per_token_logps")
        if old is None:
            with torch.no_grad():
                old = run._log_probs(run.model, output)[0]
        generator = torch.Generator().manual_seed(7)
        shift = noise * torch.randn(old.shape, generator=generator)
        shift[0, 0] = float("nan")  # a token that the engine did not score
        output["sampling_per_token_logps"] = old + shift
        return output

    run._generate_and_score_completions = patched
    return run


def test_mask_works_without_an_engine(tmp_path):
    """The policy that the trainer scored is the one that sampled: nothing masked at first, then
    exactly the answers whose largest k2 against it exceeds the threshold."""
    run = trainer(tmp_path, objective="grpo", mask_max=0.02, learning_rate=0.02, max_steps=4)
    assert run.objective.mask == MaxDivergence(0.02)
    run.train()
    kept = history(run, "mask/kept")
    assert kept[0] == 1.0
    assert 0 < min(kept[1:]) < 1
    assert set(history(run, "mask/certified")) == {0.0}
    (surrogate,) = run.last_window.surrogates
    batch = surrogate.batch
    assert torch.equal(batch.rollout_log_probs, batch.old_log_probs)
    expected, start = [], 0
    for length in batch.lengths.tolist():
        ell = batch.log_ratio[start : start + length].double()
        expected.append(float(ell.square().max()) / 2 <= 0.02)
        start += length
    assert surrogate.kept.tolist() == expected
    gone = ~surrogate.kept[batch.trajectory]
    assert bool(gone.any())
    assert not surrogate.coefficients[gone].any()


def test_engine_log_probs_reach_mask_and_correction(tmp_path):
    """The factor is ``min(old / engine, C)`` of the window's own tokens; unscored tokens have 1."""
    run = trainer(
        tmp_path, objective="grpo", correction="tis", correction_kwargs={"limit": 1.05},
        mask_mean=0.02, max_steps=2,
    )  # fmt: skip
    engine(run, 0.2).train()
    (surrogate,) = run.last_window.surrogates
    inputs = run._buffered_inputs[1]
    mask = trl_rows.loss_mask(inputs)
    old, sampled = inputs["old_per_token_logps"], inputs["sampling_per_token_logps"]
    rho = torch.where(sampled.isnan(), 1.0, (old - sampled).exp())[mask].clamp(max=1.05).double()
    plain = recipes.grpo()(surrogate.batch)
    kept = surrogate.kept[surrogate.batch.trajectory]
    assert 0 < int(surrogate.kept.sum()) < len(surrogate.kept)
    torch.testing.assert_close(surrogate.weight, plain.weight * kept * rho, rtol=1e-5, atol=1e-9)
    assert "kl_rollout/k3" in run.state.log_history[0]


@pytest.mark.parametrize("settings", [{}, {"steps_per_generation": 1}])
def test_corrections_that_do_nothing_without_an_engine_are_refused(tmp_path, settings):
    """Every ratio would be 1."""
    run = trainer(tmp_path, objective="grpo", correction="icepop", max_steps=1, **settings)
    with pytest.raises(ConfigError, match="IcePop corrects for a generation engine"):
        run.train()


@pytest.mark.filterwarnings("ignore::fiberpo.FiberPOWarning")
@pytest.mark.parametrize("noise", [None, 0.2])
def test_one_update_per_rollout(tmp_path, noise):
    """TRL leaves the old log-probs out: without an engine nothing is masked, with one the mask
    compares it with the current policy."""
    run = trainer(
        tmp_path, objective="grpo", mask_max=0.05, steps_per_generation=1, max_steps=1,
        num_generations=4,
    )  # fmt: skip
    (run if noise is None else engine(run, noise)).train()
    (kept,) = history(run, "mask/kept")
    assert kept == 1.0 if noise is None else 0 < kept < 1


def test_evaluation_with_a_mask(tmp_path):
    """TRL's evaluate compares with the policy that sampled the evaluation answers."""
    from integrations.tiny import rows

    run = trainer(tmp_path, objective="grpo", mask_max=0.05, per_device_eval_batch_size=16)
    assert abs(run.evaluate(rows(8))["eval_loss"]) < 1e-6  # ratio 1, advantages of mean 0


def test_engine_is_corrected_once(tmp_path):
    """TRL's own correction and ours together are refused; either alone is not."""
    run = trainer(tmp_path, objective="grpo")
    run.args.use_vllm = True
    objective = corrected(recipes.grpo(), factors=[TruncatedIS()])
    with pytest.raises(ConfigError, match="vllm_importance_sampling_correction=False"):
        check_corrections(objective, run.args)
    check_corrections(recipes.grpo(mask=OPSM(0.1)), run.args)
    run.args.vllm_importance_sampling_correction = False
    check_corrections(objective, run.args)


@pytest.mark.parametrize("micro", [1, 4])
def test_bound_of_the_window_is_logged(tmp_path, micro):
    """``bound/*`` = the certificate of the window's tokens and raw rewards, however it is cut."""
    run = trainer(
        tmp_path, objective=recipes.fiberpo(), reward_range=[0.0, 1.5], max_steps=3,
        per_device_train_batch_size=16 // micro, gradient_accumulation_steps=micro,
        steps_per_generation=4 * micro, learning_rate=0.3,
    )  # fmt: skip
    run.train()
    window = run._buffered_inputs[2 * micro : 3 * micro]
    log_rho, lengths, rewards = [], [], []
    log_probs = torch.cat([s.batch.log_probs for s in run.last_window.surrogates])
    old = torch.cat([x["old_per_token_logps"][trl_rows.loss_mask(x)] for x in window])
    for inputs in window:
        texts = run.processing_class.batch_decode(
            inputs["completion_ids"], skip_special_tokens=True
        )
        rewards += [sum(c in "aeiou0123" for c in t) / 8 + len(t) / 100 for t in texts]
        lengths += trl_rows.loss_mask(inputs).sum(1).tolist()
    log_rho = (log_probs - old).double().tolist()
    expected = certificate(log_rho, lengths, rewards, reward_range=[0.0, 1.5]).metrics()
    last = [h for h in run.state.log_history if "bound/best" in h][-1]
    assert last["bound/surrogate"] != 0
    assert last["bound/exact"] == 0
    for name, value in expected.items():
        assert last[name] == pytest.approx(value, rel=1e-5, abs=1e-9), name


def test_no_bound_without_a_range_and_none_that_is_wrong(tmp_path):
    """No reward range, no metric; a reward outside of it stops the run."""
    run = trainer(tmp_path / "a", objective="grpo", max_steps=1)
    run.train()
    assert not history(run, "bound/best")
    wrong = trainer(tmp_path / "b", objective="grpo", max_steps=1, reward_range=[0.0, 0.01])
    with pytest.raises(BoundError, match="outside of"):
        wrong.train()


def test_objective_and_settings_are_joined(tmp_path):
    """A mask of the objective and one of the settings both count."""
    run = trainer(tmp_path, objective=recipes.grpo(mask=OPSM(0.1)), mask_max=0.05, mask_mean=0.001)
    mask = OPSM(0.1) & MaxDivergence(0.05) & fiberpo.MeanDivergence(0.001)
    assert run.objective.mask == mask


def test_settings_of_the_program():
    """They reach the objective; a correction that would do nothing is refused at once."""
    from fiberpo.train.config import make_config

    made = make_config(
        None, {"mask_max": 0.05, "correction": "opsm", "correction_kwargs": {"delta": 1.0}}
    )
    assert made.build_objective().mask == MaxDivergence(0.05) & OPSM(1.0)
    with pytest.raises(ConfigError, match="corrects for a generation engine"):
        make_config(None, {"correction": "tis"})
