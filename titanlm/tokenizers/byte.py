"""Bytes as tokens: no vocabulary file, no loss, one id a byte."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from titanlm.registry import register
from titanlm.tokenizers.fingerprint import fingerprint
from titanlm.tokenizers.text import joined, utf8

SEPARATOR = 256


@dataclass(frozen=True)
class ByteConfig:
    """The byte tokenizer has no settings."""


@register("tokenizer", "byte")
class ByteTokenizer:
    """Ids 0 to 255 are the bytes of the UTF-8 text, 256 separates documents.

    A document becomes ``[256, bytes..., 256]``: the separator is its beginning,
    so that the first byte is a target, and its end, so that the model learns
    to stop. Padding is the separator too.
    """

    vocab_size = 257
    bos_id = SEPARATOR
    eos_id = SEPARATOR
    pad_id = SEPARATOR
    lossless = True

    def __init__(self, config: ByteConfig) -> None:
        self.config = config
        self._pieces = [*(bytes([value]) for value in range(256)), b""]
        self.fingerprint = fingerprint("byte", self)

    def encode(self, text: str) -> np.ndarray:
        """The UTF-8 bytes of ``text``: (n,) int32.

        Raises DataError for a lone surrogate, which no UTF-8 text contains.
        """
        return np.frombuffer(utf8(text), dtype=np.uint8).astype(np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``; separators vanish, broken UTF-8 becomes U+FFFD."""
        return joined(self._pieces, ids)

    def target_bytes(self, ids: np.ndarray, prev_ids: np.ndarray) -> np.ndarray:
        """Bytes that each id stands for: (n,) int32, 1 for a byte and 0 for the separator."""
        return (ids != SEPARATOR).astype(np.int32)

    def files(self) -> Mapping[str, bytes]:
        return {}

    def pieces(self) -> Sequence[bytes | None]:
        """The bytes of each id, none for the separator."""
        return self._pieces
