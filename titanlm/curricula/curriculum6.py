"""Six stages from 128 to 2,048 positions, of steps that shrink from 256 rows to 32."""

from __future__ import annotations

from dataclasses import dataclass

from titanlm.curricula.stage import Stage
from titanlm.registry import register


@dataclass(frozen=True)
class Curriculum6Config:
    """There is nothing to set; a stage of another kind follows as a table of its own."""


@register("curriculum", "curriculum6")
def curriculum6(config: Curriculum6Config) -> tuple[Stage, ...]:
    """The six-stage table of yxanul_0.6B's README, with the learning rates and re-warm-ups of its `fineweb_training_fp8.yaml`.

        from step      0    3,000   6,000  10,000  15,000  25,000
        positions    128      256     512     768   1,024   2,048
        rows      8 × 32   4 × 32  2 × 32  2 × 32  1 × 32  1 × 32
        rate         × 2    × 1.5   × 1.2     × 1   × 0.8   × 0.5
        re-warm-up   500      300     200     100     100     100
        clip           1      0.8     0.5     0.4     0.3     0.3

    Its first 25,000 steps are 901 million tokens. That repository stepped its
    optimizer at each of the 32 parts, raised 2 and 4 rows to 8, clipped at 0.3
    throughout and never used these rates; here they are what the table says.
    The first re-warm-up multiplies the warm-up of a scheduler that has one.
    """
    return tuple(
        Stage(start_step=start, seq_len=seq_len, batch=batch, accumulation=32, lr_multiplier=rate, clip=clip, rewarmup_steps=rewarmup)
        for start, seq_len, batch, rate, clip, rewarmup in (
            (0, 128, 8, 2.0, 1.0, 500),
            (3_000, 256, 4, 1.5, 0.8, 300),
            (6_000, 512, 2, 1.2, 0.5, 200),
            (10_000, 768, 2, 1.0, 0.4, 100),
            (15_000, 1_024, 1, 0.8, 0.3, 100),
            (25_000, 2_048, 1, 0.5, 0.3, 100),
        )
    )
