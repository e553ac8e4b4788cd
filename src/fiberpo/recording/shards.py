"""One shard: the arrays of one rank's optimizer step, an uncompressed ``.npz`` without pickle.

Every member of the archive carries a CRC, and its table of contents stands at the end: a file that
is cut short or has a flipped bit is recognised.
"""

from __future__ import annotations

import io
import json
import os
import re
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..batch import RatioBatch
from ..divergence import Certainty, TokenDivergence
from ..errors import RecordingError
from ..labels import Label

FOLDER = "shards"
HEADER = "header"
_NAME = re.compile(r"step-(\d{8,})\.rank-(\d{4,})\.npz")
_LOG_PROBS = ("log_probs", "old_log_probs", "rollout_log_probs")
_PER_TOKEN = (*_LOG_PROBS, "token_divergence", "token_ids", "entropies")
_PER_ROW = ("lengths", "rewards", "prompts")


@dataclass(frozen=True, eq=False)
class Columns:
    """What is recorded of one step (of one rank, or of all).

    Attributes:
        batch: the tokens.
        token_ids, entropies: ``[N]``, or None.
        rewards: ``[rows]``, or None.
        prompts: text of every row's prompt, or None.
    """

    batch: RatioBatch
    token_ids: Tensor | None = None
    entropies: Tensor | None = None
    rewards: Tensor | None = None
    prompts: list[str] | None = None


def shard_name(step: int, rank: int) -> str:
    """File name of a shard."""
    return f"step-{step:08d}.rank-{rank:04d}.npz"


def parse_name(name: str) -> tuple[int, int] | None:
    """Step and rank of a shard's file name; None for other files."""
    found = _NAME.fullmatch(name)
    return None if found is None else (int(found[1]), int(found[2]))


def pack(columns: Columns, step: int, rank: int) -> dict[str, np.ndarray]:
    """The arrays of a shard."""
    batch = columns.batch
    divergence = batch.token_divergence
    arrays: dict[str, np.ndarray] = {"lengths": _numpy(batch.lengths, np.int32)}
    same: dict[str, str] = {}
    for name in _LOG_PROBS:
        tensor = getattr(batch, name)
        if tensor is None:
            continue
        found = _numpy(tensor)
        twin = next((k for k in _LOG_PROBS if k in arrays and _equal(arrays[k], found)), None)
        if twin is None:
            arrays[name] = found
        else:
            same[name] = twin
    given = _numpy(batch.given_advantages)
    arrays["advantages"] = given if batch.by_row else _by_row(given, arrays["lengths"])
    if divergence is not None:
        arrays["token_divergence"] = _numpy(divergence.values, np.float32)
    labels: dict[str, Any] = {}
    for name, label in batch.labels.items():
        arrays[f"label.{name}"] = _numpy(label.codes, np.int32)
        texts = isinstance(label.values, tuple)
        labels[name] = {"per": "token" if label.per_token else "row"}
        if texts:
            labels[name]["values"] = list(label.values)
        else:
            arrays[f"values.{name}"] = _numpy(label.values, np.int64)  # type: ignore[arg-type]
    if columns.token_ids is not None:
        arrays["token_ids"] = _numpy(columns.token_ids, np.int32)
    if columns.entropies is not None:
        arrays["entropies"] = _numpy(columns.entropies, np.float32)
    if columns.rewards is not None:
        arrays["rewards"] = _numpy(columns.rewards, np.float64)
    header: dict[str, Any] = {
        "step": step, "rank": rank, "tokens": len(batch), "rows": batch.rows,
        "dropped": batch.dropped, "labels": labels, "same": same,
    }  # fmt: skip
    if divergence is not None:
        header["certainty"] = divergence.certainty.value
    if columns.prompts is not None:
        texts_of = {text: i for i, text in enumerate(dict.fromkeys(columns.prompts))}
        header["prompts"] = list(texts_of)
        arrays["prompts"] = np.array([texts_of[p] for p in columns.prompts], dtype=np.int32)
    arrays[HEADER] = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
    return arrays


def describe_columns(arrays: Mapping[str, np.ndarray], units: Mapping[str, str]) -> dict[str, Any]:
    """Dtype, unit and granularity of every column of a shard, for the manifest."""
    header = json.loads(bytes(arrays[HEADER]))
    found = {}
    for name, like in [*((n, n) for n in arrays), *header["same"].items()]:
        if name == HEADER or name.startswith("values."):
            continue
        if name.startswith("label."):
            per = header["labels"][name.removeprefix("label.")]["per"]
            found[name] = {"dtype": "int32", "unit": "ids of the caller", "per": per}
            continue
        per = "row" if name in _PER_ROW else "token"
        if name == "advantages":
            per = "token, or row where constant"
        dtype = "text" if name == "prompts" else str(arrays[like].dtype)
        found[name] = {"dtype": dtype, "unit": units[name], "per": per}
    return found


def write_shard(path: Path, arrays: Mapping[str, np.ndarray]) -> int:
    """Write a shard that is there whole or not at all; returns its size in bytes."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with beside.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    beside.replace(path)
    return size


def read_header(path: Path) -> dict[str, Any]:
    """The header of a shard.

    Raises:
        RecordingError: if the shard is torn.
    """
    with _refusing(path), zipfile.ZipFile(path) as archive:
        return dict(json.loads(bytes(_member(archive, HEADER))))


def read_shard(path: Path) -> Columns:
    """Read a shard; every byte of it is checked against its CRC.

    Raises:
        RecordingError: if the shard is torn.
    """
    with _refusing(path):
        with zipfile.ZipFile(path) as archive:
            names = [n.removesuffix(".npy") for n in archive.namelist()]
            arrays = {name: _member(archive, name) for name in names}
        return _unpack(arrays)


class _refusing:
    """Turns whatever a damaged file can raise into a `RecordingError`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        # a damaged header can ask for any size, type, compression or expression
        torn = (
            zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, KeyError, TypeError,
            IndexError, AttributeError, SyntaxError, NotImplementedError, RuntimeError,
            OverflowError, MemoryError,
        )  # fmt: skip
        if isinstance(error, torn):
            said = f"{type(error).__name__}: {error}"
            raise RecordingError(f"{self.path.name} is torn ({said})") from error


def _member(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    data = archive.read(f"{name}.npy")  # whole, so that its CRC is checked
    return np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)


def _unpack(arrays: dict[str, np.ndarray]) -> Columns:
    header = json.loads(bytes(arrays[HEADER]))
    for name, twin in header["same"].items():
        arrays[name] = arrays[twin]
    rows, tokens = int(header["rows"]), int(header["tokens"])
    lengths = arrays["lengths"]
    _require(int(lengths.sum(dtype=np.int64)) == tokens, "lengths do not add up to the tokens")
    _require(bool((lengths > 0).all()), "a row has no token")
    for name, array in arrays.items():
        wanted = {rows, tokens} if name == "advantages" else None
        wanted = {tokens} if name in _PER_TOKEN else {rows} if name in _PER_ROW else wanted
        _require(wanted is None or array.shape in {(n,) for n in wanted}, f"{name} is cut short")
    divergence = None
    if "token_divergence" in arrays:
        found = torch.from_numpy(arrays["token_divergence"])
        divergence = TokenDivergence(found, Certainty(header["certainty"]))
    labels = {}
    for name, about in header["labels"].items():
        per_token = about["per"] == "token"
        codes = torch.from_numpy(arrays[f"label.{name}"].astype(np.int64))
        strings = about.get("values")
        values: Tensor | tuple[str, ...] = (
            torch.from_numpy(arrays[f"values.{name}"]) if strings is None else tuple(strings)
        )
        _require(len(codes) == (tokens if per_token else rows), f"label {name} is cut short")
        inside = not len(codes) or (int(codes.min()) >= -1 and int(codes.max()) < len(values))
        _require(inside, f"label {name} has a code without a value")
        labels[name] = Label(name, codes, values, per_token)
    prompts = None
    if "prompts" in header:
        prompts = [header["prompts"][i] for i in arrays["prompts"].tolist()]

    def optional(name: str) -> Tensor | None:
        return torch.from_numpy(arrays[name]) if name in arrays else None

    batch = RatioBatch(
        log_probs=torch.from_numpy(arrays["log_probs"]),
        old_log_probs=torch.from_numpy(arrays["old_log_probs"]),
        given_advantages=torch.from_numpy(arrays["advantages"]),
        lengths=torch.from_numpy(lengths.astype(np.int64)),
        labels=labels,
        rollout_log_probs=optional("rollout_log_probs"),
        token_divergence=divergence,
        dropped=int(header["dropped"]),
    )
    return Columns(
        batch, optional("token_ids"), optional("entropies"), optional("rewards"), prompts
    )


def join(parts: list[Columns]) -> Columns:
    """The columns of several ranks, one after the other; a column counts where all have it.

    Raises:
        StrataError: if their labels do not go together.
    """
    if len(parts) == 1:
        return parts[0]
    return Columns(
        RatioBatch.concatenate([part.batch for part in parts]),
        _cat([part.token_ids for part in parts]),
        _cat([part.entropies for part in parts]),
        _cat([part.rewards for part in parts]),
        _chain([part.prompts for part in parts]),
    )


def _cat(tensors: list[Tensor | None]) -> Tensor | None:
    found = [t for t in tensors if t is not None]
    return torch.cat(found) if len(found) == len(tensors) else None


def _chain(lists: list[list[str] | None]) -> list[str] | None:
    found = [x for x in lists if x is not None]
    return [text for part in found for text in part] if len(found) == len(lists) else None


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _numpy(tensor: Tensor, dtype: Any = None) -> np.ndarray:
    found = tensor.detach().cpu().numpy()
    return found if dtype is None or found.dtype == dtype else found.astype(dtype)


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    return a is b or (a.dtype == b.dtype and np.array_equal(a, b))


def _by_row(values: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """One value a row where constant on every row (the caller's choice where both are one)."""
    first = values[np.cumsum(lengths) - lengths]
    return first if np.array_equal(np.repeat(first, lengths), values) else values
