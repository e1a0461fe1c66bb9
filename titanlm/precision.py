"""fp32 master weights, activations in the dtype the config asks for.

A weight is cast where it is used, to the dtype of the activations it meets, so
setting the dtype in which activations are made (the embedding's output) is all
there is to it; optimizers always see fp32.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CPU_MULTIPLIES_BF16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def set_precision(module: nn.Module, precision: Literal["fp32", "bf16"]) -> None:
    """Tell every module that makes or checks activations their dtype."""
    for each in module.modules():
        if hasattr(each, "compute_dtype"):
            setattr(each, "compute_dtype", DTYPES[precision])  # noqa: B010 - an nn.Module's attributes are typed as tensors


def multiplied_in(x: Tensor) -> torch.dtype:
    """The dtype in which to multiply by ``x``: its own, but fp32 for bf16 on a CPU without instructions for it.

    There torch's products in bf16 are one or two orders of magnitude slower
    than in fp32. Results rounded once are the same but for the order of sums.
    """
    return torch.float32 if x.dtype is torch.bfloat16 and x.is_cpu and not CPU_MULTIPLIES_BF16 else x.dtype
