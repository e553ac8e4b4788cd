"""The TRL path: exact over micro-batches, settings, ids, checkpoints."""

import logging

import pytest
import torch

import fiberpo
from fiberpo.errors import ConfigError, DataError
from integrations.tiny import rows, tiny_model, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
]

TIGHT = fiberpo.recipes.fiberpo_domain(
    {"domain": (0.004, 0.003), "group": (0.004, 0.003), "trajectory": (0.004, 0.003)},
    0.02,
    rollback=2.0,
)


def curve(tmp_path, name, **settings):
    """Gradient norm, loss and activity of every update."""
    run = trainer(tmp_path / name, **settings)
    run.train()
    return [
        (h["grad_norm"], h["loss"], h["gate/active"], h["gate/gradient_kept"])
        for h in run.state.log_history
        if "grad_norm" in h
    ]


@pytest.mark.parametrize("measure", ["trajectory", "token"])
def test_micro_batch_splits_give_the_same_gradients(tmp_path, measure):
    """16 x 1, 8 x 2 and 4 x 4 answers: equal gradient norms to 6 digits while gates act."""
    objective = fiberpo.recipes.fiberpo_domain(
        {"domain": (0.004, 0.003), "group": (0.004, 0.003), "trajectory": (0.004, 0.003)},
        0.02, rollback=2.0, measure=measure,
    )  # fmt: skip
    curves = [
        curve(
            tmp_path, f"{size}x{parts}", objective=objective, per_device_train_batch_size=size,
            gradient_accumulation_steps=parts, steps_per_generation=4 * parts, max_steps=6,
        )
        for size, parts in ((16, 1), (8, 2), (4, 4))
    ]  # fmt: skip
    assert max(active for _, _, active, _ in curves[0]) > 0.5
    for other in curves[1:]:
        for mine, theirs in zip(curves[0], other, strict=True):
            assert theirs == pytest.approx(mine, rel=1e-6, abs=1e-7)


def test_gradient_is_that_of_the_undivided_window(tmp_path):
    """Gradients accumulated over 4 micro-batches = autograd through the gates on the whole."""
    run = trainer(
        tmp_path, objective=TIGHT, per_device_train_batch_size=4, gradient_accumulation_steps=4,
        steps_per_generation=16, max_steps=3,
    )  # fmt: skip
    seen = {}
    original = run._clip_grad_norm

    def spy(model):
        if run.state.global_step == 2:
            seen["ours"] = [p.grad.clone() for p in model.parameters()]
            window = run._buffered_inputs[8:12]
            log_probs = torch.cat([run._log_probs(model, x)[0] for x in window])
            batch = fiberpo.RatioBatch.from_padded(
                log_probs,
                torch.cat([x["old_per_token_logps"] for x in window]),
                torch.cat([x["advantages"] for x in window]),
                torch.cat([x["completion_mask"] for x in window]),
                labels={
                    "domain": torch.cat([x["domain_id"] for x in window]),
                    "group": torch.cat([x["group_id"] for x in window]),
                },
            )
            loss = TIGHT(batch, gradient="autograd").loss
            seen["whole"] = torch.autograd.grad(loss, list(model.parameters()))
        return original(model)

    run._clip_grad_norm = spy
    run.train()
    assert run.last_window.statistics.compute()["gate/active"] > 0.5
    for ours, whole in zip(seen["ours"], seen["whole"], strict=True):
        torch.testing.assert_close(ours, whole, rtol=1e-4, atol=1e-7)


def test_resume_in_the_middle_of_a_rollout_is_exact(tmp_path):
    """Stop after update 2 of 4, resume: same numbers as without a stop."""
    whole = trainer(tmp_path / "a", objective=TIGHT, max_steps=6)
    whole.train()
    first = trainer(
        tmp_path / "b", objective=TIGHT, max_steps=6, save_strategy="steps", save_steps=2
    )
    first.train()
    second = trainer(tmp_path / "b", objective=TIGHT, max_steps=6)
    second.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2"))
    norms = [[h["grad_norm"] for h in t.state.log_history if "grad_norm" in h]
             for t in (whole, second)]  # fmt: skip
    assert norms[0] == norms[1]
    for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)
    ours, theirs = whole.run_statistics.compute(), second.run_statistics.compute()
    assert ours == theirs


def test_resume_from_a_foreign_checkpoint_is_refused(tmp_path):
    """Without the state of the rollout in use a resume would silently differ."""
    run = trainer(tmp_path, objective=TIGHT, max_steps=2, save_strategy="steps", save_steps=2)
    run.train()
    (tmp_path / "checkpoint-2" / "fiberpo_state_rank0.pt").unlink()
    again = trainer(tmp_path, objective=TIGHT, max_steps=4)
    with pytest.raises(ConfigError, match="fiberpo_state_rank0.pt"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_one_update_per_rollout_is_announced_loudly(tmp_path, caplog):
    """All log ratios are 0: say so once, with the settings and the remedy."""
    with caplog.at_level(logging.WARNING, logger="fiberpo"):
        run = trainer(tmp_path, steps_per_generation=1, max_steps=2)
    (message,) = [r.getMessage() for r in caplog.records if "INERT" in r.getMessage()]
    assert "steps_per_generation = 1" in message
    assert "num_iterations" in message
    run.train()
    metrics = run.last_window.statistics.compute()
    assert metrics["gate/active"] == 0
    assert metrics["gate/gradient_kept"] == pytest.approx(1.0)


def test_the_default_objective(tmp_path):
    """Without a word it is FiberStop; one by name, with its own parameters, takes its place."""
    assert str(trainer(tmp_path / "a").objective) == str(fiberpo.recipes.fiberstop())
    named = trainer(tmp_path / "b", objective="fiberpo_domain").objective
    assert str(named) == str(fiberpo.recipes.fiberpo_domain())


def test_several_updates_say_nothing(tmp_path, caplog):
    """No warning where the gates can act."""
    with caplog.at_level(logging.WARNING, logger="fiberpo"):
        assert trainer(tmp_path).updates_per_rollout == 4
    assert "INERT" not in caplog.text


@pytest.mark.parametrize(
    ("settings", "cut"),
    [
        ({"per_device_train_batch_size": 2, "steps_per_generation": 8}, True),
        ({"per_device_train_batch_size": 8, "steps_per_generation": 2}, False),
        # one window a rollout: whatever the micro-batches hold, no group is cut
        (
            {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8,
             "steps_per_generation": 8, "num_iterations": 2}, False,
        ),
    ],
)  # fmt: skip
def test_windows_that_cut_groups_are_announced(tmp_path, caplog, settings, cut):
    """With several windows a rollout, whose size is no multiple of the group's."""
    with caplog.at_level(logging.WARNING, logger="fiberpo"):
        trainer(tmp_path, num_generations=4, **settings)
    assert ("prompt groups are cut" in caplog.text) == cut


def test_groups_stay_together(tmp_path):
    """Every window holds whole prompt groups; without the option they are spread."""
    spread = {}
    for together in (True, False):
        run = trainer(tmp_path / str(together), keep_groups_together=together, max_steps=1)
        run.train()
        sizes = [torch.bincount(x["group_id"]) for x in run._buffered_inputs]
        spread[together] = {int(n) for s in sizes for n in s[s > 0]}
    assert spread[True] == {4}
    assert spread[False] != {4}


def test_domains_reach_the_gates(tmp_path):
    """The domain column becomes a stratum whose contexts carry their names."""
    run = trainer(tmp_path, objective=TIGHT, max_steps=2)
    run.train()
    strata = run.last_window.surrogates[0].gated.strata
    assert [strata.context_names[0](i) for i in range(2)] == ["left", "right"]
    assert "gate/domain/pass_frac/domain=left" in run.last_window.statistics.compute()
    assert any("reward/domain=right" in h for h in run.state.log_history)


def test_domain_column_may_have_another_name(tmp_path):
    """``data_source`` is found by itself; an unknown name is refused."""
    data = rows().rename_column("domain", "data_source")
    run = trainer(tmp_path / "a", objective=TIGHT, dataset=data, max_steps=1)
    run.train()
    assert run._domains == ["left", "right"]
    with pytest.raises(DataError, match="'realm'"):
        trainer(tmp_path / "b", dataset=data, domain_column="realm", max_steps=1).train()


@pytest.mark.parametrize(
    ("settings", "quoted"),
    [
        ({"epsilon": 0.1}, "epsilon = 0.1"),
        ({"loss_type": "grpo"}, "loss_type = 'grpo'"),
        ({"importance_sampling_level": "sequence"}, "objective='gspo'"),
        ({"steps_per_generation": 3, "gradient_accumulation_steps": 2}, "multiple of 2"),
        ({"objective": "fibrepo"}, "fibrepo"),
        ({"objective": "gspo", "objective_kwargs": {"epsilo": 1}}, "epsilo"),
    ],
)
def test_settings_without_effect_are_refused(tmp_path, settings, quoted):
    """The message quotes the value and names what takes its place."""
    with pytest.raises(ValueError, match=quoted):
        trainer(tmp_path, **settings)


def test_dropout_is_refused_where_the_forward_runs_twice(tmp_path):
    """Phase 1 and phase 2 need the same log-probs."""
    model, tokenizer = tiny_model()
    model.model.layers[0].mlp = torch.nn.Sequential(
        model.model.layers[0].mlp, torch.nn.Dropout(0.1)
    )
    with pytest.raises(ConfigError, match="disable_dropout=True"):
        trainer(
            tmp_path, model=(model, tokenizer), per_device_train_batch_size=8,
            gradient_accumulation_steps=2, steps_per_generation=8,
        )  # fmt: skip


def test_evaluation_has_no_window(tmp_path):
    """TRL's own evaluate works and leaves training alone."""
    run = trainer(tmp_path, objective=TIGHT, max_steps=1, per_device_eval_batch_size=16)
    result = run.evaluate(rows(8))
    assert "eval_loss" in result
    run.train()
    assert run.state.global_step == 1
