"""Whether the kernels of this package are to be used."""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Literal

import torch
from torch import Tensor, nn

from titanlm.environment import c_compiler


@cache
def _major(index: int | None) -> int:
    return 0 if torch.version.hip is not None else torch.cuda.get_device_capability(index)[0]


@cache
def _found(index: int | None) -> bool:
    # Hopper and the Blackwell of data centres; that of graphics cards has too little shared memory.
    return _major(index) in (9, 10) and importlib.util.find_spec("triton") is not None and c_compiler() is not None


def hopper(index: int | None) -> bool:
    """Whether the CUDA device of this number is one, which is where kernels of other packages were measured."""
    return _major(index) == 9


def serve(index: int | None) -> bool:
    """Whether they serve on the CUDA device of this number: one they were written for, with Triton and the C compiler it calls."""
    return _found(index)


# As torch.compiler.assume_constant_result does, which would import the compiler.
hopper._dynamo_marked_constant = serve._dynamo_marked_constant = True  # type: ignore[attr-defined]


def fused(x: Tensor) -> bool:
    """In training in bf16 on such a device. Without gradients the plain way is taken, which is where hooks of layers look on."""
    return x.is_cuda and x.dtype == torch.bfloat16 and torch.is_grad_enabled() and serve(x.device.index)


def use_kernels(module: nn.Module, kernels: Literal["fused", "plain"]) -> None:
    """Let the parts of a module that say by ``fuses`` that they have a fused way take it, where ``fused`` allows, or not. Before anything is traced."""
    for each in module.modules():
        if kernels == "plain" and hasattr(each, "fuses"):
            each.fuses = False  # type: ignore[assignment]
