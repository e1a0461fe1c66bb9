"""Products that are symmetric, at half the arithmetic: X Xᵀ, and aI + b·A + c·A Aᵀ of a symmetric A.

Both are what a Newton-Schulz step needs besides one ordinary product. A program
computes one tile of the lower triangle in fp32, adds what is to be added, rounds
once, and writes the tile and its mirror image, so the result is symmetric to the
bit. Programs of tiles above the diagonal end at once. A library's product
computes both triangles; its form with an addend also copies the addend first.

With a on the diagonal, the step's aX + (bA + cA²)X is a single product. Rounded
to bf16 it is as near to float64 as the two-part form: 0.8 % against 1.2 % for a
normal matrix of 256 × 512 after five quintic steps, 5.0 against 4.9 % for
singular values over three decades.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE = 128
"""Rows and columns that a program computes."""


def gram(x: Tensor) -> Tensor:
    """X Xᵀ (n, rows, rows) of each X in ``x`` (n, rows, columns), bf16 or fp16 with any strides."""
    from titanlm.kernels.symmetric_triton import lower_triangle

    return lower_triangle(x, 0.0, 0.0, 1.0, polynomial=False)


def plain_gram(x: Tensor) -> Tensor:
    """The twin in plain torch."""
    return torch.bmm(x, x.mT)


def polynomial(x: Tensor, a: float, b: float, c: float) -> Tensor:
    """aI + b·A + c·A Aᵀ of each symmetric A in ``x`` (n, rows, rows), bf16 or fp16 with any strides, rounded once."""
    from titanlm.kernels.symmetric_triton import lower_triangle

    return lower_triangle(x, a, b, c, polynomial=True)


def plain_polynomial(x: Tensor, a: float, b: float, c: float) -> Tensor:
    """The twin in plain torch, by fp32 products of what was read."""
    wide = x.float()
    return torch.baddbmm(wide, wide, wide.mT, beta=b, alpha=c).add_(torch.eye(x.size(-1), device=x.device), alpha=a).to(x.dtype)
