"""fp32 master weights, activations in the dtype the config asks for.

A weight is cast where it is used, to the dtype of the activations it meets, so
setting the dtype in which activations are made (the embedding's output) is all
there is to it; optimizers always see fp32.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def set_precision(module: nn.Module, precision: Literal["fp32", "bf16"]) -> None:
    """Tell every module that makes or checks activations their dtype."""
    for each in module.modules():
        if hasattr(each, "compute_dtype"):
            setattr(each, "compute_dtype", DTYPES[precision])  # noqa: B010 - an nn.Module's attributes are typed as tensors
