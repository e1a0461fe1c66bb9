"""The nearest semi-orthogonal matrix, by matrix products alone.

With X = U S Vᵀ, an odd polynomial p(X) = aX + bXXᵀX + c(XXᵀ)²X acts on the
singular values alone: U p(S) Vᵀ. Applied a few times it takes all of (0, 1] near
1 and leaves U Vᵀ, about. A singular value decomposition gives it exactly, but is
many times slower on a GPU and has no half-precision form.

``quintic`` has one polynomial with the steepest slope at 0, which small singular
values need, and does not settle: they end between about 0.7 and 1.2 (Jordan et
al. 2024, "Muon"). ``polar_express`` has another for each step, the best for what
the steps before it leave over (Amsel et al. 2025, arXiv:2505.16932; the triples
for five steps, with the authors' margin for half precision, as in the records of
parameter golf), and ends nearer to 1.

The Gram matrix A = XXᵀ is formed on the shorter side, and ``baddbmm`` adds
inside the products, so a step is three products. On a GPU it copies what it adds
to first. There large banks of matrices in half precision go through
``titanlm.kernels.symmetric``, which computes half of A and of aI + bA + cA², and
the step ends in one plain product: nothing is copied, and of 4·m²·n + 2·m³
operations for m × n a half of 2·m²·n + 2·m³ is left out.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from titanlm.kernels.fused import serve
from titanlm.kernels.symmetric import TILE, gram, polynomial
from titanlm.precision import multiplied_in

Coefficients = Literal["quintic", "polar_express"]

TRIPLES: dict[str, tuple[tuple[float, float, float], ...]] = {
    "quintic": ((3.4445, -4.7750, 2.0315),),
    "polar_express": (
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ),
}
"""(a, b, c) of each step; further steps have the last."""

EPS = 1e-7
SYMMETRIC_FROM, SYMMETRIC_TILES = 256, 132
"""The shorter side, and the tiles in all halves of a bank, from which a step goes by halves: the smallest that was timed, and one
for each multiprocessor of an H200. There banks of m × 2m, 136 to 264 tiles, took 0.68 to 0.74 of the time of whole products for m
from 256 to 1,024, and 0.93 at 2,048 (``benchmarks/muon.py --device cuda --products``)."""


def newton_schulz(x: Tensor, steps: int, coefficients: Coefficients) -> Tensor:
    """About U Vᵀ of each matrix U S Vᵀ in ``x`` (..., rows, columns), in its dtype; a zero matrix stays zero.

    Each is first divided by its Frobenius norm + 1e-7, which bounds its singular values by 1.
    """
    tall = x.size(-2) > x.size(-1)
    bank = x / (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) + EPS)
    bank = bank.reshape(-1, *x.shape[-2:])
    bank = bank.mT if tall else bank
    triples = TRIPLES[coefficients]
    halved = x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and fills(bank.size(0), bank.size(1)) and serve(x.device.index)
    for step in range(steps):
        bank = (_step_by_halves if halved else _step)(bank, *triples[min(step, len(triples) - 1)])
    return (bank.mT if tall else bank).reshape(x.shape)


def fills(n: int, rows: int) -> bool:
    """Whether n matrices with so many rows keep a GPU busy by halves."""
    side = -(-rows // TILE)
    return rows >= SYMMETRIC_FROM and n * side * (side + 1) // 2 >= SYMMETRIC_TILES


def _step(bank: Tensor, a: float, b: float, c: float) -> Tensor:
    dtype = multiplied_in(bank)

    def rounded(product: Tensor) -> Tensor:
        return product.to(bank.dtype).to(dtype)

    x = bank.to(dtype)
    squares = rounded(torch.bmm(x, x.mT))
    factor = rounded(torch.baddbmm(squares, squares, squares, beta=b, alpha=c))
    return torch.baddbmm(x, factor, x, beta=a).to(bank.dtype)


def _step_by_halves(bank: Tensor, a: float, b: float, c: float) -> Tensor:
    return torch.bmm(polynomial(gram(bank), a, b, c), bank)
