"""What the packers share: pieces of documents, rows made of them, their state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from titanlm.batch import IGNORE, Row


class Piece(NamedTuple):
    """A document or what is left of it, n ids: views into its arrays, which nobody changes."""

    ids: np.ndarray
    """(n,) int32."""
    target_bytes: np.ndarray
    """(n,) int32, one to one with the ids."""
    document_id: int

    def first(self, n: int) -> Piece:
        """The first ``n`` ids, or all where there are fewer."""
        return Piece(self.ids[:n], self.target_bytes[:n], self.document_id)

    def after(self, n: int) -> Piece:
        """All but the first ``n`` ids."""
        return Piece(self.ids[n:], self.target_bytes[n:], self.document_id)


def make_row(pieces: Iterable[Piece], seq_len: int) -> Row:
    """The pieces, none of them empty, one after the other; what is left of the row is padding.

    Together they have 1 to ``seq_len + 1`` ids. Of ``seq_len + 1`` the last is
    a label alone; of fewer, the last has no label. Where pieces meet, the label
    is the first id of the next one, if that begins a document, as its mark says
    (``titanlm.packers.boundaries``); else that id has been a label already.
    Padding is token 0 of document −1 without a label.
    """
    # One place more than the row has, so that tokens and labels are one text seen twice.
    text, document_ids = np.empty(seq_len + 1, dtype=np.int32), np.empty(seq_len + 1, dtype=np.int64)
    text_bytes = np.empty(seq_len + 1, dtype=np.int32)
    start = 0
    continued = []
    for ids, target_bytes, document_id in pieces:
        end = start + len(ids)
        text[start:end], text_bytes[start:end], document_ids[start:end] = ids, target_bytes, document_id
        if start and target_bytes[0] >= 0:
            continued.append(start)
        start = end
    labels = text[1:].copy()
    for place in continued:
        labels[place - 1], text_bytes[place] = IGNORE, 0
    if start <= seq_len:
        text[start:], labels[start - 1 :], text_bytes[start:], document_ids[start:] = 0, IGNORE, 0, -1
    return Row(text[:-1], labels, _positions(seq_len), document_ids[:-1], text_bytes[1:])


@lru_cache(maxsize=8)
def _positions(seq_len: int) -> np.ndarray:
    """0 to T − 1, the same array for every row of a length."""
    positions = np.arange(seq_len, dtype=np.int32)
    positions.flags.writeable = False
    return positions


def state_of(pieces: Iterable[Piece]) -> dict[str, Any]:
    """The pieces in order, by reference: taking a state copies no ids."""
    ids, target_bytes, document_ids = [], [], []
    for piece in pieces:
        ids.append(piece.ids)
        target_bytes.append(piece.target_bytes)
        document_ids.append(piece.document_id)
    return {"ids": ids, "target_bytes": target_bytes, "document_ids": document_ids}


def pieces_of(state: dict[str, Any]) -> Iterator[Piece]:
    """Back from ``state_of``; KeyError, TypeError or ValueError when it is no such state."""
    for ids, target_bytes, document_id in zip(state["ids"], state["target_bytes"], state["document_ids"], strict=True):
        yield Piece(np.asarray(ids, dtype=np.int32), np.asarray(target_bytes, dtype=np.int32), int(document_id))
