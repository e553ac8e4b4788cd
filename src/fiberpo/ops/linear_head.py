"""The arithmetic of one chunk of `fiberpo.linear_logprob`, and its three ways to a gradient.

With p the softmax of a row of logits z = (W h + b) / T and E = p - onehot(y), "the error":

    d log p_y / dh = -E W / T        d log p_y / dW = -E h^T / T        d log p_y / db = -E / T

so every mode is: logits (one product), softmax and error in place, and then ``E W`` (one product)
and ``E^T h`` (one product). The coefficient of a token scales a row of the narrow factors
(``[chunk, H]``), never the ``[chunk, V]`` one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import ObjectiveError, ShapeError

CPU_BLOCK, DEVICE_BLOCK = 1 << 18, 1 << 26
"""Elements of a chunk that one elementwise step goes over: what a core's own cache holds; what
keeps a GPU busy."""

Coefficients = Callable[[Tensor, slice], Tensor]
"""``(log_probs of some tokens [n], which tokens) -> dJ / d log_probs [n]``."""


def native_half(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether bfloat16 operands give float32 products without being widened first."""
    version = tuple(int(x) for x in torch.__version__.split(".")[:2])
    return device.type == "cuda" and dtype is torch.bfloat16 and version >= (2, 8)


@dataclass(frozen=True)
class Settings:
    """What a call fixes for all chunks.

    Args:
        temperature: logits are divided by it.
        dtype: the matrix products take operands rounded to it; sums and results are wide.
        chunks: consecutive slices that cover the tokens.
        entropy: whether to compute it.
        skip_zeros: leave tokens with coefficient 0 out of the gradient products.
    """

    temperature: float
    dtype: torch.dtype
    chunks: Sequence[slice]
    entropy: bool
    skip_zeros: bool

    @property
    def wide(self) -> torch.dtype:
        """Of logits, sums and results: float32, float64 where the operands are."""
        return torch.float64 if self.dtype is torch.float64 else torch.float32

    @property
    def rows(self) -> int:
        """Tokens of the largest chunk."""
        return max((c.stop - c.start for c in self.chunks), default=0)


class Chunk(NamedTuple):
    """One chunk after its forward: ``error`` is ``p - onehot``, valid until the next one."""

    where: slice
    hidden: Tensor
    error: Tensor
    log_probs: Tensor
    entropy: Tensor | None


class Head:
    """An output head: its operands as the products take them."""

    def __init__(self, weight: Tensor, bias: Tensor | None, settings: Settings) -> None:
        self.settings = settings
        self.native = native_half(weight.device, settings.dtype)
        self.weight = self.operand(weight)
        self.bias = None if bias is None else bias.detach().to(settings.wide)

    def operand(self, x: Tensor) -> Tensor:
        """Rounded to the dtype of the products, and widened where the device needs it."""
        x = x.detach().to(self.settings.dtype)
        return x if self.native else x.to(self.settings.wide)

    def product(self, out: Tensor, a: Tensor, b: Tensor, *, alpha: float, add: bool) -> None:
        """``out = alpha a b`` or ``out += alpha a b``, in float32 at least."""
        beta = 1 if add else 0
        if self.native:
            torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, alpha=alpha, out=out)
        else:
            out.addmm_(a, b, beta=beta, alpha=alpha)

    def factor(self, x: Tensor) -> Tensor:
        """A wide tensor as an operand."""
        return x.to(self.settings.dtype) if self.native else x

    def walk(self, hidden: Tensor, targets: Tensor, chunks: Sequence[slice]) -> Iterator[Chunk]:
        """Logits, log-probs and errors, chunk by chunk in one buffer."""
        rows = max((c.stop - c.start for c in chunks), default=0)
        shape = rows, self.weight.shape[0]
        buffer = torch.empty(shape, dtype=self.settings.wide, device=hidden.device)
        for where in chunks:
            tile, part = buffer[: where.stop - where.start], self.operand(hidden[where])
            self.product(tile, part, self.weight.T, alpha=1 / self.settings.temperature, add=False)
            if self.bias is not None:
                tile.add_(self.bias, alpha=1 / self.settings.temperature)
            log_probs, entropy = self._softmax(tile, targets[where, None])
            yield Chunk(where, part, tile, log_probs, entropy)

    def _softmax(self, tile: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits to ``p - onehot`` in place; log-probs and entropy on the way.

        ``log sum exp(z) = max z - log max p``: the softmax gives its own normaliser.
        """
        log_probs, entropy = tile.gather(1, targets)[:, 0], None
        size = CPU_BLOCK if tile.device.type == "cpu" else DEVICE_BLOCK
        block = max(1, size // tile.shape[1])
        if self.settings.entropy:
            entropy, scratch = torch.empty_like(log_probs), torch.empty_like(tile[:block])
        for start in range(0, len(tile), block):
            here = slice(start, start + block)
            rows = tile[here]
            top = rows.amax(-1, keepdim=True)
            if entropy is not None:
                shifted = torch.sub(rows, top, out=scratch[: len(rows)])
                torch.softmax(shifted, -1, out=rows)
                entropy[here] = -shifted.mul_(rows).sum(-1)
            else:
                torch.softmax(rows, -1, out=rows)
            log_sum = rows.amax(-1).log().neg_()
            log_probs[here].sub_(top[:, 0]).sub_(log_sum)
            if entropy is not None:
                entropy[here].add_(log_sum)
        tile.scatter_add_(1, targets, torch.full_like(targets, -1.0, dtype=tile.dtype))
        return log_probs, entropy


class Gradients:
    """Accumulated in float32 at least; None where nobody asks."""

    def __init__(self, head: Head, hidden: Tensor, needs: Sequence[bool]) -> None:
        self.head = head
        wide, device = head.settings.wide, hidden.device

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=wide, device=device)

        vocabulary, width = head.weight.shape
        self.hidden = zeros(*hidden.shape) if needs[0] else None
        self.weight = zeros(vocabulary, width) if needs[1] else None
        self.bias = zeros(vocabulary) if needs[2] else None

    def add(self, chunk: Chunk, at: slice | Tensor, coefficients: Tensor) -> None:
        """``coefficients`` of the tokens ``at``, which the chunk holds."""
        head = self.head
        scale = coefficients / -head.settings.temperature
        error = head.factor(chunk.error)
        if self.hidden is not None:
            pulled = torch.empty(chunk.hidden.shape, dtype=head.settings.wide, device=error.device)
            head.product(pulled, error, head.weight, alpha=1.0, add=False)
            self.hidden[at] = pulled.mul_(scale[:, None])
        if self.weight is not None:
            scaled = head.factor(chunk.hidden.to(head.settings.wide) * scale[:, None])
            head.product(self.weight, error.T, scaled, alpha=1.0, add=True)
        if self.bias is not None:
            self.bias.addmv_(chunk.error.T, scale)

    def found(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """For hidden states, weight, bias."""
        return self.hidden, self.weight, self.bias


def score(
    head: Head, hidden: Tensor, targets: Tensor, visit: Callable[[Chunk], None] | None = None
) -> tuple[Tensor, Tensor | None]:
    """Log-probs and entropy of all tokens; ``visit`` sees every chunk."""
    settings = head.settings
    log_probs = torch.empty(len(hidden), dtype=settings.wide, device=hidden.device)
    entropy = torch.empty_like(log_probs) if settings.entropy else None
    for chunk in head.walk(hidden, targets, settings.chunks):
        log_probs[chunk.where] = chunk.log_probs
        if entropy is not None and chunk.entropy is not None:
            entropy[chunk.where] = chunk.entropy
        if visit is not None:
            visit(chunk)
    return log_probs, entropy


def kept_rows(coefficients: Tensor) -> Tensor:
    """Tokens whose coefficient is not 0 (NaN is not 0); waits for the device."""
    return (coefficients != 0).nonzero()[:, 0]


def compact(chunk: Chunk, rows: Tensor) -> Chunk:
    """Only some rows of a chunk, in their order, moved up in place."""
    for to, row in enumerate(rows.tolist()):  # to <= row: no row is overwritten before it moved
        if to != row:
            chunk.error[to].copy_(chunk.error[row])
    return chunk._replace(error=chunk.error[: len(rows)], hidden=chunk.hidden[rows])


def _given(x: Tensor | None, like: Tensor | None) -> Tensor | None:
    return None if x is None or like is None else x.to(like.dtype)


class Frozen(torch.autograd.Function):
    """2 products: the gradient of every log-prob by its hidden state, kept from the forward."""

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor,
        settings: Settings,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        head = Head(weight, bias, settings)
        kept = torch.empty(hidden.shape, dtype=settings.wide, device=hidden.device)

        def visit(chunk: Chunk) -> None:
            error = head.factor(chunk.error)
            alpha = -1 / settings.temperature
            head.product(kept[chunk.where], error, head.weight, alpha=alpha, add=False)

        log_probs, entropy = score(head, hidden, targets, visit)
        ctx.save_for_backward(kept)
        ctx.dtype = hidden.dtype
        if entropy is not None:
            ctx.mark_non_differentiable(entropy)
        return log_probs, entropy

    @staticmethod
    @once_differentiable
    def backward(  # noqa: D102
        ctx: Any, outer: Tensor, unused: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        (kept,) = ctx.saved_tensors
        return (kept * outer[:, None]).to(ctx.dtype), None, None, None, None


class TwoPhase(torch.autograd.Function):
    """4 products: nothing of size ``V`` is kept, the backward computes the softmax again."""

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor,
        settings: Settings,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        log_probs, entropy = score(Head(weight, bias, settings), hidden, targets)
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.settings = settings
        if entropy is not None:
            ctx.mark_non_differentiable(entropy)
        return log_probs, entropy

    @staticmethod
    @once_differentiable
    def backward(  # noqa: D102
        ctx: Any, outer: Tensor, unused: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets = ctx.saved_tensors
        settings: Settings = ctx.settings
        with torch.autocast(hidden.device.type, enabled=False):
            head = Head(weight, bias, Settings(
                settings.temperature, settings.dtype, settings.chunks, False, settings.skip_zeros
            ))  # fmt: skip
            sums = Gradients(head, hidden, ctx.needs_input_grad)
            coefficients, source, rows = outer, hidden, None
            if settings.skip_zeros:
                rows = kept_rows(coefficients)
                if len(rows) == len(hidden):
                    rows = None
            if rows is not None:
                coefficients, source, targets = coefficients[rows], hidden[rows], targets[rows]
            for chunk in head.walk(source, targets, even(len(source), settings.rows)):
                at = chunk.where if rows is None else rows[chunk.where]
                sums.add(chunk, at, coefficients[chunk.where])
        for_hidden, for_weight, for_bias = sums.found()
        given = _given(for_hidden, hidden), _given(for_weight, weight), _given(for_bias, bias)
        return *given, None, None


class Resident(torch.autograd.Function):
    """3 products: coefficients known while the softmax of the chunk is at hand."""

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor,
        settings: Settings, coefficients: Coefficients,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        head = Head(weight, bias, settings)
        sums = Gradients(head, hidden, ctx.needs_input_grad)
        used = torch.empty(len(hidden), dtype=settings.wide, device=hidden.device)

        def visit(chunk: Chunk) -> None:
            found = coefficients(chunk.log_probs, chunk.where)
            if found.shape != chunk.log_probs.shape:
                raise ShapeError(
                    f"coefficients(log_probs, {chunk.where}) gave shape {tuple(found.shape)} for "
                    f"{len(chunk.log_probs)} log-probs; it gives one number a token"
                )
            used[chunk.where] = found.detach().to(settings.wide)
            at: slice | Tensor = chunk.where
            if settings.skip_zeros:
                rows = kept_rows(used[chunk.where])
                if len(rows) < len(chunk.error):
                    chunk, at = compact(chunk, rows), rows + chunk.where.start
            if len(chunk.error):
                sums.add(chunk, at, used[at])

        log_probs, entropy = score(head, hidden, targets, visit)
        ctx.save_for_backward(used)
        ctx.found = tuple(map(_given, sums.found(), (hidden, weight, bias)))
        if entropy is not None:
            ctx.mark_non_differentiable(entropy)
        return log_probs, entropy

    @staticmethod
    @once_differentiable
    def backward(  # noqa: D102
        ctx: Any, outer: Tensor, unused: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if ctx.found is None:
            raise ObjectiveError(
                "the gradients of mode='resident' are made once, in the forward, and have been "
                "handed out; call linear_logprob again, or use mode='two-phase'"
            )
        (used,) = ctx.saved_tensors
        found, ctx.found = ctx.found, None
        scale = _multiple(outer, used)
        return *(None if x is None else x.mul_(scale.to(x.dtype)) for x in found), None, None, None


def _multiple(outer: Tensor, used: Tensor) -> Tensor:
    """``s`` with ``outer = s used``, 0-dimensional float64.

    Raises:
        ObjectiveError: if there is none.
    """
    wide, known = outer.double(), used.double()
    scale = (wide @ known) / (known @ known).clamp(min=torch.finfo(torch.float64).tiny)
    gap, size = (wide - scale * known).abs(), wide.abs()
    if len(used) and bool(gap.amax() > 1e-5 * size.amax()):
        worst = int(gap.argmax())
        raise ObjectiveError(
            f"mode='resident' made its gradients with a coefficient of {float(used[worst]):.6g} "
            f"for token {worst}, but what came back is {float(outer[worst]):.6g}, which is not "
            f"that times the factor {float(scale):.6g} of the other tokens. Call backward on a "
            "multiple of (coefficients * log_probs).sum() alone, or use mode='two-phase'"
        )
    return scale


def even(count: int, rows: int) -> list[slice]:
    """The fewest slices of at most ``rows``, of nearly equal size."""
    parts = -(-count // max(rows, 1))
    bounds = [count * k // max(parts, 1) for k in range(parts + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(bounds)]
