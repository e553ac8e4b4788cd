"""Which backend evaluates a plan; the choice answers with reasons.

=============  ====================================================================================
``"cpu"``      C++, one sweep over packed tokens; needs a C++ compiler at first use
``"triton"``   Triton kernels on a GPU
``"torch"``    torch operations, on any device
=============  ====================================================================================

``"auto"`` takes the fused one of the device, or, where that cannot serve, ``"torch"``, and says so
once; a backend asked for by name serves or raises. The environment variable ``FIBERPO_BACKEND``
names one for all calls that do not (``"reference"`` among them: the gate classes themselves).
"""

from __future__ import annotations

import importlib
import logging
import os
from functools import cache

from torch import Tensor

from ..errors import ObjectiveError
from .plan import Backend, GatePlan

logger = logging.getLogger("fiberpo")

REFERENCE = "reference"

_MODULES = {"cpu": "cpu", "triton": "triton", "torch": "eager"}


def resolve(name: str) -> str:
    """A known name; that of the environment in place of ``"auto"``.

    Raises:
        ObjectiveError: for any other.
    """
    chosen = os.environ.get("FIBERPO_BACKEND", name) if name == "auto" else name
    if chosen not in ("auto", REFERENCE, *_MODULES):
        raise ObjectiveError(
            f"backend is {chosen!r}; it is one of auto, {', '.join(_MODULES)}, {REFERENCE}"
        )
    return chosen


@cache
def _load(name: str) -> Backend | str:
    """The module of a backend, or why it cannot be imported."""
    try:
        return importlib.import_module(f".{_MODULES[name]}", __package__)
    except ImportError as error:
        return f"it cannot be imported: {error}"


def unsupported(name: str, plan: GatePlan, log_probs: Tensor) -> list[str]:
    """Reasons why a backend cannot serve a call; empty if it can."""
    backend = _load(name)
    return [backend] if isinstance(backend, str) else backend.unsupported(plan, log_probs)


def choose(name: str, plan: GatePlan, log_probs: Tensor) -> Backend:
    """The backend for a call.

    Raises:
        ObjectiveError: if the backend asked for cannot serve.
    """
    if name == "auto":
        fused = "triton" if log_probs.device.type == "cuda" else "cpu"
        reasons = unsupported(fused, plan, log_probs)
        if reasons:
            _say_once(fused, tuple(reasons))
        name = "torch" if reasons else fused
    elif reasons := unsupported(name, plan, log_probs):
        raise ObjectiveError(
            f"backend={name!r} cannot serve this call: {'; '.join(reasons)}. Use backend='auto', "
            "which falls back to torch operations."
        )
    backend = _load(name)
    assert not isinstance(backend, str)
    return backend


@cache
def _say_once(name: str, reasons: tuple[str, ...]) -> None:
    logger.warning(
        "the fused backend %r cannot serve (%s); torch operations do, some hundred times slower",
        name, "; ".join(reasons),
    )  # fmt: skip
