"""What flows from a dataset to the model.

Legend: B rows, T positions. A document becomes pieces of rows; a row becomes
one line of a batch. Labels are shifted here, once: ``labels[t]`` is the token
after ``tokens[t]``. A label of −100 is not trained on; it is set by position
(the end of a document, padding), never by comparing ids, because the end-of-
document id may equal the padding id.
"""

from __future__ import annotations

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
    """Unique within a run: the position in the endless sequence of epochs."""
    n_bytes: int
    """UTF-8 length of the text."""


@dataclass(frozen=True)
class Row:
    """``seq_len`` positions of one logical stream; every array is (T,)."""

    tokens: np.ndarray
    """int64."""
    labels: np.ndarray
    """int64, −100 where nothing is trained."""
    positions: np.ndarray
    """int32, from 0 at the start of every document piece."""
    document_ids: np.ndarray
    """int64; attention stays inside equal ids."""
    target_bytes: np.ndarray
    """int32, UTF-8 bytes that the label stands for; 0 where the label is −100."""


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

    @classmethod
    def stack(cls, rows: list[Row], *, document_mask: bool = True) -> Batch:
        import torch

        arrays = {field.name: np.stack([getattr(row, field.name) for row in rows]) for field in fields(Row)}
        return cls(**{name: torch.from_numpy(array) for name, array in arrays.items()}, document_mask=document_mask)

    def to(self, device: torch.device) -> Batch:
        """The same batch on ``device``; from pinned memory the copy does not block."""
        moved = {}
        for field in fields(Row):
            tensor = getattr(self, field.name)
            if device.type == "cuda" and tensor.device.type == "cpu":
                tensor = tensor.pin_memory()
            moved[field.name] = tensor.to(device, non_blocking=True)
        return replace(self, **moved)
