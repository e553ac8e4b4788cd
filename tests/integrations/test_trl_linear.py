"""`linear_log_probs` in the TRL trainer: the same training as with TRL's own head."""

import logging

import pytest
import torch
from peft import LoraConfig
from torch import nn

from fiberpo import recipes
from fiberpo.errors import ConfigError
from fiberpo.integrations import trl_linear
from integrations.tiny import apart, gradients, scripted, tiny_model, trainer, updates

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

BUDGET = (0.004, 0.003)
DOMAIN = recipes.fiberpo_domain(
    {"domain": BUDGET, "group": BUDGET, "trajectory": BUDGET}, 0.02, rollback=2.0
)
GRPO = recipes.grpo()  # no rollback: nothing that multiplies rounding


def model(**overrides):
    """Away from its 64-token initial symmetry; not in float64, where TRL's head would be less."""
    return tiny_model(initializer_range=0.1, **overrides)


def make(tmp_path, linear, size=8, objective=GRPO, **settings):
    parts = 16 // size
    torch.manual_seed(0)  # of an adapter
    defaults = {
        "per_device_train_batch_size": size, "gradient_accumulation_steps": parts,
        "steps_per_generation": parts, "num_iterations": 3, "max_steps": 3, "learning_rate": 0.02,
        "temperature": 0.8, "linear_log_probs": linear, "model": model(),
    }  # fmt: skip
    name = f"{linear}-{size}"
    return scripted(trainer(tmp_path / name, objective=objective, **{**defaults, **settings}))


def modes(monkeypatch):
    """The modes that are taken, in the order of the calls with a graph."""
    found, plain = [], trl_linear.linear_logprob

    def spy(*args, **settings):
        out = plain(*args, **settings)
        log_probs = out[0] if isinstance(out, tuple) else out
        if log_probs.requires_grad:
            found.append(log_probs.grad_fn.name().removesuffix("Backward"))
        return out

    monkeypatch.setattr(trl_linear, "linear_logprob", spy)
    return found


LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


@pytest.mark.parametrize(
    ("size", "settings", "taken"),
    [
        # GRPO is contained in every micro-batch
        pytest.param(16, {}, {"TwoPhase"}, id="one part", marks=pytest.mark.slow),
        pytest.param(4, {}, {"TwoPhase"}, id="parts", marks=pytest.mark.slow),
        pytest.param(4, {"objective": DOMAIN, "learning_rate": 1e-3}, {"Resident"}, id="known"),
        pytest.param(
            8,
            {"objective": DOMAIN, "beta": 0.1, "learning_rate": 1e-3},
            {"TwoPhase"},
            id="reference",
            marks=pytest.mark.slow,
        ),
        pytest.param(8, {"peft_config": LORA, "learning_rate": 0.2}, {"Frozen"}, id="lora"),
        pytest.param(8, {"model": "untied"}, {"TwoPhase"}, id="untied", marks=pytest.mark.slow),
    ],  # fmt: skip
)
def test_training_is_that_of_the_plain_head(tmp_path, monkeypatch, size, settings, taken):
    """Gradients, loss and entropy of three updates, and the log-probs after them."""
    found = modes(monkeypatch)
    runs = []
    for linear in (False, True):
        more = dict(settings)
        if more.get("model") == "untied":
            more["model"] = model(tie_word_embeddings=False)
        if settings.get("beta"):
            save = tmp_path / "reference"
            more["model"] = model()
            more["model"][0].save_pretrained(save)
            more["model"][0].config._name_or_path = str(save)
        runs.append(make(tmp_path, linear, size, **more))
    plain, ours = runs
    wanted, got = gradients(plain), gradients(ours)
    assert not found or set(found) == taken
    assert found
    assert len(got) == 3
    assert apart(got, wanted) < 1e-5
    for mine, theirs in zip(updates(ours), updates(plain), strict=True):
        for name in ("loss", "entropy", "gate/active"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-6), name
    inputs = plain._buffered_inputs[0]
    with torch.no_grad():
        for mine, theirs in zip(
            ours._log_probs(ours.model, inputs, True), plain._log_probs(plain.model, inputs, True)
        ):
            if mine is not None:
                torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_tool_tokens_are_not_scored(tmp_path):
    """Only loss tokens reach the head: the others have a log-prob of 0, and change nothing."""
    run = make(tmp_path, True)
    run.train()
    inputs = dict(run._buffered_inputs[0])
    inputs["tool_mask"] = torch.ones_like(inputs["completion_mask"])
    inputs["tool_mask"][:, 1] = 0
    with torch.no_grad():
        whole = run._log_probs(run.model, run._buffered_inputs[0])[0]
        some = run._log_probs(run.model, inputs)[0]
    kept = (inputs["completion_mask"] * inputs["tool_mask"]).bool()
    torch.testing.assert_close(some, whole * kept)
    assert bool((whole[:, 1] != 0).any())


@pytest.mark.slow
def test_evaluation(tmp_path):
    """The same loss and entropy."""
    results = []
    for linear in (False, True):
        run = make(tmp_path, linear, eval_dataset=None, per_device_eval_batch_size=16)
        results.append(run.evaluate(run.train_dataset.select(range(8))))
    plain, ours = results
    assert ours["eval_loss"] == pytest.approx(plain["eval_loss"], abs=1e-6)
    assert ours["eval_entropy"] == pytest.approx(plain["eval_entropy"], rel=1e-5)


def test_small_vocabularies_are_left_alone(tmp_path, caplog):
    """By default, and the log says why; with 4,096 ids it is on."""
    with caplog.at_level(logging.INFO, logger="fiberpo"):
        assert make(tmp_path, None)._head is None
    assert "a vocabulary of 64 is below 4096" in caplog.text
    assert make(tmp_path, None, model=model(vocab_size=4096))._head is not None
    assert make(tmp_path, False, model=model(vocab_size=4096))._head is None


def test_what_gains_nothing():
    """Small heads, and devices on which TRL's own head may be the faster one."""
    assert trl_linear.without_gain(torch.empty(4096, 1)) == []
    (reason,) = trl_linear.without_gain(torch.empty(4096, 1, device="meta"))
    assert "on meta TRL's own head" in reason


class Capped(nn.Linear):
    """Not what it seems to be."""

    def forward(self, x):
        return 5 * torch.tanh(super().forward(x) / 5)


def capped(found):
    head = found.lm_head
    found.lm_head = Capped(head.in_features, head.out_features, bias=False)
    found.lm_head.weight = head.weight


def replaced(found):
    plain = found.lm_head.forward
    found.lm_head.forward = lambda x: plain(x) * 2


def hooked(found):
    found.lm_head.register_forward_hook(lambda module, args, out: out * 2)


def wrapped(found):
    """A scale that no attribute tells of."""
    plain = type(found).forward

    class Scaled(type(found)):
        def forward(self, *args, **kwargs):
            out = plain(self, *args, **kwargs)
            out.logits = out.logits * 3
            return out

    found.__class__ = Scaled


def silent(found):
    """No logits at all."""
    plain = type(found).forward

    class Silent(type(found)):
        def forward(self, *args, **kwargs):
            out = plain(self, *args, **kwargs)
            out.logits = None
            return out

    found.__class__ = Silent


def softcapped(found):
    found.config.final_logit_softcapping = 30.0


def scaled(found):
    found.config.logit_scale = -1.0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (capped, "is a Capped, not a plain torch.nn.Linear"),
        (replaced, "forward of the output head has been replaced"),
        (hooked, "has hooks"),
        (wrapped, "does something to them that is not known"),
        (silent, "gives no logits for 8 token ids alone"),
        (softcapped, "final_logit_softcapping = 30.0"),
        (scaled, "logit scale of the model is -1.0"),
    ],
)
def test_heads_that_are_not_plain(tmp_path, caplog, change, reason):
    """Off with the reason by default; refused where it is asked for."""
    settings = {"vocab_size": 4096}
    with caplog.at_level(logging.INFO, logger="fiberpo"):
        found = model(**settings)
        change(found[0])
        assert make(tmp_path, None, model=found)._head is None
    assert reason in caplog.text
    found = model(**settings)
    change(found[0])
    with pytest.raises(ConfigError, match="linear_log_probs = True cannot work") as caught:
        make(tmp_path, True, model=found)
    assert reason in str(caught.value)


def test_a_copy_of_the_head_is_not_plain(tmp_path):
    """PEFT trains a copy beside the head where it is to be saved."""
    adapter = LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"
    )
    with pytest.raises(ConfigError, match="is a ModulesToSaveWrapper"):
        make(tmp_path, True, model=model(tie_word_embeddings=False), peft_config=adapter)


@pytest.mark.slow
def test_a_known_scale_is_part_of_the_temperature(tmp_path):
    """Granite divides its logits by ``logits_scaling``."""
    from transformers import GraniteConfig, GraniteForCausalLM

    def granite():
        plain, tokenizer = model()
        torch.manual_seed(0)
        config = GraniteConfig(
            **{
                name: getattr(plain.config, name)
                for name in (
                    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                    "num_attention_heads", "num_key_value_heads", "pad_token_id", "bos_token_id",
                    "eos_token_id",
                )
            },
            logits_scaling=0.25, initializer_range=0.1,
        )  # fmt: skip
        found = GraniteForCausalLM(config)
        found.generation_config = plain.generation_config
        return found, tokenizer

    plain, ours = (make(tmp_path, linear, model=granite()) for linear in (False, True))
    assert ours._head.temperature == pytest.approx(0.8 * 0.25)
    assert apart(gradients(ours), gradients(plain)) < 1e-5


@pytest.mark.slow
def test_bfloat16_heads_keep_float32_log_probs(tmp_path):
    """Under autocast the operands are bfloat16, the logits are not: closer to float32."""
    runs = {
        name: make(tmp_path, linear, bf16=bf16)
        for name, linear, bf16 in (
            ("full", True, False),
            ("plain", False, True),
            ("ours", True, True),
        )
    }
    runs["full"].train()
    inputs = runs["full"]._buffered_inputs[0]
    states = runs["full"].model.state_dict()
    found = {}
    for name, run in runs.items():
        run.model.load_state_dict(states)
        with torch.no_grad():
            found[name] = run._log_probs(run.model, inputs)[0]
    assert found["ours"].dtype is torch.float32
    ours, plain = ((found[n] - found["full"]).abs().mean() for n in ("ours", "plain"))
    assert ours < plain


@pytest.mark.slow
@pytest.mark.parametrize("linear", [False, True])
def test_cast_to_float32(tmp_path, linear):
    """``cast_lm_head_to_fp32``: the products are float32 inside autocast too."""
    run = make(tmp_path, linear, bf16=True, cast_lm_head_to_fp32=True)
    run.train()
    inputs = run._buffered_inputs[0]
    with torch.no_grad():
        found = run._log_probs(run.model, inputs)[0]
        run.model.lm_head.weight.add_(1e-4 * torch.rand_like(run.model.lm_head.weight))
        moved = run._log_probs(run.model, inputs)[0]
    assert found.dtype is torch.float32
    assert bool((found != moved)[inputs["completion_mask"].bool()].all())
