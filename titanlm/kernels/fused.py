"""Whether the kernels of this package are to be used."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

_HAS_TRITON = importlib.util.find_spec("triton") is not None


def fused(x: Tensor) -> bool:
    """In training in bf16 on CUDA. Scoring takes the plain way: it is where hooks of layers look on, and where no gradient has to be cheap."""
    return x.is_cuda and x.dtype == torch.bfloat16 and torch.is_grad_enabled() and _HAS_TRITON
