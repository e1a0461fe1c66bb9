"""Constant learning rate after a linear warm-up."""

from __future__ import annotations

from dataclasses import dataclass

from titanlm.constraints import NonNegativeInt
from titanlm.progress import Progress
from titanlm.registry import register
from titanlm.schedulers.warmup import require_fit, warmup


@dataclass(frozen=True)
class ConstantConfig:
    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up."""


@register("scheduler", "constant")
class Constant:
    """1 after the warm-up."""

    def __init__(self, config: ConstantConfig, *, total_steps: int) -> None:
        require_fit(total_steps, warmup_steps=config.warmup_steps)
        self.config = config

    def factor(self, progress: Progress) -> float:
        return warmup(progress.step, self.config.warmup_steps)
