"""Text and bytes at the edges of a tokenizer, the same for all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from titanlm.errors import DataError

MAX_ID = 1 << 24
"""Ids beyond it are a mistake or an attack: tables as long as the largest id are allocated."""


def utf8(text: str) -> bytes:
    """The UTF-8 bytes of ``text``.

    Raises DataError for a lone surrogate, which no UTF-8 text contains.
    """
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"character {error.start} of a text is the lone surrogate {text[error.start]!r}, which UTF-8 cannot hold") from error


def joined(pieces: Sequence[bytes | None], ids: Sequence[int]) -> str:
    """The text of ``ids`` in a vocabulary where an id stands for bytes; broken UTF-8 becomes U+FFFD.

    Raises DataError for an id outside the table or one in a gap of it (None).
    """
    array = np.asarray(ids, dtype=np.int64)
    require_ids(array, len(pieces))
    found = [pieces[i] for i in array.tolist()]
    if None in found:
        raise DataError(f"id {array[found.index(None)]} is no token of this vocabulary, which has gaps")
    return b"".join(piece for piece in found if piece).decode("utf-8", errors="replace")


def n_words(piece: bytes) -> int:
    """How many words a token has a part of; words are what is visible between spaces. More than one make a superword."""
    return sum(bool(part.strip()) for part in piece.decode("utf-8", errors="replace").split(" "))


def require_ids(array: np.ndarray, vocab_size: int) -> None:
    """Raise DataError unless every id is 0 to ``vocab_size - 1``."""
    if array.size and not 0 <= array.min() <= array.max() < vocab_size:
        raise DataError(f"the tokenizer has ids 0 to {vocab_size - 1}, not {array.min()} to {array.max()}")


def hf_library(what: str) -> Any:
    """The package ``tokenizers``; DataError that says how to install it when ``what`` cannot have it."""
    try:
        import tokenizers
    except ImportError as error:
        raise DataError(f"{what} needs the package `tokenizers`; run: pip install 'titanlm[huggingface]'") from error
    return tokenizers


@contextmanager
def rust_errors(remedy: str) -> Iterator[None]:
    """Turn whatever a library written in Rust raises into a DataError that starts with ``remedy``.

    Its panics are BaseExceptions, which no ``except Exception`` sees.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise DataError(f"{remedy} ({error})") from error
        raise
