"""A random 50k-parameter model and a trainer around it, for tests of the TRL path."""

import torch
from datasets import Dataset
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

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


def rows(count=64, domains=("left", "right")):
    return Dataset.from_list(
        [
            {"prompt": f"{LETTERS[i % 10]}{LETTERS[i // 10]}", "domain": domains[i % len(domains)]}
            for i in range(count)
        ]
    )


def vowels(prompts, completions, **columns):
    return [sum(c in "aeiou0123" for c in text) / 8 + len(text) / 100 for text in completions]


def trainer(tmp_path, *, objective=None, dataset=None, model=None, callbacks=None, **settings):
    defaults = {
        "output_dir": str(tmp_path), "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 1, "steps_per_generation": 4, "num_generations": 4,
        "max_completion_length": 8, "learning_rate": 3e-3, "max_steps": 4, "logging_steps": 1,
        "report_to": "none", "use_cpu": True, "seed": 3, "save_strategy": "no", "bf16": False,
        "gradient_checkpointing": False, "disable_tqdm": True, "shuffle_dataset": False,
        "max_grad_norm": 1e9, "optim": "sgd",
    }  # fmt: skip
    model, tokenizer = model or tiny_model()
    if isinstance(objective, str):
        settings["objective"], objective = objective, None
    return FiberPOTrainer(
        model,
        vowels,
        FiberPOConfig(**{**defaults, **settings}),
        objective=objective,
        train_dataset=dataset or rows(),
        processing_class=tokenizer,
        callbacks=callbacks,
    )
