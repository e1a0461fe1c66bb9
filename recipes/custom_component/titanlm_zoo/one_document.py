"""A document a row: padded when it is shorter, continued in the next row when it is longer."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np

from titanlm.batch import IGNORE, Document, Row
from titanlm.registry import register


@dataclass(frozen=True)
class OneDocumentConfig:
    """No settings."""


@register("packer", "one_document")
class OneDocument:
    """Rows of T positions out of at most T + 1 ids of one document.

    Consecutive rows of a long document share one id, so every token but its
    first is a label exactly once. Documents of one id have no label and are
    passed over.
    """

    def __init__(self, config: OneDocumentConfig) -> None:
        self._waiting: deque[tuple[np.ndarray, np.ndarray, int]] = deque()

    def add(self, document: Document, target_bytes: np.ndarray) -> None:
        if len(document.ids) > 1:
            self._waiting.append((document.ids, target_bytes, document.document_id))

    def pop(self, seq_len: int) -> Row | None:
        if not self._waiting:
            return None
        ids, target_bytes, document_id = self._waiting.popleft()
        if len(ids) > seq_len + 1:
            self._waiting.appendleft((ids[seq_len:], target_bytes[seq_len:], document_id))
        n = min(seq_len, len(ids) - 1)
        row = Row(
            tokens=np.zeros(seq_len, dtype=np.int64),
            labels=np.full(seq_len, IGNORE, dtype=np.int64),
            positions=np.arange(seq_len, dtype=np.int32),
            document_ids=np.full(seq_len, -1, dtype=np.int64),
            target_bytes=np.zeros(seq_len, dtype=np.int32),
        )
        row.tokens[:n], row.labels[:n], row.target_bytes[:n], row.document_ids[:n] = ids[:n], ids[1 : n + 1], target_bytes[1 : n + 1], document_id
        return row

    def flush(self, seq_len: int) -> Row | None:
        return self.pop(seq_len)

    def state(self) -> dict[str, Any]:
        return {"waiting": [list(document) for document in self._waiting]}

    def restore(self, state: dict[str, Any]) -> None:
        self._waiting = deque((np.asarray(ids), np.asarray(target_bytes), int(number)) for ids, target_bytes, number in state["waiting"])
