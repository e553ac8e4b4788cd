"""Shapes said in annotations are executed under the tests."""

import os
import warnings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import importlib.metadata
import sys
import types

import hypothesis
import torch
from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

_typecheck = types.ModuleType("_typecheck")
_typecheck.check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float
sys.modules["_typecheck"] = _typecheck

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    hook = install_import_hook(
        [
            "fiberpo.acceptance", "fiberpo.batch", "fiberpo.budgets", "fiberpo.charts",
            "fiberpo.corrections", "fiberpo.divergence", "fiberpo.gates",
            "fiberpo.exact", "fiberpo.gating", "fiberpo.inputs", "fiberpo.labels",
            "fiberpo.cutting", "fiberpo.layout", "fiberpo.lowering", "fiberpo.masks",
            "fiberpo.measurement", "fiberpo.objective", "fiberpo.ops.dispatch", "fiberpo.ops.eager",
            "fiberpo.ops.linear", "fiberpo.ops.linear_head", "fiberpo.ops.linear_reference",
            "fiberpo.ops.plan", "fiberpo.ops.reference", "fiberpo.ops.segments",
            "fiberpo.peer_gates",
            "fiberpo.peers", "fiberpo.recipes", "fiberpo.token_masks",
            "fiberpo.statistics", "fiberpo.stopping", "fiberpo.stops", "fiberpo.strata",
            "fiberpo.length_neutral", "fiberpo.weights",
        ],
        "_typecheck.check",
    )  # fmt: skip
hook.__enter__()

torch.set_num_threads(1)
hypothesis.settings.register_profile("ci", deadline=None, max_examples=40, derandomize=True)
hypothesis.settings.load_profile("ci")

collect_ignore = []
try:
    importlib.metadata.version("verl")
except importlib.metadata.PackageNotFoundError:
    collect_ignore.append("verl")  # in an environment of their own: make test-verl
