"""FlashAttention 3, built from ``hopper/`` of Dao-AILab/flash-attention: kernels for Hopper alone."""

from __future__ import annotations

import torch
from torch import Tensor

from titanlm.kernels.lengths import bounds, flat, shapes


@torch.library.custom_op("titanlm::flash3_forward", mutates_args=(), schema="(Tensor q, Tensor k, Tensor v, Tensor? lengths) -> (Tensor, Tensor)")
def flash3_forward(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """As ``Kernel.forward``."""
    import flash_attn_interface  # noqa: F401 - which registers the operators

    y, lse = torch.ops.flash_attn_3.fwd(*flat(lengths, q, k, v), **bounds(lengths, q.shape[1]), is_causal=True, num_splits=1)[:2]
    return y.view(q.shape), lse


@flash3_forward.register_fake
def _forward_shapes(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    return shapes(q, lengths)


_BACKWARD = "(Tensor g, Tensor q, Tensor k, Tensor v, Tensor y, Tensor lse, Tensor? lengths) -> (Tensor, Tensor, Tensor)"


@torch.library.custom_op("titanlm::flash3_backward", mutates_args=(), schema=_BACKWARD)
def flash3_backward(g: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """As ``Kernel.backward``; deterministic where torch is told to be."""
    import flash_attn_interface  # noqa: F401 - which registers the operators

    gradients = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    settings = {**bounds(lengths, q.shape[1]), "is_causal": True, "deterministic": torch.are_deterministic_algorithms_enabled()}
    torch.ops.flash_attn_3.bwd(*flat(lengths, g, q, k, v, y), lse, *flat(lengths, *gradients), **settings)
    return gradients


@flash3_backward.register_fake
def _backward_shapes(g: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
