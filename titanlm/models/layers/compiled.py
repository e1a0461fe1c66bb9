"""Compiled twins of plain functions, one each however often asked for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile(function)``; compiled at the first call for each set of dtypes and shapes."""
    return torch.compile(function)
