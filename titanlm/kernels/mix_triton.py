"""The Triton kernels of ``mix``, which see."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 4
"""Rows a program has in hand at a time."""
WARPS = 4
PROGRAMS = 8
"""Programs a multiprocessor, each with sums of its own for the gradients of the weights."""


@triton.jit
def _column_weight(weights, index, columns, inside, D: tl.constexpr):
    return tl.load(weights + index * D + columns, mask=inside, other=0.0)[None, :]


@triton.jit
def _forward(t0, t1, t2, weights, out, normed, n_rows, eps, D: tl.constexpr, WIDTH: tl.constexpr, TERMS: tl.constexpr, PLAIN: tl.constexpr, NORM: tl.constexpr, ROWS: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    inside = columns < D
    places = rows[:, None] * D + columns[None, :]
    mask = (rows < n_rows)[:, None] & inside[None, :]
    total = tl.load(t0 + places, mask=mask, other=0.0).to(tl.float32)
    if PLAIN == 0:
        total *= _column_weight(weights, 0, columns, inside, D)
    total += tl.load(t1 + places, mask=mask, other=0.0).to(tl.float32) * _column_weight(weights, 1 - PLAIN, columns, inside, D)
    if TERMS == 3:
        total += tl.load(t2 + places, mask=mask, other=0.0).to(tl.float32) * _column_weight(weights, 2 - PLAIN, columns, inside, D)
    rounded = total.to(out.dtype.element_ty)
    tl.store(out + places, rounded, mask=mask)
    if NORM:
        total = rounded.to(tl.float32)
        scale = tl.rsqrt(tl.sum(total * total, 1) / D + eps)
        tl.store(normed + places, (total * scale[:, None]).to(normed.dtype.element_ty), mask=mask)


@triton.jit
def _backward(
    t0, t1, t2, weights, g_out, g_normed, c0, c1, c2, d0, d1, d2, sums, n_rows, eps,
    D: tl.constexpr, WIDTH: tl.constexpr, TERMS: tl.constexpr, PLAIN: tl.constexpr, NORM: tl.constexpr, OUT: tl.constexpr,
    C0: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    columns = tl.arange(0, WIDTH)
    inside = columns < D
    w1 = _column_weight(weights, 1 - PLAIN, columns, inside, D)
    if PLAIN == 0:
        w0 = _column_weight(weights, 0, columns, inside, D)
    if TERMS == 3:
        w2 = _column_weight(weights, 2 - PLAIN, columns, inside, D)
    sum0 = tl.zeros((ROWS, WIDTH), tl.float32)
    sum1 = tl.zeros((ROWS, WIDTH), tl.float32)
    sum2 = tl.zeros((ROWS, WIDTH), tl.float32)
    for first in tl.range(program * ROWS, n_rows, programs * ROWS):
        rows = (first + tl.arange(0, ROWS)).to(tl.int64)
        places = rows[:, None] * D + columns[None, :]
        mask = (rows < n_rows)[:, None] & inside[None, :]
        x0 = tl.load(t0 + places, mask=mask, other=0.0).to(tl.float32)
        x1 = tl.load(t1 + places, mask=mask, other=0.0).to(tl.float32)
        if TERMS == 3:
            x2 = tl.load(t2 + places, mask=mask, other=0.0).to(tl.float32)
        if OUT:
            gradient = tl.load(g_out + places, mask=mask, other=0.0).to(tl.float32)
        else:
            gradient = tl.zeros((ROWS, WIDTH), tl.float32)
        if NORM:
            total = x0 + x1 * w1 if PLAIN == 1 else x0 * w0 + x1 * w1
            if TERMS == 3:
                total += x2 * w2
            total = total.to(t0.dtype.element_ty).to(tl.float32)
            scale = tl.rsqrt(tl.sum(total * total, 1) / D + eps)[:, None]
            unit = total * scale
            g = tl.load(g_normed + places, mask=mask, other=0.0).to(tl.float32)
            gradient += scale * (g - unit * (tl.sum(g * unit, 1) / D)[:, None])
        r0 = gradient
        if PLAIN == 0:
            r0 = gradient * w0
            sum0 += gradient * x0
        if C0:
            r0 += tl.load(c0 + places, mask=mask, other=0.0).to(tl.float32)
        tl.store(d0 + places, r0.to(d0.dtype.element_ty), mask=mask)
        r1 = gradient * w1
        sum1 += gradient * x1
        if C1:
            r1 += tl.load(c1 + places, mask=mask, other=0.0).to(tl.float32)
        tl.store(d1 + places, r1.to(d1.dtype.element_ty), mask=mask)
        if TERMS == 3:
            r2 = gradient * w2
            sum2 += gradient * x2
            if C2:
                r2 += tl.load(c2 + places, mask=mask, other=0.0).to(tl.float32)
            tl.store(d2 + places, r2.to(d2.dtype.element_ty), mask=mask)
    own = sums + program * (TERMS - PLAIN) * D + columns
    if PLAIN == 0:
        tl.store(own, tl.sum(sum0, 0), mask=inside)
    tl.store(own + (1 - PLAIN) * D, tl.sum(sum1, 0), mask=inside)
    if TERMS == 3:
        tl.store(own + (2 - PLAIN) * D, tl.sum(sum2, 0), mask=inside)


def forward(terms: Sequence[Tensor], weights: Tensor, eps: float, norm: bool) -> tuple[Tensor, Tensor]:
    x = terms[0]
    width, n_rows = x.shape[-1], x.numel() // x.shape[-1]
    out = torch.empty_like(x)
    normed = torch.empty_like(x) if norm else x.new_empty(0)
    _forward[(triton.cdiv(n_rows, ROWS),)](
        terms[0], terms[1], terms[-1], weights, out, normed, n_rows, eps,
        D=width, WIDTH=triton.next_power_of_2(width), TERMS=len(terms), PLAIN=len(terms) - len(weights), NORM=norm, ROWS=ROWS, num_warps=WARPS,
    )  # fmt: skip
    return out, normed


def backward(
    terms: Sequence[Tensor], weights: Tensor, eps: float, g_out: Tensor | None, g_normed: Tensor | None, carried: Sequence[Tensor | None]
) -> tuple[list[Tensor], Tensor]:
    x = terms[0]
    width, n_rows = x.shape[-1], x.numel() // x.shape[-1]
    programs = min(triton.cdiv(n_rows, ROWS), PROGRAMS * torch.cuda.get_device_properties(x.device).multi_processor_count) if x.is_cuda else 3
    gradients = [torch.empty_like(x) for _ in terms]
    sums = torch.empty(programs, *weights.shape, device=x.device, dtype=torch.float32)
    carries = [x if each is None else each for each in carried]
    _backward[(programs,)](
        terms[0], terms[1], terms[-1], weights, x if g_out is None else g_out, x if g_normed is None else g_normed, carries[0], carries[1], carries[-1],
        gradients[0], gradients[1], gradients[-1], sums, n_rows, eps,
        D=width, WIDTH=triton.next_power_of_2(width), TERMS=len(terms), PLAIN=len(terms) - len(weights), NORM=g_normed is not None, OUT=g_out is not None,
        C0=carried[0] is not None, C1=carried[1] is not None, C2=carried[-1] is not None, ROWS=ROWS, num_warps=WARPS,
    )  # fmt: skip
    return gradients, sums.sum(0)
