"""The learning rate of the first transformer (Vaswani et al. 2017, arXiv:1706.03762)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from titanlm.constraints import PositiveInt
from titanlm.progress import Progress
from titanlm.registry import register


@dataclass(frozen=True)
class InverseSqrtConfig:
    warmup_steps: PositiveInt = 100
    """Steps of linear growth; the peak is at the last of them."""


@register("scheduler", "inverse_sqrt")
class InverseSqrt:
    """With n the number of the step, from 1: min(n / W, √(W / n)). It does not depend on when the run ends."""

    def __init__(self, config: InverseSqrtConfig) -> None:
        self.warmup_steps = config.warmup_steps

    def factor(self, progress: Progress) -> float:
        n = progress.step + 1
        return min(n / self.warmup_steps, math.sqrt(self.warmup_steps / n))
