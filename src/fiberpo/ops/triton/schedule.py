"""Which program takes which tokens: decided from host numbers alone, tables made on the device.

A launch has one width for all of its programs. Where lengths are skewed (thousands of short
segments and a few long ones) the segments are sorted by length and cut into runs, each with a width
of its own: the ``m``-th longest of ``N`` tokens' segments has at most ``N / m`` tokens, so that
widths are known without asking the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

RESIDENT = 8192
"""Longest segment that one program holds in registers; half of it where tokens are heavy."""

CHUNK = 2048
"""Tokens of a chunk of a longer one."""

_WIDTHS = (32, 512)


@dataclass(frozen=True, eq=False)
class Run:
    """Pieces that one launch serves.

    Attributes:
        pieces: how many (upper bound; the last may be empty).
        columns: tokens of the longest, a power of 2.
        vector: whether tokens are read by aligned fours.
        segment, low, high: of each piece; None where pieces are the segments in their order.
        heavy: whether a token takes so many registers that a thread holds 8, not 16.
        first, segments: where pieces are chunks: the chunks of ``segments[j]`` are ``first[j]`` to
            ``first[j + 1]``.
    """

    pieces: int
    columns: int
    vector: bool
    heavy: bool = False
    segment: Tensor | None = None
    low: Tensor | None = None
    high: Tensor | None = None
    first: Tensor | None = None
    segments: Tensor | None = None

    @property
    def rows(self) -> int:
        """Pieces of one program."""
        return max(512 // self.columns, 1)

    @property
    def programs(self) -> int:
        """Programs of the launch."""
        return -(-self.pieces // self.rows)

    @property
    def warps(self) -> int:
        """Warps of a program: 16 tokens a thread, fewer where they need more registers."""
        lanes = self.columns * self.rows
        return lanes // 128 if self.columns < 64 else max(lanes // (256 if self.heavy else 512), 1)


def _width(longest: int) -> tuple[int, bool]:
    """Power of 2, and whether it has room for the three tokens that an aligned start costs."""
    columns = max(1 << (longest - 1).bit_length(), 1)
    return columns, columns >= 256 and longest + 3 <= columns


def cut(starts: Tensor, tokens: int, longest: int, heavy: bool = False) -> tuple[Run, ...]:
    """The runs of segments ``starts[s]`` to ``starts[s + 1]``; those of chunks come first."""
    segments, resident = starts.shape[0] - 1, RESIDENT // 2 if heavy else RESIDENT
    counts = []  # of segments longer than each width, at most
    for width in (*_WIDTHS, resident):
        if width >= longest:
            break
        counts.append(min(segments, tokens // (width + 1)))
    # a run of its own only where it takes at least half of what is left
    ends, left = [], segments
    for count in counts:
        if left > 2 * count:
            ends.append(count)
            left = count
    if not ends and longest <= resident:
        return (Run(segments, *_width(longest), heavy),)
    lengths = starts.diff()
    order = torch.argsort(lengths, stable=True, descending=True)
    edges, runs = [0, *reversed(ends), segments], []
    for begin, end in pairwise(edges):
        here = order[begin:end]
        limit = min(longest, tokens // (begin + 1))
        if limit > resident:
            runs.append(_chunks(starts, here, tokens, heavy))
        else:
            low, high = starts[here], starts[here + 1]
            runs.append(Run(end - begin, *_width(limit), heavy, here, low, high))
    return tuple(runs)


def _chunks(starts: Tensor, segments: Tensor, tokens: int, heavy: bool) -> Run:
    """Chunks that begin at multiples of 4 tokens (but for the first of each segment)."""
    low, high = starts[segments], starts[segments + 1]
    base = low // 4 * 4
    each = torch.where(high > low, (high - base + CHUNK - 1) // CHUNK, 0)
    first = torch.cat([each.new_zeros(1), each.cumsum(0)])
    pieces = tokens // CHUNK + 2 * len(segments)
    piece = torch.arange(pieces, device=starts.device)
    of = torch.searchsorted(first[1:], piece, right=True).clamp(max=len(segments) - 1)
    begin = base[of] + (piece - first[of]) * CHUNK
    end = torch.minimum(begin + CHUNK, high[of])
    begin = torch.maximum(begin, low[of])
    end = torch.where(piece < first[-1], end, begin)
    return Run(pieces, CHUNK, True, heavy, segments[of], begin, end, first, segments)


__all__ = ["CHUNK", "RESIDENT", "Run", "cut"]
