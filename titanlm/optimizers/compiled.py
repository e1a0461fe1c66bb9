"""Compiled twins of what optimizers do in a step, and numbers that may change from step to step without another graph."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MAX_SHAPES = 256
"""Of one function; torch's own limit, 8, is fewer than the parameters of some models have."""


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile(function)`` without graph breaks, one graph for each set of shapes, dtypes and plain arguments."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_SHAPES)
    # Shapes are few and known: a graph for shapes of any size would be slower for all of them.
    return torch.compile(function, fullgraph=True, dynamic=False)


def scalar(value: float) -> Tensor:
    """A number as a graph must be given it, 0-d fp32 on the CPU: graphs are specialised on the value of a Python float.

    Let it meet a tensor of the device before another scalar: two of them make a
    kernel for the CPU, for which there may be no compiler.
    """
    return torch.tensor(value, dtype=torch.float32)
