"""The Triton kernels of ``rotated_heads``, which see."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from titanlm.kernels.jit import jit, tl, triton
from titanlm.kernels.rotate import empty_heads

_ROWS = 8
"""Positions a program has in hand, all their heads one after the other. Measured on an H200 at 8 and 4 heads of 64."""


@jit
def _rotated(
    qkv, cos, sin, norms, gain, q, k, v, n_rows, eps,
    STRIDE: tl.constexpr, H: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr, COPIES: tl.constexpr,
    NORM: tl.constexpr, LEARNED: tl.constexpr, GAIN: tl.constexpr, ROWS: tl.constexpr,
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
        if LEARNED:
            own = norms + half[None, :] if head < H else norms + 2 * HALF + half[None, :]
            x1 *= tl.load(own)
            x2 *= tl.load(own + HALF)
        y1 = x1 * c - x2 * s
        y2 = x2 * c + x1 * s
        if head < H and GAIN:
            factor = tl.load(gain + head)
            y1 *= factor
            y2 *= factor
        if head < H:
            target = q + rows[:, None] * (H * 2 * HALF) + head * 2 * HALF + half[None, :]
        else:
            target = k + rows[:, None] * (K * COPIES * 2 * HALF) + (head - H) * COPIES * 2 * HALF + half[None, :]
        for copy in tl.static_range(1 if head < H else COPIES):
            tl.store(target + copy * 2 * HALF, y1.to(q.dtype.element_ty), mask=mask)
            tl.store(target + copy * 2 * HALF + HALF, y2.to(q.dtype.element_ty), mask=mask)
    if COPIES > 1:
        for head in tl.static_range(K):
            source = qkv + rows[:, None] * STRIDE + (H + K + head) * 2 * HALF + half[None, :]
            x1 = tl.load(source, mask=mask, other=0.0)
            x2 = tl.load(source + HALF, mask=mask, other=0.0)
            target = v + rows[:, None] * (K * COPIES * 2 * HALF) + head * COPIES * 2 * HALF + half[None, :]
            for copy in tl.static_range(COPIES):
                tl.store(target + copy * 2 * HALF, x1, mask=mask)
                tl.store(target + copy * 2 * HALF + HALF, x2, mask=mask)


@jit
def _rotated_backward(
    qkv, cos, sin, norms, gain, g_q, g_k, g_v, g_own, d_qkv, norm_sums, gain_sums, n_rows, eps,
    T, q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, own_batch, own_row, own_head,
    STRIDE: tl.constexpr, H: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr, COPIES: tl.constexpr,
    NORM: tl.constexpr, LEARNED: tl.constexpr, GAIN: tl.constexpr, OWN: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    rows = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    half = tl.arange(0, HALF)
    mask = (rows < n_rows)[:, None] & (half < HALF)[None, :]
    table = rows[:, None] * HALF + half[None, :]
    c = tl.load(cos + table, mask=mask, other=0.0)
    s = tl.load(sin + table, mask=mask, other=0.0)
    batch, place = rows // T, rows % T
    q_rows = (batch * q_batch + place * q_row)[:, None] + half[None, :]
    k_rows = (batch * k_batch + place * k_row)[:, None] + half[None, :]
    v_rows = (batch * v_batch + place * v_row)[:, None] + half[None, :]
    for part in tl.static_range(2):
        sum1 = tl.zeros((HALF,), tl.float32)
        sum2 = tl.zeros((HALF,), tl.float32)
        for index in tl.static_range(H if part == 0 else K):
            head = index if part == 0 else H + index
            own = rows[:, None] * STRIDE + head * 2 * HALF + half[None, :]
            x1 = tl.load(qkv + own, mask=mask, other=0.0).to(tl.float32)
            x2 = tl.load(qkv + own + HALF, mask=mask, other=0.0).to(tl.float32)
            gradient = g_q + q_rows + index * q_head if part == 0 else g_k + k_rows + index * COPIES * k_head
            g1 = tl.load(gradient, mask=mask, other=0.0).to(tl.float32)
            g2 = tl.load(gradient + HALF, mask=mask, other=0.0).to(tl.float32)
            for copy in tl.static_range(1, 1 if part == 0 else COPIES):
                g1 += tl.load(gradient + copy * k_head, mask=mask, other=0.0).to(tl.float32)
                g2 += tl.load(gradient + copy * k_head + HALF, mask=mask, other=0.0).to(tl.float32)
            # Back by the angle, then through gain, weight and norm.
            u1 = g1 * c + g2 * s
            u2 = g2 * c - g1 * s
            if NORM:
                scale = tl.rsqrt((tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)) / (2 * HALF) + eps)[:, None]
                x1 *= scale
                x2 *= scale
            if LEARNED:
                w1 = tl.load(norms + part * 2 * HALF + half)[None, :]
                w2 = tl.load(norms + part * 2 * HALF + HALF + half)[None, :]
            if GAIN and part == 0:
                along = tl.sum(u1 * x1 * w1 + u2 * x2 * w2 if LEARNED else u1 * x1 + u2 * x2, 1)
                tl.store(gain_sums + program * H + index, tl.sum(along, 0))
                factor = tl.load(gain + index)
                u1 *= factor
                u2 *= factor
            if LEARNED:
                sum1 += tl.sum(u1 * x1, 0)
                sum2 += tl.sum(u2 * x2, 0)
                u1 *= w1
                u2 *= w2
            if NORM:
                mean = (tl.sum(u1 * x1 + u2 * x2, 1) / (2 * HALF))[:, None]
                u1 = scale * (u1 - x1 * mean)
                u2 = scale * (u2 - x2 * mean)
            tl.store(d_qkv + own, u1.to(d_qkv.dtype.element_ty), mask=mask)
            tl.store(d_qkv + own + HALF, u2.to(d_qkv.dtype.element_ty), mask=mask)
        if LEARNED:
            tl.store(norm_sums + (program * 2 + part) * 2 * HALF + half, sum1)
            tl.store(norm_sums + (program * 2 + part) * 2 * HALF + HALF + half, sum2)
    for index in tl.static_range(K):
        own = rows[:, None] * STRIDE + (H + K + index) * 2 * HALF + half[None, :]
        value = g_v + v_rows + index * COPIES * v_head
        g1 = tl.load(value, mask=mask, other=0.0).to(tl.float32)
        g2 = tl.load(value + HALF, mask=mask, other=0.0).to(tl.float32)
        for copy in tl.static_range(1, COPIES):
            g1 += tl.load(value + copy * v_head, mask=mask, other=0.0).to(tl.float32)
            g2 += tl.load(value + copy * v_head + HALF, mask=mask, other=0.0).to(tl.float32)
        if OWN:
            more = g_own + (batch * own_batch + place * own_row)[:, None] + half[None, :] + index * own_head
            g1 += tl.load(more, mask=mask, other=0.0).to(tl.float32)
            g2 += tl.load(more + HALF, mask=mask, other=0.0).to(tl.float32)
        tl.store(d_qkv + own, g1.to(d_qkv.dtype.element_ty), mask=mask)
        tl.store(d_qkv + own + HALF, g2.to(d_qkv.dtype.element_ty), mask=mask)


def _shape(qkv: Tensor, norms: Tensor | None, gain: Tensor | None, n_heads: int, n_kv_heads: int, eps: float | None, copies: int) -> dict[str, Any]:
    width = qkv.shape[-1]
    half = width // (n_heads + 2 * n_kv_heads) // 2
    flags = {"NORM": eps is not None, "LEARNED": norms is not None, "GAIN": gain is not None}
    return {"STRIDE": width, "H": n_heads, "K": n_kv_heads, "HALF": half, "COPIES": copies, **flags, "ROWS": _ROWS, "num_warps": 1}


def rotated(
    qkv: Tensor, cos: Tensor, sin: Tensor, norms: Tensor | None, gain: Tensor | None, n_heads: int, n_kv_heads: int, eps: float | None, copies: int
) -> list[Tensor]:
    """``empty_heads``, filled."""
    shape = _shape(qkv, norms, gain, n_heads, n_kv_heads, eps, copies)
    made = empty_heads(qkv, n_heads, n_kv_heads, copies)
    n_rows = qkv.numel() // qkv.shape[-1]
    _rotated[(triton.cdiv(n_rows, _ROWS),)](
        qkv, cos, sin, cos if norms is None else norms, cos if gain is None else gain, made[0], made[1], made[-1], n_rows, eps or 0.0, **shape
    )
    return made


def rotated_backward(
    g_q: Tensor,
    g_k: Tensor,
    g_v: Tensor,
    g_own: Tensor | None,
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    norms: Tensor | None,
    gain: Tensor | None,
    n_heads: int,
    n_kv_heads: int,
    eps: float | None,
    copies: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of qkv, norms and gain; those of what is None are zeros, or empty. Those that come in may have any strides but for the last dimension."""
    shape = _shape(qkv, norms, gain, n_heads, n_kv_heads, eps, copies)
    n_rows = qkv.numel() // qkv.shape[-1]
    programs = triton.cdiv(n_rows, _ROWS)
    d_qkv = torch.empty_like(qkv)
    norm_sums = cos.new_empty(0 if norms is None else programs, 2, 2 * shape["HALF"])
    gain_sums = cos.new_empty(0 if gain is None else programs, n_heads)
    incoming = (g_q, g_k, g_v, g_v if g_own is None else g_own)
    strides = (stride for gradient in incoming for stride in gradient.stride()[:3])
    _rotated_backward[(programs,)](
        qkv, cos, sin, cos if norms is None else norms, cos if gain is None else gain, *incoming, d_qkv, norm_sums, gain_sums, n_rows, eps or 0.0,
        qkv.shape[1], *strides, **shape, OWN=g_own is not None,
    )  # fmt: skip
    return d_qkv, norm_sums.sum(0), gain_sums.sum(0)
