"""DeepSpeed ZeRO-2 on two gloo processes equals one plain process; `make test-deepspeed` runs it.

Not part of the test suite: DeepSpeed has an environment of its own, and accelerate turns it off
where there is no GPU. `train` therefore says in its place that two CPU processes are a distributed
run.
"""

import json
import os
import sys
import tempfile
import warnings
from pathlib import Path

from accelerate.state import DistributedType, PartialState

from integrations import two_ranks
from integrations.tiny import tiny_model

CASES = ("domain straddling", "group whole", "trajectory interleaved", "tokens straddling")
LOG_PROB = 1e-6  # nats: four units in the last place of a float32 log-prob
ZERO = {
    "zero_optimization": {"stage": 2}, "zero_allow_untested_optimizer": True,
    "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto", "gradient_clipping": "auto",
}  # fmt: skip


def train(folder):
    warnings.simplefilter("ignore")
    settings, several = {}, two_ranks.RANKS > 1
    if several:
        os.environ.pop("ACCELERATE_USE_CPU", None)
        PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_CPU)
        settings = {"deepspeed": ZERO, "use_cpu": False}
    found = {}
    for case in CASES:
        run, routes = two_ranks.make(folder, *case.split(), model=tiny_model(), **settings)
        run.train()
        assert run.is_deepspeed_enabled == several
        if several:
            assert run.model_wrapped.zero_optimization_stage() == 2
        found[case] = {"steps": two_ranks.updates(run), "routes": routes.found}
    two_ranks.finish(folder, found)


def compare(folder):
    from integrations.test_trl_ranks import TORCHRUN, assert_equal, start

    program = Path(__file__)
    start(folder, program=program)
    start(folder, *TORCHRUN, program=program)
    one, two = (json.loads((folder / f"ranks{n}.json").read_text()) for n in (1, 2))
    for case in CASES:
        assert_equal(one[case], two[case], LOG_PROB)
        norms = [[step["grad_norm"] for step in run[case]["steps"]] for run in (one, two)]
        print(f"{case:22}", *(f"{a:.6f} {b:.6f} " for a, b in zip(*norms, strict=True)))
    print("ZeRO-2 on two processes equals one process, update by update, to 6 digits")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        train(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as name:
            compare(Path(name))
