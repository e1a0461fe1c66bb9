"""A document a row: every one begins its own, the rest of which is padding."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np

from titanlm.batch import Document, Row
from titanlm.packers.rows import Piece, make_row, pieces_of, state_of
from titanlm.registry import register


@dataclass(frozen=True)
class NoneConfig:
    """There is nothing to set."""


@register("packer", "none")
class NonePacker:
    """Rows of T positions out of at most T + 1 ids of one document.

    A longer document goes on in the next row, which shares one id with the
    one before: the last label there, the first token here. So every id after a
    document's first is a label exactly once. A document of one id, which has
    no label and with a mask is none, is passed over. The row length may change
    from one ``pop`` to the next.
    """

    def __init__(self, config: NoneConfig) -> None:
        self._pieces: deque[Piece] = deque()

    def add(self, document: Document, target_bytes: np.ndarray) -> None:
        """Append a document; ``target_bytes`` (n,) belongs to its ids one to one."""
        if len(document.ids) > 1:
            self._pieces.append(Piece(document.ids, target_bytes, document.document_id))

    def pop(self, seq_len: int) -> Row | None:
        """The next row, or None while no document waits."""
        if not self._pieces:
            return None
        piece = self._pieces.popleft()
        if len(piece.ids) > seq_len + 1:
            self._pieces.appendleft(piece.after(seq_len))
        return make_row([piece.first(seq_len + 1)], seq_len)

    def flush(self, seq_len: int) -> Row | None:
        """At the end of the data: the same, since nothing is held back."""
        return self.pop(seq_len)

    def state(self) -> dict[str, Any]:
        return state_of(self._pieces)

    def restore(self, state: dict[str, Any]) -> None:
        self._pieces = deque(pieces_of(state))
