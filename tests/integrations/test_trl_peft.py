"""LoRA: only adapters train, exactly over micro-batches; the base model is the reference."""

import pytest
import torch
from peft import LoraConfig

from fiberpo import recipes
from fiberpo.errors import ConfigError
from integrations.tiny import apart, double_model, gradients, scripted, trainer, updates

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

BUDGET = (0.004, 0.003)
DOMAIN = recipes.fiberpo_domain(
    {"domain": BUDGET, "group": BUDGET, "trajectory": BUDGET}, 0.02, rollback=2.0
)


def make(tmp_path, size, dropout=0.0, **settings):
    torch.manual_seed(0)  # of the adapter
    parts = 16 // size
    defaults = {
        "per_device_train_batch_size": size, "gradient_accumulation_steps": parts,
        "steps_per_generation": parts, "num_iterations": 3, "max_steps": 3, "learning_rate": 0.1,
    }  # fmt: skip
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "up_proj"], lora_dropout=dropout,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    run = trainer(
        tmp_path, objective=DOMAIN, peft_config=config, model=double_model(),
        **{**defaults, **settings},
    )  # fmt: skip
    return scripted(run)


def test_only_adapters_train(tmp_path):
    """Gradients reach the adapters alone; the base weights stay as they were."""
    run = make(tmp_path, 8)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    trained = {name for name, p in run.model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    run.train()
    for name, p in run.model.named_parameters():
        assert p.equal(before[name]) == (name not in trained), name
    assert updates(run)[2]["gate/active"] > 0.3


def test_micro_batch_splits_give_the_same_gradients(tmp_path):
    """8 x 2 and 16 x 1, two-phase and in one pass."""
    halves, whole = make(tmp_path / "8", 8), make(tmp_path / "16", 16)
    assert apart(gradients(halves), gradients(whole)) < 1e-6
    assert halves.last_window.route.value == "two-phase"
    assert whole.last_window.route.value == "contained"


def test_reference_is_the_base_model(tmp_path):
    """With beta no second model is held: the adapter is switched off for the reference."""
    run = make(tmp_path, 8, beta=5.0)
    assert run.ref_model is None
    without = make(tmp_path, 8)
    found, plain = gradients(run), gradients(without)
    first, second, _ = updates(run)
    assert first["kl"] == 0  # a new adapter is the identity
    assert second["kl"] > 1e-6
    assert apart(found[:1], plain[:1]) < 1e-6
    assert apart(found[2:], plain[2:]) > 0.01
    window = run._buffered_inputs[0]
    with torch.no_grad(), run.model.disable_adapter():
        base = run._log_probs(run.model, window)[0]
    mask = window["completion_mask"].bool()
    torch.testing.assert_close(window["ref_per_token_logps"][mask], base[mask])


def test_dropout_of_the_adapter_is_refused(tmp_path):
    """As any dropout, where the forward runs twice."""
    with pytest.raises(ConfigError, match=r"lora_dropout.*dropout of 0\.1"):
        make(tmp_path, 8, dropout=0.1)


def test_resume_is_exact(tmp_path):
    """From an adapter checkpoint in the middle of a rollout."""
    settings = {"save_strategy": "steps", "save_steps": 2}
    whole = make(tmp_path, 8, **settings)
    whole.train()
    again = make(tmp_path, 8)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert updates(again)[2]["grad_norm"] == updates(whole)[2]["grad_norm"]
