"""FlashAttention 4, the package ``flash-attn-4``: kernels for Hopper and later that are compiled at their first call."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from titanlm.kernels.flash import backward_operator, forward_operator
from titanlm.kernels.lengths import bounds, flat
from titanlm.kernels.products_quack import keep_on_disk

_SPEC = importlib.util.find_spec("flash_attn")
# Looked for and not imported: another package of that name loads its CUDA library at once.
# Before 4 it had a folder "cute" too, of kernels that cannot do what is asked here.
HAS_FLASH4 = any(Path(place, "cute", "flash_bwd_sm90.py").is_file() for place in (_SPEC and _SPEC.submodule_search_locations) or ())


def disk_cache() -> Path:
    """Where the package keeps what it compiled: beside what torch did, unless the environment has a folder for it."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir  # which brings the compiler along

    return Path(os.environ.get("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR") or Path(cache_dir(), "flash4"))


def kernels_in_use() -> list[Path]:
    """The files in ``disk_cache`` of what this process compiled or loaded."""
    interface = sys.modules.get("flash_attn.cute.interface")
    found: list[Any] = [getattr(each, "compile_cache", None) for each in vars(interface).values()] if interface else []
    caches = [cache for cache in found if hasattr(cache, "cache_path")]
    return sorted(path for cache in caches for key in cache.cache if (path := cache.cache_path / f"{cache._key_to_hash(key)}.o").exists())


def _interface() -> ModuleType:
    """The package's functions. It keeps nothing on disk unless it is told to, before it is imported."""
    if "flash_attn.cute" not in sys.modules:
        os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
        os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", str(disk_cache()))
        keep_on_disk()
    from flash_attn.cute import interface

    return interface


def _forward(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    y, lse = _interface()._flash_attn_fwd(*flat(lengths, q, k, v), **bounds(lengths, q.shape[1]), causal=True, return_lse=True)[:2]
    return y.view(q.shape), lse


def _backward(g: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Deterministic where torch is told to be."""
    settings = {**bounds(lengths, q.shape[1]), "causal": True, "deterministic": torch.are_deterministic_algorithms_enabled()}
    dq, dk, dv = _interface()._flash_attn_bwd(*flat(lengths, q, k, v, y, g), lse, **settings)[:3]
    return dq.view(q.shape), dk.view(k.shape), dv.view(v.shape)


flash4_forward = forward_operator("flash4_forward", _forward)
flash4_backward = backward_operator("flash4_backward", _backward)
