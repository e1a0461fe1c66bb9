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

from typing import Any

import torch
from torch import Tensor


def plain_mix(terms: list[Tensor], weights: Tensor, eps: float, norm: bool) -> tuple[Tensor, Tensor]:
    """The twin in plain torch. Terms (..., D), weights (n, D) fp32 of the last n of them, the first being taken as it is if it has none."""
    plain = len(terms) - len(weights)
    wide = torch.promote_types(terms[0].dtype, torch.float32)
    total = sum((weights[k - plain] * term if k >= plain else term.to(wide)) for k, term in enumerate(terms))
    out = torch.as_tensor(total).to(terms[0].dtype)
    again = out.to(wide)
    normed = again * torch.rsqrt(again.square().mean(-1, keepdim=True) + eps) if norm else again.new_empty(0)
    return out, normed.to(out.dtype)


@torch.library.custom_op("titanlm::mix", mutates_args=(), schema="(Tensor[] terms, Tensor weights, float eps, bool norm) -> (Tensor, Tensor)")
def _mix(terms: list[Tensor], weights: Tensor, eps: float, norm: bool) -> tuple[Tensor, Tensor]:
    from titanlm.kernels import mix_triton

    return mix_triton.forward(terms, weights, eps, norm)


@_mix.register_fake
def _mix_shapes(terms: list[Tensor], weights: Tensor, eps: float, norm: bool) -> tuple[Tensor, Tensor]:
    x = terms[0]
    return torch.empty_like(x), torch.empty_like(x) if norm else x.new_empty(0)


_BACKWARD = "(Tensor[] terms, Tensor weights, float eps, Tensor? g_out, Tensor? g_normed, Tensor?[] carried) -> (Tensor[], Tensor)"


@torch.library.custom_op("titanlm::mix_backward", mutates_args=(), schema=_BACKWARD)
def _mix_backward(
    terms: list[Tensor], weights: Tensor, eps: float, g_out: Tensor | None, g_normed: Tensor | None, carried: list[Tensor | None]
) -> tuple[list[Tensor], Tensor]:
    from titanlm.kernels import mix_triton

    return mix_triton.backward(terms, weights, eps, g_out, g_normed, carried)


@_mix_backward.register_fake
def _mix_backward_shapes(
    terms: list[Tensor], weights: Tensor, eps: float, g_out: Tensor | None, g_normed: Tensor | None, carried: list[Tensor | None]
) -> tuple[list[Tensor], Tensor]:
    return [torch.empty_like(term) for term in terms], torch.empty_like(weights)


class Mix(torch.autograd.Function):
    """``(weights, eps or None, which terms are passed through, *terms) → (out, normed, *passed)``; without eps there is no normed."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, eps: float | None, passes: tuple[bool, ...], *terms: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(weights, *terms)
        ctx.eps, ctx.passes = eps, passes
        out, normed = torch.ops.titanlm.mix(list(terms), weights, 0.0 if eps is None else eps, eps is not None)
        passed = tuple(term.view_as(term) for term, wanted in zip(terms, passes) if wanted)
        return (out, *passed) if eps is None else (out, normed, *passed)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weights, *terms = ctx.saved_tensors
        n_own = 1 if ctx.eps is None else 2
        g_out, g_normed = gradients[0], None if ctx.eps is None else gradients[1].contiguous()
        places = [n_own + sum(ctx.passes[:k]) for k in range(len(terms))]
        carried = [gradients[place].contiguous() if wanted else None for place, wanted in zip(places, ctx.passes)]
        of_terms, of_weights = torch.ops.titanlm.mix_backward(terms, weights, ctx.eps or 0.0, g_out.contiguous(), g_normed, carried)
        return of_weights, None, None, *of_terms
