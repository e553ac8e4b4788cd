"""Compile the GPU kernels that plans launch, for a GPU that need not be there.

    python benchmarks/gpu_compile.py [--arch 90] [--json out.json]

Prints registers, spills, shared memory, programs that fit a multiprocessor, and float64 operations
and widths of memory operations in the machine code. Nothing is run, nothing is timed.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels cannot be compiled

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import fiberpo
import fiberpo.ops.triton as backend

POINTERS = {
    torch.float32: "*fp32", torch.float64: "*fp64", torch.int64: "*i64", torch.int32: "*i32",
}  # fmt: skip
LENGTHS = (1, 500, 2000, 4000, 8189, 40_000)
QUICK = {
    "gspo": (4000,), "sapo": (4000,), "fiberpo": (8189, 40_000), "fiberpo_domain": (8189,),
    "fiberpo_pessimistic": (4000,), "fiberstop": (8189, 40_000),
}  # fmt: skip
PHASES = ("final", "guess", "sums", "middle", "gradient")
REGISTERS, THREADS = 65_536, 2_048
"""Of a multiprocessor (compute capability 9.0)."""


class Recorder:
    """Stands in for a kernel: keeps what a launch would compile."""

    def __init__(self, kernel, found):
        self.kernel, self.found = kernel, found

    def __getitem__(self, grid):
        def launch(*args, num_warps=4, enable_fp_fusion=True, maxnreg=None, **constants):
            signature, constexprs, attrs = {}, {}, {}
            options = {"num_warps": num_warps, "enable_fp_fusion": enable_fp_fusion}
            options |= {} if maxnreg is None else {"maxnreg": maxnreg}
            for i, name in enumerate(self.kernel.arg_names):
                value = args[i] if i < len(args) else constants[name]
                if i >= len(args) or value is None or (isinstance(value, int) and value == 1):
                    signature[name], constexprs[(i,)] = "constexpr", value
                    continue
                tensor = isinstance(value, torch.Tensor)
                signature[name] = POINTERS[value.dtype] if tensor else "i32"
                if (value.data_ptr() if tensor else value) % 16 == 0:
                    attrs[(i,)] = [["tt.divisibility", 16]]
            key = json.dumps([self.kernel.__name__, signature, repr(constexprs), repr(attrs)])
            self.found[key] = (self.kernel, signature, constexprs, attrs, options)

        return launch


def launches(plan, length):
    """What an evaluation of a plan compiles."""
    found = {}
    x, advantages = torch.zeros(length), torch.zeros(plan.segments)
    names = ("tokens", "join", "add", "stage")
    patches = [mock.patch.object(backend, n, Recorder(getattr(backend, n), found)) for n in names]
    for patch in patches:
        patch.start()
    try:
        backend.evaluate(plan, x, x, advantages, torch.zeros(plan.segments).double())
    finally:
        for patch in patches:
            patch.stop()
    return found


def build(found, arch):
    """Compile; registers and the like."""
    kernel, signature, constexprs, attrs, options = found
    source = ASTSource(kernel, signature, constexprs, attrs)
    target = GPUTarget("cuda", arch, 32)
    built = triton.compile(source, target=target, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "--dump-resource-usage", file.name)
        code = tool("cuobjdump", "-sass", file.name)
    registers, stack, shared, local = (
        int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "SHARED", "LOCAL")
    )
    warps = options["num_warps"]
    per_warp = -(-registers * 32 // 256) * 256
    operations = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?([A-Z0-9.]+)", code, re.M)
    return {
        "warps": warps,
        "registers": registers,
        "spilled": stack + local,
        "shared": shared,
        "programs": min(REGISTERS // (per_warp * warps), THREADS // (32 * warps)),
        "loads_128": sum(op.startswith("LDG") and ".128" in op for op in operations),
        "stores_128": sum(op.startswith("STG") and ".128" in op for op in operations),
        "float64": sum(op.split(".")[0] in ("DADD", "DMUL", "DFMA", "DSETP") for op in operations),
        "conversions": sum(op.startswith("F2F") for op in operations),
        "instructions": len(operations),
    }


def tool(name, *args):
    """Output of a program that comes with triton."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *args], check=True, capture_output=True, text=True).stdout


STRATA = {"domain": (0.02, 0.015), "group": (0.04, 0.03), "trajectory": (0.12, 0.05)}


def objectives():
    """Every named recipe, and the pessimistic forms."""
    found = {
        name: recipe(**({"length": 1024} if name == "dr_grpo" else {}))
        for name, recipe in fiberpo.recipes.RECIPES.items()
        if name != "fiberpo_domain"
    }
    for more in ({}, {"pessimistic": True}):
        end = "_pessimistic" if more else ""
        found["fiberpo" + end] = fiberpo.recipes.fiberpo(**more)
        found["fiberpo_domain" + end] = fiberpo.recipes.fiberpo_domain(STRATA, **more)
    return found


def plan_of(objective, length, rows):
    """The plan of an objective on trajectories of one length, eight to a group."""
    zeros = torch.zeros(length * rows)
    ids = torch.arange(rows)
    batch = fiberpo.RatioBatch.from_packed(
        zeros, zeros, torch.ones(rows), [length] * rows,
        labels={"group": ids // 8, "domain": ids // 8 % 4},
    )  # fmt: skip
    return objective.plan(batch, mu=torch.ones(rows).double()).lowered


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("--quick", action="store_true", help="fewer lengths and methods")
    parser.add_argument("--json")
    args = parser.parse_args()
    rows, seen = [], set()
    for name, objective in objectives().items():
        for length in QUICK.get(name, ()) if args.quick else LENGTHS:
            count = max(200_000 // length, 8) if length <= 8192 else 8
            found = launches(plan_of(objective, length, count), length * count)
            for key, launch in found.items():
                if key in seen:
                    continue
                seen.add(key)
                kernel, _, constants, *_ = launch
                phase = constants.get((kernel.arg_names.index("PHASE"),)) \
                    if "PHASE" in kernel.arg_names else None  # fmt: skip
                row = {"method": name, "length": length, "kernel": kernel.__name__}
                row |= {"phase": "" if phase is None else PHASES[phase], **build(launch, args.arch)}
                rows.append(row)
                print(*(f"{k}={v}" for k, v in row.items()), flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps({"arch": args.arch, "rows": rows}, indent=1) + "\n")
    return int(any(row["spilled"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
