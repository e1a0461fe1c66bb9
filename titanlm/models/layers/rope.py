"""Rotary positions (Su et al. 2021, arXiv:2104.09864), on halves.

The pair of dimension i is dimension i + head_dim/2, as in the Llama family,
so checkpoints go to and from it without a permutation. The tables are
computed once a forward pass from the batch's positions: there is no buffer to
initialise, to keep out of checkpoints or to lose in bf16.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_tables(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of ``positions · theta^(−2i/head_dim)``.

    (B, T) → two of (B, T, 1, head_dim/2), in fp32, or in fp64 when ``dtype``
    is: angles grow with the position, and bf16 has 8 bits for them.
    """
    wide = torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=wide) / head_dim
    angles = positions.to(wide)[..., None, None] * theta**-exponents
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (B, T, H, head_dim); computed in the dtype of the tables, returned in that of ``x``."""
    x1, x2 = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)


def ntk_theta(theta: float, head_dim: int, seq_len: int, reference_tokens: int) -> float:
    """The base for rows longer than the reference: ``theta · (seq_len / reference)^(head_dim / (head_dim − 2))``.

    "NTK-aware" scaling (Peng et al. 2023, arXiv:2309.00071, §3.1): the highest
    frequency stays and the lowest is stretched by just the factor of the
    lengths. Rows up to the reference keep ``theta``.
    """
    return theta * max(1.0, seq_len / reference_tokens) ** (head_dim / (head_dim - 2))
