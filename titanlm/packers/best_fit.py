"""Whole documents, packed tightly: none is cut unless it is longer than a row.

Concatenating cuts a document at the end of nearly every row, and what is left
of it is read without its beginning. Ding et al. 2024, "Fewer Truncations
Improve Language Modeling" (arXiv:2404.10830), pack whole documents instead, in
hardly more rows, and find better reading comprehension and less hallucination.
They cut what is longer than a row, sort a corpus by length, and put each piece
into the fullest row that has room for it. A stream has no end to sort, so here
it is the other way round: of the pieces that wait, a row takes the longest one
that it has room for.

What waits is bounded (``buffer_rows``) and is part of the state.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import Any

import numpy as np

from titanlm.batch import Document, Row
from titanlm.constraints import PositiveInt
from titanlm.packers.rows import Piece, make_row, pieces_of, state_of
from titanlm.registry import register


@dataclass(frozen=True)
class BestFitConfig:
    buffer_rows: PositiveInt = 16
    """Rows' worth of tokens to choose from, in each stream. More pack tighter; they cost memory, checkpoint size and time before the first step."""


@register("packer", "best_fit")
class BestFitPacker:
    """Rows of T positions: the oldest waiting piece, then always the longest that fits; ties go to the older.

    A document of n ids takes n positions. One of more than T ids is cut as soon
    as it comes: full rows, consecutive ones sharing an id (the last label of
    one, the first token of the next), and what is left waits with the others,
    as old as its document. So every id after a document's first is a label
    exactly once. A document of one id, which has no label and with a mask is
    none, is passed over. The row length may change from one ``pop`` to the
    next; what waits may then have to be cut.

    Nothing waits for ever: of ``buffer_rows + 1`` consecutive rows at least
    one is of the oldest piece.
    """

    def __init__(self, config: BestFitConfig) -> None:
        self._buffer_rows = config.buffer_rows
        self._empty()

    def add(self, document: Document, target_bytes: np.ndarray) -> None:
        """Let a document wait; ``target_bytes`` (n,) belongs to its ids one to one and is marked (``titanlm.packers.boundaries``)."""
        self._wait(self._next, Piece(document.ids, target_bytes, document.document_id))
        self._next += 1

    def pop(self, seq_len: int) -> Row | None:
        """The next row, or None while nothing fills one alone and there is too little to choose from."""
        enough = self._n_ids >= self._buffer_rows * seq_len or (self._waiting and self._by_length[-1][0] > seq_len)
        return self._row(seq_len) if enough else None

    def flush(self, seq_len: int) -> Row | None:
        """At the end of the data: the rest as rows; None when nothing waits."""
        return self._row(seq_len) if self._waiting else None

    def state(self) -> dict[str, Any]:
        return {**state_of(self._waiting.values()), "rows_ahead": self._rows_ahead}

    def restore(self, state: dict[str, Any]) -> None:
        pieces, rows_ahead = list(pieces_of(state)), int(state["rows_ahead"])
        self._empty()
        for number, piece in enumerate(pieces):
            self._wait(number, piece)
        self._next, self._rows_ahead = len(pieces), rows_ahead

    def _empty(self) -> None:
        self._waiting: dict[int, Piece] = {}  # by number, which is by age
        self._by_length: list[tuple[int, int]] = []  # (ids, −number), ascending: of equal lengths the oldest is last
        self._n_ids = 0
        self._next = 0
        self._rows_ahead = 0  # that younger pieces have had since the oldest had one

    def _wait(self, number: int, piece: Piece) -> None:
        n_ids = len(piece.ids)
        if n_ids > 1:
            self._waiting[number] = piece
            insort(self._by_length, (n_ids, -number))
            self._n_ids += n_ids

    def _take(self, place: int) -> int:
        """The number of the piece at a place of the order of lengths, which it leaves; it stays in ``_waiting``, at its age."""
        n_ids, number = self._by_length.pop(place)
        self._n_ids -= n_ids
        return -number

    def _row(self, seq_len: int) -> Row:
        oldest = next(iter(self._waiting))
        place = len(self._by_length) - 1
        if self._by_length[place][0] <= seq_len or self._rows_ahead >= self._buffer_rows:
            place = bisect_left(self._by_length, (len(self._waiting[oldest].ids), -oldest))
        number = self._take(place)
        self._rows_ahead = 0 if number == oldest else self._rows_ahead + 1
        piece = self._waiting[number]
        if len(piece.ids) > seq_len + 1:
            self._wait(number, piece.after(seq_len))
            return make_row([piece.first(seq_len + 1)], seq_len)
        pieces = [self._waiting.pop(number)]
        room = seq_len - len(piece.ids)
        while fitting := bisect_left(self._by_length, (room + 1,)):  # how many are short enough
            pieces.append(self._waiting.pop(self._take(fitting - 1)))
            room -= len(pieces[-1].ids)
        return make_row(pieces, seq_len)
