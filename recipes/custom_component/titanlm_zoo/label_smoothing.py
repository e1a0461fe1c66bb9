"""Cross-entropy against a label mixed with the uniform distribution (Szegedy et al. 2015, arXiv:1512.00567)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from titanlm.constraints import Fraction, NonNegativeInt
from titanlm.registry import register


@dataclass(frozen=True)
class LabelSmoothingConfig:
    smoothing: Fraction = 0.1
    """Share of the uniform distribution in the target."""
    chunk_tokens: NonNegativeInt = 4096
    """Tokens whose logits exist at one time; 0: all of them."""


@register("loss", "label_smoothing")
class LabelSmoothing:
    """lse − (1 − ε)·z_y − ε·z̄, in nats: (1 − ε) and ε/V are the target's probabilities."""

    needs_mean = True  # of the logits of a token, z̄

    def __init__(self, config: LabelSmoothingConfig) -> None:
        self.smoothing, self.chunk_tokens = config.smoothing, config.chunk_tokens

    def per_token(self, z_y: Tensor, lse: Tensor, z_mean: Tensor | None) -> Tensor:
        """(n,) each → (n,)."""
        assert z_mean is not None
        return lse - (1 - self.smoothing) * z_y - self.smoothing * z_mean
