"""A random 50k-parameter model and a trainer around it, for tests of the TRL path."""

import random

import torch
from datasets import Dataset
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from trl import GRPOConfig, GRPOTrainer

from fiberpo.integrations.trl import FiberPOConfig, FiberPOTrainer
from fiberpo.train.embedded import build_tokenizer

LETTERS = "abcdefghij"


def tiny_model(seed=0, **overrides):
    tokenizer = build_tokenizer()
    settings = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
        "max_position_embeddings": 64, "tie_word_embeddings": True, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2,
    }  # fmt: skip
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**settings, **overrides}))
    model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return model, tokenizer


def double_model():
    """In float64 up to the head (TRL's head gives float32 log-probs): differences between two ways
    to one gradient are then far below the distance of a drift from its budget."""
    model, tokenizer = tiny_model()
    return model.double(), tokenizer


def rows(count=64, domains=("left", "right")):
    return Dataset.from_list(
        [
            {"prompt": f"{LETTERS[i % 10]}{LETTERS[i // 10]}", "domain": domains[i % len(domains)]}
            for i in range(count)
        ]
    )


def vowels(prompts, completions, **columns):
    return [sum(c in "aeiou0123" for c in text) / 8 + len(text) / 100 for text in completions]


DEFAULTS = {
    "per_device_train_batch_size": 16, "gradient_accumulation_steps": 1,
    "steps_per_generation": 4, "num_generations": 4, "max_completion_length": 8,
    "learning_rate": 3e-3, "max_steps": 4, "logging_steps": 1, "report_to": "none",
    "use_cpu": True, "seed": 3, "save_strategy": "no", "bf16": False,
    "gradient_checkpointing": False, "disable_tqdm": True, "shuffle_dataset": False,
    "max_grad_norm": 1e9, "optim": "sgd",
}  # fmt: skip


def trainer(
    tmp_path, *, objective=None, dataset=None, model=None, callbacks=None, eval_dataset=None,
    peft_config=None, **settings,
):  # fmt: skip
    """Ours."""
    model, tokenizer = model or tiny_model()
    if isinstance(objective, str):
        settings["objective"], objective = objective, None
    return FiberPOTrainer(
        model,
        vowels,
        FiberPOConfig(**{"output_dir": str(tmp_path), **DEFAULTS, **settings}),
        objective=objective,
        train_dataset=dataset or rows(),
        processing_class=tokenizer,
        callbacks=callbacks,
        eval_dataset=eval_dataset,
        peft_config=peft_config,
    )


def host(tmp_path, *, dataset=None, model=None, **settings):
    """TRL's own, with the same defaults."""
    model, tokenizer = model or tiny_model()
    return GRPOTrainer(
        model,
        vowels,
        GRPOConfig(**{"output_dir": str(tmp_path), **DEFAULTS, **settings}),
        train_dataset=dataset or rows(),
        processing_class=tokenizer,
    )


def answer(prompt, place):
    """Token ids of the answer at a place of a prompt's group: at most 8, the last one ``<eos>``."""
    draw = random.Random(repr((list(prompt), place)))
    return [draw.randrange(4, 40) for _ in range(draw.randrange(1, 8))] + [2]


def scripted(run, log_probs=None, answer=answer):
    """Answers depend on prompt and place in the group alone, not on the policy or the rank.

    ``log_probs(prompt, answer)``: what the sampling engine says, None for a token that it did not
    score.
    """

    def generate(prompt_ids, images, fields, num_generations, *rest, **more):
        first = run.accelerator.process_index * len(prompt_ids)
        answers = [answer(p, (first + i) % num_generations) for i, p in enumerate(prompt_ids)]
        if log_probs is None:
            return answers, None
        return answers, [log_probs(p, a) for p, a in zip(prompt_ids, answers, strict=True)]

    run._generate_single_turn = generate
    return run


def gradients(run):
    """Train; the gradient of every update as one vector."""
    found = []
    original = run._clip_grad_norm

    def spy(model):
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        found.append(torch.cat([g.double().flatten() for g in grads]))
        return original(model)

    run._clip_grad_norm = spy
    run.train()
    return found


def apart(found, wanted):
    """Largest relative distance ``|found - wanted| / |wanted|`` of two lists of vectors."""
    assert all(float(b.norm()) > 0 for b in wanted)
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True))


def updates(run):
    """The log lines of the optimizer steps."""
    return [h for h in run.state.log_history if "grad_norm" in h]
