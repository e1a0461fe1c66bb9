"""Overlapping rows of the concatenated documents, for scoring: labels with much before them.

A label at the start of a row is predicted from little. Here a row of T positions
begins only ``stride`` positions behind the one before, and of its labels the
last ``stride`` alone are scored, which have more than T − stride tokens before
them, for T / stride times the work. Rows begin at 0, stride, 2 · stride... as
long as a target is left that no row has scored; the first has all its labels,
the last is padded. So every target is scored exactly once. Parameter Golf's
sliding scores before its #1218 went on with shorter and shorter rows at the end
and scored the last targets again in each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from titanlm.batch import IGNORE, Document, Row
from titanlm.constraints import Size
from titanlm.errors import DataError
from titanlm.packers.rows import Piece
from titanlm.registry import register


@dataclass(frozen=True)
class SlidingConfig:
    stride: Size | None = None
    """Positions from the start of a row to that of the next, and labels scored of it; None: the row's length, so that rows do not overlap."""
    drop_tail: bool = False
    """Leave out the targets behind the last whole multiple of the row's length, as Parameter Golf does."""


@register("packer", "sliding")
class SlidingPacker:
    """Rows of T positions that begin ``stride`` positions apart; labels that an earlier row had are −100, their bytes 0.

    With ``drop_tail`` no row ends behind ⌊(n − 1) / T⌋ · T for n ids in all.
    How many there will be is not known, so a row waits until so many have come
    that its end cannot be cut off.

    Ids lie in one array, of which rows are views; what has been scored and no
    row needs any more is left behind when documents are appended. Boundaries
    between documents are resolved later (``titanlm.packers.boundaries``). The
    row length may change from one ``pop`` to the next.

    Raises DataError when a stride does not suit the length of the rows.
    """

    def __init__(self, config: SlidingConfig, *, seq_len: int) -> None:
        self._stride, self._drop_tail = config.stride, config.drop_tail
        self.stride(seq_len)
        self.restore({"ids": [], "target_bytes": [], "document_ids": [], "first": 0, "scored": 0})

    def stride(self, seq_len: int) -> int:
        """Positions from the start of a row to that of the next, and labels of every row but the first."""
        stride = self._stride or seq_len
        if stride > seq_len:
            raise DataError(f"packer.stride: {stride} positions between rows of {seq_len} would leave labels out; lower it, or raise seq_len")
        if self._drop_tail and seq_len % stride:
            raise DataError(f"packer.stride: {stride} does not divide rows of {seq_len}, as packer.drop_tail needs; choose one that does, or drop_tail = false")
        return stride

    def add(self, document: Document, target_bytes: np.ndarray) -> None:
        """Append a document; ``target_bytes`` (n,) belongs to its ids one to one and is marked."""
        self._waiting.append(Piece(document.ids, target_bytes, document.document_id))
        self._n_ids += len(document.ids)

    def pop(self, seq_len: int) -> Row | None:
        """The next row, or None while more documents are needed."""
        begin, targets = self._begin(seq_len), self._n_ids - 1
        return self._row(begin, seq_len) if begin + seq_len <= (targets - targets % seq_len if self._drop_tail else targets) else None

    def flush(self, seq_len: int) -> Row | None:
        """At the end of the data: the rest as rows, the last one padded, or nothing with ``drop_tail``.

        Raises DataError when all there was is such a tail.
        """
        if self._drop_tail:
            if self._n_ids and not self._scored:
                raise DataError(
                    f"packer.drop_tail: all {self._n_ids:,} tokens are a tail, for a row of {seq_len} takes {seq_len + 1}; shorten rows or drop none"
                )
            return None
        return self._row(self._begin(seq_len), seq_len) if self._scored < self._n_ids - 1 else None

    def state(self) -> dict[str, Any]:
        """The ids from the ``first`` of the last row on, which is as far back as a row may reach; how many targets are scored."""
        self._move_to(self._first)
        arrays = {"ids": self._ids, "target_bytes": self._target_bytes, "document_ids": self._document_ids}
        return {**arrays, "first": self._first, "scored": self._scored}

    def restore(self, state: dict[str, Any]) -> None:
        """KeyError, TypeError or ValueError when it is no such state."""
        self._ids, self._target_bytes = (np.asarray(state[name], dtype=np.int32) for name in ("ids", "target_bytes"))
        self._document_ids: np.ndarray = np.asarray(state["document_ids"], dtype=np.int64)
        self._first, self._scored = int(state["first"]), int(state["scored"])  # places in the whole
        self._n_ids = self._first + len(self._ids)  # of the whole, up to here
        if not (len(self._ids) == len(self._target_bytes) == len(self._document_ids) and 0 <= self._first <= self._scored <= self._n_ids):
            raise ValueError("its ids, bytes and places do not belong together")
        self._waiting: list[Piece] = []

    def _begin(self, seq_len: int) -> int:
        """Where the next row begins: its last label is the last of ``stride`` new ones. One that is longer than those before reaches no further back."""
        return max(self._first, self._scored + self.stride(seq_len) - seq_len)

    def _move_to(self, begin: int) -> None:
        """Leave the ids before ``begin`` behind and append what waits, in new arrays, since rows and states refer to the old ones."""
        kept = slice(begin - self._first, None)
        arrays = [self._ids[kept]], [self._target_bytes[kept]], [self._document_ids[kept]]
        for piece in self._waiting:
            for parts, part in zip(arrays, (piece.ids, piece.target_bytes, np.full(len(piece.ids), piece.document_id))):
                parts.append(part)
        self._ids, self._target_bytes, self._document_ids = (parts[0] if len(parts) == 1 else np.concatenate(parts) for parts in arrays)
        self._first, self._waiting = begin, []

    def _row(self, begin: int, seq_len: int) -> Row:
        self._move_to(begin)
        seen = self._scored - begin
        new = slice(seen + 1, seq_len + 1)
        n_new = len(self._ids[new])
        labels, target_bytes = np.full(seq_len, IGNORE, dtype=np.int32), np.zeros(seq_len, dtype=np.int32)
        labels[seen : seen + n_new], target_bytes[seen : seen + n_new] = self._ids[new], self._target_bytes[new]
        self._scored += n_new
        tokens, document_ids = _padded(self._ids[:seq_len], seq_len, 0), _padded(self._document_ids[:seq_len], seq_len, -1)
        return Row(tokens, labels, np.arange(seq_len, dtype=np.int32), document_ids, target_bytes)


def _padded(array: np.ndarray, seq_len: int, value: int) -> np.ndarray:
    return array if len(array) == seq_len else np.pad(array, (0, seq_len - len(array)), constant_values=value)
