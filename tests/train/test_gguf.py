"""The GGUF reader against files written here by a plain, value-by-value encoder."""

import struct

import numpy as np
import pytest

from fiberpo.errors import DataError
from fiberpo.train.gguf import read_gguf

F32, F16, Q4_0, Q4_1, Q8_0 = 0, 1, 2, 3, 8


def text(value):
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def encode_q8_0(values):
    out = b""
    for start in range(0, len(values), 32):
        block = values[start : start + 32]
        scale = float(np.float16(max(abs(v) for v in block) / 127))
        out += struct.pack("<e", scale)
        for v in block:
            out += struct.pack("<b", max(-127, min(127, round(v / scale))) if scale else 0)
    return out


def encode_q4_1(values):
    out = b""
    for start in range(0, len(values), 32):
        block = values[start : start + 32]
        low = float(np.float16(min(block)))
        scale = float(np.float16((max(block) - min(block)) / 15))
        codes = [max(0, min(15, round((v - low) / scale))) if scale else 0 for v in block]
        out += struct.pack("<ee", scale, low)
        for i in range(16):
            out += struct.pack("<B", codes[i] | codes[i + 16] << 4)
    return out


def encode(array, kind):
    values = [float(v) for v in array.reshape(-1)]
    if kind == F32:
        return struct.pack(f"<{len(values)}f", *values)
    if kind == F16:
        return struct.pack(f"<{len(values)}e", *values)
    return encode_q8_0(values) if kind == Q8_0 else encode_q4_1(values)


METADATA = (
    text("general.architecture") + struct.pack("<I", 8) + text("llama"),
    text("block_count") + struct.pack("<II", 4, 30),
    text("epsilon") + struct.pack("<If", 6, 0.5),
    text("flag") + struct.pack("<I?", 7, True),
    text("offset") + struct.pack("<Iq", 11, -(2**40)),
    text("tokens") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("Ġß"),
    text("types") + struct.pack("<IIQiii", 9, 5, 3, 1, -2, 3),
    text("nested") + struct.pack("<IIQ", 9, 9, 1) + struct.pack("<IQBB", 0, 2, 7, 8),
)


def build(tensors, metadata=METADATA, alignment=32):
    """The bytes of a file with ``tensors``: name -> (array, type number, data or None)."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata)) + b"".join(metadata)
    data = b""
    for name, (array, kind, raw) in tensors.items():
        head += text(name) + struct.pack("<I", array.ndim)
        head += struct.pack(f"<{array.ndim}Q", *array.shape[::-1])
        data += b"\0" * (-len(data) % alignment)
        head += struct.pack("<IQ", kind, len(data))
        data += encode(array, kind) if raw is None else raw
    return head + b"\0" * (-len(head) % alignment) + data


def write(tmp_path, content):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    return path


@pytest.fixture
def tensors():
    rng = np.random.default_rng(0)
    return {
        "plain": (rng.normal(size=(3, 5)).astype(np.float32), F32, None),
        "half": (rng.normal(size=(7,)).astype(np.float16).astype(np.float32), F16, None),
        "eight": (rng.normal(size=(4, 64)).astype(np.float32), Q8_0, None),
        "four": (rng.normal(size=(6, 96)).astype(np.float32), Q4_1, None),
    }


def test_metadata(tmp_path, tensors):
    file = read_gguf(write(tmp_path, build(tensors)))
    assert file.metadata == {
        "general.architecture": "llama",
        "block_count": 30,
        "epsilon": 0.5,
        "flag": True,
        "offset": -(2**40),
        "tokens": ["a", "Ġß"],
        "types": [1, -2, 3],
        "nested": [[7, 8]],
    }
    assert list(file.tensors) == list(tensors)
    with pytest.raises(DataError, match="has no metadata 'missing'"):
        file.get("missing")


def test_round_trip_within_quantisation_error(tmp_path, tensors):
    file = read_gguf(write(tmp_path, build(tensors)))
    for name, (array, kind, _) in tensors.items():
        read = file.tensor(name)
        assert read.dtype == np.float32
        assert read.shape == array.shape == file.tensors[name].shape
        if kind in (F32, F16):
            np.testing.assert_array_equal(read, array)
            continue
        blocks, got = array.reshape(-1, 32), read.reshape(-1, 32)
        spread = {Q8_0: np.abs(blocks).max(1) / 127, Q4_1: np.ptp(blocks, axis=1) / 15}
        step = spread[kind]
        # Half a step, and what rounding the float16 scale and minimum adds.
        slack = np.abs(blocks).max(1) * 2**-9
        assert (np.abs(got - blocks).max(1) <= step / 2 + slack).all()


def test_exact_on_representable_values(tmp_path):
    eight = np.arange(-127, 129, dtype=np.float32).reshape(2, 128).clip(-127, 127) * 0.25
    eight[:, ::32] = -127 * 0.25  # every block reaches the full range, so its scale is 0.25
    four = (np.tile(np.arange(16, dtype=np.float32), 8).reshape(2, 64) * 0.5) - 3
    file = read_gguf(
        write(tmp_path, build({"eight": (eight, Q8_0, None), "four": (four, Q4_1, None)}))
    )
    np.testing.assert_array_equal(file.tensor("eight"), eight)
    np.testing.assert_array_equal(file.tensor("four"), four)


def test_alignment_from_metadata(tmp_path):
    array = np.ones((2, 3), np.float32)
    metadata = (*METADATA, text("general.alignment") + struct.pack("<II", 4, 256))
    content = build({"x": (array, F32, None), "y": (2 * array, F32, None)}, metadata, 256)
    file = read_gguf(write(tmp_path, content))
    np.testing.assert_array_equal(file.tensor("y"), 2 * array)


def test_arrays_are_writable_copies(tmp_path):
    file = read_gguf(write(tmp_path, build({"x": (np.ones(4, np.float32), F32, None)})))
    file.tensor("x")[:] = 5
    np.testing.assert_array_equal(file.tensor("x"), np.ones(4))


def test_other_quantisation_is_named_and_only_refused_on_use(tmp_path):
    array = np.ones((1, 32), np.float32)
    file = read_gguf(
        write(tmp_path, build({"odd.weight": (array, Q4_0, b"\0" * 18), "x": (array, F32, None)}))
    )
    np.testing.assert_array_equal(file.tensor("x"), array)
    with pytest.raises(DataError, match=r"'odd\.weight' has GGUF type number 2.*Q4_1 \(3\)"):
        file.tensor("odd.weight")
    with pytest.raises(DataError, match="has no tensor 'nothing'"):
        file.tensor("nothing")


def test_row_length_that_no_block_fits(tmp_path):
    content = build({"x": (np.ones((32, 3), np.float32), Q8_0, b"\0" * 102)})
    with pytest.raises(DataError, match="'x' of type Q8_0 has rows of 3 values"):
        read_gguf(write(tmp_path, content))


def test_every_truncation_is_an_error(tmp_path, tensors):
    content = build(tensors)
    for size in [*range(0, 400, 7), len(content) // 2, len(content) - 1]:
        with pytest.raises(DataError, match="truncated|not a GGUF file"):
            read_gguf(write(tmp_path, content[:size]))


def test_absurd_counts_are_truncation(tmp_path):
    entry = text("tokens") + struct.pack("<IIQ", 9, 8, 2**60)
    with pytest.raises(DataError, match="metadata 'tokens' needs"):
        read_gguf(write(tmp_path, build({}, (entry,))))


def test_foreign_files(tmp_path):
    with pytest.raises(DataError, match=r"not a GGUF file: it begins with b'PK\\x03\\x04'"):
        read_gguf(write(tmp_path, b"PK\3\4" + b"\0" * 100))
    with pytest.raises(DataError, match="version 1"):
        read_gguf(write(tmp_path, b"GGUF" + struct.pack("<IQQ", 1, 0, 0)))
    with pytest.raises(DataError, match="metadata 'k' has the unknown GGUF value type 77"):
        read_gguf(write(tmp_path, build({}, (text("k") + struct.pack("<II", 77, 0),))))
    with pytest.raises(DataError, match="no GGUF file at"):
        read_gguf(tmp_path / "absent.gguf")
