"""Bytes, and the strings of a list as tokens of their own."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from titanlm.errors import DataError
from titanlm.registry import register

SEPARATOR = 256


@dataclass(frozen=True)
class PiecesConfig:
    path: str
    """A file with one piece a line, each a JSON string of two bytes or more."""


@register("tokenizer", "pieces")
class Pieces:
    """Ids 0 to 255 are bytes, 256 begins and ends a document, 257 on are the pieces.

    Text is cut from left to right, the longest piece first; a byte that begins
    none stands for itself, so nothing is lost. Raises DataError for a list that
    cannot be read or holds a piece twice. ``files`` is the list as it travelled
    with an artifact; given, ``path`` is not opened.
    """

    bos_id = SEPARATOR
    eos_id = SEPARATOR
    lossless = True

    def __init__(self, config: PiecesConfig, *, files: Mapping[str, bytes] | None = None) -> None:
        try:
            self._list = Path(config.path).read_bytes() if files is None else files["pieces.txt"]
            pieces = [json.loads(line).encode("utf-8") for line in self._list.decode("utf-8").splitlines()]
        except (OSError, KeyError, ValueError, AttributeError) as error:
            raise DataError(f"tokenizer.path: {config.path}: not a list of pieces, a JSON string a line: {error}") from error
        if len(set(pieces)) < len(pieces) or any(len(piece) < 2 for piece in pieces):
            raise DataError(f"tokenizer.path: {config.path}: a piece is there twice or shorter than two bytes; remove it")
        self._bytes = [bytes([byte]) for byte in range(256)] + [b""] + pieces
        self._ids = {piece: number for number, piece in enumerate(self._bytes) if piece}
        self._lengths = np.array([len(piece) for piece in self._bytes], dtype=np.int32)
        longest_first = sorted(pieces, key=len, reverse=True)
        self._cut = re.compile(b"|".join([*map(re.escape, longest_first), b"."]), re.DOTALL)
        self.vocab_size = len(self._bytes)
        self.fingerprint = f"pieces: {hashlib.sha256(repr(pieces).encode()).hexdigest()}"

    def encode(self, text: str) -> np.ndarray:
        """(n,) int32."""
        try:
            return np.array([self._ids[piece] for piece in self._cut.findall(text.encode("utf-8"))], dtype=np.int32)
        except UnicodeEncodeError as error:
            raise DataError(f"character {error.start} of a text is a lone surrogate, which UTF-8 cannot hold") from error

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(self._bytes[number] for number in ids).decode("utf-8", errors="replace")

    def target_bytes(self, ids: np.ndarray, prev_ids: np.ndarray) -> np.ndarray:
        """(n,) int32; 0 for the separator."""
        return self._lengths[ids]

    def files(self) -> Mapping[str, bytes]:
        return {"pieces.txt": self._list}
