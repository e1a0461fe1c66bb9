"""What flows from a dataset to the model.

Legend: B rows, T positions. A document becomes pieces of rows; a row becomes
one line of a batch. Labels are shifted here, once: ``labels[t]`` is the token
after ``tokens[t]``. A label of −100 is not trained on; it is set by position
(the end of a document, padding), never by comparing ids, because the end-of-
document id may equal the padding id.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch
    from torch import Tensor

IGNORE = -100


@dataclass(frozen=True)
class Document:
    """One tokenised document of a dataset."""

    ids: np.ndarray
    """(n,) int32; special ids included. Never changed in place: states refer to it."""
    document_id: int
    """Unique within a run: the place in the endless sequence of epochs (``titanlm.datasets.documents``)."""
    n_bytes: int | None
    """UTF-8 length of the text; None where only tokens are known."""
    trained: np.ndarray | None = None
    """(n,) bool, False for ids that are read but not predicted, such as the user's turns of a chat; None: all are predicted."""
    target_bytes: np.ndarray | None = None
    """(n,) int32, what the tokenizer counts for the ids, the receiver's to change; None: to be counted."""


@dataclass(frozen=True)
class Row:
    """``seq_len`` positions of one logical stream; every array is (T,)."""

    tokens: np.ndarray
    """int64; a packer may leave them int32."""
    labels: np.ndarray
    """int64 or int32 likewise, −100 where nothing is trained."""
    positions: np.ndarray
    """int32, from 0 at the start of every document piece."""
    document_ids: np.ndarray
    """int64; attention stays inside equal ids."""
    target_bytes: np.ndarray
    """int32, UTF-8 bytes that the label stands for; 0 where the label is −100."""


def padding(seq_len: int) -> Row:
    """A row of nothing."""
    return Row(
        tokens=np.zeros(seq_len, dtype=np.int64),
        labels=np.full(seq_len, IGNORE, dtype=np.int64),
        positions=np.arange(seq_len, dtype=np.int32),
        document_ids=np.full(seq_len, -1, dtype=np.int64),
        target_bytes=np.zeros(seq_len, dtype=np.int32),
    )


def stacked(rows: Sequence[Row]) -> Row:
    """R rows of packers as one whose arrays are (R, T); positions are those of the first, ``finish`` computes them."""
    arrays = {name: np.stack([getattr(row, name) for row in rows]) for name in ("tokens", "labels", "document_ids", "target_bytes")}
    return Row(positions=np.broadcast_to(rows[0].positions, arrays["tokens"].shape), **arrays)


def document_bound(ids: np.ndarray) -> int:
    """``Batch.max_documents`` of (B, T) ids: a power of two, and at least a 512th of the positions.

    A tensor of that length is part of a compiled graph, so the bound should be
    the same for batch after batch, with documents more or fewer. Room that is
    not needed costs kernels little.
    """
    n_runs = len(ids) + max(1, int(np.count_nonzero(ids[:, 1:] != ids[:, :-1])))  # rows of a document each are not to be a shape of their own
    return 1 << (max(int(n_runs), ids.size // 512) - 1).bit_length()


@dataclass(frozen=True)
class Batch:
    """B rows on one device; every tensor is (B, T)."""

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    document_ids: Tensor
    target_bytes: Tensor
    document_mask: bool = True
    """False: plain causal attention over the row, whatever ``document_ids`` says."""
    n_sources: int = 1
    """Datasets that are mixed; a position's source is its document id modulo this."""
    max_documents: int | None = None
    """No fewer than there are runs of equal ids in all rows; None: not counted, or not asked for."""

    @classmethod
    def of(cls, rows: Row, *, document_mask: bool = True, n_sources: int = 1) -> Batch:
        """A stack of finished rows; the tensors share its memory."""
        import torch

        arrays = {field.name: torch.from_numpy(getattr(rows, field.name)) for field in fields(Row)}
        max_documents = document_bound(rows.document_ids) if document_mask else None
        return cls(**arrays, document_mask=document_mask, n_sources=n_sources, max_documents=max_documents)

    def pinned(self) -> Batch:
        """The same batch in page-locked memory, from which copies to a GPU do not block."""
        return replace(self, **{field.name: getattr(self, field.name).pin_memory() for field in fields(Row)})

    def unlabelled(self) -> Batch:
        """The same batch with nothing to predict."""
        return replace(self, labels=self.labels.new_full(self.labels.shape, IGNORE), target_bytes=self.target_bytes.new_zeros(self.target_bytes.shape))

    def to(self, device: torch.device) -> Batch:
        """The same batch on ``device``."""
        return replace(self, **{field.name: getattr(self, field.name).to(device, non_blocking=True) for field in fields(Row)})
