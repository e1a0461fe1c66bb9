"""Short rows at first, as in short-sequence pre-training (Press et al. 2021, "Shortformer", arXiv:2012.15832)."""

from __future__ import annotations

from dataclasses import dataclass

from titanlm.constraints import PositiveInt, Size
from titanlm.curricula.stage import Stage
from titanlm.registry import register


@dataclass(frozen=True)
class ShortFirstConfig:
    steps: PositiveInt = 40
    """Of the first stage."""
    seq_len: Size = 24
    """Positions of its rows; `train.seq_len` from then on."""


@register("curriculum", "short_first")
def short_first(config: ShortFirstConfig) -> tuple[Stage, ...]:
    """Two stages of equally many rows a step."""
    return Stage(start_step=0, seq_len=config.seq_len), Stage(start_step=config.steps)
