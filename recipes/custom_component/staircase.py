"""A learning rate that falls in equal steps."""

from __future__ import annotations

from dataclasses import dataclass

from titanlm.constraints import Fraction, PositiveInt
from titanlm.progress import Progress
from titanlm.registry import register


@dataclass(frozen=True)
class StaircaseConfig:
    stairs: PositiveInt = 4
    """Parts of the run, all of one length."""
    ratio: Fraction = 0.5
    """Learning rate of a part over that of the one before."""


@register("scheduler", "staircase")
class Staircase:
    def __init__(self, config: StaircaseConfig, *, total_steps: int) -> None:
        self.config, self.total_steps = config, total_steps

    def factor(self, progress: Progress) -> float:
        stair = min(progress.step * self.config.stairs // self.total_steps, self.config.stairs - 1)
        return self.config.ratio**stair
