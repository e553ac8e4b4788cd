"""Read GGUF version 3 files: metadata and tensors of the types F32, F16, Q4_1 and Q8_0.

A GGUF file is a header (magic, version, counts), key-value metadata, one description per tensor
and, from the next multiple of ``general.alignment`` bytes on, the tensor data. All numbers are
little-endian. Tensor dimensions are stored fastest-varying first, so they are reversed here and
the arrays come out in numpy's row-major order (``(out_features, in_features)`` for a weight).

Quantised types store blocks of 32 values of one row:

* Q8_0: a float16 scale ``d`` and 32 int8 ``q``; ``x = d * q``.
* Q4_1: float16 ``d`` and ``m`` and 16 bytes; the low four bits are values 0..15 of the block, the
  high four bits values 16..31; ``x = d * q + m``.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fiberpo.errors import DataError

__all__ = ["GGUFFile", "TensorInfo", "read_gguf"]

_VERSION = 3
# Metadata value types: number -> numpy code. 8 (string) and 9 (array) are handled apart.
_SCALARS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?",
            10: "<u8", 11: "<i8", 12: "<f8"}  # fmt: skip
_STRING, _ARRAY = 8, 9
# Tensor types: number -> (name, values in a block, numpy type of a block).
_TENSOR_TYPES: dict[int, tuple[str, int, np.dtype[Any]]] = {
    0: ("F32", 1, np.dtype("<f4")),
    1: ("F16", 1, np.dtype("<f2")),
    3: ("Q4_1", 32, np.dtype([("d", "<f2"), ("m", "<f2"), ("q", "u1", (16,))])),
    8: ("Q8_0", 32, np.dtype([("d", "<f2"), ("q", "i1", (32,))])),
}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor's description: name, numpy-order shape, GGUF type number, byte offset in file."""

    name: str
    shape: tuple[int, ...]
    type_number: int
    offset: int


class _Cursor:
    """Reads values one after the other and refuses to read past the end of the file."""

    def __init__(self, buffer: mmap.mmap, path: Path) -> None:
        self.buffer, self.path, self.position = buffer, path, 0

    def take(self, count: int, what: str) -> int:
        start = self.position
        if start + count > len(self.buffer):
            raise DataError(
                f"{self.path} is truncated or damaged: {what} needs {count} bytes at offset "
                f"{start}, the file has {len(self.buffer)} bytes; download it again"
            )
        self.position = start + count
        return start

    def unpack(self, code: str, what: str) -> Any:
        start = self.take(struct.calcsize(code), what)
        return struct.unpack_from("<" + code, self.buffer, start)[0]

    def string(self, what: str) -> str:
        count = self.unpack("Q", what)
        start = self.take(count, what)
        try:
            return self.buffer[start : start + count].decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{self.path}: {what} is not UTF-8 text: {error}") from error

    def value(self, kind: int, what: str) -> Any:
        if kind == _STRING:
            return self.string(what)
        if kind == _ARRAY:
            item, count = self.unpack("I", what), self.unpack("Q", what)
            if item in _SCALARS:
                return self.numbers(item, count, what).tolist()
            # A string or an array takes at least 8 bytes: stops an absurd count at once.
            if count * 8 > len(self.buffer) - self.position:
                self.take(count * 8, what)
            return [self.value(item, what) for _ in range(count)]
        if kind not in _SCALARS:
            raise DataError(f"{self.path}: {what} has the unknown GGUF value type {kind}")
        return self.numbers(kind, 1, what)[0].item()

    def numbers(self, kind: int, count: int, what: str) -> npt.NDArray[Any]:
        dtype = np.dtype(_SCALARS[kind])
        start = self.take(count * dtype.itemsize, what)
        return np.frombuffer(self.buffer, dtype, count, start)


class GGUFFile:
    """An open GGUF file.

    Attributes:
        path: the file.
        metadata: key -> value (int, float, bool, str, or a list of those).
        tensors: tensor name -> :class:`TensorInfo`, in file order.
    """

    def __init__(
        self,
        path: Path,
        buffer: mmap.mmap,
        metadata: dict[str, Any],
        tensors: dict[str, TensorInfo],
    ) -> None:
        self.path, self._buffer = path, buffer
        self.metadata, self.tensors = metadata, tensors

    def get(self, key: str) -> Any:
        """The metadata value of ``key``; DataError if the file does not have it."""
        if key not in self.metadata:
            raise DataError(f"{self.path} has no metadata {key!r}; is it the right model file?")
        return self.metadata[key]

    def tensor(self, name: str) -> npt.NDArray[np.float32]:
        """The tensor ``name`` as a new float32 array in numpy order, dequantised if need be.

        Errors:
            DataError for an unknown name, an unsupported quantisation (its type number and the
            tensor name are quoted) and data that lie past the end of the file.
        """
        if name not in self.tensors:
            raise DataError(f"{self.path} has no tensor {name!r}")
        info = self.tensors[name]
        start, count, dtype = _extent(self.path, info)
        if start + count * dtype.itemsize > len(self._buffer):
            raise DataError(f"{self.path} is truncated: tensor {name!r} lies past its end")
        blocks = np.frombuffer(self._buffer, dtype, count, start)
        if info.type_number == 3:
            nibbles = np.concatenate([blocks["q"] & 15, blocks["q"] >> 4], axis=1)
            values = nibbles.astype(np.float32)
            values *= blocks["d"].astype(np.float32)[:, None]
            values += blocks["m"].astype(np.float32)[:, None]
        elif info.type_number == 8:
            values = blocks["q"].astype(np.float32)
            values *= blocks["d"].astype(np.float32)[:, None]
        else:
            values = blocks.astype(np.float32)
        return values.reshape(info.shape)


def _extent(path: Path, info: TensorInfo) -> tuple[int, int, np.dtype[Any]]:
    """First byte, number of blocks and block type of a tensor; DataError for other types."""
    if info.type_number not in _TENSOR_TYPES:
        known = ", ".join(f"{name} ({number})" for number, (name, _, _) in _TENSOR_TYPES.items())
        raise DataError(
            f"{path}: tensor {info.name!r} has GGUF type number {info.type_number}, which this "
            f"reader does not know; it reads {known}: use a file in one of these"
        )
    name, width, dtype = _TENSOR_TYPES[info.type_number]
    if info.shape and info.shape[-1] % width:
        raise DataError(
            f"{path}: tensor {info.name!r} of type {name} has rows of {info.shape[-1]} values, "
            f"not a multiple of {width}"
        )
    return info.offset, math.prod(info.shape) // width, dtype


def read_gguf(path: str | Path) -> GGUFFile:
    """Open a GGUF version 3 file and read its metadata and tensor descriptions.

    Tensor data are memory-mapped and only converted by :meth:`GGUFFile.tensor`, so a tensor of an
    unsupported type is an error only when it is asked for.

    Errors:
        DataError if the file is missing, is not GGUF, has another version, or is shorter than
        its header says.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"no GGUF file at {path}")
    with path.open("rb") as file:
        magic = file.read(4)
        if magic != b"GGUF":
            raise DataError(f"{path} is not a GGUF file: it begins with {magic!r}, not b'GGUF'")
        buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    cursor = _Cursor(buffer, path)
    cursor.take(4, "the magic")
    version = cursor.unpack("I", "the version")
    if version != _VERSION:
        raise DataError(f"{path} is GGUF version {version}; this reader knows version {_VERSION}")
    tensor_count = cursor.unpack("Q", "the tensor count")
    entry_count = cursor.unpack("Q", "the metadata count")
    metadata: dict[str, Any] = {}
    for number in range(entry_count):
        key = cursor.string(f"the key of metadata entry {number}")
        what = f"metadata {key!r}"
        metadata[key] = cursor.value(cursor.unpack("I", what), what)
    described: list[tuple[str, tuple[int, ...], int, int]] = []
    for number in range(tensor_count):
        name = cursor.string(f"the name of tensor {number}")
        what = f"the description of tensor {name!r}"
        rank = cursor.unpack("I", what)
        shape = tuple(cursor.unpack("Q", what) for _ in range(rank))[::-1]
        described.append((name, shape, cursor.unpack("I", what), cursor.unpack("Q", what)))
    alignment = int(metadata.get("general.alignment", 32))
    if alignment < 1:
        raise DataError(f"{path}: general.alignment is {alignment}; it must be positive")
    base = -(-cursor.position // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    for name, shape, kind, offset in described:
        info = tensors[name] = TensorInfo(name, shape, kind, base + offset)
        if kind in _TENSOR_TYPES:
            start, count, dtype = _extent(path, info)
            cursor.position = start
            cursor.take(count * dtype.itemsize, f"the data of tensor {name!r}")
    return GGUFFile(path, buffer, metadata, tensors)
