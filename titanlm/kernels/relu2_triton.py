"""The Triton kernels of ``relu2_network``, which see: a matrix product that squares, or differentiates a square, on its way out."""

from __future__ import annotations

import torch
from torch import Tensor

from titanlm.kernels.jit import TensorDescriptor, jit, tl

TILE = {1: (128, 256, 64), 2: (256, 128, 64)}
WARPS = 8
STAGES = {1: 4, 2: 3}
"""Tiles in flight. Both by tensors of the result's shape, whose tiles take shared memory too; measured on an H200 at (262,144, 512) × (512, 1,536)."""


@jit
def _write(part, kept, c, row, column, BACK: tl.constexpr, SLOPE: tl.constexpr):
    if BACK:
        old = kept.load([row, column]).to(tl.float32)
        if SLOPE != 0:  # u
            part *= tl.where(old > 0, 2 * old, 2 * SLOPE * SLOPE * old)
        else:  # h
            part *= 2 * tl.sqrt(old)
    else:
        if SLOPE != 0:
            kept.store([row, column], part.to(kept.dtype))
            part = tl.where(part < 0, SLOPE * part, part)
        else:
            part = tl.maximum(part, 0.0, propagate_nan=tl.PropagateNan.ALL)  # a guard against them must see them
        part *= part
    c.store([row, column], part.to(c.dtype))


@jit
def _product(a, b, kept, c, m, n, k, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BACK: tl.constexpr, SLOPE: tl.constexpr):
    across = tl.cdiv(n, N)
    for tile in tl.range(tl.program_id(0), tl.cdiv(m, M) * across, tl.num_programs(0), flatten=True):
        row, column = tile // across * M, tile % across * N
        total = tl.zeros((M, N), tl.float32)
        for depth in range(tl.cdiv(k, K)):
            total = tl.dot(a.load([row, depth * K]), b.load([column, depth * K]).T, total)
        # In two halves, which leaves shared memory for one more tile of a and b in flight.
        left, right = tl.split(tl.permute(tl.reshape(total, (M, 2, N // 2)), (0, 2, 1)))
        _write(left, kept, c, row, column, BACK, SLOPE)
        _write(right, kept, c, row, column + N // 2, BACK, SLOPE)


def product(a: Tensor, b: Tensor, kept: Tensor | None, slope: float) -> list[Tensor]:
    """(m, k) times the transpose of (n, k), and of that u leaky relu² with a slope: [h], or [h, u] where the slope is not 0.

    With ``kept``, the last of such a list from before, the product times the
    derivative there in place of all that. All are (m, n).
    """
    (m, k), n = a.shape, len(b)
    back = kept is not None
    made = [a.new_empty(m, n) for _ in range(2 if slope and not back else 1)]
    tensors = len(made) + back
    tile_m, tile_n, tile_k = TILE[tensors]
    out, *rest = (TensorDescriptor.from_tensor(each, [tile_m, tile_n // 2]) for each in (made if kept is None else [*made, kept]))
    programs = torch.cuda.get_device_properties(a.device).multi_processor_count if a.is_cuda else 1
    _product[(programs,)](
        TensorDescriptor.from_tensor(a, [tile_m, tile_k]),
        TensorDescriptor.from_tensor(b, [tile_n, tile_k]),
        rest[0] if rest else out,
        out,
        m, n, k, M=tile_m, N=tile_n, K=tile_k, BACK=back, SLOPE=slope, num_warps=WARPS, num_stages=STAGES[tensors],
    )  # fmt: skip
    return made
