"""A straight line up to 1, then constant."""

from __future__ import annotations

from dataclasses import dataclass

from titanlm.constraints import Fraction, PositiveInt
from titanlm.progress import Progress
from titanlm.registry import register


@dataclass(frozen=True)
class RampConfig:
    start_factor: Fraction
    """Of the first step; of a momentum from 0.92 to 0.99 it is 0.92/0.99 = 0.9293."""
    steps: PositiveInt
    """After so many steps the factor is 1; they may be more than the run has."""


@register("scheduler", "ramp")
class Ramp:
    """start + (1 − start)·min(1, step/steps), meant for the momentum of `muon`, which starts low and is then held.

    Unlike a warm-up it starts at ``start_factor`` itself and may outlast the run.
    """

    def __init__(self, config: RampConfig) -> None:
        self.config = config

    def factor(self, progress: Progress) -> float:
        start, steps = self.config.start_factor, self.config.steps
        return start + (1.0 - start) * min(1.0, progress.step / steps)
