"""Cross-entropy that turns away from tokens the model already knows (Lin et al. 2017, arXiv:1708.02002)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from titanlm.constraints import NonNegativeFloat, NonNegativeInt
from titanlm.registry import register


@dataclass(frozen=True)
class FocalConfig:
    gamma: NonNegativeFloat = 1.0
    """How fast known tokens stop to count; 0 is cross-entropy."""
    chunk_tokens: NonNegativeInt = 4096
    """Tokens whose logits exist at one time; 0: all of them."""


@register("loss", "focal")
class Focal:
    """−(1 − p)^γ · log p, p the probability of the label."""

    def __init__(self, config: FocalConfig) -> None:
        self.gamma, self.chunk_tokens = config.gamma, config.chunk_tokens

    def per_token(self, z_y: Tensor, lse: Tensor, z_mean: Tensor | None) -> Tensor:
        """(n,) each → (n,)."""
        log_p = z_y - lse
        # 1 − p without cancellation, and away from 0, where the power has no finite derivative.
        return -(-log_p.expm1()).clamp_min(1e-12).pow(self.gamma) * log_p
