"""Loss and gradient from given log-probs on a GPU, beside a device copy and other libraries.

    python benchmarks/gpu_loss.py [--tokens 32768 1048576 33554432] [--json out.json]
    TRITON_INTERPRET=1 python benchmarks/gpu_loss.py --device cpu --tokens 2048

Correctness first: a row is timed only if value and gradient agree with torch operations in
float64.
Rows are timed by events around replays of a CUDA graph, and around plain calls (which the launches
of the host dominate when there are few tokens). ``floor`` is a device copy that moves the same 12
bytes a token. On a CPU nothing but the program itself is tested: its times mean nothing.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

import fiberpo
import fiberpo.ops.triton as backend
from fiberpo.ops import eager

STRATA = {"domain": (0.02, 0.015), "group": (0.04, 0.03), "trajectory": (0.12, 0.05)}
OBJECTIVES = {
    "grpo": fiberpo.recipes.grpo(),
    "gspo": fiberpo.recipes.gspo(),
    "fiberpo": fiberpo.recipes.fiberpo(),
    "fiberpo_domain, no gate acts": fiberpo.recipes.fiberpo_domain(dict.fromkeys(STRATA, (1, 1))),
    "fiberpo_domain": fiberpo.recipes.fiberpo_domain(STRATA),
    "fiberstop, nothing stops": fiberpo.recipes.fiberstop(dict.fromkeys(STRATA, (9, 9)), 9.0),
    "fiberstop": fiberpo.recipes.fiberstop(STRATA),
    "fiberpo_domain, pessimistic": fiberpo.recipes.fiberpo_domain(STRATA, pessimistic=True),
}
SIZES = [32_768, 262_144, 1_048_576, 8_388_608, 33_554_432]


def make(tokens, length, device):
    """Packed tokens of trajectories of half to all of ``length``."""
    torch.manual_seed(0)
    lengths, left = [], tokens
    for drawn in torch.randint(length // 2, length + 1, (3 * tokens // length + 2,)).tolist():
        lengths.append(min(drawn, left))
        left -= lengths[-1]
        if not left:
            break
    rows = torch.arange(len(lengths))
    log_probs = (torch.randn(tokens) * 0.05 - 1).to(device)
    old = (log_probs.cpu() + torch.randn(tokens) * 0.05).to(device)
    labels = {"group": (rows // 8).to(device), "domain": (rows // 8 % 4).to(device)}
    return fiberpo.RatioBatch.from_packed(
        log_probs, old, torch.randn(len(lengths)).to(device), lengths, labels=labels
    )


def prepared(objective, batch):
    """A call without arguments: value and gradient from log-probs, plan and weights given."""
    mu = objective.weights(batch)
    plan = objective.plan(batch, mu=mu).lowered
    scale = mu[plan.starts[:-1]] if len(plan.starts) > 1 else mu
    given = (batch.log_probs.detach(), batch.old_log_probs, batch.advantages, scale)
    return plan, given, lambda: backend.evaluate(plan, *given)


def disagreement(plan, given, found):
    """Largest error, relative to the largest coefficient and to the sum of the terms' sizes."""
    wanted = eager.evaluate(plan, given[0].double(), given[1].double(), *given[2:])
    gradient = (found.gradient.double() - wanted.gradient).abs().max() / wanted.gradient.abs().max()
    value = (found.value - wanted.value).abs() / wanted.segment_values.abs().sum()
    return float(gradient), float(value)


def padded(batch):
    """Rectangles, as the other libraries take them."""
    rows, width = len(batch.lengths), int(batch.lengths.max())
    where = torch.arange(width, device=batch.device) < batch.lengths[:, None]
    out = [torch.zeros(rows, width, device=batch.device) for _ in range(2)]
    for target, source in zip(out, (batch.log_probs.detach(), batch.old_log_probs), strict=True):
        target[where] = source
    return (out[0].requires_grad_(), out[1], batch.advantages[batch.lengths.cumsum(0) - 1],
            where.float())  # fmt: skip


def compiled_ppo(log_probs, old, advantages, mask):
    ratio = torch.exp(log_probs - old)
    first, second = ratio * advantages[:, None], ratio.clamp(0.8, 1.2) * advantages[:, None]
    return -(torch.min(first, second) * mask).sum() / mask.sum()


def trl_loss():
    """TRL's own `_compute_loss`, log-probs given; None where it is not installed."""
    try:
        from trl import GRPOTrainer
    except ImportError:
        return None

    def loss(log_probs, old, advantages, mask):
        ids = torch.zeros_like(mask, dtype=torch.long)
        host = SimpleNamespace(
            aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
            importance_sampling_level="token", beta=0.0, loss_type="grpo", epsilon_low=0.2,
            epsilon_high=0.2, use_vllm=False, _entropy_bonus_enabled=False,
            model=SimpleNamespace(training=True), current_gradient_accumulation_steps=1,
            args=SimpleNamespace(delta=None),
            accelerator=SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x),
            _metrics={"train": _Sink()},
            _get_per_token_logps_and_entropies=lambda *a, **k: (log_probs, mask, None),
        )  # fmt: skip
        given = {
            "prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1], "completion_ids": ids,
            "completion_mask": mask, "advantages": advantages, "old_per_token_logps": old,
        }  # fmt: skip
        return GRPOTrainer._compute_loss(host, None, given)

    return loss


class _Sink(dict):
    def __missing__(self, key):
        return []


def liger_loss():
    """The per-token loss of Liger's GRPO with its reduction; None where it is not installed."""
    try:
        from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOFunction
    except ImportError:
        return None

    def loss(log_probs, old, advantages, mask):
        return LigerFusedLinearGRPOFunction.ppo_loss_fn(
            log_probs, mask, advantages, mask, old_per_token_logps=old, beta=0.0,
            epsilon_low=0.2, epsilon_high=0.2, loss_type="grpo",
        )  # fmt: skip

    return loss


class Clock:
    """Microseconds of a call: from replays of a graph, and called plainly."""

    def __init__(self, device, repeat):
        self.device, self.repeat = device, repeat

    def __call__(self, call, graph=True):
        if self.device == "cpu":
            begin = time.perf_counter()
            call()
            return {"plain_us": (time.perf_counter() - begin) * 1e6}
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        found = {"plain_us": self.median(call)}
        if graph:
            recorded, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                call()
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(recorded):
                call()
            found["graph_us"] = self.median(recorded.replay)
        return found

    def median(self, call, inner=10):
        """Of batches of calls, so that the events themselves do not count."""
        times = []
        for _ in range(self.repeat):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(inner):
                call()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e3 / inner)
        return statistics.median(times)


def rows_of(tokens, args):
    """All rows for one number of tokens."""
    clock = Clock(args.device, args.repeat)
    batch = make(tokens, args.length, args.device)
    half = torch.empty(6 * tokens, dtype=torch.uint8, device=args.device)
    target = torch.empty_like(half)
    floor = clock(lambda: target.copy_(half))
    yield {"row": "floor", "tokens": tokens, **floor}
    for name, objective in OBJECTIVES.items():
        plan, given, call = prepared(objective, batch)
        gradient, value = disagreement(plan, given, call())
        row = {"row": name, "tokens": tokens, "gradient_error": gradient, "value_error": value}
        if not (gradient < 1e-5 and value < 1e-5):
            yield {**row, "wrong": True}
            continue
        yield row | clock(call)
    data = padded(batch)
    reference = prepared(OBJECTIVES["grpo"], batch)[2]().gradient
    peers = {"TRL": trl_loss(), "Liger": liger_loss()}
    if args.device != "cpu":
        peers["torch.compile PPO"] = torch.compile(compiled_ppo)
    for name, loss in peers.items():
        if loss is None or tokens > args.peers_below:
            continue

        def step(loss=loss):
            found = loss(*data)
            found = found[0] if isinstance(found, tuple) else found
            return torch.autograd.grad(found, data[0])

        row = {"row": name, "tokens": tokens}
        if name != "torch.compile PPO":  # the loss of GRPO, so its gradient
            row["gradient_error"] = float(
                (step()[0][data[3] > 0] - reference).abs().max() / reference.abs().max()
            )
            if not row["gradient_error"] < 1e-4:
                yield {**row, "wrong": True}
                continue
        yield row | clock(step, graph=False)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tokens", type=int, nargs="+", default=SIZES)
    parser.add_argument("--length", type=int, default=1024, help="longest trajectory")
    parser.add_argument("--repeat", type=int, default=21)
    parser.add_argument("--peers-below", type=int, default=8_388_608, help="tokens")
    parser.add_argument("--json")
    args = parser.parse_args()
    on_gpu = args.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        parser.error("no GPU is at hand; --device cpu under TRITON_INTERPRET=1 tests the program")
    name = torch.cuda.get_device_name() if on_gpu else "interpreted on a CPU: no times"
    print(f"{name}, trajectories of {args.length // 2} to {args.length} tokens")
    rows, floor = [], {}
    for tokens in args.tokens:
        for row in rows_of(tokens, args):
            rows.append(row)
            if row["row"] == "floor":
                floor = row
            took = row.get("graph_us", row.get("plain_us"))
            said = "WRONG, not timed" if row.get("wrong") else (
                f"{took:12.1f} us  {took / floor.get('graph_us', floor['plain_us']):8.2f} x floor"
            )  # fmt: skip
            print(f"{tokens:12,}  {row['row']:30} {said}", flush=True)
    out = args.json or (Path(__file__).parent / "results" / "gpu_loss.json" if on_gpu else None)
    if out:
        machine = {"device": name, "platform": platform.platform(), "torch": torch.__version__}
        Path(out).write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    return int(any(row.get("wrong") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
