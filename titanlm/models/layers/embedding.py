"""Token embedding, whole or factorised (ALBERT: Lan et al. 2019, arXiv:1909.11942)."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titanlm.models.layers.product import product_of
from titanlm.models.layers.rounding import in_use
from titanlm.precision import multiplied_in


class Embedding(nn.Module):
    """Ids to vectors: a table (V, D), or a table (V, r) times a projection (r, D).

    Masters are fp32. The output has ``compute_dtype``, which the trainer sets
    on every module that has it: this is where a bf16 run becomes bf16.
    """

    rounds = ("weight", "projection")
    multiplies: ClassVar = {"projection": 1}

    def __init__(self, vocab_size: int, d_model: int, rank: int | None = None) -> None:
        super().__init__()
        self.compute_dtype = torch.float32
        self.weight = nn.Parameter(torch.empty(vocab_size, rank or d_model, dtype=torch.float32))
        self.projection = nn.Parameter(torch.empty(rank, d_model, dtype=torch.float32)) if rank else None

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) ids → (B, T, D)."""
        x = F.embedding(tokens, in_use(self, "weight")).to(self.compute_dtype)
        return x if self.projection is None else product_of(self, "projection", _by_rows)(x, in_use(self, "projection").to(x.dtype).T)

    def extra_repr(self) -> str:
        rank = "" if self.projection is None else f"rank={self.weight.shape[1]}, "
        return f"{self.weight.shape[0]}, {rank}compute_dtype={self.compute_dtype}"


def _by_rows(x: Tensor, weight: Tensor) -> Tensor:
    dtype = multiplied_in(x)
    return (x.to(dtype) @ weight.T.to(dtype)).to(x.dtype)
