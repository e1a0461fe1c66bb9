"""The Triton kernels of ``relu2_network``, which see: a matrix product that squares, or differentiates a square, on its way out."""

from __future__ import annotations

import torch
from torch import Tensor

from titanlm.kernels.jit import TensorDescriptor, jit, tl

TILE = (256, 128, 64)
WARPS = 8
STAGES = {False: 4, True: 3}
"""Tiles in flight, without and with a slope, whose own tile takes shared memory too. Measured on an H200 at (262,144, 512) × (512, 1,536)."""


@jit
def _write(part, h, c, row, column, SLOPE: tl.constexpr):
    if SLOPE:
        part *= 2 * tl.sqrt(h.load([row, column]).to(tl.float32))
    else:
        part = tl.maximum(part, 0.0, propagate_nan=tl.PropagateNan.ALL)  # a guard against them must see them
        part *= part
    c.store([row, column], part.to(c.dtype))


@jit
def _product(a, b, h, c, m, n, k, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, SLOPE: tl.constexpr):
    across = tl.cdiv(n, N)
    for tile in tl.range(tl.program_id(0), tl.cdiv(m, M) * across, tl.num_programs(0), flatten=True):
        row, column = tile // across * M, tile % across * N
        total = tl.zeros((M, N), tl.float32)
        for depth in range(tl.cdiv(k, K)):
            total = tl.dot(a.load([row, depth * K]), b.load([column, depth * K]).T, total)
        # In two halves, which leaves shared memory for one more tile of a and b in flight.
        left, right = tl.split(tl.permute(tl.reshape(total, (M, 2, N // 2)), (0, 2, 1)))
        _write(left, h, c, row, column, SLOPE)
        _write(right, h, c, row, column + N // 2, SLOPE)


def product(a: Tensor, b: Tensor, h: Tensor | None) -> Tensor:
    """(m, k) times the transpose of (n, k), then relu² of it; with ``h`` (m, n), a relu² before, times its slope 2·√h in place of that. → (m, n)."""
    (m, k), n = a.shape, len(b)
    c = a.new_empty(m, n)
    tile_m, tile_n, tile_k = TILE
    out = TensorDescriptor.from_tensor(c, [tile_m, tile_n // 2])
    programs = torch.cuda.get_device_properties(a.device).multi_processor_count if a.is_cuda else 1
    _product[(programs,)](
        TensorDescriptor.from_tensor(a, [tile_m, tile_k]),
        TensorDescriptor.from_tensor(b, [tile_n, tile_k]),
        out if h is None else TensorDescriptor.from_tensor(h, [tile_m, tile_n // 2]),
        out,
        m, n, k, M=tile_m, N=tile_n, K=tile_k, SLOPE=h is not None, num_warps=WARPS, num_stages=STAGES[h is not None],
    )  # fmt: skip
    return c
