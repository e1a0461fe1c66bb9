"""Where a document ends inside a row, decided in one place for every packer.

Whether a label may be the first token of the next document is a choice of the
run (`data.document_mask`, `data.boundary_label`), not of a packer. But a packer
cuts the rows, and after the cut nobody can tell whether a row's last label
still belongs to the document of its last token. So marks travel with the
tokens, inside their byte counts, which are never negative and never reach 2³⁰:

* the count of a document's first token is stored as its bitwise complement, so
  a negative one is the start of a document wherever a packer has carried it;
* the count of a token that is read but not predicted (`Document.trained`) has
  2³⁰ added to it.

A packer therefore only moves arrays: ``labels`` are the tokens that follow
(−100 where none does), ``target_bytes`` go with the labels, ``document_ids``
with the tokens (−1 for padding). ``finish`` makes the row that a model sees. A
packer that masks boundaries itself is right as well, with masking.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from titanlm.batch import IGNORE, Row

UNTRAINED = 1 << 30

BoundaryLabel = Literal["ignore", "next"]


def mark(target_bytes: np.ndarray, trained: np.ndarray | None = None) -> np.ndarray:
    """A document's (n,) target bytes as int32, marked; in place where they are int32 already. ``trained`` as in ``Document``."""
    marked = target_bytes.astype(np.int32, copy=False)
    if trained is not None:
        marked[~trained] += UNTRAINED
    marked[:1] = ~marked[:1]
    return marked


def finish(row: Row, *, document_mask: bool, boundary_label: BoundaryLabel = "ignore", pad_id: int = 0) -> Row:
    """A row, or a stack of them, with the marks resolved; every array is (T,) or (R, T), of the dtypes that ``Row`` says.

    With ``document_mask`` positions restart at 0 where the document id changes,
    and the first token of a document is no label unless ``boundary_label`` is
    "next". Without, the row is one text: every following token is a label,
    positions are 0 to T − 1. A token that is not trained is never a label.
    Padding holds ``pad_id``.
    """
    marked = row.target_bytes
    target_bytes = marked ^ (marked >> 31)  # the complement, where negative
    labels = row.labels.astype(np.int64)  # a copy, whatever they are
    if document_mask and boundary_label == "ignore":
        labels[marked < 0] = IGNORE
    if target_bytes.max(initial=0) >= UNTRAINED:
        labels[target_bytes >= UNTRAINED] = IGNORE
        target_bytes &= UNTRAINED - 1
    target_bytes[labels == IGNORE] = 0
    if document_mask:
        # Every run of equal ids counts from its own start; repeating the few starts is cheaper than a running maximum.
        begins = document_starts(row.document_ids)
        lengths = np.diff(begins, append=marked.size)
        positions = (np.arange(marked.size, dtype=np.int32) - np.repeat(begins.astype(np.int32), lengths)).reshape(marked.shape)
    else:
        positions = np.broadcast_to(np.arange(marked.shape[-1], dtype=np.int32), marked.shape).copy()
    tokens = row.tokens.astype(np.int64, copy=False)
    if pad_id and (row.document_ids < 0).any():
        tokens = np.where(row.document_ids < 0, pad_id, tokens)
    return Row(tokens=tokens, labels=labels, positions=positions, document_ids=row.document_ids, target_bytes=target_bytes)


def document_starts(document_ids: np.ndarray) -> np.ndarray:
    """Flat indices, ascending, where a run of equal ids begins: (T,) or (R, T) ids, each row apart."""
    changes = np.ones(document_ids.shape, dtype=bool)
    np.not_equal(document_ids[..., 1:], document_ids[..., :-1], out=changes[..., 1:])
    return np.flatnonzero(changes)
