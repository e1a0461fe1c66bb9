"""sdclip: symmetric integers of 5 to 8 bits whose grid reaches k standard deviations of the row, at export and, if asked for, in training.

With b bits the step is s = k·std(row) / (2^(b-1) - 1), whatever the row's
largest weight, so k says how often the levels in the middle are used and with
that how far a codec gets. For a normal density of deviation σ and a step below
about σ a level carries

    H = log2(σ √(2πe) / s) = log2(2^(b-1) - 1) - log2 k + 2.05 bits

at a squared error of s² / 12: at b = 6, k = 12.85 it is 3.3 bits. A k for which
weights are clipped adds what they lose. From openai/parameter-golf (pull
request 1394), where k replaced pruning as what makes an artifact fit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from titanlm.constraints import PositiveFloat
from titanlm.quantizers.rowwise import Rowwise, RowwiseConfig, rowwise
from titanlm.registry import register


@dataclass(frozen=True)
class SdclipConfig(RowwiseConfig):
    """Settings of the quantizer ``sdclip``."""

    bits: Literal[5, 6, 7, 8] = 6
    """Of an integer before compression."""
    k: PositiveFloat = 12.85
    """Standard deviations of a row from 0 to the last level. More: coarser and smaller. Below about 4 weights are clipped."""

    @property
    def least_k(self) -> float:
        """Below it clipping costs more than finer steps gain: the reach of the best uniform quantizer of a normal density (Max 1960)."""
        return {5: 2.82, 6: 3.23, 7: 3.58, 8: 3.91}[self.bits]

    def coarser(self, factor: float) -> SdclipConfig:
        """The same with steps ``factor`` times as wide; what the fitter ``clip_dial`` turns."""
        return replace(self, k=self.k * factor)


@register("quantizer", "sdclip")
def sdclip(config: SdclipConfig) -> Rowwise:
    """Integers of ``bits`` bits times a scale a row, k·std(row) at the last of them."""
    return rowwise("sdclip", config, bits=config.bits, reach=partial(deviations, k=config.k))


def deviations(rows: Tensor, k: float) -> Tensor:
    """(R, n) → (R,): k standard deviations (Bessel's n - 1) in the rows' dtype.

    The largest magnitude instead for rows that lie beyond that altogether, by
    their mean: those of a single weight, or of equal ones, would be lost.
    """
    wide = rows.double()
    mean = wide.mean(1)
    reach = k * ((wide - mean[:, None]).square().sum(1) / max(1, rows.shape[1] - 1)).sqrt()
    return torch.where(reach > mean.abs(), reach.to(rows.dtype), rows.abs().amax(1))
