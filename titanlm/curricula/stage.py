"""One stage: a table of `[[curriculum]]`, and what every curriculum is made of."""

from __future__ import annotations

from dataclasses import dataclass

from titanlm.constraints import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Size
from titanlm.registry import register


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Shape and learning rate of the steps from `start_step` on, up to the stage that follows."""

    start_step: NonNegativeInt
    """Optimizer steps done before it; the first stage has 0, and each one more than the stage before."""
    seq_len: Size | None = None
    """Positions a row; unset: `train.seq_len`."""
    batch: Size | None = None
    """Rows, over all ranks, of one of the `accumulation` parts of a step; unset: `train.global_batch`."""
    accumulation: PositiveInt = 1
    """A step has so many times `batch` rows. How many of them go forward at once is for `train.micro_batch` and `train.micro_batch_tokens` to say."""
    lr_multiplier: PositiveFloat = 1.0
    """Times the learning rate that the scheduler gives."""
    clip: NonNegativeFloat | None = None
    """Largest gradient norm, 0: any; unset: `train.clip`."""
    rewarmup_steps: NonNegativeInt = 0
    """Steps over which the learning rate rises again to its full height from the start of the stage."""


@register("curriculum", "stage")
def stage(config: Stage) -> tuple[Stage, ...]:
    """Itself. What a table of `[[curriculum]]` without a name is."""
    return (config,)
