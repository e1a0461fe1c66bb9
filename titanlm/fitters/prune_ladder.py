"""prune_ladder: fixed fractions of the smallest weights become 0, the first that is enough is kept; the maths is in ``pruning``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from titanlm.constraints import Fraction, NonNegativeInt
from titanlm.exporters.encoding import Candidate
from titanlm.fitters.pruning import Trials, prune_each
from titanlm.registry import register


@dataclass(frozen=True)
class PruneLadderConfig:
    """Settings of the fitter ``prune_ladder``."""

    fractions: tuple[Fraction, ...] = (0.0, 0.10, 0.12, 0.14, 0.16)
    """Shares of each large matrix that become 0, tried in this order. 0 is the artifact as it is; the record began at 0.10, pruned whether it had to or not."""
    above_elements: NonNegativeInt = 65_536
    """Matrices of so many elements or fewer are left alone."""

    def __post_init__(self) -> None:
        if not self.fractions or list(self.fractions) != sorted(set(self.fractions)):
            raise ValueError(f"fractions: at least one, each larger than the one before, not {list(self.fractions)}")


@register("fitter", "prune_ladder")
class PruneLadder:
    """As the logs of Parameter Golf's pull request 369 show it: per matrix, every weight below the quantile of |w| becomes 0."""

    def __init__(self, config: PruneLadderConfig, *, max_bytes: int) -> None:
        self.config, self.max_bytes = config, max_bytes

    def fit(self, candidate: Candidate, size_bytes: Callable[[Candidate], int]) -> Candidate:
        """At most ``len(fractions)`` exports are tried. Raises ArtifactError when even the last fraction is too large."""
        fractions = self.config.fractions
        trials = Trials(
            candidate, size_bytes, prune=prune_each, above_elements=self.config.above_elements, max_bytes=self.max_bytes, at_most=len(fractions)
        )  # fmt: skip
        for fraction in fractions:
            pruned = trials.attempt(fraction)
            if pruned is not None:
                return pruned
        raise trials.overshoot(fractions[-1], "fitter.fractions")
