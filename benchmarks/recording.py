"""What a recording costs: bytes a token, tokens a second, and its share of a training step.

    python benchmarks/recording.py [--tokens 20000000] [--json out.json]

Correctness first: nothing is timed unless a recorded step comes back bit for bit. The share of a
step is that of ``fiberpo train`` with the embedded model: time spent in recording over the time of
the optimizer steps alone, and over the whole of training with its rollouts.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

import fiberpo
from fiberpo.recording import Recorder, open_recording

STEP = 2**20
"""Tokens of a step."""


def make(tokens, length, seed=0, per_token=False):
    """Rows of one length in groups of 8 and 4 domains, with token ids and entropies."""
    generator = torch.Generator().manual_seed(seed)
    rows = tokens // length
    tokens = rows * length
    old = -torch.rand(tokens, generator=generator)
    batch = fiberpo.RatioBatch.from_packed(
        old + 0.05 * torch.randn(tokens, generator=generator), old,
        torch.randn(tokens if per_token else rows, generator=generator),
        [length] * rows,
        labels={
            "domain": [f"domain {i // 8 % 4}" for i in range(rows)],
            "group": [f"prompt {i // 8}" for i in range(rows)],
        },
    )  # fmt: skip
    ids = torch.randint(150_000, (tokens,), generator=generator)
    return batch, {"token_ids": ids, "entropies": torch.rand(tokens, generator=generator)}


def check(folder):
    """Refuse to time what does not come back."""
    batch, more = make(4096, 64, per_token=True)
    with Recorder(folder) as recorder:
        recorder.record(1, batch, **more)
    (item,) = open_recording(folder).iterate()
    for found, wanted in (
        (item.batch.log_probs, batch.log_probs), (item.batch.advantages, batch.advantages),
        (item.entropies, more["entropies"]), (item.token_ids, more["token_ids"].int()),
    ):  # fmt: skip
        if not torch.equal(found, wanted):
            sys.exit("a recorded step does not come back: nothing is timed")


def size(folder):
    return sum(path.stat().st_size for path in (folder / "shards").iterdir())


def native(folder, tokens, length, **kept):
    """One recording written and read."""
    steps = max(tokens // STEP, 1)
    batch, more = make(min(STEP, tokens), length, per_token=kept.pop("per_token", False))
    if not kept.pop("more", False):
        more = {}
    written = time.perf_counter()
    with Recorder(folder, overwrite=True) as recorder:
        for step in range(steps):
            recorder.record(step, batch, **more)
    written = time.perf_counter() - written
    recording = open_recording(folder)
    peak, read, seen = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter(), 0
    for item in recording.iterate():
        seen += len(item.batch)
    read = time.perf_counter() - read
    assert seen == recording.tokens
    more_memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    return {
        "answer_length": length,
        "tokens": seen,
        "bytes_a_token": size(folder) / seen,
        "write_tokens_per_s": seen / written,
        "read_tokens_per_s": seen / read,
        "more_memory_mb": more_memory / 1024,
    }


def foreign(folder, tokens, length=512):
    """The same rows as parquet and as JSONL (a tenth of them)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    batch, _ = make(tokens, length)
    shape = (batch.rows, length)
    columns = {
        "per_token_logps": list(batch.log_probs.reshape(shape).numpy()),
        "old_per_token_logps": list(batch.old_log_probs.reshape(shape).numpy()),
        "advantages": batch.advantages[::length].numpy(),
        "uid": [f"prompt {i // 8}" for i in range(batch.rows)],
    }
    table = pa.table(columns)
    paths = {"parquet": folder / "x.parquet", "jsonl": folder / "x.jsonl"}
    pq.write_table(table, paths["parquet"])
    with paths["jsonl"].open("w") as file:
        for row in table.slice(0, batch.rows // 10).to_pylist():
            file.write(json.dumps(row) + "\n")
    found = {}
    for kind, path in paths.items():
        started = time.perf_counter()
        seen = sum(len(item.batch) for item in open_recording(path).iterate())
        found[kind] = {"tokens": seen, "read_tokens_per_s": seen / (time.perf_counter() - started)}
        found[kind]["bytes_a_token"] = path.stat().st_size / seen
    return found


def share(folder, rollouts):
    """Time of recording inside ``fiberpo train``."""
    import fiberpo.integrations.trl as adapter
    from fiberpo.train.config import make_config
    from fiberpo.train.program import train

    spent = dict.fromkeys(("recording", "steps", "rollouts", "training"), 0.0)

    def timed(owner, name, key):
        inner = getattr(owner, name)

        def call(*args, **kwargs):
            started = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                spent[key] += time.perf_counter() - started

        setattr(owner, name, call)
        return inner

    class_ = adapter.FiberPOTrainer
    before = [
        (Recorder, "attempt", timed(Recorder, "attempt", "recording")),
        (class_, "training_step", timed(class_, "training_step", "steps")),
        (class_, "_prepare_inputs", timed(class_, "_prepare_inputs", "rollouts")),
        (class_, "train", timed(class_, "train", "training")),
    ]
    values = {
        "output": str(folder), "name": "run", "objective": "fiberpo_domain", "rollouts": rollouts,
        "heldout_prompts": 4, "heldout_every": rollouts + 1, "save_every": rollouts, "record": True,
    }  # fmt: skip
    try:
        summary = train(make_config(None, values), progress=False, say=lambda line: None)
    finally:
        for owner, name, inner in before:
            setattr(owner, name, inner)
    recording = open_recording(folder / "run")
    steps = summary["steps"]
    updates = spent["steps"] - spent["rollouts"]  # forward and backward passes, and the recording
    return {
        "steps": steps,
        "tokens_a_step": recording.tokens / steps,
        "bytes_a_token": size(folder / "run" / "recording") / recording.tokens,
        "recording_ms_a_step": 1e3 * spent["recording"] / steps,
        "training_ms_a_step": 1e3 * spent["training"] / steps,
        "share_of_updates": spent["recording"] / updates,
        "share_of_training": spent["recording"] / spent["training"],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=20_000_000)
    parser.add_argument("--rollouts", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp())
    try:
        check(folder / "check")
        results = {
            "machine": f"{platform.machine()}, torch {torch.__version__}, 1 thread",
            "native": {
                "log-probs, advantages, ids": native(folder / "a", options.tokens, 512),
                "and token ids, entropies": native(folder / "b", options.tokens, 512, more=True),
                "and advantages a token": native(
                    folder / "c", options.tokens, 512, more=True, per_token=True
                ),
                "the first, answers of 16 tokens": native(folder / "d", options.tokens, 16),
            },
            "foreign": foreign(folder, min(options.tokens, 4_000_000)),
            "fiberpo train": share(folder, options.rollouts),
        }
    finally:
        shutil.rmtree(folder)
    for name, row in {**results["native"], **results["foreign"]}.items():
        write = row.get("write_tokens_per_s")
        written = "" if write is None else f"written {write / 1e6:.1f}, "
        print(
            f"{name:34} {row['bytes_a_token']:5.1f} bytes a token, million tokens a second: "
            f"{written}read {row['read_tokens_per_s'] / 1e6:.1f}"
        )
    row = results["fiberpo train"]
    print(
        f"fiberpo train: {row['recording_ms_a_step']:.1f} of {row['training_ms_a_step']:.0f} ms a "
        f"step ({row['share_of_training']:.2%}; {row['share_of_updates']:.2%} of the updates "
        f"alone), {row['tokens_a_step']:.0f} tokens, {row['bytes_a_token']:.1f} bytes a token"
    )
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
