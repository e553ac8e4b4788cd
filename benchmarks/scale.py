"""What an exact optimizer step costs over many ranks: bytes that cross, and our own CPU work.

    python benchmarks/scale.py [--quick] [--json out.json]

Ranks are threads that hold shards (`fiberpo.testing.simulate_ranks`). Each takes the two-phase step
of `fiberpo.exact` on two micro-batches; a wrapper notes every reduction: its kind, the bytes handed
in and the answer. Correctness first: the coefficients of all ranks must be those of one call on the
whole batch to 1e-9 of the largest, or nothing is printed.

CPU time is that of rank 0 alone: its step is repeated in the main thread with a stub that gives the
noted answers, so that no other rank competes for the core and no network is in the number.
Log-probs are given: the forward passes of a policy are not in it either. Two and four processes
with gloo on this machine show the real calls (wall time, the fastest of 100 steps, since cores are
shared).

Without ``--quick`` and ``--json`` the results go to ``benchmarks/results/scale.json``, and the
tables of ``docs/exact.md`` are written again from them.
"""

import argparse
import functools
import json
import os
import platform
import re
import statistics
import sys
import tempfile
import textwrap
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from fiberpo import FiberPOWarning, RatioBatch, TorchGroup, recipes
from fiberpo.collective import Ranks
from fiberpo.exact import Stepper
from fiberpo.testing import SimulatedRanks, simulate_ranks

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "benchmarks/results/scale.json", ROOT / "docs/exact.md"
OBJECTIVE = recipes.fiberpo_domain(
    {"domain": (0.02, 0.015), "group": (0.04, 0.03), "trajectory": (0.12, 0.05)}
)
DOMAINS, PARTS, LENGTH = 4, 2, 32
FULL = {
    "ranks": (2, 8, 32, 128, 512, 1024), "total_rows": 32_768, "rows_per_rank": 32,
    "lengths": (16, 128, 1024), "contexts": (10, 1_000, 10_000, 100_000),
    "processes": (2, 4), "repeat": 5,
}  # fmt: skip
QUICK = {
    "ranks": (2, 8), "total_rows": 256, "rows_per_rank": 32, "lengths": (4, 16),
    "contexts": (10, 100), "processes": (2,), "repeat": 3,
}  # fmt: skip


class WrongError(Exception):
    """The coefficients are not those of the whole batch."""


@dataclass
class Call:
    """One reduction or gather."""

    kind: str
    handed: int
    received: int
    seconds: float
    answer: Any


@dataclass(eq=False)
class Noted(Ranks):
    """Passes everything on to ``ranks`` and notes it."""

    ranks: Ranks
    calls: list[Call] = field(default_factory=list)

    @property
    def size(self):
        return self.ranks.size

    def _note(self, kind, values):
        begin = time.perf_counter()
        answer = getattr(self.ranks, kind)(values)
        seconds = time.perf_counter() - begin
        received = sum(part.nbytes for part in answer) if kind == "gather" else answer.nbytes
        self.calls.append(Call(kind, values.nbytes, received, seconds, answer))
        return answer

    def total(self, values):
        return self._note("total", values)

    def largest(self, values):
        return self._note("largest", values)

    def gather(self, rows):
        return self._note("gather", rows)


@dataclass(eq=False)
class Replayed(Ranks):
    """Gives the answers of calls that were noted before."""

    answers: list[Any]
    count: int

    @property
    def size(self):
        return self.count

    def total(self, values):
        return self.answers.pop(0).clone()

    largest = total

    def gather(self, rows):
        return self.answers.pop(0)


def make(rows, length, groups, text=False):
    """A batch of ``rows`` answers of about ``length`` tokens to ``groups`` prompts in 4 domains."""
    generator = torch.Generator().manual_seed(0)
    group = torch.arange(rows) * groups // rows
    lengths = torch.randint(length // 2, 3 * length // 2 + 1, (rows,), generator=generator)
    drift = 0.05 * torch.randn(rows, generator=generator, dtype=torch.float64)
    drift = torch.repeat_interleave(drift, lengths)
    old = -torch.rand(len(drift), generator=generator, dtype=torch.float64)
    noise = 0.05 * torch.randn(len(drift), generator=generator, dtype=torch.float64)
    ids = [f"prompt-{g:08d}" for g in group.tolist()] if text else group
    return RatioBatch.from_packed(
        old + drift + noise, old, torch.randn(rows, generator=generator), lengths,
        labels={"domain": group % DOMAINS, "group": ids},
    )  # fmt: skip


def cut(batch, ranks, torn):
    """Per rank its rows: neighbours (whole groups, where they fit), or dealt out one by one."""
    rows = torch.arange(batch.rows)
    place = rows % ranks if torn else rows * ranks // batch.rows
    return [(place == rank).nonzero().flatten() for rank in range(ranks)]


def micro_batches(batch, rows):
    return [batch.select(mine) for mine in rows.chunk(PARTS)]


def step(parts, ranks):
    """Both phases up to the coefficients; the window, and seconds of CPU in each phase."""
    begin = time.process_time()
    window = Stepper(OBJECTIVE, collective=ranks, gradients="summed").open(parts)
    between = time.process_time()
    opened = len(getattr(ranks, "calls", ()))
    window.fill([part.log_probs for part in parts])
    return window, opened, (between - begin, time.process_time() - between)


def check(found, expected, where):
    """Raise unless the coefficients are equal."""
    error = float((found - expected).abs().max() / expected.abs().max())
    if not error <= 1e-9:
        raise WrongError(f"{where}: coefficients differ by {error:.1e} of the largest")
    return error


def phases(calls, opened):
    """Calls of an optimizer step by what they are for."""
    return {
        "keys": [call for call in calls[:opened] if call.kind == "gather"],
        "layout": [call for call in calls[:opened] if call.kind != "gather"],
        "step": calls[opened:],
    }


def simulate(batch, ranks, torn, repeat):
    """One setting: checked, counted, timed."""
    whole = OBJECTIVE(batch).coefficients
    tokens = torch.arange(len(batch)).split(batch.lengths.tolist())
    shards = cut(batch, ranks, torn)

    def work(rows, simulated: SimulatedRanks):
        parts, noted = micro_batches(batch, rows), Noted(simulated)
        window, opened, _ = step(parts, noted)
        handed = sum(call.handed for call in noted.calls)
        if (simulated.calls, simulated.sent) != (len(noted.calls), handed):
            raise WrongError("the notes are not what the ranks count themselves")
        surrogate = window.surrogates[0]
        expected = whole[torch.cat([tokens[row] for row in rows.tolist()])]
        error = check(surrogate.coefficients, expected, f"{ranks} ranks")
        width = surrogate.gated.layout.contexts.match.width
        return {"error": error, "calls": noted.calls, "opened": opened, "straddling": width}

    outs = simulate_ranks(work, shards, timeout=300)
    by_rank = [phases(out["calls"], out["opened"]) for out in outs]

    def most(phase, what):
        return max(sum(getattr(call, what) for call in rank[phase]) for rank in by_rank)

    parts = micro_batches(batch, shards[0])
    seconds = []
    for _ in range(repeat):
        replayed = Replayed([call.answer for call in outs[0]["calls"]], ranks)
        seconds.append(step(parts, replayed)[2])
    open_ms, fill_ms = (1e3 * statistics.median(times) for times in zip(*seconds, strict=True))
    return {
        "ranks": ranks,
        "rows": batch.rows,
        "tokens": len(batch),
        "torn": torn,
        "contexts": len(batch.strata(("domain", "group"))),
        "straddling": outs[0]["straddling"],
        "calls": {phase: len(calls) for phase, calls in by_rank[0].items()},
        "handed": {phase: most(phase, "handed") for phase in by_rank[0]},
        "keys_received": most("keys", "received"),
        "cpu_ms": {"open": round(open_ms, 2), "coefficients": round(fill_ms, 2)},
        "error": max(out["error"] for out in outs),
    }


def process(rank, world, path, repeat):
    """One of several real processes; the first writes what it measured."""
    warnings.simplefilter("ignore", FiberPOWarning)
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{path}/meeting", rank=rank, world_size=world
    )
    batch = make(1024, LENGTH, 128)
    rows = cut(batch, world, torn=True)[rank]
    parts, found = micro_batches(batch, rows), []
    for _ in range(repeat + 1):
        noted = Noted(TorchGroup())
        torch.distributed.barrier()
        begin = time.perf_counter()
        window, opened, _ = step(parts, noted)
        seconds = time.perf_counter() - begin
        calls = phases(noted.calls, opened)
        found.append([sum(c.seconds for c in calls[p]) for p in calls] + [seconds])
    tokens = torch.arange(len(batch)).split(batch.lengths.tolist())
    expected = OBJECTIVE(batch).coefficients[torch.cat([tokens[row] for row in rows.tolist()])]
    error = check(window.surrogates[0].coefficients, expected, f"gloo, rank {rank} of {world}")
    if rank == 0:
        names = ("keys", "layout", "step", "all")
        fastest = [min(column) for column in zip(*found[1:], strict=True)]
        result = {
            "processes": world,
            "tokens": len(batch),
            "handed": {phase: sum(c.handed for c in calls[phase]) for phase in calls},
            "wall_ms": {n: round(1e3 * s, 2) for n, s in zip(names, fastest, strict=True)},
            "error": error,
        }
        Path(path, "result.json").write_text(json.dumps(result))
    torch.distributed.destroy_process_group()


def gloo(world, repeat):
    """The same step in ``world`` processes that talk over gloo on this machine."""
    with tempfile.TemporaryDirectory() as path:
        torch.multiprocessing.spawn(process, (world, path, repeat), nprocs=world)
        return json.loads(Path(path, "result.json").read_text())


def measure(settings):
    """All settings; raises before anything is printed if one of them is wrong."""
    repeat, per_rank = settings["repeat"], settings["rows_per_rank"]
    batch_of = functools.lru_cache(maxsize=1)(lambda rows: make(rows, LENGTH, rows // 8))

    @functools.cache
    def spread(rows, ranks, torn):
        return simulate(batch_of(rows), ranks, torn, repeat)

    cases = [(ranks, torn) for ranks in settings["ranks"] for torn in (False, True)]
    return {
        "per_rank": [spread(per_rank * ranks, ranks, torn) for ranks, torn in cases],
        "total": [spread(settings["total_rows"], ranks, torn) for ranks, torn in cases],
        "lengths": [
            {"length": n, **simulate(make(64, n, 8), 8, True, repeat)} for n in settings["lengths"]
        ],
        "contexts": [
            {"ids": ids, **simulate(make(2 * c, 4, c, ids == "strings"), 4, True, repeat)}
            for c in settings["contexts"]
            for ids in ("integers", "strings")
        ],
        "gloo": [gloo(world, 20 * repeat) for world in settings["processes"]],
    }


def markdown(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def cells(row):
    """What every simulated setting shows."""
    handed, cpu = row["handed"], row["cpu_ms"]
    counts = (row["straddling"], handed["keys"], row["keys_received"], handed["layout"])
    counts = [f"{count:,}" for count in (*counts, handed["step"])]
    return [*counts, f"{cpu['open']:.1f}", f"{cpu['coefficients']:.1f}"]


SHOWN = [
    "contexts that straddle", "keys handed in, B", "keys received, B", "layout all-reduces, B",
    "the two all-reduces, B", "CPU ms, layout", "CPU ms, coefficients",
]  # fmt: skip


def tables(results):
    """Markdown tables by name, from the results alone."""
    found = {}
    for name in ("per_rank", "total"):
        found[name] = markdown(
            ["groups", "ranks", "answers", *SHOWN],
            [["torn" if r["torn"] else "whole", r["ranks"], f"{r['rows']:,}", *cells(r)]
             for r in sorted(results[name], key=lambda r: r["torn"])],
        )  # fmt: skip
    found["lengths"] = markdown(
        ["tokens an answer", "tokens", *SHOWN],
        [[f"{r['length']:,}", f"{r['tokens']:,}", *cells(r)] for r in results["lengths"]],
    )
    found["contexts"] = markdown(
        ["contexts", "ids", *SHOWN],
        [[f"{r['contexts']:,}", r["ids"], *cells(r)] for r in results["contexts"]],
    )
    found["gloo"] = markdown(
        ["processes", "gather of keys, ms", "layout all-reduces, ms", "the two all-reduces, ms",
         "whole step, ms"],
        [[r["processes"], *(f"{r['wall_ms'][k]:.2f}" for k in ("keys", "layout", "step", "all"))]
         for r in results["gloo"]],
    )  # fmt: skip
    found["job"] = textwrap.fill(job(results["per_rank"]), 110)
    machine = results["machine"]
    found["machine"] = (
        f"Measured on {machine['cores']} shared CPU cores with {machine['threads']} thread, Python "
        f"{machine['python']}, PyTorch {machine['torch']}."
    )
    return found


def job(rows):
    """What a rank of the largest job pays, in words."""
    whole, torn = sorted(rows, key=lambda r: (r["ranks"], r["torn"]))[-2:]
    handed, gradient = torn["handed"], 2 * 7_000_000_000
    return (
        f"So one of {torn['ranks']:,} ranks ({torn['rows']:,} answers, {torn['straddling']:,} "
        f"groups and domains, all of them torn) hands in {handed['keys']:,} bytes of keys and gets "
        f"{torn['keys_received']:,} back, hands in {handed['layout']:,} bytes to the all-reduces "
        f"of the layout and {handed['step']:,} bytes to the two of the step, and spends "
        f"{sum(torn['cpu_ms'].values()):.0f} ms of CPU. Where groups are whole on a rank, the "
        f"layout is {whole['handed']['layout']:,} bytes and the step {whole['handed']['step']:,}. "
        f"The gradient of 7 billion parameters in 16 bits is {gradient:,} bytes, "
        f"{gradient // handed['step']:,} times the two all-reduces of the worst case."
    )


def fill_page(text, results):
    """A page with its tables written again; they stand between ``<!-- scale: name -->`` marks."""
    for name, table in tables(results).items():
        mark = re.compile(rf"(<!-- scale: {name} -->\n).*?(\n<!-- end -->)", re.DOTALL)
        text = mark.sub(lambda m, t=table: m[1] + t + m[2], text)
    return text


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small settings, no file is changed")
    parser.add_argument("--json", type=Path, help="write the results here and nothing else")
    args = parser.parse_args(arguments)
    warnings.simplefilter("ignore", FiberPOWarning)
    torch.set_num_threads(1)
    begin = time.perf_counter()
    try:
        results = measure(QUICK if args.quick else FULL)
    except WrongError as error:
        print(f"wrong, so nothing is reported: {error}", file=sys.stderr)
        return 1
    results["machine"] = {
        "platform": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for name, table in tables(results).items():
        print(f"\n{name}\n{table}")
    print(f"\n{time.perf_counter() - begin:.0f} s, of which {sum(os.times()[:4]):.0f} s of CPU")
    path = args.json or (None if args.quick else RESULTS)
    if path:
        path.write_text(json.dumps(results, indent=1) + "\n")
    if path == RESULTS:
        PAGE.write_text(fill_page(PAGE.read_text(), results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
