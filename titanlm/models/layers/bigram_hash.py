"""BigramHash: an embedding of the last two tokens, hashed into a small table.

From the records of openai/parameter-golf (pull request 369 and its parents).
Bucket of position t: ``((36313·id_t) xor (27191·id_{t−1})) mod (B − 1)``; the
last bucket, B − 1, is for positions without a previous token. Computed in
int64: in int32, as the records have it, vocabularies above 59,000 overflow.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from titanlm.models.layers.embedding import Embedding
from titanlm.models.layers.linear import Linear


class BigramHash(nn.Module):
    """``scale · W table[bucket]``, (B, T, D) in the compute dtype, to be added to the token embedding.

    ``table`` is (n_buckets, dim), ``projection`` (D, dim), ``scale`` (1,).
    """

    def __init__(self, n_buckets: int, dim: int, d_model: int) -> None:
        super().__init__()
        self.table = Embedding(n_buckets, dim)
        self.projection = Linear(dim, d_model)
        self.scale = nn.Parameter(torch.empty(1, dtype=torch.float32))

    def buckets(self, tokens: Tensor, starts: Tensor) -> Tensor:
        """(B, T) int64 ids and (B, T) bool, True where there is no previous token → (B, T) int64."""
        last = self.table.weight.shape[0] - 1
        previous = tokens.roll(1, 1)  # what is rolled in from the end stands at a start
        return torch.where(starts, last, (36313 * tokens ^ 27191 * previous) % last)

    def forward(self, tokens: Tensor, starts: Tensor) -> Tensor:
        x = self.projection(self.table(self.buckets(tokens, starts)))
        return x * self.scale.to(x.dtype)
