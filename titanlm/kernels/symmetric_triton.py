"""The Triton kernel of ``symmetric``, which see."""

from __future__ import annotations

from torch import Tensor

from titanlm.kernels.jit import jit, tl, triton
from titanlm.kernels.symmetric import TILE

DEPTH, WARPS, STAGES = 64, 8, 3
"""Tiles of TILE × TILE, DEPTH columns of X at a time: 96 KiB of shared memory, two programs on one multiprocessor of an H100."""


@jit
def _kernel(  # type: ignore[no-untyped-def]
    x, result, rows, columns: tl.constexpr, x_matrix, x_row, x_column, a, b, c, POLYNOMIAL: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr
):  # fmt: skip
    upper, lower, matrix = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    if upper > lower:
        return
    i = lower * BLOCK + tl.arange(0, BLOCK)
    j = upper * BLOCK + tl.arange(0, BLOCK)
    x += matrix * x_matrix
    result += matrix * rows * rows
    left = x + i[:, None] * x_row
    right = x + j[None, :] * x_row
    total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for start in range(0, columns, DEPTH):
        k = start + tl.arange(0, DEPTH)
        of_left = tl.load(left + k[None, :] * x_column, mask=(i[:, None] < rows) & (k[None, :] < columns), other=0.0)
        of_right = tl.load(right + k[:, None] * x_column, mask=(j[None, :] < rows) & (k[:, None] < columns), other=0.0)
        total = tl.dot(of_left, of_right, total)
    inside = (i[:, None] < rows) & (j[None, :] < rows)
    if POLYNOMIAL:
        own = tl.load(left + j[None, :] * x_column, mask=inside, other=0.0)
        total = c * total + b * own.to(tl.float32) + tl.where(i[:, None] == j[None, :], a, 0.0)
    tile = total.to(result.dtype.element_ty)
    tl.store(result + i[:, None] * rows + j[None, :], tile, mask=inside)
    if upper < lower:
        tl.store(result + j[:, None] * rows + i[None, :], tl.trans(tile), mask=(j[:, None] < rows) & (i[None, :] < rows))


def lower_triangle(x: Tensor, a: float, b: float, c: float, polynomial: bool) -> Tensor:
    """c·X Xᵀ of each X in ``x`` (n, rows, columns), with ``polynomial`` and aI + b·X."""
    n, rows, columns = x.shape
    result = x.new_empty(n, rows, rows)
    tiles = triton.cdiv(rows, TILE)
    if result.numel():
        _kernel[tiles, tiles, n](
            x, result, rows, columns, *x.stride(), a, b, c, polynomial, TILE, DEPTH, num_warps=WARPS, num_stages=STAGES
        )  # fmt: skip
    return result
