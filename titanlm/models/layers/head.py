"""From hidden states to logits.

The head is not run by the model but by the loss, chunk by chunk. It may own
its matrix or share the embedding's, factorised or not. Sharing is by holding
the same ``Parameter``: each appears once in ``named_parameters()`` of the model
(as the embedding's) and once in its state dict, and ``head.parameters()`` still
gives everything that the head computes with.

Many vocabularies have an odd size (200,005 is one), and cuBLAS then falls back
to kernels several times slower, forward and backward. So on CUDA the products
are computed with the vocabulary padded by rows of zeros to whole 16 bytes, and
logits are the first V of each longer row. A gradient that the loss wrote into
the same memory is used in place, padding included.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titanlm.models.layers.embedding import Embedding
from titanlm.models.layers.product import Product, plain_product, product_of
from titanlm.models.layers.rounding import in_use, is_rounding
from titanlm.models.layers.softcap import Softcap

_ROW_BYTES = 16


class _AlignedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, product: Product, multiple: int) -> Tensor:
        n, width = len(x), len(weight)
        padding = -width % multiple
        ctx.x, ctx.weight = x.detach(), F.pad(weight.detach(), (0, 0, 0, padding)) if padding else weight.detach()
        for operand, needed in zip((ctx.x, ctx.weight), ctx.needs_input_grad[:2], strict=True):
            operand.requires_grad_(needed)
        # A graph of its own, whose result nobody else sees: that its memory is written to is not held against it.
        with torch.enable_grad():
            ctx.rows = product(ctx.x, ctx.weight)
        # The same memory, but no slice of it: autograd would not let the loss overwrite a view.
        return x.new_empty(0).set_(ctx.rows.untyped_storage(), 0, (n, width), (width + padding, 1))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), rows = gradients, ctx.rows.detach()
        width, operands = gradient.shape[1], (ctx.x, ctx.weight)
        if gradient.data_ptr() == rows.data_ptr() and gradient.stride() == rows.stride():
            gradient = rows  # in place, padding included
        elif padding := len(ctx.weight) - width:
            gradient = F.pad(gradient, (0, padding))
        found = iter(torch.autograd.grad(ctx.rows, [operand for operand in operands if operand.requires_grad], gradient))
        for_x, for_weight = (next(found) if operand.requires_grad else None for operand in operands)
        return for_x, None if for_weight is None else for_weight[:width], None, None


def aligned_product(x: Tensor, weight: Tensor, product: Product, multiple: int) -> Tensor:
    """The first V columns of ``product`` of (..., D) and (V, D), V padded to a ``multiple`` by zeros; they may be overwritten before the backward pass."""
    y: Tensor = _AlignedProduct.apply(x.reshape(-1, x.shape[-1]), weight, product, multiple)
    return y if x.ndim == 2 else y.view(*x.shape[:-1], -1)


def needs_alignment(x: Tensor, weight: Tensor) -> bool:
    """Compiled code is left alone: the compiler pads products itself. The meta device takes the memory that a GPU would."""
    return (x.is_cuda or x.is_meta) and len(weight) * x.element_size() % _ROW_BYTES != 0 and not torch.compiler.is_compiling()


def project(x: Tensor, weight: Tensor) -> Tensor:
    """(..., D) times the transpose of (V, D); not contiguous on CUDA where V has to be padded."""
    if not needs_alignment(x, weight):
        return plain_product(x, weight)
    return aligned_product(x, weight, plain_product, _ROW_BYTES // x.element_size())


class Head(nn.Module):
    """``h Wᵀ``, or ``(h Pᵀ) Eᵀ`` when tied to a factorised embedding, then the softcap if there is one."""

    rounds = ("weight", "projection")
    multiplies: ClassVar = {"weight": 0, "projection": 0}

    def __init__(self, vocab_size: int, d_model: int, *, tied_to: Embedding | None = None, softcap: float | None = None) -> None:
        super().__init__()
        self.tied = tied_to is not None
        self.weight: nn.Parameter = nn.Parameter(torch.empty(vocab_size, d_model, dtype=torch.float32)) if tied_to is None else tied_to.weight
        self.projection: nn.Parameter | None = None if tied_to is None else tied_to.projection
        self.softcap = None if softcap is None else Softcap(softcap)

    @property
    def casts_weights(self) -> bool:
        """Whether every weight is used in the dtype of the hidden states alone, so that the loss may cast once for all its chunks.

        Not while weights are rounded: the grid is that of the fp32 master.
        """
        return not is_rounding(self)

    def tie(self, embedding: Embedding) -> None:
        """Share again after the embedding's parameters were replaced, as a move between devices may do."""
        if self.tied:
            self.weight, self.projection = embedding.weight, embedding.projection

    @property
    def cap(self) -> float | None:
        """The bound of the logits, for a loss that takes them before it and applies it in passes of its own."""
        return None if self.softcap is None else self.softcap.cap

    def forward(self, hidden: Tensor, capped: bool = True) -> Tensor:
        """(..., D) → (..., V), in the dtype of ``hidden``."""
        if self.projection is not None:
            hidden = product_of(self, "projection")(hidden, in_use(self, "projection").to(hidden.dtype))
        logits = product_of(self, "weight", project)(hidden, in_use(self, "weight").to(hidden.dtype))
        return self.softcap(logits) if capped and self.softcap is not None else logits

    # The owner saves and loads what is shared.
    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if not self.tied:
            super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if not self.tied:
            super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, {'tied' if self.tied else 'untied'}"
