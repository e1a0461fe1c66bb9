"""FlashAttention 2, which comes with torch (``torch.nn.attention.varlen`` is made of it): its kernels of variable length, for Ampere and later."""

from __future__ import annotations

import torch
from torch import Tensor

from titanlm.kernels.lengths import flat


def flash2_forward(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """As ``Kernel.forward``, but that lse is (H, B·T) always."""
    n = q.shape[1]
    lengths = _lengths(q, lengths)
    y, lse = torch.ops.aten._flash_attention_forward(*flat(lengths, q, k, v), lengths, lengths, n, n, 0.0, True, False)[:2]
    return y.view(q.shape), lse


def flash2_backward(g: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """As ``Kernel.backward``, with that lse; deterministic where torch is told to be."""
    n = q.shape[1]
    lengths = _lengths(q, lengths)
    seed = q.new_empty(2, dtype=torch.uint64), q.new_empty(0)  # of a dropout that there is not
    parts = torch.ops.aten._flash_attention_backward(*flat(lengths, g, q, k, v, y), lse, lengths, lengths, n, n, 0.0, True, *seed)
    dq, dk, dv = (part.view(x.shape) for part, x in zip(parts, (q, k, v), strict=True))
    return dq, dk, dv


def _lengths(q: Tensor, lengths: Tensor | None) -> Tensor:
    """Those of whole rows, where there are none."""
    n_rows, n = q.shape[:2]
    return torch.arange(0, n_rows * n + 1, n, dtype=torch.int32, device=q.device) if lengths is None else lengths
