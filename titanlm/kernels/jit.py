"""Triton where it is installed. Its kernels may be defined, though not run, where it is not: in a submission all modules are one."""

from __future__ import annotations

from typing import Any

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ModuleNotFoundError:
    triton = tl = TensorDescriptor = None


def jit(function: Any) -> Any:
    """``triton.jit``."""
    return function if triton is None else triton.jit(function)
