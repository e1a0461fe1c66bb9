"""Warm-up, stable, decay."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from titanlm.constraints import Fraction, NonNegativeInt
from titanlm.progress import Progress
from titanlm.registry import register
from titanlm.schedulers.warmup import require_fit, warmup

SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda u: 1.0 - u,
    "sqrt": lambda u: 1.0 - math.sqrt(u),
    "cosine": lambda u: 0.5 * (1.0 + math.cos(math.pi * u)),
}


@dataclass(frozen=True)
class WsdConfig:
    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up."""
    decay_steps: NonNegativeInt = 0
    """Last steps of the run, over which the factor falls."""
    shape: Literal["linear", "sqrt", "cosine"] = "sqrt"
    """Of the decay: 1 − u, 1 − √u or ½(1 + cos πu), u from 0 to 1 over `decay_steps`."""
    min_factor: Fraction = 0.0
    """Share of the peak that the decay runs towards."""


@register("scheduler", "wsd")
class Wsd:
    """Warm-up, stable, decay (Hu et al., 2024; 1 − √u by Hägele et al., 2024).

    The stable part does not depend on the length of the run, so a checkpoint
    of it can be decayed at any time by raising or lowering ``train.steps``.
    """

    def __init__(self, config: WsdConfig, *, total_steps: int) -> None:
        require_fit(total_steps, warmup_steps=config.warmup_steps, decay_steps=config.decay_steps)
        self.config, self.total_steps = config, total_steps

    def factor(self, progress: Progress) -> float:
        config = self.config
        into_decay = progress.step - (self.total_steps - config.decay_steps)
        if into_decay <= 0 or config.decay_steps == 0:
            return warmup(progress.step, config.warmup_steps)
        u = min(1.0, into_decay / config.decay_steps)
        return config.min_factor + (1.0 - config.min_factor) * SHAPES[config.shape](u)
