"""The position-wise network of a block.

``swiglu``: W_down(silu(W_gate x) · W_up x), Shazeer 2020, arXiv:2002.05202.
``relu2``: W_down(relu(W_up x)²), So et al. 2021, arXiv:2109.08668.
``leaky_relu2``: W_down(leaky_relu(W_up x)²) with slope 1/2, so that a negative
number counts by a quarter of its square; of Parameter Golf's records since
pull request 549.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch.nn.functional as F
from torch import Tensor, nn

from titanlm.kernels.fused import fused
from titanlm.kernels.product_onto import takes
from titanlm.kernels.relu2 import Relu2Network, relu2
from titanlm.models.layers.linear import Linear, scaled
from titanlm.models.layers.product import plain_product, shared_product

Activation: TypeAlias = Literal["swiglu", "relu2", "leaky_relu2"]
SLOPES = {"relu2": 0.0, "leaky_relu2": 0.5}
"""Below 0, of what is squared."""


def default_width(d_model: int, activation: Activation) -> int:
    """The width at which the network has about 8·d_model² parameters: a multiple of 64, at least d_model."""
    exact = 8 * d_model / 3 if activation == "swiglu" else 4 * d_model
    return max(64 * round(exact / 64), d_model)


class FeedForward(nn.Module):
    """(..., D) → (..., D) through ``d_ff`` units."""

    def __init__(self, d_model: int, d_ff: int, activation: Activation) -> None:
        super().__init__()
        self.gate_proj = Linear(d_model, d_ff) if activation == "swiglu" else None
        self.up_proj = Linear(d_model, d_ff)
        self.down_proj = Linear(d_ff, d_model)
        self.slope = SLOPES.get(activation, 0.0)
        self.fuses = activation in SLOPES and d_model % 8 == d_ff % 8 == 0  # rows of whole 16 bytes, as the device copies tiles

    def forward(self, x: Tensor, scale: Tensor | None = None, onto: Tensor | None = None) -> Tensor:
        """Times ``scale`` (D,), and added to ``onto`` (..., D), if there are such."""
        if self.fuses and fused(x) and shared_product(self.up_proj, self.down_proj) is plain_product:
            weights = self.up_proj.used_weight(x.dtype), self.down_proj.used_weight(x.dtype, scale)
            inside = onto.flatten(0, -2) if onto is not None and takes(x, self.down_proj.weight, onto) else None
            network: Tensor = Relu2Network.apply(x.flatten(0, -2), *weights, self.slope, inside).view(x.shape)
            return network if onto is None or inside is not None else onto + network
        up = self.up_proj(x)
        inner = relu2(up, self.slope) if self.gate_proj is None else F.silu(self.gate_proj(x)) * up
        return scaled(self.down_proj, inner, scale, onto)
