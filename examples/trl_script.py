"""An existing TRL script turned to FiberPO-Domain: the changed lines are marked CHANGED."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from datasets import Dataset
from transformers import PrinterCallback

from fiberpo.errors import ConfigError
from fiberpo.integrations.trl import FiberPOConfig, FiberPOTrainer  # CHANGED: from trl import ...
from fiberpo.train.embedded import build_model, build_tokenizer, load_embedded
from fiberpo.train.tasks import exact_answer, make_rows

try:
    model, tokenizer = load_embedded()
except ConfigError:  # no checkpoint in this installation: random weights will do for a few steps
    model, tokenizer = build_model(0), build_tokenizer()

rows = [row for task in ("sum", "sort", "reverse") for row in make_rows(task, seed=0, count=64)]

args = FiberPOConfig(  # CHANGED: GRPOConfig
    output_dir="runs/trl_script",
    objective="fiberpo_domain",  # CHANGED: new (the default); `epsilon`, `loss_type` are left out
    objective_kwargs={"pessimistic": True},  # CHANGED: new; parameters of the recipe
    steps_per_generation=4,  # CHANGED: more than gradient_accumulation_steps, or gates are inert
    gradient_accumulation_steps=1,
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
trainer = FiberPOTrainer(  # CHANGED: GRPOTrainer
    model=model,
    reward_funcs=exact_answer,
    args=args,
    train_dataset=Dataset.from_list(rows),
    processing_class=tokenizer,
)
trainer.remove_callback(PrinterCallback)  # the table below is shorter
trainer.train()

print("step  gate/active  gradient kept  domain p90  group p90  trajectory p90")
for record in trainer.state.log_history:
    if "gate/active" in record:
        domain, group, trajectory = (
            record[f"gate/{stratum}/drift_pos/p90"] for stratum in ("domain", "group", "trajectory")
        )
        print(
            f"{record['step']:4}  {record['gate/active']:11.3f}  "
            f"{record['gate/gradient_kept']:13.3f}  "
            f"{domain:10.4f}  {group:9.4f}  {trajectory:14.4f}"
        )
rewards = [record["reward"] for record in trainer.state.log_history if "reward" in record]
print("mean reward of each rollout:", [round(reward, 3) for reward in rewards])
