"""A weighted sum of residual streams, and the norm of it, in one pass over memory.

A block of the golf models mixes what it is given with what the first block was
given, and perhaps a skip, with a weight a channel, and norms the result. None of
it computes much; all of it is bytes. Left to the compiler, gradients of the
weights are sums over all positions that read everything once more, and a
stream that goes into every block gets its gradients added up outside.

    out = Σ w_k ∘ t_k        normed = out / √(mean(out²) + eps)

Forward reads the terms and writes both; backward reads the terms and two
gradients and writes a gradient a term, with the sums for the weights on the
way. The sum is computed in fp32 and rounded once, and it is the rounded one
that is normed.

A term that is used again behind the sum is passed through: its other gradient
then comes to the same backward kernel, which adds it in fp32.

Sums of a branch with a weight a channel need none of this: ``linear.scaled``
puts the weight into the branch's last product, and what is left is a sum whose
gradient is that of both terms as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from titanlm.kernels.operator import operator


def plain_mix(terms: Sequence[Tensor], weights: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The twin in plain torch of ``Mix``: out and normed."""
    wide = torch.promote_types(terms[0].dtype, torch.float32)
    out = torch.stack([weight * term.to(wide) for weight, term in zip(weights, terms, strict=True)]).sum(0).to(terms[0].dtype)
    rounded = out.to(wide)
    return out, (rounded * torch.rsqrt(rounded.square().mean(-1, keepdim=True) + eps)).to(out.dtype)


def _forward(terms: list[Tensor], weights: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    from titanlm.kernels.mix_triton import mixed

    return mixed(terms, weights, eps)


def _backward(terms: list[Tensor], weights: Tensor, eps: float, g_out: Tensor, g_normed: Tensor, carried: list[Tensor | None]) -> tuple[list[Tensor], Tensor]:
    from titanlm.kernels.mix_triton import mixed_backward

    return mixed_backward(terms, weights, eps, g_out, g_normed, carried)


mix_forward = operator(
    "mix(Tensor[] terms, Tensor weights, float eps) -> (Tensor, Tensor)",
    _forward,
    lambda terms, weights, eps: (torch.empty_like(terms[0]), torch.empty_like(terms[0])),
)
mix_backward = operator(
    "mix_backward(Tensor[] terms, Tensor weights, float eps, Tensor g_out, Tensor g_normed, Tensor?[] carried) -> (Tensor[], Tensor)",
    _backward,
    lambda terms, weights, *_: ([torch.empty_like(term) for term in terms], weights.new_empty(weights.shape, dtype=torch.float32)),
)


class Mix(torch.autograd.Function):
    """``(weights, eps, which terms are passed through, *terms) → (out, normed, *passed)``.

    Two or three terms (..., D) of one dtype; ``weights`` (n, D) fp32.
    """

    @staticmethod
    def forward(ctx: Any, weights: Tensor, eps: float, passes: tuple[bool, ...], *terms: Tensor) -> tuple[Tensor, ...]:
        terms = tuple(term.contiguous() for term in terms)
        ctx.save_for_backward(weights, *terms)
        ctx.eps, ctx.passes = eps, passes
        out, normed = mix_forward(list(terms), weights, eps)
        return out, normed, *(term.view_as(term) for term, wanted in zip(terms, passes) if wanted)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weights, *terms = ctx.saved_tensors
        g_out, g_normed, *behind = (gradient.contiguous() for gradient in gradients)
        carried = [behind[sum(ctx.passes[:k])] if wanted else None for k, wanted in enumerate(ctx.passes)]
        of_terms, of_weights = mix_backward(terms, weights, ctx.eps, g_out, g_normed, carried)
        return of_weights, None, None, *of_terms
