"""Where a document ends inside a row, decided in one place for every packer.

Whether a label may be the first token of the next document is a choice of the
run (`data.document_mask`), not of a packer. But a packer cuts the rows, and
after the cut nobody can tell whether a row's last label still belongs to the
document of its last token. So the mark travels with the tokens: before a
document reaches the packer, the byte count of its first token is stored as its
bitwise complement. Counts are never negative, so a negative one marks the
first token of a document wherever a packer has carried it, and nothing is lost.

A packer therefore only moves arrays: ``labels`` are the tokens that follow
(−100 where none does), ``target_bytes`` go with the labels, ``document_ids``
with the tokens (−1 for padding). ``finish`` makes the row that a model sees. A
packer that masks boundaries itself is right as well, with masking.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from titanlm.batch import IGNORE, Row


def mark_start(target_bytes: np.ndarray) -> np.ndarray:
    """A copy of a document's (n,) target bytes with the first one marked."""
    marked = target_bytes.astype(np.int32)
    marked[:1] = ~marked[:1]
    return marked


def finish(row: Row, *, document_mask: bool) -> Row:
    """The row with its marks resolved; every array (T,).

    With ``document_mask`` the first token of a document is no label and
    positions restart at 0 where the document id changes. Without, the row is
    one text: every following token is a label, positions are 0 to T − 1.
    """
    starts = row.target_bytes < 0
    index = np.arange(len(row.tokens), dtype=np.int32)
    if not document_mask:
        target_bytes = np.where(starts, ~row.target_bytes, row.target_bytes)
        return replace(row, positions=index, target_bytes=target_bytes)
    labels = np.where(starts, IGNORE, row.labels)
    changes = np.concatenate([[True], row.document_ids[1:] != row.document_ids[:-1]])
    positions = index - np.maximum.accumulate(np.where(changes, index, 0))
    return replace(
        row,
        labels=labels,
        positions=positions.astype(np.int32),
        target_bytes=np.where(labels == IGNORE, 0, row.target_bytes).astype(np.int32),
    )
