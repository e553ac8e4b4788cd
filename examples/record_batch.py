"""Figure 1 from your own run: four updates on one rollout, recorded, and the fibration of the last.

The package's sample batch (`fiberpo.theory.fibration.sample_batch`) was recorded by this script.
"""

import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from datasets import Dataset
from transformers import PrinterCallback

from fiberpo import recipes
from fiberpo.integrations.trl import FiberPOConfig, FiberPOTrainer
from fiberpo.integrations.trl_record import record
from fiberpo.recording import open_recording
from fiberpo.theory.drawing import save
from fiberpo.theory.fibration import BUDGETS, draw_fibration
from fiberpo.train.embedded import load_embedded
from fiberpo.train.tasks import exact_answer, make_rows

GROUPS, ANSWERS = 2, 4  # of each domain; to each prompt
FOLDER = Path("runs/record_batch")

model, tokenizer = load_embedded()
rows = [row for task in ("sum", "boolean") for row in make_rows(task, seed=1, count=GROUPS)]
trainer = FiberPOTrainer(
    model=model,
    reward_funcs=exact_answer,
    args=FiberPOConfig(
        output_dir=str(FOLDER),
        steps_per_generation=1,
        num_iterations=4,  # four updates on the one rollout: in the first every log ratio is 0
        max_steps=4,
        gradient_accumulation_steps=1,
        per_device_train_batch_size=2 * GROUPS * ANSWERS,
        num_generations=ANSWERS,
        max_completion_length=21,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        seed=0,
    ),
    objective=recipes.fiberpo_domain(BUDGETS, epsilon=0.2),
    train_dataset=Dataset.from_list(rows),
    processing_class=tokenizer,
)
trainer.remove_callback(PrinterCallback)
record(trainer, FOLDER / "recording", overwrite=True)
trainer.train()

*_, last = open_recording(FOLDER).iterate()
batch = last.batch
columns = {
    name: [round(x, 5) for x in getattr(batch, name).tolist()]
    for name in ("log_probs", "old_log_probs", "advantages")
}
columns["lengths"] = batch.lengths.tolist()
for name in ("domain", "group"):
    label = batch.labels[name]
    columns[name] = [label.value(code) for code in label.codes.tolist()]
(FOLDER / "batch.json").write_text(json.dumps(columns) + "\n")
figure = draw_fibration(batch, trainer.objective)
print(f"{batch.trajectories} answers, {len(batch)} tokens; the first: {''.join(last.text(0))}")
print(FOLDER / "batch.json", *save(figure, FOLDER, "figure1", ("png", "svg")))
