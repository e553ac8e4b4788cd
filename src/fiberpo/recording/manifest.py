"""``manifest.json``: what a recording holds, in which units, and which objective was optimised."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import budgets, corrections, masks, recipes, stops, token_masks, weights
from ..errors import FiberPOError, RecordingError
from ..objective import Objective

SCHEMA = 1
"""Version of the format that this program writes; it reads all up to this one."""

MANIFEST_FILE = "manifest.json"
FORMAT = "fiberpo recording"

UNITS: Mapping[str, str] = {
    "log_probs": "nats",
    "old_log_probs": "nats",
    "rollout_log_probs": "nats",
    "advantages": "reward, normalised by the host",
    "token_divergence": "nats",
    "lengths": "tokens",
    "token_ids": "ids of the tokenizer",
    "entropies": "nats",
    "rewards": "reward",
    "prompts": "text",
}
"""Unit of every column; labels hold the caller's ids."""

_PARTS = {
    kind.__name__: kind
    for module in (masks, corrections, stops, token_masks, weights, budgets)
    for kind in vars(module).values()
    if isinstance(kind, type) and dataclasses.is_dataclass(kind)
}


@dataclass(frozen=True)
class Manifest:
    """What a recording says of itself.

    Attributes:
        schema: version of the format.
        host: what wrote it (``"fiberpo train"``, ``"trl 1.16.0"``, ...).
        objective: name of the recipe that was optimised; None where it is not known.
        parameters: its parameters, as JSON.
        factors: corrections beyond the recipe's own, as JSON.
        settings: the host's settings that matter, as the host names them.
        columns: name -> ``{"dtype", "unit", "per"}``; labels are called ``label.<stratum>``.
        ranks: processes that record.
        tokenizer: file with the tokenizer, relative to the manifest, or None.
        created: ISO date of the first step.
        fiberpo: version of the program.
        complete: whether the run closed its recording (not in the file: see ``complete.*.json``).
    """

    schema: int = SCHEMA
    host: str = ""
    objective: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    factors: Sequence[Any] = field(default_factory=list)
    settings: Mapping[str, Any] = field(default_factory=dict)
    columns: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    ranks: int = 1
    tokenizer: str | None = None
    created: str = ""
    fiberpo: str = ""
    complete: bool = False

    def same_run(self, other: Manifest) -> str | None:
        """What differs between two runs: a field's name, or None where nothing does."""
        for name in ("host", "objective", "parameters", "factors", "ranks"):
            if getattr(self, name) != getattr(other, name):
                return name
        return None

    def build_objective(self) -> Objective | None:
        """The objective, where its recipe is known and all its parameters were plain values.

        Raises:
            RecordingError: if the recipe refuses what the manifest holds.
        """
        plain = not _opaque(self.parameters) and not _opaque(self.factors)
        if self.objective not in recipes.RECIPES or not plain:
            return None
        try:
            made = recipes.from_name(str(self.objective), **_decode(self.parameters))
            factors = _decode(self.factors)
            return corrections.corrected(made, factors=factors) if factors else made
        except (FiberPOError, TypeError) as error:
            raise RecordingError(
                f"the manifest's objective {self.objective!r} with {dict(self.parameters)} cannot "
                f"be built: {error}"
            ) from error

    def write(self, folder: Path) -> None:
        """Write ``manifest.json``, whole or not at all."""
        values = {"format": FORMAT, **dataclasses.asdict(self)}
        del values["complete"]
        write_whole(folder / MANIFEST_FILE, json.dumps(values, indent=1).encode())

    @staticmethod
    def read(folder: Path) -> Manifest:
        """Read ``manifest.json``.

        Raises:
            RecordingError: if it is missing, damaged, foreign, or of a newer format.
        """
        path = folder / MANIFEST_FILE
        try:
            values = json.loads(path.read_bytes().decode())
        except FileNotFoundError as error:
            raise RecordingError(f"{folder} holds no {MANIFEST_FILE}: no recording") from error
        except (ValueError, RecursionError) as error:
            raise RecordingError(
                f"{path} is damaged ({error}); restore it from a copy, or write one by hand: the "
                "shards beside it are readable without it but for objective and host"
            ) from error
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise RecordingError(
                f'{path} is not the manifest of a recording: it lacks "format": "{FORMAT}"'
            )
        schema = values.get("schema")
        if not isinstance(schema, int) or schema < 1:
            raise RecordingError(f"{path} has the schema {schema!r}; it is a number from 1")
        if schema > SCHEMA:
            raise RecordingError(
                f"{path} has schema {schema}, and this program reads up to {SCHEMA}: it was "
                f"written by fiberpo {values.get('fiberpo', '?')}; update fiberpo to read it"
            )
        known = {f.name for f in dataclasses.fields(Manifest)}
        manifest = Manifest(**{k: v for k, v in values.items() if k in known})
        for name in ("parameters", "settings", "columns"):
            if not isinstance(getattr(manifest, name), dict):
                raise RecordingError(f"{path}: {name!r} must be an object")
        return manifest


def describe(objective: Objective | None) -> dict[str, Any]:
    """The fields of a manifest that speak of the objective."""
    if objective is None:
        return {}
    given = {k: v for k, v in objective.parameters.items() if v is not None}
    factors: Sequence[Any] = ()
    if objective.name in recipes.RECIPES:
        known = inspect.signature(recipes.RECIPES[objective.name]).parameters
        given = {k: v for k, v in given.items() if k in known}
        own = len(recipes.from_name(objective.name, **given).factors)
        factors = objective.factors[own:]
    return {"objective": objective.name, "parameters": encode(given), "factors": encode(factors)}


def encode(value: Any) -> Any:
    """As JSON; what has no plain form becomes ``{"$repr": ...}``."""
    if isinstance(value, (np.generic, torch.Tensor)) and np.ndim(value) == 0:
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": str(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(k): encode(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(v) for v in value]
    if type(value).__name__ in _PARTS:
        fields = {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"$type": type(value).__name__, **fields}
    return {"$repr": repr(value)}


def _opaque(value: Any) -> bool:
    if isinstance(value, Mapping):
        return "$repr" in value or any(_opaque(v) for v in value.values())
    return isinstance(value, (list, tuple)) and any(_opaque(v) for v in value)


def _decode(value: Any) -> Any:
    if isinstance(value, Mapping):
        if "$float" in value:
            return float(value["$float"])
        inside = {k: _decode(v) for k, v in value.items() if k != "$type"}
        if "$type" not in value:
            return inside
        kind = _PARTS.get(value["$type"])
        if kind is None:
            raise RecordingError(f"the manifest names an unknown part {value['$type']!r}")
        return kind(**inside)
    return tuple(map(_decode, value)) if isinstance(value, (list, tuple)) else value


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that is there whole or not at all, whenever the program is killed."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with beside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
