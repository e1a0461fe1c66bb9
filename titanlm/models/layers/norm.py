"""Root-mean-square norm (Zhang and Sennrich 2019, arXiv:1910.07467)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """``weight · x / sqrt(mean(x²) + eps)`` over the last dimension; not ``learned``, it has no weight.

    Computed in fp32 (fp64 for fp64 input), weight included, and rounded once
    to the dtype of the input.
    """

    def __init__(self, dim: int, eps: float, *, learned: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, dtype=torch.float32)) if learned else None
        self.dim, self.eps = dim, eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) → (..., dim)."""
        wide = torch.promote_types(x.dtype, torch.float32)
        weight = None if self.weight is None else self.weight.to(wide)
        return F.rms_norm(x.to(wide), (self.dim,), weight, self.eps).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}{'' if self.weight is not None else ', without weight'}"
