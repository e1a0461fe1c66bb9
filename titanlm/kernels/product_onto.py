"""A matrix product onto what is there already, which ends a residual branch.

    y = c + x Wᵀ

Apart from the product, the sum writes and reads the product once more. Here it
is made of the product's tile before that is written, in fp32 and rounded once.
Gradients are those of the two: g of c as it is, g W and gᵀ x.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from titanlm.kernels.operator import operator
from titanlm.kernels.products_quack import add, serves


def takes(x: Tensor, weight: Tensor, onto: Tensor) -> bool:
    """Whether the device adds so, for (..., k), (n, k) and (..., n) in bf16: rows of whole 16 bytes, as it copies tiles."""
    alike = onto.dtype == x.dtype and onto.shape == (*x.shape[:-1], weight.shape[0])
    return alike and weight.shape[0] % 8 == weight.shape[1] % 8 == 0 and serves(x)


def _run(x: Tensor, weight: Tensor, onto: Tensor) -> Tensor:
    return add(x.contiguous(), weight.contiguous(), onto.contiguous())


def _like(x: Tensor, weight: Tensor, onto: Tensor) -> Tensor:
    return x.new_empty(len(x), len(weight))


product_onto = operator("product_onto(Tensor x, Tensor weight, Tensor onto) -> Tensor", _run, _like)


class ProductOnto(torch.autograd.Function):
    """(m, k) bf16, (n, k), (m, n) → (m, n)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, onto: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        y: Tensor = product_onto(x, weight, onto)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        x, weight = ctx.saved_tensors
        (g,) = gradients
        return g @ weight, g.T @ x, g
