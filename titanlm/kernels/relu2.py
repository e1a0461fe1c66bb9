"""The relu² network with its activation inside the matrix products.

    h = relu(x Uᵀ)²      y = h Dᵀ

The activation is a pass over the widest tensor of a block, there and back. Here
the first product squares its tile before it is written, and in the backward
pass the product that makes the gradient of h multiplies it by the slope,
2·relu(u) = 2·√h, so that neither u nor the gradient of h ever exists. √h is of
the rounded h: within 2⁻⁹ of relu(u), as the rounding of u would be.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from titanlm.kernels.operator import operator


def plain_relu2_network(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The twin in plain torch: (..., D), (F, D), (D, F) → (..., D)."""
    return F.linear(F.relu(F.linear(x, up)).square(), down)


def _product(a: Tensor, b: Tensor, h: Tensor | None) -> Tensor:
    from titanlm.kernels.relu2_triton import product

    return product(a, b, h)


relu2_product = operator("relu2_product(Tensor a, Tensor b, Tensor? h) -> Tensor", _product, lambda a, b, h: a.new_empty(len(a), len(b)))


class Relu2Network(torch.autograd.Function):
    """(n, D) bf16, (F, D), (D, F) → (n, D)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        h = relu2_product(x, up, None)
        ctx.save_for_backward(x, up, down, h)
        return h @ down.T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, up, down, h = ctx.saved_tensors
        g = gradients[0].contiguous()
        g_u = relu2_product(g, down.T.contiguous(), h)
        return g_u @ up, g_u.T @ x, g.T @ h
