"""The TRL trainer says once what the doctor sees in its settings and first steps."""

import logging

import pytest
import torch

from fiberpo import recipes
from fiberpo.diagnosis.evidence import Evidence
from integrations.tiny import trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
]

STRATA = ("domain", "group", "trajectory")


def told(caplog, tmp_path, reward=None, **settings):
    """What is logged in three rollouts."""
    with caplog.at_level(logging.INFO, logger="fiberpo.doctor"):
        run = trainer(tmp_path, max_steps=12, **settings)
        if reward is not None:
            run.reward_funcs = [reward]
        run.train()
    records = [r for r in caplog.records if r.name == "fiberpo.doctor"]
    return [(r.levelname, r.getMessage().split(":")[0]) for r in records], run


def objective(budget, epsilon=0.02):
    return recipes.fiberpo_domain(dict.fromkeys(STRATA, (budget, budget)), epsilon)


def test_budgets_are_held_against_drifts_after_the_warm_up(tmp_path, caplog):
    """Far too narrow: an error a stratum, each once, and not before the second rollout."""
    found, run = told(caplog, tmp_path, objective=objective(1e-6))
    narrow = [x for x in found if x == ("WARNING", "budget-too-narrow")]
    assert len(narrow) == 3
    assert len(found) == len(set(found)) + 2
    callbacks = [c for c in run.callback_handler.callbacks if type(c).__name__ == "FirstSteps"]
    assert callbacks[0].looks == 2


def test_sane_budgets_say_nothing(tmp_path, caplog):
    """Budgets of the size of the drifts of this model."""
    found, run = told(caplog, tmp_path, objective=objective(0.004, 0.004))
    assert found == []
    assert run.run_statistics.compute()["gate/active"] > 0


def test_dead_rewards_are_seen_in_the_first_rollout(tmp_path, caplog):
    """A reward that is always the same: all advantages are 0."""
    found, run = told(
        caplog, tmp_path, reward=lambda completions, **columns: [0.0] * len(completions),
        objective=objective(0.004, 0.004),
    )  # fmt: skip
    assert found == [("WARNING", "zero-advantages")]  # and not that nothing moves, which follows


def test_notes_are_for_the_curious(tmp_path, caplog):
    """epsilon above C- is a note."""
    with caplog.at_level(logging.INFO, logger="fiberpo.doctor"):
        trainer(tmp_path, objective=objective(0.004, 0.02))
    (record,) = [r for r in caplog.records if r.name == "fiberpo.doctor"]
    assert record.levelname == "INFO"
    assert "epsilon-above-budget" in record.getMessage()


def test_looking_costs_no_extra_forward(tmp_path, monkeypatch):
    """After two looks nothing is collected any more."""
    seen = []
    add = Evidence.add
    monkeypatch.setattr(Evidence, "add", lambda self, *a, **k: (seen.append(1), add(self, *a, **k)))
    run = trainer(tmp_path, objective=objective(0.004, 0.004), max_steps=16)
    run.train()
    assert len(seen) == 8
    assert torch.isfinite(torch.tensor(run.state.log_history[-1]["train_loss"]))
