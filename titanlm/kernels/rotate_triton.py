"""The Triton kernels of ``rotated_heads``, which see."""

from __future__ import annotations

import torch
from torch import Tensor

from titanlm.kernels.jit import jit, tl, triton

_ROWS = 8
"""Positions a program has in hand, all their heads one after the other. Measured on an H200 at 8 and 4 heads of 64."""


@jit
def _rotated(
    qkv, cos, sin, gain, q, k, n_rows, eps,
    STRIDE: tl.constexpr, H: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr, GAIN: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    half = tl.arange(0, HALF)
    mask = (rows < n_rows)[:, None] & (half < HALF)[None, :]
    table = rows[:, None] * HALF + half[None, :]
    c = tl.load(cos + table, mask=mask, other=0.0)
    s = tl.load(sin + table, mask=mask, other=0.0)
    for head in tl.static_range(H + K):
        source = qkv + rows[:, None] * STRIDE + head * 2 * HALF + half[None, :]
        x1 = tl.load(source, mask=mask, other=0.0).to(tl.float32)
        x2 = tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)
        if NORM:
            scale = tl.rsqrt((tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)) / (2 * HALF) + eps)[:, None]
            x1 *= scale
            x2 *= scale
        y1 = x1 * c - x2 * s
        y2 = x2 * c + x1 * s
        if head < H and GAIN:
            factor = tl.load(gain + head)
            y1 *= factor
            y2 *= factor
        if head < H:
            target = q + rows[:, None] * (H * 2 * HALF) + head * 2 * HALF + half[None, :]
        else:
            target = k + rows[:, None] * (K * 2 * HALF) + (head - H) * 2 * HALF + half[None, :]
        tl.store(target, y1.to(q.dtype.element_ty), mask=mask)
        tl.store(target + HALF, y2.to(q.dtype.element_ty), mask=mask)


@jit
def _rotated_backward(
    qkv, cos, sin, gain, g_q, g_k, g_v, d_qkv, sums, n_rows, eps,
    q_row, q_head, k_row, k_head, v_row, v_head, T,  q_batch, k_batch, v_batch,
    STRIDE: tl.constexpr, H: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr, GAIN: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    half = tl.arange(0, HALF)
    mask = (rows < n_rows)[:, None] & (half < HALF)[None, :]
    table = rows[:, None] * HALF + half[None, :]
    c = tl.load(cos + table, mask=mask, other=0.0)
    s = tl.load(sin + table, mask=mask, other=0.0)
    batch, place = rows // T, rows % T
    q_rows = (batch * q_batch + place * q_row)[:, None] + half[None, :]
    k_rows = (batch * k_batch + place * k_row)[:, None] + half[None, :]
    v_rows = (batch * v_batch + place * v_row)[:, None] + half[None, :]
    for head in tl.static_range(H + K):
        own = rows[:, None] * STRIDE + head * 2 * HALF + half[None, :]
        x1 = tl.load(qkv + own, mask=mask, other=0.0).to(tl.float32)
        x2 = tl.load(qkv + own + HALF, mask=mask, other=0.0).to(tl.float32)
        if head < H:
            gradient = g_q + q_rows + head * q_head
        else:
            gradient = g_k + k_rows + (head - H) * k_head
        g1 = tl.load(gradient, mask=mask, other=0.0).to(tl.float32)
        g2 = tl.load(gradient + HALF, mask=mask, other=0.0).to(tl.float32)
        # Back by the angle, then through the norm.
        u1 = g1 * c + g2 * s
        u2 = g2 * c - g1 * s
        if NORM:
            scale = tl.rsqrt((tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)) / (2 * HALF) + eps)[:, None]
            x1 *= scale
            x2 *= scale
        along = tl.sum(u1 * x1, 1) + tl.sum(u2 * x2, 1)
        if head < H and GAIN:
            tl.store(sums + tl.program_id(0) * H + head, tl.sum(along, 0))
            factor = tl.load(gain + head)
            u1 *= factor
            u2 *= factor
            along *= factor
        if NORM:
            along = (along / (2 * HALF))[:, None]
            u1 = scale * (u1 - x1 * along)
            u2 = scale * (u2 - x2 * along)
        tl.store(d_qkv + own, u1.to(d_qkv.dtype.element_ty), mask=mask)
        tl.store(d_qkv + own + HALF, u2.to(d_qkv.dtype.element_ty), mask=mask)
    for head in tl.static_range(K):
        own = rows[:, None] * STRIDE + (H + K + head) * 2 * HALF + half[None, :]
        value = g_v + v_rows + head * v_head
        tl.store(d_qkv + own, tl.load(value, mask=mask, other=0.0), mask=mask)
        tl.store(d_qkv + own + HALF, tl.load(value + HALF, mask=mask, other=0.0), mask=mask)


def rotated(qkv: Tensor, cos: Tensor, sin: Tensor, gain: Tensor | None, n_heads: int, n_kv_heads: int, eps: float | None) -> tuple[Tensor, Tensor]:
    *rows, stride = qkv.shape
    head_dim = stride // (n_heads + 2 * n_kv_heads)
    n_rows = qkv.numel() // stride
    q = qkv.new_empty(*rows, n_heads, head_dim)
    k = qkv.new_empty(*rows, n_kv_heads, head_dim)
    _rotated[(triton.cdiv(n_rows, _ROWS),)](
        qkv, cos, sin, qkv if gain is None else gain, q, k, n_rows, eps or 0.0,
        STRIDE=stride, H=n_heads, K=n_kv_heads, HALF=head_dim // 2, NORM=eps is not None, GAIN=gain is not None, ROWS=_ROWS, num_warps=1,
    )  # fmt: skip
    return q, k


def rotated_backward(
    g_q: Tensor, g_k: Tensor, g_v: Tensor, qkv: Tensor, cos: Tensor, sin: Tensor, gain: Tensor | None, n_heads: int, n_kv_heads: int, eps: float | None
) -> tuple[Tensor, Tensor]:
    stride = qkv.shape[-1]
    n_rows = qkv.numel() // stride
    programs = triton.cdiv(n_rows, _ROWS)
    d_qkv = torch.empty_like(qkv)
    sums = torch.empty(programs if gain is not None else 0, n_heads, device=qkv.device, dtype=torch.float32)
    _rotated_backward[(programs,)](
        qkv, cos, sin, qkv if gain is None else gain, g_q, g_k, g_v, d_qkv, sums, n_rows, eps or 0.0,
        g_q.stride(1), g_q.stride(2), g_k.stride(1), g_k.stride(2), g_v.stride(1), g_v.stride(2), qkv.shape[1], g_q.stride(0), g_k.stride(0), g_v.stride(0),
        STRIDE=stride, H=n_heads, K=n_kv_heads, HALF=stride // (n_heads + 2 * n_kv_heads) // 2,
        NORM=eps is not None, GAIN=gain is not None, ROWS=_ROWS, num_warps=1,
    )  # fmt: skip
    return d_qkv, sums.sum(0)
