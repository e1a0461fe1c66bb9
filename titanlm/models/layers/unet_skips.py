"""U-Net skips: the first half of the layers hands its outputs to the second, last out first in.

Ronneberger et al. 2015, arXiv:1505.04597, in the form of the records of
modded-nanogpt and openai/parameter-golf: added with a learned weight a channel.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class UNetSkips(nn.Module):
    """Of L layers the first ⌊L/2⌋ are encoder; ``weight`` is (number of skips, D).

    With an odd number the decoder has a layer more, which gets nothing.
    """

    def __init__(self, n_layers: int, d_model: int) -> None:
        super().__init__()
        self.n_encoder = n_layers // 2
        self.weight = nn.Parameter(torch.empty(self.n_encoder, d_model, dtype=torch.float32))

    def forward(self, layer: int, kept: list[Tensor]) -> tuple[Tensor, Tensor] | None:
        """What is added to the input of layer ``layer``, (B, T, D), and its weight (D,). ``kept`` holds outputs of encoder layers and loses that one."""
        index = layer - self.n_encoder
        return (kept.pop(), self.weight[index]) if 0 <= index < self.n_encoder else None
