"""Warmdown: full learning rate, then down over the last part of a run, which may end by the clock."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from titanlm.constraints import Fraction, NonNegativeInt
from titanlm.progress import Horizon, Progress
from titanlm.registry import register
from titanlm.schedulers.warmup import require_fit, warmup


@dataclass(frozen=True)
class WarmdownConfig:
    """Exactly one of `warmdown_steps` and `warmdown_fraction`."""

    warmdown_steps: NonNegativeInt | None = None
    """Last steps of the run, over which the factor falls; more than the run has: it begins below 1."""
    warmdown_fraction: Fraction | None = None
    """The same as a share of the run, of its steps or its seconds, whichever end is nearer."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up."""
    shape: Literal["linear", "cosine"] = "linear"
    """Of the way down: u or ½(1 + cos π(1 − u)), u from 1 to 0."""
    min_factor: Fraction = 0.0
    """Floor under the factor, which stays there once it has come so far down; other schedulers stretch their decay to end at it."""


@register("scheduler", "warmdown")
class Warmdown:
    """1, then u, or half a cosine of it, down to 0 at the end, not below ``min_factor``; in the warm-up no more than that.

    With W ``warmdown_steps``, N steps, step s after t seconds and L the run's
    limit in seconds, u is at most 1 and

        by steps     (N − s) / W, and not above (L − t) / (W·t/s) where there is a limit:
                     the seconds that are left by those that W steps take at the mean pace so far
        by fraction  (1 − f) / F, with f the share of the run that is done (``Horizon.fraction``)

    These are the rules of openai/parameter-golf: by steps in its baseline, the
    cosine in pull request 349, the fraction in 1394, its floor in 1787. With a
    limit in seconds the factor is pure in ``Progress``, but falls evenly only
    as far as steps take equally long.

    Raises ValueError naming the setting when not exactly one length is given or
    the warm-up is longer than the run.
    """

    def __init__(self, config: WarmdownConfig, *, total_steps: int, horizon: Horizon) -> None:
        require_fit(total_steps, warmup_steps=config.warmup_steps)
        if (config.warmdown_steps is None) == (config.warmdown_fraction is None):
            raise ValueError("warmdown_steps: give either this or warmdown_fraction")
        self.config, self.total_steps, self.horizon = config, total_steps, horizon

    def factor(self, progress: Progress) -> float:
        config = self.config
        u = min(1.0, max(0.0, self._remaining(progress)))
        down = u if config.shape == "linear" else 0.5 * (1.0 + math.cos(math.pi * (1.0 - u)))
        return min(warmup(progress.step, config.warmup_steps), max(down, config.min_factor))

    def _remaining(self, progress: Progress) -> float:
        """What is left of the run, in lengths of the way down."""
        config, limit_s = self.config, self.horizon.max_wallclock_s
        if config.warmdown_fraction is not None:
            return _ratio(1.0 - self.horizon.fraction(progress), config.warmdown_fraction)
        assert config.warmdown_steps is not None
        by_steps = _ratio(self.total_steps - progress.step, config.warmdown_steps)
        if limit_s is None:
            return by_steps
        step_s = progress.elapsed_s / max(1, progress.step)
        return min(by_steps, _ratio(limit_s - progress.elapsed_s, config.warmdown_steps * step_s))


def _ratio(left: float, length: float) -> float:
    """A way down without a length is none."""
    return left / length if length > 0 else 1.0
