"""Causal attention by kernels whose forward and backward are chosen apart.

Every kernel computes the same function from the same intermediates, the output
and the natural logarithm of every row's sum of exponentials. So the backward
pass may be another's than the forward pass, whichever is faster at it. Inside
documents: those that take cumulative lengths, which is all but cuDNN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from titanlm.errors import TitanError
from titanlm.kernels.flash2 import flash2_backward, flash2_forward
from titanlm.kernels.flash3 import flash3_backward, flash3_forward
from titanlm.kernels.flash4 import flash4_backward, flash4_forward
from titanlm.kernels.fused import hopper

Gradients = tuple[Tensor, Tensor, Tensor]


class Kernel(NamedTuple):
    """Letters as in ``CausalAttention``; L lengths (n + 1,) int32 or None; lse fp32, (B, H, T), with lengths (H, B·T)."""

    forward: Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]
    """(q, k, v, L) → (y, lse)."""
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None], Gradients]
    """(gradient of y, q, k, v, y, lse, L) → gradients of q, k, v."""


def _require_rows(lengths: Tensor | None) -> None:
    if lengths is not None:
        raise TitanError('model.attention_backend: cuDNN knows no documents within a row; use "flash4" or "auto", or set data.document_mask = false')


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    _require_rows(lengths)
    y, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None, True, 0.0, True, False)
    return y.transpose(1, 2), lse.squeeze(-1)


def _cudnn_backward(g: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, lengths: Tensor | None) -> Gradients:
    _require_rows(lengths)
    n, seed = q.shape[1], q.new_empty((), dtype=torch.int64)  # of a dropout that there is not
    heads_first = [x.transpose(1, 2) for x in (g, q, k, v, y)]
    parts = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(*heads_first, lse.unsqueeze(-1), seed, seed, None, None, None, n, n, 0.0, True)
    dq, dk, dv = (part.transpose(1, 2) for part in parts)
    return dq, dk, dv


KERNELS = {
    "cudnn": Kernel(_cudnn_forward, _cudnn_backward),
    "flash4": Kernel(flash4_forward, flash4_backward),
    "flash3": Kernel(flash3_forward, flash3_backward),
    "varlen": Kernel(flash2_forward, flash2_backward),
}
"""By the name that a config gives them."""


def copies(backward: str, n_heads: int, n_kv_heads: int, head_dim: int, device: torch.device) -> int:
    """How often keys and values are to be written out before attention whose backward pass is this kernel's: once, or for each query head.

    FlashAttention 4 adds up the gradients of query heads that share keys in
    fp32, atomically, in memory that is zeroed before and rounded after. Where
    that was measured, heads of 64 in pairs on an H200, in whole rows and in
    documents longer than those, one head to each is faster
    (``docs/performance.md``); for others it is not done.
    """
    measured = backward == "flash4" and n_heads == 2 * n_kv_heads and head_dim == 64
    return 2 if measured and hopper(device.index) else 1


class CausalAttention(torch.autograd.Function):
    """q (B, T, H, dh), k and v (B, T, K, dh), bf16 or fp16, by two of ``KERNELS`` → (B, T, H, dh).

    ``lengths`` (n + 1,) int32 are where the documents of all rows begin, one
    row after the other, and B·T as often as there is room; None: each row is one.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, forward: str, backward: str) -> Tensor:
        y, lse = KERNELS[forward].forward(q, k, v, lengths)
        ctx.save_for_backward(q, k, v, y, lse, lengths)
        ctx.kernel = backward
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = gradients
        return *KERNELS[ctx.kernel].backward(g.contiguous(), *ctx.saved_tensors), None, None, None
