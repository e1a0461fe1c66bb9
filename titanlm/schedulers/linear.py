"""Linear decay."""

from __future__ import annotations

from dataclasses import dataclass

from titanlm.constraints import Fraction, NonNegativeInt
from titanlm.progress import Progress
from titanlm.registry import register
from titanlm.schedulers.warmup import require_fit, warmup


@dataclass(frozen=True)
class LinearConfig:
    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up."""
    min_factor: Fraction = 0.0
    """Share of the peak that the decay runs towards."""


@register("scheduler", "linear")
class Linear:
    """From 1 after the warm-up in a straight line to ``min_factor`` at the end.

    With u = (step − W) / (N − W): 1 − (1 − min)·u. The last step, N − 1, lies
    one step before the end of the line, so it still trains.
    """

    def __init__(self, config: LinearConfig, *, total_steps: int) -> None:
        require_fit(total_steps, warmup_steps=config.warmup_steps)
        self.config, self.total_steps = config, total_steps

    def factor(self, progress: Progress) -> float:
        config = self.config
        if progress.step < config.warmup_steps:
            return warmup(progress.step, config.warmup_steps)
        u = min(1.0, (progress.step - config.warmup_steps) / max(1, self.total_steps - config.warmup_steps))
        return 1.0 - (1.0 - config.min_factor) * u
