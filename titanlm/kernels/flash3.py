"""FlashAttention 3, built from ``hopper/`` of Dao-AILab/flash-attention: kernels for Hopper alone."""

from __future__ import annotations

import torch
from torch import Tensor

from titanlm.kernels.flash import backward_operator, forward_operator
from titanlm.kernels.lengths import bounds, flat


def _forward(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    import flash_attn_interface  # noqa: F401 - which registers the operators

    y, lse = torch.ops.flash_attn_3.fwd(*flat(lengths, q, k, v), **bounds(lengths, q.shape[1]), is_causal=True, num_splits=1)[:2]
    return y.view(q.shape), lse


def _backward(g: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Deterministic where torch is told to be."""
    import flash_attn_interface  # noqa: F401 - which registers the operators

    gradients = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    settings = {**bounds(lengths, q.shape[1]), "is_causal": True, "deterministic": torch.are_deterministic_algorithms_enabled()}
    torch.ops.flash_attn_3.bwd(*flat(lengths, g, q, k, v, y), lse, *flat(lengths, *gradients), **settings)
    return gradients


flash3_forward = forward_operator("flash3_forward", _forward)
flash3_backward = backward_operator("flash3_backward", _backward)
