"""The Triton kernels of ``mix``, which see."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from titanlm.kernels.jit import jit, tl, triton

FORWARD = (2, 512)
BACKWARD = {2: (2, 1024), 3: (1, 512)}
"""Rows that a program has in hand at a time, and elements of them that a warp has; of the backward pass by terms, for want of registers."""
PER_PROCESSOR = 8
"""Programs of the backward pass for each multiprocessor. All measured on an H200 at width 512."""


@jit
def _weight(weights, index, columns, inside, D: tl.constexpr):
    return tl.load(weights + index * D + columns, mask=inside, other=0.0)[None, :]


@jit
def _mixed(t0, t1, t2, weights, out, normed, n_rows, eps, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, TERMS: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    inside = columns < D
    places = rows[:, None] * D + columns[None, :]
    mask = (rows < n_rows)[:, None] & inside[None, :]
    total = tl.load(t0 + places, mask=mask, other=0.0).to(tl.float32) * _weight(weights, 0, columns, inside, D)
    total += tl.load(t1 + places, mask=mask, other=0.0).to(tl.float32) * _weight(weights, 1, columns, inside, D)
    if TERMS == 3:
        total += tl.load(t2 + places, mask=mask, other=0.0).to(tl.float32) * _weight(weights, 2, columns, inside, D)
    rounded = total.to(out.dtype.element_ty)
    tl.store(out + places, rounded, mask=mask)
    total = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(total * total, 1) / D + eps)
    tl.store(normed + places, (total * scale[:, None]).to(normed.dtype.element_ty), mask=mask)


@jit
def _mixed_backward(
    t0, t1, t2, weights, g_out, g_normed, c0, c1, c2, d0, d1, d2, sums, n_rows, eps,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, TERMS: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr,
):  # fmt: skip
    # Few programs of many rows each: the sums over rows stay in registers until the end.
    program, programs = tl.program_id(0), tl.num_programs(0)
    columns = tl.arange(0, WIDTH)
    inside = columns < D
    w0 = _weight(weights, 0, columns, inside, D)
    w1 = _weight(weights, 1, columns, inside, D)
    if TERMS == 3:
        w2 = _weight(weights, 2, columns, inside, D)
    sum0 = tl.zeros((ROWS, WIDTH), tl.float32)
    sum1 = tl.zeros((ROWS, WIDTH), tl.float32)
    sum2 = tl.zeros((ROWS, WIDTH), tl.float32)
    for first in tl.range(program * ROWS, n_rows, programs * ROWS):
        rows = (first + tl.arange(0, ROWS)).to(tl.int64)
        places = rows[:, None] * D + columns[None, :]
        mask = (rows < n_rows)[:, None] & inside[None, :]
        x0 = tl.load(t0 + places, mask=mask, other=0.0).to(tl.float32)
        x1 = tl.load(t1 + places, mask=mask, other=0.0).to(tl.float32)
        total = x0 * w0 + x1 * w1
        if TERMS == 3:
            x2 = tl.load(t2 + places, mask=mask, other=0.0).to(tl.float32)
            total += x2 * w2
        total = total.to(t0.dtype.element_ty).to(tl.float32)
        scale = tl.rsqrt(tl.sum(total * total, 1) / D + eps)[:, None]
        unit = total * scale
        g = tl.load(g_normed + places, mask=mask, other=0.0).to(tl.float32)
        gradient = tl.load(g_out + places, mask=mask, other=0.0).to(tl.float32)
        gradient += scale * (g - unit * (tl.sum(g * unit, 1) / D)[:, None])
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
    own = sums + program * TERMS * D + columns
    tl.store(own, tl.sum(sum0, 0), mask=inside)
    tl.store(own + D, tl.sum(sum1, 0), mask=inside)
    if TERMS == 3:
        tl.store(own + 2 * D, tl.sum(sum2, 0), mask=inside)


def _shape(terms: Sequence[Tensor], rows: int, per_warp: int) -> dict[str, int]:
    width = triton.next_power_of_2(terms[0].shape[-1])
    return {"D": terms[0].shape[-1], "WIDTH": width, "ROWS": rows, "TERMS": len(terms), "num_warps": min(16, max(1, rows * width // per_warp))}


def mixed(terms: Sequence[Tensor], weights: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """out and normed of ``Mix``."""
    x = terms[0]
    n_rows = x.numel() // x.shape[-1]
    out, normed = torch.empty_like(x), torch.empty_like(x)
    _mixed[(triton.cdiv(n_rows, FORWARD[0]),)](x, terms[1], terms[-1], weights, out, normed, n_rows, eps, **_shape(terms, *FORWARD))
    return out, normed


def mixed_backward(
    terms: Sequence[Tensor], weights: Tensor, eps: float, g_out: Tensor, g_normed: Tensor, carried: Sequence[Tensor | None]
) -> tuple[list[Tensor], Tensor]:
    """Gradients of the terms, those that came to what was passed through added, and of the weights."""
    x = terms[0]
    n_rows = x.numel() // x.shape[-1]
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
    rows, per_warp = BACKWARD[len(terms)]
    programs = min(triton.cdiv(n_rows, rows), PER_PROCESSOR * processors)
    sums = torch.empty(programs, *weights.shape, device=x.device, dtype=torch.float32)
    gradients = [torch.empty_like(term) for term in terms]
    extra = [x if each is None else each for each in carried]
    _mixed_backward[(programs,)](
        x, terms[1], terms[-1], weights, g_out, g_normed, extra[0], extra[1], extra[-1], gradients[0], gradients[1], gradients[-1], sums, n_rows, eps,
        **_shape(terms, rows, per_warp), C0=carried[0] is not None, C1=carried[1] is not None, C2=carried[-1] is not None,
    )  # fmt: skip
    return gradients, sums.sum(0)
