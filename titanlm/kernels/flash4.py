"""FlashAttention 4, the package ``flash-attn-4``: kernels for Hopper and later that are compiled at their first call."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import Tensor

from titanlm.kernels.flash import backward_operator, forward_operator
from titanlm.kernels.lengths import bounds, flat

_SPEC = importlib.util.find_spec("flash_attn")
# Looked for and not imported: another package of that name loads its CUDA library at once.
# Before 4 it had a folder "cute" too, of kernels that cannot do what is asked here.
HAS_FLASH4 = any(Path(place, "cute", "flash_bwd_sm90.py").is_file() for place in (_SPEC and _SPEC.submodule_search_locations) or ())


def _forward(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    from flash_attn.cute import interface

    y, lse = interface._flash_attn_fwd(*flat(lengths, q, k, v), **bounds(lengths, q.shape[1]), causal=True, return_lse=True)[:2]
    return y.view(q.shape), lse


def _backward(g: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Deterministic where torch is told to be."""
    from flash_attn.cute import interface

    settings = {**bounds(lengths, q.shape[1]), "causal": True, "deterministic": torch.are_deterministic_algorithms_enabled()}
    dq, dk, dv = interface._flash_attn_bwd(*flat(lengths, q, k, v, y, g), lse, **settings)[:3]
    return dq.view(q.shape), dk.view(k.shape), dv.view(v.shape)


flash4_forward = forward_operator("flash4_forward", _forward)
flash4_backward = backward_operator("flash4_backward", _backward)
