"""Queries and keys normed, rotated and scaled in one pass over memory, out of one matrix product for all three heads.

What lies between the product and attention is three functions of rows of
head_dim numbers. In one kernel each direction reads and writes them once, and
the gradient of the product's output is written in one piece: that of the values
is copied in. Computed in fp32 and rounded once.

Some attention is faster if every query head has keys and values of its own.
They are then written out as often as they are shared, and the gradients of the
copies are summed where they are read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from titanlm.kernels.operator import operator
from titanlm.models.layers.rope import rotate


def plain_rotated_heads(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    norms: Tensor | None,
    gain: Tensor | None,
    n_heads: int,
    n_kv_heads: int,
    eps: float | None,
    copies: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The twin in plain torch of ``RotatedHeads``."""
    q, k, v = qkv.unflatten(-1, (n_heads + 2 * n_kv_heads, -1)).split([n_heads, n_kv_heads, n_kv_heads], -2)
    q, k = q.to(cos.dtype), k.to(cos.dtype)
    if eps is not None:
        q, k = (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) for x in (q, k))
    if norms is not None:
        q, k = q * norms[0], k * norms[1]
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    if gain is not None:
        q = q * gain[:, None]
    k, copied = (x.repeat_interleave(copies, -2) for x in (k, v))
    return q.to(v.dtype), k.to(v.dtype), copied, v


def _forward(*arguments: Any) -> list[Tensor]:
    from titanlm.kernels.rotate_triton import rotated

    return rotated(*arguments)


def _backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    from titanlm.kernels.rotate_triton import rotated_backward

    return rotated_backward(*arguments)


def empty_heads(qkv: Tensor, n_heads: int, n_kv_heads: int, copies: int) -> list[Tensor]:
    """What the forward kernel writes: q and k, and v where there are several ``copies``."""
    head_dim = qkv.shape[-1] // (n_heads + 2 * n_kv_heads)
    counts = (n_heads, *[n_kv_heads * copies] * (1 if copies == 1 else 2))
    return [qkv.new_empty(*qkv.shape[:-1], heads, head_dim) for heads in counts]


_ARGUMENTS = "Tensor qkv, Tensor cos, Tensor sin, Tensor? norms, Tensor? gain, int n_heads, int n_kv_heads, float? eps, int copies"
heads_forward = operator(
    f"rotated_heads({_ARGUMENTS}) -> Tensor[]",
    _forward,
    lambda qkv, cos, sin, norms, gain, n_heads, n_kv_heads, eps, copies: empty_heads(qkv, n_heads, n_kv_heads, copies),
)
heads_backward = operator(
    f"rotated_heads_backward(Tensor g_q, Tensor g_k, Tensor g_v, Tensor? g_own, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    _backward,
    lambda g_q, g_k, g_v, g_own, qkv, cos, sin, norms, gain, n_heads, *_: (torch.empty_like(qkv), cos.new_empty(2, g_q.shape[-1]), cos.new_empty(n_heads)),
)


class RotatedHeads(torch.autograd.Function):
    """(B, T, (H + 2K)·dh) → q (B, T, H, dh), k and v (B, T, C·K, dh), and if C > 1 and ``own`` the values as they are, (B, T, K, dh).

    ``cos`` and ``sin`` (B, T, 1, dh/2) fp32 as ``rotary_tables`` gives them,
    ``norms`` (2, dh) fp32 the weights of the norms of queries and keys or None,
    ``gain`` (H,) fp32 of the queries or None, then H, K, ``eps`` of the norms or
    None for no norms, how often each key and value is written one after the
    other, C, and ``own``. Values not copied are a view. dh is a power of two.
    """

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, norms: Tensor | None, gain: Tensor | None, n_heads: int, n_kv_heads: int, eps: float | None,
        copies: int, own: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        ctx.save_for_backward(qkv, cos, sin, norms, gain)
        ctx.shape = n_heads, n_kv_heads, eps, copies
        made = heads_forward(qkv, cos, sin, norms, gain, *ctx.shape)
        values = qkv.unflatten(-1, (n_heads + 2 * n_kv_heads, -1))[..., n_heads + n_kv_heads :, :]
        return (*made, values) if own or copies == 1 else tuple(made)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        qkv, cos, sin, norms, gain = ctx.saved_tensors
        # Attention by plain products gives those of keys with positions last.
        g_q, g_k, g_v, *rest = (gradient if gradient.stride(-1) == 1 else gradient.contiguous() for gradient in gradients)
        of_qkv, of_norms, of_gain = heads_backward(g_q, g_k, g_v, rest[0] if rest else None, qkv, cos, sin, norms, gain, *ctx.shape)
        return of_qkv, None, None, None if norms is None else of_norms, None if gain is None else of_gain, None, None, None, None, None
