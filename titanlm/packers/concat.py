"""Documents one after the other, cut into rows: no padding, no token lost."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from titanlm.batch import IGNORE, Document, Row
from titanlm.registry import register


@dataclass(frozen=True)
class ConcatConfig:
    """The concatenating packer has no settings."""


class _Piece(NamedTuple):
    """What is left of a document: views into its arrays, which nobody changes."""

    ids: np.ndarray
    target_bytes: np.ndarray
    document_id: int


@register("packer", "concat")
class ConcatPacker:
    """Rows of T positions out of T + 1 ids of the concatenated documents.

    Consecutive rows share one id, the last label of one and the first token of
    the next, so that every token after the first is a label exactly once. The
    row length may change from one ``pop`` to the next. Boundaries between
    documents are resolved later (``titanlm.packers.boundaries``).
    """

    def __init__(self, config: ConcatConfig) -> None:
        self._pieces: deque[_Piece] = deque()
        self._n_ids = 0

    def add(self, document: Document, target_bytes: np.ndarray) -> None:
        """Append a document; ``target_bytes`` (n,) belongs to its ids one to one."""
        if len(document.ids):
            self._pieces.append(_Piece(document.ids, target_bytes, document.document_id))
            self._n_ids += len(document.ids)

    def pop(self, seq_len: int) -> Row | None:
        """The next row, or None while there are fewer than ``seq_len + 1`` ids."""
        return self._cut(seq_len) if self._n_ids > seq_len else None

    def flush(self, seq_len: int) -> Row | None:
        """At the end of the data: the rest as rows, the last one padded; None when no label is left."""
        if self._n_ids > 1:
            return self._cut(seq_len)
        self._pieces.clear()
        self._n_ids = 0
        return None

    def state(self) -> dict[str, Any]:
        """The pieces by reference: taking a state costs no copy."""
        return {
            "ids": [piece.ids for piece in self._pieces],
            "target_bytes": [piece.target_bytes for piece in self._pieces],
            "document_ids": [piece.document_id for piece in self._pieces],
        }

    def restore(self, state: dict[str, Any]) -> None:
        self._pieces = deque(
            _Piece(np.asarray(ids, dtype=np.int32), np.asarray(target_bytes, dtype=np.int32), int(document_id))
            for ids, target_bytes, document_id in zip(state["ids"], state["target_bytes"], state["document_ids"], strict=True)
        )
        self._n_ids = sum(len(piece.ids) for piece in self._pieces)

    def _cut(self, seq_len: int) -> Row:
        """Take ``seq_len`` ids (or all) off the front and look at the one after them."""
        head: list[_Piece] = []
        wanted = seq_len + 1
        for piece in self._pieces:
            head.append(_Piece(piece.ids[:wanted], piece.target_bytes[:wanted], piece.document_id))
            wanted -= len(head[-1].ids)
            if wanted == 0:
                break
        ids = np.concatenate([piece.ids for piece in head])
        target_bytes = np.concatenate([piece.target_bytes for piece in head])
        document_ids = np.repeat([piece.document_id for piece in head], [len(piece.ids) for piece in head])
        self._drop(min(seq_len, self._n_ids))

        n_tokens, n_labels = min(seq_len, len(ids)), len(ids) - 1
        row = Row(
            tokens=np.zeros(seq_len, dtype=np.int64),
            labels=np.full(seq_len, IGNORE, dtype=np.int64),
            positions=np.arange(seq_len, dtype=np.int32),
            document_ids=np.full(seq_len, -1, dtype=np.int64),
            target_bytes=np.zeros(seq_len, dtype=np.int32),
        )
        row.tokens[:n_tokens] = ids[:n_tokens]
        row.document_ids[:n_tokens] = document_ids[:n_tokens]
        row.labels[:n_labels] = ids[1:]
        row.target_bytes[:n_labels] = target_bytes[1:]
        return row

    def _drop(self, n_ids: int) -> None:
        self._n_ids -= n_ids
        while n_ids:
            ids, target_bytes, document_id = self._pieces.popleft()
            if len(ids) > n_ids:
                self._pieces.appendleft(_Piece(ids[n_ids:], target_bytes[n_ids:], document_id))
                return
            n_ids -= len(ids)
