"""Matrix products that compute on before they write, from QuACK, the package ``quack-kernels``: for Hopper, compiled at their first call.

A tile of a product lies in registers before it is written. What is done to it
there, one function of a number and of another tensor's at its place, costs no
pass over memory, and two groups of warps take turns, so that one multiplies
while the other writes.

Numbers that are not finite: ``square`` is relu(u)·u and so NaN where u is NaN,
but also where it is −∞, whose relu² is 0. A negative u gives −0.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titanlm.kernels.fused import hopper


def _installed() -> bool:
    """Whether in a version like that which was tried, 0.6.5. Looked for and not imported, which takes seconds."""
    try:
        *series, patch = importlib.metadata.version("quack-kernels").split(".")
    except importlib.metadata.PackageNotFoundError:
        return False
    return series == ["0", "6"] and patch.isdecimal() and int(patch) >= 5


HAS_QUACK = _installed()


def serve(index: int | None) -> bool:
    """Whether they serve on the CUDA device of this number: Hopper, where they were measured, with the package."""
    return HAS_QUACK and hopper(index)


def serves(x: Tensor) -> bool:
    """Whether they serve where this tensor is, and its dtype."""
    return x.is_cuda and x.dtype == torch.bfloat16 and serve(x.device.index)


def disk_cache() -> Path:
    """Where the package keeps what it compiled, once ``keep_on_disk`` has said so."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir  # which brings the compiler along

    return Path(os.environ.get("QUACK_CACHE_DIR") or Path(cache_dir(), "quack"))


def keep_on_disk() -> None:
    """Let that be beside what torch compiled, unless the environment has a folder for it. Before the package is imported, as FlashAttention 4 does."""
    os.environ["QUACK_CACHE_DIR"] = str(disk_cache())


def kernels_in_use() -> list[Path]:
    """The files in ``disk_cache`` of the products that this process compiled or loaded; none where the package has other names for what tells them."""
    host = sys.modules.get("quack.gemm_runtime.host")
    if host is None:
        return []
    try:
        from quack.cache import jit

        folder, made = disk_cache() / jit._compute_source_fingerprint(), host._compile_gemm_epi
        files = [folder / f"{jit._key_to_hash((made.__qualname__, *key))}.o" for key in made.cache]
    except (AttributeError, ImportError):
        return []
    return sorted(path for path in files if path.exists())


@cache
def _epilogues() -> dict[str, Any]:
    keep_on_disk()
    import cutlass.cute as cute
    from quack import activation  # as a module: the package looks into functions, and at modules' names alone, to know a kernel again
    from quack.epilogue import gemm_epilogue

    # Of an installed titanlm the package's files are named by these names and not by what they do: what does another thing needs another name.
    @gemm_epilogue()
    def square(acc: Any) -> Any:
        return {"D": activation.relu_sq(acc)}

    @gemm_epilogue()
    def slope(acc: Any, c: Any) -> Any:
        return {"D": acc * cute.math.sqrt(c, fastmath=True) * 2.0}

    @gemm_epilogue()
    def add(acc: Any, c: Any) -> Any:
        return {"D": acc + c}

    return {"square": square, "slope": slope, "add": add}


def _product(name: str, a: Tensor, b: Tensor, *c: Tensor) -> Tensor:
    out = a.new_empty(len(a), len(b))
    _epilogues()[name](a, b.T, *c, out={"D": out}, tuned=False)
    return out


def square(a: Tensor, b: Tensor) -> Tensor:
    """relu² of the product of (m, k) and the transpose of (n, k): (m, n). Here and below bf16, contiguous, k and n multiples of 8."""
    return _product("square", a, b)


def slope(a: Tensor, b: Tensor, h: Tensor) -> Tensor:
    """The product times 2·√h, which is the slope of relu² where it is h (m, n)."""
    return _product("slope", a, b, h)


def add(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The product plus c (m, n), rounded once."""
    return _product("add", a, b, c)
