"""Cosine decay."""

from __future__ import annotations

import math
from dataclasses import dataclass

from titanlm.constraints import Fraction, NonNegativeInt
from titanlm.progress import Progress
from titanlm.registry import register
from titanlm.schedulers.warmup import require_fit, warmup


@dataclass(frozen=True)
class CosineConfig:
    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up."""
    min_factor: Fraction = 0.1
    """Share of the peak that the decay ends at."""


@register("scheduler", "cosine")
class Cosine:
    """Half a cosine from 1 after the warm-up to ``min_factor`` (Loshchilov & Hutter, 2017).

    With u = (step − W) / (N − W): min + (1 − min)·½(1 + cos πu).
    """

    def __init__(self, config: CosineConfig, *, total_steps: int) -> None:
        require_fit(total_steps, warmup_steps=config.warmup_steps)
        self.config, self.total_steps = config, total_steps

    def factor(self, progress: Progress) -> float:
        config = self.config
        if progress.step < config.warmup_steps:
            return warmup(progress.step, config.warmup_steps)
        u = min(1.0, (progress.step - config.warmup_steps) / max(1, self.total_steps - config.warmup_steps))
        return config.min_factor + (1.0 - config.min_factor) * 0.5 * (1.0 + math.cos(math.pi * u))
