"""SmearGate: each position takes on some of the one before it.

From the records of openai/parameter-golf (pull request 369 and its parents):
``(1 − g) x_t + g x_{t−1}`` with g = sigmoid of a learned vector that starts at
0, so at g = ½.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Smear: TypeAlias = Literal["recorded", "masked"]


class SmearGate(nn.Module):
    """(B, T, D) → (B, T, D), given where nothing stands before a position.

    ``recorded``: what stands there is 0, as in the records, where that is the
    start of a row and documents run into each other. ``masked``: the gate is
    shut there, so that with the starts of documents a first token stays as it
    is and nothing crosses into it.
    """

    def __init__(self, d_model: int, kind: Smear) -> None:
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(torch.empty(d_model, dtype=torch.float32))

    def forward(self, x: Tensor, starts: Tensor) -> Tensor:
        """``starts`` (B, T) bool; the first position of a row is one."""
        previous, starts = F.pad(x[:, :-1], (0, 0, 1, 0)), starts[..., None]
        gate = self.weight.sigmoid().to(x.dtype).expand_as(x)
        if self.kind == "masked":
            gate = gate.masked_fill(starts, 0)
        else:
            previous = previous.masked_fill(starts, 0)
        return torch.lerp(x, previous, gate)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, {self.kind}"
