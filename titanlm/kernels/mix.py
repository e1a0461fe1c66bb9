"""Weighted sums of residual streams, and the norm that follows, in one pass over memory.

A block of the golf models mixes what it is given with what the first block was
given, adds branches with a weight a channel, and norms the result. None of it
computes much; all of it is bytes. Left to the compiler, gradients of the
weights are sums over all positions that read everything once more, and a
stream that goes into every block gets its gradients added up outside.

    out = Σ c_k ∘ t_k        normed = out / √(mean(out²) + eps)

Forward reads the terms and writes both; backward reads the terms and two
gradients and writes a gradient a term, with the sums for the weights on the
way. The sum is computed in fp32 and rounded once, and it is the rounded one
that is normed.

A term that is used again behind the sum is passed through: its other gradient
then comes to the same backward kernel, which adds it in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from titanlm.kernels.operator import operator


def plain_mix(terms: Sequence[Tensor], weights: Tensor, eps: float | None) -> tuple[Tensor, Tensor | None]:
    """The twin in plain torch of ``Mix``: out and, with eps, normed."""
    wide = torch.promote_types(terms[0].dtype, torch.float32)
    factors = [torch.ones_like(weights[0]), *weights][-len(terms) :]
    out = torch.stack([factor * term.to(wide) for factor, term in zip(factors, terms, strict=True)]).sum(0).to(terms[0].dtype)
    if eps is None:
        return out, None
    rounded = out.to(wide)
    return out, (rounded * torch.rsqrt(rounded.square().mean(-1, keepdim=True) + eps)).to(out.dtype)


def _forward(terms: list[Tensor], weights: Tensor, eps: float | None) -> tuple[Tensor, Tensor]:
    from titanlm.kernels.mix_triton import mixed

    return mixed(terms, weights, eps)


def _backward(
    terms: list[Tensor], weights: Tensor, eps: float | None, g_out: Tensor, g_normed: Tensor | None, carried: list[Tensor | None]
) -> tuple[list[Tensor], Tensor]:
    from titanlm.kernels.mix_triton import mixed_backward

    return mixed_backward(terms, weights, eps, g_out, g_normed, carried)


mix_forward = operator(
    "mix(Tensor[] terms, Tensor weights, float? eps) -> (Tensor, Tensor)",
    _forward,
    lambda terms, weights, eps: (torch.empty_like(terms[0]), terms[0].new_empty(0 if eps is None else terms[0].shape)),
)
mix_backward = operator(
    "mix_backward(Tensor[] terms, Tensor weights, float? eps, Tensor g_out, Tensor? g_normed, Tensor?[] carried) -> (Tensor[], Tensor)",
    _backward,
    lambda terms, weights, *_: ([torch.empty_like(term) for term in terms], weights.new_empty(weights.shape, dtype=torch.float32)),
)


class Mix(torch.autograd.Function):
    """``(weights, eps or None, which terms are passed through, *terms) → (out, normed, *passed)``; without eps there is no normed.

    Two or three terms (..., D) of one dtype; ``weights`` (n, D) fp32
    are of the last n, the first term being taken as it is if it has none.
    """

    @staticmethod
    def forward(ctx: Any, weights: Tensor, eps: float | None, passes: tuple[bool, ...], *terms: Tensor) -> tuple[Tensor, ...]:
        terms = tuple(term.contiguous() for term in terms)
        ctx.save_for_backward(weights, *terms)
        ctx.eps, ctx.passes = eps, passes
        out, normed = mix_forward(list(terms), weights, eps)
        passed = tuple(term.view_as(term) for term, wanted in zip(terms, passes) if wanted)
        return (out, *passed) if eps is None else (out, normed, *passed)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weights, *terms = ctx.saved_tensors
        g_normed = None if ctx.eps is None else gradients[1].contiguous()
        behind = 1 if ctx.eps is None else 2
        carried = [gradients[behind + sum(ctx.passes[:k])].contiguous() if wanted else None for k, wanted in enumerate(ctx.passes)]
        of_terms, of_weights = mix_backward(terms, weights, ctx.eps, gradients[0].contiguous(), g_normed, carried)
        return of_weights, None, None, *of_terms
