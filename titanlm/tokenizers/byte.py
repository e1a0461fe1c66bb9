"""Bytes as tokens: no vocabulary file, no loss, one id a byte."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from titanlm.errors import DataError
from titanlm.registry import register

SEPARATOR = 256


@dataclass(frozen=True)
class ByteConfig:
    """The byte tokenizer has no settings."""


@register("tokenizer", "byte")
class ByteTokenizer:
    """Ids 0 to 255 are the bytes of the UTF-8 text, 256 separates documents.

    A document becomes ``[256, bytes..., 256]``: the separator is its beginning,
    so that the first byte is a target, and its end, so that the model learns
    to stop.
    """

    vocab_size = 257
    bos_id = SEPARATOR
    eos_id = SEPARATOR
    lossless = True
    fingerprint = "byte: ids 0-255 are UTF-8 bytes, 256 begins and ends a document"

    def __init__(self, config: ByteConfig) -> None:
        self.config = config

    def encode(self, text: str) -> np.ndarray:
        """The UTF-8 bytes of ``text``: (n,) int32.

        Raises DataError for a lone surrogate, which no UTF-8 text contains.
        """
        try:
            return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int32)
        except UnicodeEncodeError as error:
            raise DataError(f"character {error.start} of a text is the lone surrogate {text[error.start]!r}, which UTF-8 cannot hold") from error

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``; separators vanish, broken UTF-8 becomes U+FFFD."""
        array = np.asarray(ids, dtype=np.int64)
        if array.size and not 0 <= array.min() <= array.max() <= SEPARATOR:
            raise DataError(f"the byte tokenizer has ids 0 to {SEPARATOR}, not {array.min()} to {array.max()}")
        return array[array != SEPARATOR].astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def target_bytes(self, ids: np.ndarray, prev_ids: np.ndarray) -> np.ndarray:
        """Bytes that each id stands for: (n,) int32, 1 for a byte and 0 for the separator."""
        return (ids != SEPARATOR).astype(np.int32)

    def files(self) -> Mapping[str, bytes]:
        return {}
