"""Token ids back to text, without the model's own files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from .manifest import write_whole

TOKENIZER_FILE = "tokenizer.json"
VOCABULARY_FILE = "vocabulary.json"


def save_tokenizer(tokenizer: Any, folder: Path) -> str | None:
    """Keep a tokenizer beside the manifest; the name of the file, or None where there is none.

    A fast tokenizer is kept whole, any other as its list of pieces.
    """
    if tokenizer is None:
        return None
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if hasattr(backend, "to_str"):
        write_whole(folder / TOKENIZER_FILE, backend.to_str().encode())
        return TOKENIZER_FILE
    vocabulary = tokenizer.get_vocab()
    pieces = [""] * (max(vocabulary.values(), default=-1) + 1)
    for piece, i in vocabulary.items():
        pieces[i] = piece
    write_whole(folder / VOCABULARY_FILE, json.dumps(pieces).encode())
    return VOCABULARY_FILE


class TokenText:
    """Text of single tokens, each decoded once."""

    def __init__(self, path: Path) -> None:
        self._known: dict[int, str] = {}
        self._pieces: list[str] | None = None
        if path.name == VOCABULARY_FILE:
            self._pieces = json.loads(path.read_text())
        else:
            from tokenizers import Tokenizer

            self._tokenizer = Tokenizer.from_buffer(path.read_bytes())

    def __call__(self, ids: np.ndarray) -> list[str]:
        """One text a token."""
        return [self._one(i) for i in ids.tolist()]

    def _one(self, i: int) -> str:
        if i not in self._known:
            self._known[i] = self._decode(i)
        return self._known[i]

    def _decode(self, i: int) -> str:
        if self._pieces is not None:
            return self._pieces[i] if 0 <= i < len(self._pieces) else f"<{i}>"
        if i < 0 or self._tokenizer.id_to_token(i) is None:
            return f"<{i}>"
        # the second of two: some decoders strip the space before the first
        once = str(self._tokenizer.decode([i], skip_special_tokens=False))
        twice = str(self._tokenizer.decode([i, i], skip_special_tokens=False))
        return twice[len(once) :] if twice.startswith(once) else once
