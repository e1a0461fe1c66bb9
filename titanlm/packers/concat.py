"""Documents one after the other, cut into rows: no padding, no token lost."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np

from titanlm.batch import Document, Row
from titanlm.packers.rows import Piece, make_row, pieces_of, state_of
from titanlm.registry import register


@dataclass(frozen=True)
class ConcatConfig:
    """The concatenating packer has no settings."""


@register("packer", "concat")
class ConcatPacker:
    """Rows of T positions out of T + 1 ids of the concatenated documents.

    Consecutive rows share one id, the last label of one and the first token of
    the next, so that every token after the first is a label exactly once. The
    row length may change from one ``pop`` to the next. Boundaries between
    documents are resolved later (``titanlm.packers.boundaries``).
    """

    def __init__(self, config: ConcatConfig) -> None:
        self._pieces: deque[Piece] = deque()
        self._n_ids = 0

    def add(self, document: Document, target_bytes: np.ndarray) -> None:
        """Append a document; ``target_bytes`` (n,) belongs to its ids one to one."""
        if len(document.ids):
            self._pieces.append(Piece(document.ids, target_bytes, document.document_id))
            self._n_ids += len(document.ids)

    def pop(self, seq_len: int) -> Row | None:
        """The next row, or None while there are fewer than ``seq_len + 1`` ids."""
        return self._row(seq_len) if self._n_ids > seq_len else None

    def flush(self, seq_len: int) -> Row | None:
        """At the end of the data: the rest as rows, the last one padded; None when no label is left."""
        if self._n_ids > 1:
            return self._row(seq_len)
        self._pieces.clear()
        self._n_ids = 0
        return None

    def state(self) -> dict[str, Any]:
        return state_of(self._pieces)

    def restore(self, state: dict[str, Any]) -> None:
        self._pieces = deque(pieces_of(state))
        self._n_ids = sum(len(piece.ids) for piece in self._pieces)

    def _row(self, seq_len: int) -> Row:
        """Take ``seq_len + 1`` ids (or all) off the front and put the last of so many back."""
        pieces: list[Piece] = []
        missing = seq_len + 1
        while missing and self._pieces:
            piece = self._pieces.popleft()
            pieces.append(piece if len(piece.ids) <= missing else piece.first(missing))
            missing -= len(pieces[-1].ids)
        if not missing:
            self._pieces.appendleft(piece.after(len(pieces[-1].ids) - 1))
        self._n_ids -= min(seq_len, self._n_ids)
        return make_row(pieces, seq_len)
