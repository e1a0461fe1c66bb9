"""Documents of a batch as kernels of variable length want them: all rows one after the other, and where each document begins."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def cumulative_lengths(ids: Tensor, max_documents: int | None) -> Tensor:
    """(B, T) ids → (max_documents + 1,) int32: where runs of equal ids begin, each row apart, then B·T as often as there is room.

    A run is a document, that of padding too. More runs than ``max_documents``
    end the process's work on its device with an assertion, since nothing waits
    to look. None: they are counted, for which the host waits.
    """
    begins = F.pad(ids[:, 1:] != ids[:, :-1], (1, 0), value=True).flatten()
    if max_documents is None:
        max_documents = int(begins.sum())
    lengths = torch.nonzero_static(begins, size=max_documents + 1, fill_value=ids.numel()).squeeze(1).int()
    torch._assert_async(lengths[-1] == ids.numel(), "the batch has more documents than its max_documents")
    return lengths


def flat(lengths: Tensor | None, *tensors: Tensor) -> list[Tensor]:
    """(B, T, ...) → (B·T, ...) where there are lengths."""
    return [x if lengths is None else x.flatten(0, 1) for x in tensors]


def bounds(lengths: Tensor | None, n: int) -> dict[str, Any]:
    """What FlashAttention 3 and 4 want to be told of lengths in rows of ``n`` positions."""
    longest = None if lengths is None else n
    return {"cu_seqlens_q": lengths, "cu_seqlens_k": lengths, "max_seqlen_q": longest, "max_seqlen_k": longest}
