"""The tables of `docs/performance.md` and others, written from `benchmarks/results/*.json`.

    python benchmarks/page.py [--check]

``--check`` changes nothing and exits with 1 where a page is not what the files say.
"""

import argparse
import json
import re
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS, DOCS = ROOT / "benchmarks/results", ROOT / "docs"
PEERS = {"fiberpo": "grpo", "grpo": "grpo", "gspo": "gspo"}
"""What a method of ours is compared with."""


def read(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


def table(head, rows):
    """A markdown table; numbers to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def label(name):
    kind, _, method = name.partition(": ")
    if kind == "C++":
        return f"**ours, kernel**: {method}"
    if kind == "torch":
        return f"ours, kernel, backend torch: {method}"
    if kind.startswith("objective, "):
        backend = kind.removeprefix("objective, ")
        more = "" if backend == "cpu" else f", backend {backend}"
        return f"ours, objective{more}: {method}"
    return {"floor": "the floor"}.get(name, f"{kind}: {method}")


def losses(size):
    """Rows that matter of one size, fastest first, with ratios to the floor and to ours."""
    ratios = size["times_floor"]
    wanted = [
        name for name in ratios
        if name == "floor" or not name.startswith(("torch.sub", "eager autograd"))
    ]  # fmt: skip
    rows = []
    for name in sorted(wanted, key=ratios.get):
        method = name.rpartition(": ")[2]
        mine = ratios.get(f"objective, cpu: {method}")
        seconds = size["seconds"].get(name)
        other = mine is not None and not name.startswith(("C++", "objective, cpu"))
        rows.append([
            label(name), "" if seconds is None else f"{1e3 * seconds:.3g}", f"{ratios[name]:.2f}",
            f"{ratios[name] / mine:.1f}" if other else "",
        ])  # fmt: skip
    return table(["", "ms", "x floor", "x our objective of that method"], rows)


def machine(found):
    about = found["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in found["versions"].items() if v)
    verl = next((s["verl"] for s in found["sizes"] if s.get("verl")), None)
    return (
        f"{about['cpu']}, {about['cores']} shared cores, one thread; Python {about['python']}, "
        f"PyTorch {about['torch']}, {about['compiler']}; beside {versions}"
        f"{f', verl {verl}' if verl else ''}."
    )


def steps(found):
    columns = ("rollout", "phase 1", "phase 2", "statistics", "optimizer", "other", "whole step")
    rows = [
        [name, *(f"{1e3 * row[c]:.0f}" for c in columns), f"{row['ratio']:.2f}",
         f"{row['ratio without rollout']:.2f}", ", ".join(row["routes"])]
        for name, row in found["rows"].items()
    ]  # fmt: skip
    head = ["", *columns, "x GRPO", "x GRPO without rollout", "routes of a rollout"]
    return table(head, rows)


def contexts(found):
    last = found["growth"]["contexts"][-1]
    whole, count = last["C++"]["seconds"], last["contexts"]
    return (
        f"{count:,} contexts cost {1e9 * whole / count:.0f} ns each, {1e3 * whole:.0f} ms in all."
    )


def replayed(found):
    def rate(part, name):
        return f"{found[part][name]['tokens_per_second'] / 1e6:.1f}"

    rows = [
        [name, rate("in_all", name), rate("array_work", f"{name}, 2 threads"),
         rate("coefficients_only", name)]
        for name in ("fiberpo_domain", "grpo", "gspo", "all three")
    ]  # fmt: skip
    head = ["million tokens a second", "in all", "array work, 2 threads", "coefficients, 1 thread"]
    peak = found["peak_mb"]
    return {
        "replay": table(head, rows),
        "replay memory": (
            f"Peak memory with `grpo`: {peak['10 steps']:.0f} MB after 10 steps, "
            f"{peak['all steps']:.0f} MB after 250, of which {peak['imports']:.0f} MB are imports."
        ),
    }


def recorded(found):
    names = {
        "log-probs, advantages, ids": "log-probs, advantages a row, two labels",
        "and token ids, entropies": "and token ids and entropies",
        "and advantages a token": "and advantages a token",
        "the first, answers of 16 tokens": "the first, rows of 16 tokens",
    }
    rows = [
        [names[name], f"{r['bytes_a_token']:.1f}", f"{r['write_tokens_per_s'] / 1e6:.0f}",
         f"{r['read_tokens_per_s'] / 1e6:.0f}"]
        for name, r in found["native"].items()
    ]  # fmt: skip
    rows += [
        [f"{name}, the first", f"{r['bytes_a_token']:.1f}", "",
         f"{r['read_tokens_per_s'] / 1e6:.1f}"]
        for name, r in found["foreign"].items()
    ]  # fmt: skip
    train = found["fiberpo train"]
    return {
        "recording": table(
            ["kept", "bytes a token", "written, M tokens/s", "read, M tokens/s"], rows
        ),
        "recording share": (
            f"In `fiberpo train` with the embedded model recording takes "
            f"{100 * train['share_of_training']:.1f} % of the time of training, and "
            f"{100 * train['share_of_updates']:.1f} % of the updates alone, without rollouts."
        ),
    }


def aims(large, linear):
    """What was aimed at, what was found."""
    x = large["times_floor"]

    def against(peer, method):
        theirs = x[f"{peer}: {PEERS[method]}"]
        return theirs / x[f"C++: {method}"], theirs / x[f"objective, cpu: {method}"]

    rows = []

    def row(what, aim, found, met):
        rows.append([what, aim, found, "met" if met else "**missed**"])

    row("FiberPO kernel, x floor", "5", f"{x['C++: fiberpo']:.1f}", x["C++: fiberpo"] <= 5)
    whole = x["objective, cpu: fiberpo"]
    row("FiberPO objective, x floor", "5", f"{whole:.1f}", whole <= 5)
    for method in ("fiberpo", "grpo", "gspo"):
        for peer in ("TRL", "verl"):
            if f"{peer}: {PEERS[method]}" in x:
                kernel, entire = against(peer, method)
                row(
                    f"{method} faster than {peer}'s {PEERS[method]}, kernel; objective", "20 times",
                    f"{kernel:.0f}; {entire:.0f}", min(kernel, entire) >= 20,
                )  # fmt: skip
    kernel = x["C++: fiberpo_domain"] / x["C++: fiberpo"]
    entire = x["objective, cpu: fiberpo_domain"] / x["objective, cpu: fiberpo"]
    row(
        "FiberPO-Domain, x FiberPO, kernel; objective", "1.3", f"{kernel:.2f}; {entire:.2f}",
        max(kernel, entire) <= 1.3,
    )  # fmt: skip
    ours = {r["name"]: r for r in linear["rows"]}
    peak = ours["TRL, logits in memory"]["peak_mb"]
    for name in ("ours, frozen", "ours, resident (FiberPO)", "ours, two-phase"):
        ratio, memory = ours[name]["x_floor_unchunked"], peak / ours[name]["peak_mb"]
        row(
            f"linear_logprob {name.removeprefix('ours, ')}, x its products; memory of TRL style",
            "1.1; 1/8", f"{ratio:.2f}; 1/{memory:.1f}", ratio <= 1.1 and memory >= 8,
        )  # fmt: skip
    return table(["aim, CPU, one thread", "at most / at least", "found", ""], rows)


def in_short(large, linear, step):
    """The paragraph of the README."""
    x, ms = large["times_floor"], large["seconds"]
    mm = next(r["x_floor_unchunked"] for r in linear["rows"] if r["name"] == "ours, frozen")
    two = next(r["x_floor_unchunked"] for r in linear["rows"] if r["name"] == "ours, two-phase")
    tokens, ratio = large["tokens"] / 1e6, step["rows"]["fiberpo_domain"]["ratio"]
    kernel, whole, theirs = (
        1e3 * ms[name] for name in ("C++: fiberpo", "objective, cpu: fiberpo", "TRL: grpo")
    )
    text = (
        f"Loss and gradient for {tokens:.1f} million tokens on one CPU thread, log-probs given: "
        f"the FiberPO kernel takes {kernel:.1f} ms, {x['C++: fiberpo']:.1f} times what moving the "
        f"numbers alone costs; with checks and autograd {whole:.1f} ms; TRL's own GRPO loss "
        f"{theirs:.0f} ms. An exact FiberPO-Domain step in the TRL trainer costs {ratio:.2f} "
        "times a GRPO step. `fiberpo.linear_logprob` gives log-probs and their backward without "
        f"logits, at {mm:.2f} to {two:.2f} times the matrix products they need."
    )
    return textwrap.fill(text, 100)


def pages():
    """Page -> name of a mark -> what stands there."""
    large = max((s for s in read("loss")["sizes"] if s["threads"] == 1), key=lambda s: s["tokens"])
    return {
        "../README.md": {
            "short": in_short(large, read("linear_logprob"), read("exact_step")),
        },
        "performance.md": blocks(),
        "replay.md": replayed(read("replay")),
        "recording.md": recorded(read("recording")),
    }


def blocks():
    """The marks of the performance page."""
    loss, guard = read("loss"), json.loads((ROOT / "benchmarks/baselines/loss.json").read_text())
    large = max((s for s in loss["sizes"] if s["threads"] == 1), key=lambda s: s["tokens"])
    small = min((s for s in loss["sizes"] if s["threads"] == 1), key=lambda s: s["tokens"])
    key = "{} / exp(new - old)".format
    times = guard[key("fiberpo metrics")]["baseline"] / guard[key("fiberpo")]["baseline"]
    return {
        "machine": machine(loss),
        "loss": f"{large['tokens']:,} tokens, one thread:\n\n{losses(large)}",
        "small": losses(small),
        "aims": aims(large, read("linear_logprob")),
        "metrics": f"{times:.0f} times the kernel of FiberPO at a million tokens",
        "contexts": contexts(read("growth")),
        "step": steps(read("exact_step")),
    }


def fill(text, blocks):
    """A page with its marks filled."""
    for name, block in blocks.items():
        mark = re.compile(rf"(<!-- bench: {name} -->)(\n?).*?(<!-- end -->)", re.DOTALL)
        assert mark.search(text), name
        text = mark.sub(lambda m, b=block: m[1] + m[2] + b + m[2] + m[3], text)
    return text


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(arguments)
    for name, found in pages().items():
        path = DOCS / name
        text = path.read_text()
        filled = fill(text, found)
        if options.check and filled != text:
            sys.exit(f"{name} is not what benchmarks/results say; run benchmarks/page.py")
        path.write_text(filled)
    print("the pages are what benchmarks/results say")


if __name__ == "__main__":
    main()
