"""FlashAttention 3 and 4 as operators: what differs between the packages is the call alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from titanlm.kernels.operator import operator


def forward_operator(name: str, run: Callable[..., Any]) -> Any:
    """``torch.ops.titanlm.NAME``, which is a ``Kernel.forward``."""
    return operator(f"{name}(Tensor q, Tensor k, Tensor v, Tensor? lengths) -> (Tensor, Tensor)", run, _forward_shapes)


def backward_operator(name: str, run: Callable[..., Any]) -> Any:
    """``torch.ops.titanlm.NAME``, which is a ``Kernel.backward``."""
    return operator(f"{name}(Tensor g, Tensor q, Tensor k, Tensor v, Tensor y, Tensor lse, Tensor? lengths) -> (Tensor, Tensor, Tensor)", run, _backward_shapes)


def _forward_shapes(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    b, t, h, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((b, h, t) if lengths is None else (h, b * t), dtype=torch.float32)


def _backward_shapes(g: Tensor, q: Tensor, k: Tensor, v: Tensor, *kept: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
