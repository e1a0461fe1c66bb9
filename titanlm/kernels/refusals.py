"""What each attention backend cannot do, in words for who asked for it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import TYPE_CHECKING

from titanlm.errors import TitanError
from titanlm.kernels.flash4 import HAS_FLASH4

if TYPE_CHECKING:
    import torch

FLEX_HEAD_DIM = 16
"""Narrower heads are refused by FlexAttention's kernels."""
WIDTHS = {"cudnn": (8, 128), "flash4": (8, 256), "flash3": (8, 256), "varlen": (8, 256), "flex": (FLEX_HEAD_DIM, None)}
"""Widths of heads: the least, of which all but flex want a multiple, and the most."""
_PACKAGES = {"flash4": 'pip install "flash-attn-4>=4.0.0b36"', "flash3": "build hopper/ of github.com/Dao-AILab/flash-attention"}


def missing_package(backend: str) -> str | None:
    """How to install what the backend needs and this machine lacks."""
    found = {"flash4": HAS_FLASH4, "flash3": importlib.util.find_spec("flash_attn_interface") is not None}
    return None if found.get(backend, True) else _PACKAGES[backend]


def refusals(
    backend: str,
    head_dim: int,
    *,
    documents: bool = False,
    dtype: torch.dtype | None = None,
    deterministic: bool = False,
    device: torch.device | None = None,
) -> Iterator[str]:
    """Why the backend cannot serve, each with a remedy; nothing where it can, or where what would tell is not given.

    ``documents``: attention stays inside them. ``deterministic``: gradients
    must be. A device is looked at if it is given, and so are packages then.
    Names without kernels of their own (auto, sdpa, math) refuse nothing.
    """
    if backend not in WIDTHS:
        return
    least, most = WIDTHS[backend]
    if head_dim < least or (most and (head_dim > most or head_dim % least)):
        wanted = f"a multiple of {least} up to {most}" if most else f"{least} or more"
        yield f'"{backend}" needs heads of a width of {wanted}, and they are {head_dim} wide; use "auto" or "sdpa"'
    if backend == "cudnn" and documents:
        yield '"cudnn" knows no documents; set data.document_mask = false, or use "flash4", "flex" or "auto"'
    if backend == "cudnn" and deterministic:
        yield '"cudnn" has no deterministic backward pass; set train.deterministic = false, or use "flash4" or "sdpa"'
    if backend != "flex" and dtype is not None and dtype.itemsize != 2:
        yield f'"{backend}" computes in bf16 or fp16 alone, not in {str(dtype).removeprefix("torch.")}; set train.precision = "bf16", or use "auto" or "sdpa"'
    if device is None:
        return
    if device.type != "cuda":
        yield f'"{backend}" runs on CUDA alone, not on {device.type}; use "auto" or "sdpa"'
    elif remedy := missing_package(backend):
        yield f'"{backend}" needs a package that is not installed: {remedy}; or use "auto"'
    else:
        yield from _refusals_of_gpu(backend, head_dim, deterministic, device)


def _refusals_of_gpu(backend: str, head_dim: int, deterministic: bool, device: torch.device) -> Iterator[str]:
    import torch

    major, minor = torch.cuda.get_device_capability(device)
    served = {"flash4": range(9, 13), "flash3": range(9, 10)}.get(backend, range(8, 100))
    if major not in served:
        yield f'"{backend}" has no kernels for a GPU of capability {major}.{minor}; use "auto" or "sdpa"'
    if backend == "flash4" and major > 9 and 128 < head_dim < 256:
        yield f'"flash4" needs heads of a width up to 128, or of 256, on a GPU of capability {major}.{minor}; use "auto" or "sdpa"'
    if backend == "flash4" and major == 12 and deterministic:
        yield f'"flash4" has no deterministic backward pass on a GPU of capability {major}.{minor}; set train.deterministic = false, or use "sdpa"'


def require(backend: str, head_dim: int, **circumstances: object) -> None:
    """Raises TitanError with the first of the ``refusals``."""
    for why in refusals(backend, head_dim, **circumstances):  # type: ignore[arg-type]
        raise TitanError(f"model.attention_backend: {why}")
