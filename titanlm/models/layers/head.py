"""From hidden states to logits.

The head is not run by the model but by the loss, chunk by chunk. It may own
its matrix or share the embedding's, factorised or not. Sharing is by holding
the same ``Parameter``: each appears once in ``named_parameters()`` of the model
(as the embedding's) and once in its state dict, and ``head.parameters()`` still
gives everything that the head computes with.

Rows of logits start at multiples of 16 bytes on CUDA. Many vocabularies have an
odd size (200,005 is one), and with rows of that length packed end to end cuBLAS
falls back to kernels several times slower in all three products, forward and
backward. So the product is written into longer rows, of which logits are a
view; the loss writes its gradient into the same memory, which keeps the
backward products aligned too.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titanlm.models.layers.embedding import Embedding
from titanlm.models.layers.softcap import Softcap

_ROW_BYTES = 16


def _aligned_rows(like: Tensor, n: int, width: int) -> Tensor:
    # Not a slice of something wider: autograd would not let a view be overwritten.
    step = _ROW_BYTES // like.element_size()
    return like.new_empty_strided((n, width), (-(-width // step) * step, 1))


class _AlignedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.mm(x, weight.T, out=_aligned_rows(x, len(x), len(weight)))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        (gradient,) = gradients
        if gradient.stride(1) != 1 or gradient.stride(0) * gradient.element_size() % _ROW_BYTES:
            gradient = _aligned_rows(gradient, *gradient.shape).copy_(gradient)
        for_x, for_weight = ctx.needs_input_grad
        return gradient @ weight if for_x else None, gradient.T @ x if for_weight else None


def needs_alignment(x: Tensor, weight: Tensor) -> bool:
    """Compiled code is left alone: the compiler pads products itself."""
    return x.is_cuda and len(weight) * x.element_size() % _ROW_BYTES != 0 and not torch.compiler.is_compiling()


def project(x: Tensor, weight: Tensor) -> Tensor:
    """(..., D) times the transpose of (V, D); on CUDA each row of the result is aligned, so it may not be contiguous."""
    if not needs_alignment(x, weight):
        return F.linear(x, weight)
    product: Tensor = _AlignedProduct.apply(x.reshape(-1, x.shape[-1]), weight)
    return product if x.ndim == 2 else product.view(*x.shape[:-1], -1)


class Head(nn.Module):
    """``h Wᵀ``, or ``(h Pᵀ) Eᵀ`` when tied to a factorised embedding, then the softcap if there is one."""

    casts_weights = True
    """Every weight is used in the dtype of the hidden states alone, so the loss may cast once for all its chunks."""

    def __init__(self, vocab_size: int, d_model: int, *, tied_to: Embedding | None = None, softcap: float | None = None) -> None:
        super().__init__()
        self.tied = tied_to is not None
        self.weight: nn.Parameter = nn.Parameter(torch.empty(vocab_size, d_model, dtype=torch.float32)) if tied_to is None else tied_to.weight
        self.projection: nn.Parameter | None = None if tied_to is None else tied_to.projection
        self.softcap = None if softcap is None else Softcap(softcap)

    def tie(self, embedding: Embedding) -> None:
        """Share again after the embedding's parameters were replaced, as a move between devices may do."""
        if self.tied:
            self.weight, self.projection = embedding.weight, embedding.projection

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., D) → (..., V), in the dtype of ``hidden``."""
        if self.projection is not None:
            hidden = F.linear(hidden, self.projection.to(hidden.dtype))
        logits = project(hidden, self.weight.to(hidden.dtype))
        return logits if self.softcap is None else self.softcap(logits)

    # The owner saves and loads what is shared.
    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if not self.tied:
            super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if not self.tied:
            super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, {'tied' if self.tied else 'untied'}"
