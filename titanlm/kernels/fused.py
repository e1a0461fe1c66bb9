"""Whether the kernels of this package are to be used."""

from __future__ import annotations

import importlib.util
from typing import Literal

import torch
from torch import Tensor, nn


def _has_kernels(index: int | None) -> bool:
    """Whether a CUDA device is one that they were written for, Hopper or newer, and Triton is there to build them."""
    return torch.cuda.get_device_capability(index) >= (9, 0) and importlib.util.find_spec("triton") is not None


# As torch.compiler.assume_constant_result does, which would import the compiler.
_has_kernels._dynamo_marked_constant = True  # type: ignore[attr-defined]


def fused(x: Tensor) -> bool:
    """In training in bf16 on such a device. Scoring takes the plain way: it is where hooks of layers look on, and where no gradient has to be cheap."""
    return x.is_cuda and x.dtype == torch.bfloat16 and torch.is_grad_enabled() and _has_kernels(x.device.index)


def use_kernels(module: nn.Module, kernels: Literal["fused", "plain"]) -> None:
    """Let the parts of a module that say by ``fuses`` that they have a fused way take it, where ``fused`` allows, or not. Before anything is traced."""
    for each in module.modules():
        if kernels == "plain" and hasattr(each, "fuses"):
            each.fuses = False  # type: ignore[assignment]
