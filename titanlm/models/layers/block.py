"""One pre-norm layer: attention, then the feed-forward network, each added to the residual stream."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from titanlm.models.layers.attention import Attention, Mask
from titanlm.models.layers.feed_forward import FeedForward
from titanlm.models.layers.norm import RMSNorm

if TYPE_CHECKING:
    from titanlm.models.layers.cache import LayerCache


class Block(nn.Module):
    """(B, T, D) → (B, T, D). The unit that is compiled, checkpointed and sharded."""

    def __init__(self, d_model: int, norm_eps: float, attention: Attention, feed_forward: FeedForward) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(d_model, norm_eps)
        self.attention = attention
        self.feed_forward_norm = RMSNorm(d_model, norm_eps)
        self.feed_forward = feed_forward

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Mask, past: tuple[LayerCache, Tensor, int] | None = None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotary, mask, past)
        return x + self.feed_forward(self.feed_forward_norm(x))
