"""Bounded logits: ``cap · tanh(z / cap)`` (Gemma 2, arXiv:2408.00118).

Written as one function with its own derivative: the tensors here are as wide
as the vocabulary, and the plain expression would keep and pass over several of
them. It is computed in fp32 (fp64 for fp64 input) and rounded once. Compiled,
each direction is one kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from titanlm.models.layers.compiled import compiled


def cap_forward(z: Tensor, cap: float) -> Tensor:
    wide = torch.promote_types(z.dtype, torch.float32)
    return (torch.tanh(z.to(wide) / cap) * cap).to(z.dtype)


def cap_backward(gradient: Tensor, z: Tensor, cap: float) -> Tensor:
    wide = torch.promote_types(z.dtype, torch.float32)
    return (gradient.to(wide) * (1 - torch.tanh(z.to(wide) / cap).square())).to(z.dtype)


class _Cap(torch.autograd.Function):
    # Keeps its input, not its output: the loss writes the gradient over the logits.
    @staticmethod
    def forward(ctx: Any, z: Tensor, cap: float, kernels: bool) -> Tensor:
        ctx.save_for_backward(z)
        ctx.cap, ctx.kernels = cap, kernels
        return (compiled(cap_forward) if kernels else cap_forward)(z, cap)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (z,) = ctx.saved_tensors
        return (compiled(cap_backward) if ctx.kernels else cap_backward)(gradients[0], z, ctx.cap), None, None


class Softcap(nn.Module):
    """Logits of any shape into (−cap, cap). ``compile_kernels`` is set by the trainer on every module that has it."""

    def __init__(self, cap: float) -> None:
        super().__init__()
        self.cap = cap
        self.compile_kernels = False

    def forward(self, z: Tensor) -> Tensor:
        capped: Tensor = _Cap.apply(z, self.cap, self.compile_kernels)
        return capped

    def extra_repr(self) -> str:
        return f"{self.cap}"
