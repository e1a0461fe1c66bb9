"""Makes an artifact fit by setting its smallest weights to zero, as few as it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from titanlm.constraints import Fraction, PositiveInt
from titanlm.errors import ArtifactError
from titanlm.exporters.encoding import Candidate
from titanlm.registry import register


@dataclass(frozen=True)
class ZeroSmallestConfig:
    max_fraction: Fraction = 0.9
    """Give up rather than set more than this share of the weights to zero."""
    halvings: PositiveInt = 8
    """Exports that are tried; the share found is at most max_fraction / 2^halvings above the smallest."""


@register("fitter", "zero_smallest")
class ZeroSmallest:
    """Bisects the share of zeros; "small" is relative to the root mean square of its tensor, and vectors are spared.

    It only helps where zeros compress: an exporter without a codec stores them as it stores anything else.
    """

    def __init__(self, config: ZeroSmallestConfig, *, max_bytes: int) -> None:
        self.config, self.max_bytes = config, max_bytes

    def fit(self, candidate: Candidate, size_bytes: Callable[[Candidate], int]) -> Candidate:
        """Raises ArtifactError when even ``max_fraction`` of zeros is too large."""
        if size_bytes(candidate) <= self.max_bytes:
            return candidate
        tensors = candidate.tensors
        sizes = {name: _relative(tensor) for name, tensor in tensors.items() if tensor.ndim > 1 and tensor.is_floating_point()}
        ordered = torch.cat([size.flatten() for size in sizes.values()]).sort().values

        def zeroed(fraction: float) -> Candidate:
            edge = ordered[max(0, int(fraction * len(ordered)) - 1)]
            zeros = {name: tensors[name].masked_fill(size <= edge, 0.0) for name, size in sizes.items()}
            return replace(candidate, tensors={**tensors, **zeros}, chosen={"zero_fraction": fraction})

        low, high = 0.0, self.config.max_fraction
        best = zeroed(high)
        if (n_bytes := size_bytes(best)) > self.max_bytes:
            raise ArtifactError(
                f"with {high:.0%} of its weights at zero the artifact takes {n_bytes:,} bytes, {n_bytes - self.max_bytes:,} over "
                f"export.max_bytes = {self.max_bytes:,}; use fewer bits, a smaller model, or raise fitter.max_fraction"
            )
        for _ in range(self.config.halvings):
            middle = (low + high) / 2
            smaller = zeroed(middle)
            if size_bytes(smaller) <= self.max_bytes:
                high, best = middle, smaller
            else:
                low = middle
        return best


def _relative(tensor: Tensor) -> Tensor:
    return tensor.float().abs() / tensor.float().square().mean().sqrt().clamp_min(1e-30)
