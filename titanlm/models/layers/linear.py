"""A matrix with fp32 masters and compute in the dtype of its input.

The same class serves fp32 and bf16 runs, one GPU and many: the cast is part of
the graph, so its backward turns the bf16 product into an fp32 gradient, and no
autocast context decides behind one's back.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from titanlm.kernels.fused import fused
from titanlm.kernels.product_onto import ProductOnto, takes
from titanlm.models.layers.product import plain_product, product_of, shared_product
from titanlm.models.layers.rounding import in_use


class Linear(nn.Module):
    """``x @ weight.T`` without bias.

    ``weight`` is (n_out, n_in), fp32, empty until the model's ``init_weights``.
    """

    rounds = ("weight",)
    multiplies: ClassVar = {"weight": 0}

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """(..., n_in) → (..., n_out), in the dtype of ``x``."""
        return product_of(self, "weight")(x, self.used_weight(x.dtype))

    def used_weight(self, dtype: torch.dtype, scale: Tensor | None = None) -> Tensor:
        """The weight as the product uses it, (n_out, n_in), its rows scaled: for who computes the product himself."""
        weight = in_use(self, "weight")
        return (weight if scale is None else scale[:, None] * weight).to(dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]} -> {self.weight.shape[0]}"


def scaled(layer: nn.Module, x: Tensor, scale: Tensor | None, onto: Tensor | None = None) -> Tensor:
    """What a linear layer gives for ``x``, times a number a channel (n_out,), and added to ``onto`` (..., n_out); None for no such thing.

    Where the layer multiplies and does no more, by scaling the rows of its
    weight, and where a kernel can, by adding inside the product: equal but for
    rounding, and neither the output nor its gradient is gone over once more
    for it.
    """
    product = None if scale is None and onto is None else shared_product(layer)
    if product is None:
        y: Tensor = layer(x) if scale is None else scale.to(x.dtype) * layer(x)
        return y if onto is None else onto + y
    weight: Tensor = layer.used_weight(x.dtype, scale)  # type: ignore[operator]
    if onto is not None and product is plain_product and fused(x) and takes(x, weight, onto):
        return ProductOnto.apply(x.flatten(0, -2), weight, onto.flatten(0, -2)).view(onto.shape)  # type: ignore[no-any-return]
    y = product(x, weight)
    return y if onto is None else onto + y
