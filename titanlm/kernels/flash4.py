"""FlashAttention 4, the package ``flash-attn-4``: kernels for Hopper and later that are compiled at their first call."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import Tensor

from titanlm.kernels.lengths import bounds, flat, shapes

_SPEC = importlib.util.find_spec("flash_attn")
# Looked for and not imported: another package of that name loads its CUDA library at once.
# Before 4 it had a folder "cute" too, of kernels that cannot do what is asked here.
HAS_FLASH4 = any(Path(place, "cute", "flash_bwd_sm90.py").is_file() for place in (_SPEC and _SPEC.submodule_search_locations) or ())


@torch.library.custom_op("titanlm::flash4_forward", mutates_args=(), schema="(Tensor q, Tensor k, Tensor v, Tensor? lengths) -> (Tensor, Tensor)")
def flash4_forward(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """As ``Kernel.forward``."""
    from flash_attn.cute import interface

    y, lse = interface._flash_attn_fwd(*flat(lengths, q, k, v), **bounds(lengths, q.shape[1]), causal=True, return_lse=True)[:2]
    return y.view(q.shape), lse


@flash4_forward.register_fake
def _forward_shapes(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    return shapes(q, lengths)


_BACKWARD = "(Tensor g, Tensor q, Tensor k, Tensor v, Tensor y, Tensor lse, Tensor? lengths) -> (Tensor, Tensor, Tensor)"


@torch.library.custom_op("titanlm::flash4_backward", mutates_args=(), schema=_BACKWARD)
def flash4_backward(g: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """As ``Kernel.backward``; deterministic where torch is told to be."""
    from flash_attn.cute import interface

    settings = {**bounds(lengths, q.shape[1]), "causal": True, "deterministic": torch.are_deterministic_algorithms_enabled()}
    dq, dk, dv = interface._flash_attn_bwd(*flat(lengths, q, k, v, y, g), lse, **settings)[:3]
    return dq.view(q.shape), dk.view(k.shape), dv.view(v.shape)


@flash4_backward.register_fake
def _backward_shapes(g: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
