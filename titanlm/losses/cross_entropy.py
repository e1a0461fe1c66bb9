"""Cross-entropy with an optional penalty on the size of the logits."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from titanlm.constraints import NonNegativeFloat, NonNegativeInt
from titanlm.registry import register


@dataclass(frozen=True)
class CrossEntropyConfig:
    chunk_tokens: NonNegativeInt = 4096
    """Tokens whose logits exist at one time; 0: all of them, by plain autograd. Fewer save memory, many fewer cost speed."""
    z_loss: NonNegativeFloat = 0.0
    """Weight of lse², which keeps logits from drifting (PaLM, arXiv:2204.02311, uses 1e-4)."""


@register("loss", "cross_entropy")
class CrossEntropy:
    """lse − z_y + z_loss·lse², in nats."""

    def __init__(self, config: CrossEntropyConfig) -> None:
        self.chunk_tokens = config.chunk_tokens
        self.z_loss = config.z_loss

    def per_token(self, z_y: Tensor, lse: Tensor, z_mean: Tensor | None) -> Tensor:
        """(n,) each → (n,) in the same dtype."""
        nll = lse - z_y
        return nll + self.z_loss * lse.square() if self.z_loss else nll
