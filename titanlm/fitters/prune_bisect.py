"""prune_bisect: the smallest fraction of weights at 0 with which an artifact fits; the maths is in ``pruning``."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from titanlm.constraints import Fraction, NonNegativeInt, PositiveFloat
from titanlm.exporters.encoding import Candidate
from titanlm.fitters.pruning import Trials, prune_each, prune_rows
from titanlm.registry import register


@dataclass(frozen=True)
class PruneBisectConfig:
    """Settings of the fitter ``prune_bisect``."""

    max_fraction: Fraction = 0.2
    """Give up rather than set more than this share of the large matrices to 0."""
    tolerance: PositiveFloat = 0.001
    """The fraction kept fits, and one smaller by at most this was tried and did not. 0.2 / 0.001 takes at most 10 exports."""
    smallest: Literal["row", "tensor"] = "row"
    """What is small. "row": |w| / max|row|, ranked over all matrices together. That is the place of a weight on a grid made by the largest, so rows with
    outliers give more and dense ones less. "tensor": |w|, the same share of every matrix, as prune_ladder does."""
    above_elements: NonNegativeInt = 65_536
    """Matrices of so many elements or fewer are left alone."""

    def __post_init__(self) -> None:
        if self.max_fraction == 0:
            raise ValueError("max_fraction: 0 prunes nothing; leave the fitter out")
        if self.tolerance < 1e-6:
            raise ValueError(f"tolerance: {self.tolerance:g} is finer than any artifact; at least 1e-6")


@register("fitter", "prune_bisect")
class PruneBisect:
    """Bisection over multiples of the tolerance; nothing is pruned when nothing has to be."""

    def __init__(self, config: PruneBisectConfig, *, max_bytes: int) -> None:
        self.config, self.max_bytes = config, max_bytes

    def fit(self, candidate: Candidate, size_bytes: Callable[[Candidate], int]) -> Candidate:
        """The candidate with the smallest fraction tried that fits.

        Sizes need not fall at every step, since coders are not exact: what is
        returned was measured, never inferred. Raises ArtifactError when
        ``max_fraction`` is too large still.
        """
        config = self.config
        low, high = 0, math.ceil(config.max_fraction / config.tolerance)
        trials = Trials(
            candidate, size_bytes, prune=prune_rows if config.smallest == "row" else prune_each,
            above_elements=config.above_elements, max_bytes=self.max_bytes, at_most=2 + (high - 1).bit_length(),
        )  # fmt: skip
        best = trials.attempt(0.0)
        if best is not None:
            return best
        step = config.max_fraction / high
        best = trials.attempt(config.max_fraction)
        if best is None:
            raise trials.overshoot(config.max_fraction, "fitter.max_fraction")
        while high - low > 1:
            middle = (low + high) // 2
            pruned = trials.attempt(middle * step)
            if pruned is None:
                low = middle
            else:
                high, best = middle, pruned
        return best
