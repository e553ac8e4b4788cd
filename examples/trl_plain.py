"""A plain TRL script; `trl_script.py` is the same with FiberStop, four lines further."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from datasets import Dataset
from transformers import PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from fiberpo.errors import ConfigError
from fiberpo.train.embedded import build_model, build_tokenizer, load_embedded
from fiberpo.train.tasks import exact_answer, make_rows

try:
    model, tokenizer = load_embedded()
except ConfigError:  # no checkpoint in this installation: random weights will do for a few steps
    model, tokenizer = build_model(0), build_tokenizer()

rows = [row for task in ("sum", "sort", "reverse") for row in make_rows(task, seed=0, count=64)]

args = GRPOConfig(
    output_dir="runs/trl_script",
    per_device_train_batch_size=24,
    num_generations=4,
    max_completion_length=21,
    max_steps=8,
    learning_rate=1e-3,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    use_cpu=True,
    bf16=False,
    gradient_checkpointing=False,
    dataloader_pin_memory=False,
    disable_tqdm=True,
    seed=0,
)
trainer = GRPOTrainer(
    model=model,
    reward_funcs=exact_answer,
    args=args,
    train_dataset=Dataset.from_list(rows),
    processing_class=tokenizer,
)
trainer.remove_callback(PrinterCallback)  # the table below is shorter
trainer.train()

shown = ("grad_norm", "clip_ratio/region_mean", "gate/left_out", "gate/gradient_kept", "reward")
print("step", *(f"{name:>22}" for name in shown))
for record in trainer.state.log_history:
    if "grad_norm" in record:
        values = [f"{record[name]:.4f}" if name in record else "" for name in shown]
        print(f"{record['step']:4}", *(f"{value:>22}" for value in values))
