"""Averaged weights in the place of a model's own, for as long as they are needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def swapped_in(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Iterator[None]:
    """The parameters hold ``values``, of the same names and shapes, inside, and what they held again after."""
    own = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    _copy(values, parameters)
    try:
        yield
    finally:
        _copy(own, parameters)


@torch.no_grad()
def _copy(values: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])
