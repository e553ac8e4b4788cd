"""fiberpo: trust regions for reinforcement learning of large language models.

Multi-scale ratio gating (token, trajectory, prompt group, domain, ...) with one budget per scale, a
closed-form gradient, and PPO, GRPO, DAPO, GSPO and APC-Obj in the same form.

    >>> import torch, fiberpo
    >>> batch = fiberpo.RatioBatch.from_packed(
    ...     torch.tensor([-1.0, -0.8]), torch.tensor([-1.0, -1.0]), torch.tensor([1.0]), [2])
    >>> out = fiberpo.recipes.fiberpo(budget=(0.12, 0.05), epsilon=0.04)(batch)
    >>> out.coefficients.shape
    torch.Size([2])

Names are imported when first used, so ``import fiberpo`` is instant.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "AggregateGate": "gates", "BudgetClip": "gates", "LogClip": "gates", "Pass": "gates",
    "RatioClip": "gates", "Regime": "gates", "Zero": "gates", "aggregate_gate": "gates",
    "Budget": "budgets", "RatioBatch": "batch", "Strata": "strata",
    "Deviation": "charts", "Log": "charts", "SignedLog": "charts",
    "GateMap": "gating", "open_gates": "gating", "Weights": "weights", "Denominators": "weights",
    "MaxDivergence": "masks", "MeanDivergence": "masks", "SequenceMask": "masks",
    "LengthNeutral": "masks", "Renormalised": "masks",
    "Certainty": "divergence", "TokenDivergence": "divergence", "full_divergence": "divergence",
    "top_k_divergence": "divergence",
    "Statistics": "statistics", "Objective": "objective", "Surrogate": "objective",
    "linear_logprob": "ops.linear",
    "Local": "collective", "TorchGroup": "collective", "citation": "citations",
    "FiberPOError": "errors", "ShapeError": "errors", "NonFiniteError": "errors",
    "EmptyBatchError": "errors", "StrataError": "errors", "BudgetError": "errors",
    "ObjectiveError": "errors", "ConfigError": "errors", "DataError": "errors",
    "TheoryError": "errors", "BoundError": "errors", "RecordingError": "errors",
    "FiberPOWarning": "errors",
}  # fmt: skip
_MODULES = {
    "corrections", "recipes", "errors", "integrations", "exact", "recording", "testing", "theory",
}  # fmt: skip

__all__ = ["__version__", "recipes", *_EXPORTS]

if TYPE_CHECKING:
    from . import corrections as corrections
    from . import errors as errors
    from . import recipes as recipes
    from .batch import RatioBatch as RatioBatch
    from .budgets import Budget as Budget
    from .charts import Deviation as Deviation
    from .charts import Log as Log
    from .charts import SignedLog as SignedLog
    from .citations import citation as citation
    from .collective import Local as Local
    from .collective import TorchGroup as TorchGroup
    from .divergence import Certainty as Certainty
    from .divergence import TokenDivergence as TokenDivergence
    from .divergence import full_divergence as full_divergence
    from .divergence import top_k_divergence as top_k_divergence
    from .errors import *  # noqa: F403
    from .gates import AggregateGate as AggregateGate
    from .gates import BudgetClip as BudgetClip
    from .gates import LogClip as LogClip
    from .gates import Pass as Pass
    from .gates import RatioClip as RatioClip
    from .gates import Regime as Regime
    from .gates import Zero as Zero
    from .gates import aggregate_gate as aggregate_gate
    from .gating import GateMap as GateMap
    from .gating import open_gates as open_gates
    from .masks import LengthNeutral as LengthNeutral
    from .masks import MaxDivergence as MaxDivergence
    from .masks import MeanDivergence as MeanDivergence
    from .masks import Renormalised as Renormalised
    from .masks import SequenceMask as SequenceMask
    from .objective import Objective as Objective
    from .objective import Surrogate as Surrogate
    from .ops.linear import linear_logprob as linear_logprob
    from .statistics import Statistics as Statistics
    from .strata import Strata as Strata
    from .weights import Denominators as Denominators
    from .weights import Weights as Weights


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name in _EXPORTS:
        return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS, *_MODULES])
