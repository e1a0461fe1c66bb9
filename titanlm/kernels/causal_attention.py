"""Causal attention by cuDNN forward and, where it is installed, FlashAttention 4 backward.

Both compute the same function from the same intermediates: outputs and the
logarithm of every row's sum of exponentials, (B, H, T) fp32. So each direction
can be the faster of the two. FlashAttention 4: the package ``flash-attn-4``.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from titanlm.kernels.operator import operator

HAS_FLASH4 = importlib.util.find_spec("flash_attn") is not None and importlib.util.find_spec("flash_attn.cute") is not None


def _flash4_backward(g: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    from flash_attn.cute.interface import _flash_attn_bwd

    dq, dk, dv = _flash_attn_bwd(q, k, v, y, g, lse, causal=True, deterministic=torch.are_deterministic_algorithms_enabled())[:3]
    return dq, dk, dv


flash4_backward = operator(
    "flash4_backward(Tensor g, Tensor q, Tensor k, Tensor v, Tensor y, Tensor lse) -> (Tensor, Tensor, Tensor)",
    _flash4_backward,
    lambda g, q, k, v, y, lse: (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)),
)


class CausalAttention(torch.autograd.Function):
    """q (B, T, H, dh), k and v (B, T, K, dh), bf16 → (B, T, H, dh)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads_first = (q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        y, lse, _, _, _, _, seed, offset, _ = torch.ops.aten._scaled_dot_product_cudnn_attention(*heads_first, None, True, 0.0, True, False)
        ctx.save_for_backward(q, k, v, y, lse, seed, offset)
        return y.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, y, lse, seed, offset = ctx.saved_tensors
        (g,) = gradients
        if HAS_FLASH4:
            dq, dk, dv = flash4_backward(g.contiguous(), q, k, v, y.transpose(1, 2), lse.squeeze(-1))
            return dq, dk, dv
        n = q.shape[1]
        parts = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            g.transpose(1, 2), q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), y, lse, seed, offset, None, None, None, n, n, 0.0, True
        )
        dq, dk, dv = (part.transpose(1, 2) for part in parts)
        return dq, dk, dv
