"""Ten stages from 8 to 2,048 positions, of steps of 65,536 to 196,608 tokens."""

from __future__ import annotations

from dataclasses import dataclass

from titanlm.curricula.stage import Stage
from titanlm.registry import register


@dataclass(frozen=True)
class Curriculum10Config:
    """There is nothing to set; a stage of another kind follows as a table of its own."""


@register("curriculum", "curriculum10")
def curriculum10(config: Curriculum10Config) -> tuple[Stage, ...]:
    """The ten stages of yxanul_0.6B: rows of its README's history, starts, rates and clips of its "ultra" configuration.

        from step       0  2,000  5,000  10,000  20,000  35,000  55,000  80,000  110,000  140,000
        positions       8     16     32      64     128     256     512     768    1,536    2,048
        rows        8,192  8,192  4,096   2,048   1,024     512     256     256      128       64
        rate        × 0.3    0.4    0.5     0.6    0.75    0.85    0.95       1        1        1
        clip          0.5    0.5    0.7     0.8     0.9       1       1       1        1        1

    Its first 200,000 steps are 30.0 billion tokens. It was meant for a cosine
    from 6e-4 after 1 % of warm-up. With `train.micro_batch_tokens` passes are of
    equal size in all stages.
    """
    return tuple(
        Stage(start_step=start, seq_len=seq_len, batch=batch, lr_multiplier=rate, clip=clip)
        for start, seq_len, batch, rate, clip in (
            (0, 8, 8_192, 0.3, 0.5),
            (2_000, 16, 8_192, 0.4, 0.5),
            (5_000, 32, 4_096, 0.5, 0.7),
            (10_000, 64, 2_048, 0.6, 0.8),
            (20_000, 128, 1_024, 0.75, 0.9),
            (35_000, 256, 512, 0.85, 1.0),
            (55_000, 512, 256, 0.95, 1.0),
            (80_000, 768, 256, 1.0, 1.0),
            (110_000, 1_536, 128, 1.0, 1.0),
            (140_000, 2_048, 64, 1.0, 1.0),
        )
    )
