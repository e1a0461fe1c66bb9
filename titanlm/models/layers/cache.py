"""Keys and values of past tokens, for decoding one token at a time.

A slot is addressed by the absolute position of its token, not by the order of
arrival. So prompts of different lengths may share a batch, padded on the
right: what padding wrote lies at later positions, which nobody sees before
they are overwritten.
"""

from __future__ import annotations

import torch
from torch import Tensor

from titanlm.errors import TitanError


class LayerCache:
    """One layer's share of a :class:`KVCache`."""

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device | str) -> None:
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    def update(self, positions: Tensor, keys: Tensor, values: Tensor, used: int) -> tuple[Tensor, Tensor]:
        """Store (B, T, K, dh) at ``positions`` (B, T); gives the first ``used`` slots, (B, used, K, dh)."""
        rows = torch.arange(len(positions), device=positions.device)[:, None]
        self.keys[rows, positions] = keys
        self.values[rows, positions] = values
        return self.keys[:, :used], self.values[:, :used]


class KVCache:
    """Room for ``max_len`` tokens a row; made by the model's ``new_cache``."""

    def __init__(self, n_layers: int, batch_size: int, max_len: int, n_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device | str) -> None:
        self.max_len = max_len
        self.used = 0
        """Tokens taken in so far; every position must be below it."""
        self.layers = [LayerCache((batch_size, max_len, n_kv_heads, head_dim), dtype, device) for _ in range(n_layers)]

    def reserve(self, n_tokens: int) -> None:
        """Make room for the next tokens. Raises TitanError when there is none."""
        if self.used + n_tokens > self.max_len:
            raise TitanError(f"the cache holds {self.max_len} tokens and {self.used + n_tokens} are asked of it; make it larger or generate fewer")
        self.used += n_tokens
