"""fp32 weights in two halves: the bf16 number that products take, and the 16 bits that it leaves out.

A bf16 number is an fp32 number without its last 16 bits. Those are kept beside
it as a signed difference, so that the bf16 half is the nearest one (away from
zero where two are as near) and both together are the fp32 number to the bit.
After record 57 of KellerJordan/modded-nanogpt, which cuts the bits off instead.
"""

from __future__ import annotations

import torch
from torch import Tensor


def halves(weight: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 → (bf16, int16), both of its shape. Of NaN only both halves together are one."""
    bits = weight.view(torch.int32)
    low = bits.to(torch.int16)  # the last 16 bits, as a signed number
    return (bits - low >> 16).to(torch.int16).view(torch.bfloat16), low


def joined(high: Tensor, low: Tensor) -> Tensor:
    """The fp32 number of which these are the ``halves``."""
    return ((high.view(torch.int16).to(torch.int32) << 16) + low).view(torch.float32)


def store(weight: Tensor, high: Tensor, low: Tensor) -> None:
    """Put the halves of ``weight`` where they are kept."""
    for place, half in zip((high, low), halves(weight), strict=True):
        place.copy_(half)


def split_(parameter: torch.nn.Parameter) -> Tensor:
    """Let a parameter be bf16, and its gradients stay fp32, sums of several passes too; what is left of it is returned."""
    parameter.data, low = halves(parameter.detach().float())
    parameter.grad_dtype = torch.float32
    return low
