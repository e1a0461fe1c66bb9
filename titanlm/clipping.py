"""Clipping the gradient's norm over all ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def clip_gradients(parameters: list[Any], largest: float | None) -> Tensor:
    """The gradients' norm over all ranks before clipping, 0-d on the device; nothing waits for it."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if largest is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, largest, norm)
    return norm
