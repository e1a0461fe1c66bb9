"""The relu² network, or that of leaky relu², with its activation inside the matrix products.

    u = x Uᵀ      h = u² where u > 0, (s·u)² elsewhere      y = h Dᵀ

The activation is a pass over the widest tensor of a block, there and back. Here
the first product squares its tile before it is written, and in the backward
pass the product that makes the gradient of h multiplies it by the derivative.
With s = 0 that is 2·relu(u) = 2·√h, so that neither u nor the gradient of h ever
exists. √h is of the rounded h: within 2⁻⁹ of relu(u), as the rounding of u would
be. With another s the sign of u counts as well, and u is written beside h.
A residual stream that h Dᵀ is added to may be in the last product too.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from titanlm.kernels import products_quack
from titanlm.kernels.operator import operator
from titanlm.kernels.product_onto import product_onto


def relu2(u: Tensor, slope: float) -> Tensor:
    """The square of relu, or of leaky relu with another ``slope`` than 0."""
    return (F.leaky_relu(u, slope) if slope else F.relu(u)).square()


def plain_relu2_network(x: Tensor, up: Tensor, down: Tensor, slope: float = 0.0) -> Tensor:
    """The twin in plain torch: (..., D), (F, D), (D, F) → (..., D)."""
    return F.linear(relu2(F.linear(x, up), slope), down)


def _product(a: Tensor, b: Tensor, kept: Tensor | None, slope: float) -> list[Tensor]:
    if slope == 0 and products_quack.serves(a):
        return [products_quack.square(a, b) if kept is None else products_quack.slope(a, b, kept)]
    from titanlm.kernels.relu2_triton import product

    return product(a, b, kept, slope)


def _shapes(a: Tensor, b: Tensor, kept: Tensor | None, slope: float) -> list[Tensor]:
    return [a.new_empty(len(a), len(b)) for _ in range(2 if slope and kept is None else 1)]


relu2_product = operator("relu2_product(Tensor a, Tensor b, Tensor? kept, float slope) -> Tensor[]", _product, _shapes)


class Relu2Network(torch.autograd.Function):
    """(n, D) bf16, (F, D), (D, F), slope → (n, D); added to ``onto`` (n, D) inside the product, which is for where ``product_onto.takes`` it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, up: Tensor, down: Tensor, slope: float, onto: Tensor | None = None) -> Tensor:
        made = relu2_product(x, up, None, slope)
        h, ctx.slope, ctx.adds = made[0], slope, onto is not None
        ctx.save_for_backward(x, up, down, h, made[-1])
        y: Tensor = h @ down.T if onto is None else product_onto(h, down, onto)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, up, down, h, kept = ctx.saved_tensors
        g = gradients[0].contiguous()
        (g_u,) = relu2_product(g, down.T.contiguous(), kept, ctx.slope)
        return g_u @ up, g_u.T @ x, g.T @ h, None, g if ctx.adds else None
