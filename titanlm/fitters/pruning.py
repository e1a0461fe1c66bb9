"""Magnitude pruning for artifacts that are too large: small weights of large matrices become 0.

Zeros help only where an entropy coder follows, and only those that would not
have been rounded to 0 anyhow: of Gaussian rows of 512 that is 8.6 % at 5 bits
and 4.2 % at 6. Measured on 27 M Gaussian parameters at 5 to 8 bits, zstd 1:
16.06 MB as they are, 15.93, 15.81, 15.69, 15.58 MB with 10, 12, 14, 16 % at 0.

Small by matrix (``prune_each``) takes the same share of every matrix, and of a
row of small weights all of it. Small beside the largest weight of the row
(``prune_rows``) is small on the quantizer's grid: it is ranked over all
matrices together, and no row loses its largest weight, so no grid moves that
is made by it (that of ``sdclip`` is made by the deviation of a row, and moves).

A quantile is an order statistic. torch.quantile used to refuse more than 2^24
elements; a selection does not, and no interpolation is needed: a weight lies
below the linearly interpolated f-quantile of n numbers exactly when it lies
below the one of rank ⌈f (n - 1)⌉. Equal weights stay or go together, so the
outcome does not depend on an order, and less than f goes where many are equal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from titanlm.errors import ArtifactError
from titanlm.exporters.encoding import Candidate
from titanlm.fitters.trial import measured

Tensors = dict[str, Tensor]
Prune = Callable[[Mapping[str, Tensor], Sequence[str], float], Tensors]


def prunable(tensors: Mapping[str, Tensor], above_elements: int) -> list[str]:
    """Names of floating tensors of two dimensions and more than ``above_elements`` elements."""
    return [name for name, tensor in tensors.items() if tensor.ndim == 2 and tensor.is_floating_point() and tensor.numel() > above_elements]


def prune_each(tensors: Mapping[str, Tensor], names: Sequence[str], fraction: float) -> Tensors:
    """``tensors`` with the weights of each named one that lie below its own ``fraction``-quantile of |w| at 0."""

    def pruned(tensor: Tensor) -> Tensor:
        magnitude = _magnitude(tensor)
        return tensor.masked_fill(magnitude < edge(magnitude.flatten().numpy(), fraction), 0)

    return {**tensors, **{name: pruned(tensors[name]) for name in names}}


def prune_rows(tensors: Mapping[str, Tensor], names: Sequence[str], fraction: float) -> Tensors:
    """``tensors`` with the weights at 0 that lie below the ``fraction``-quantile of |w| / max|row| over all named ones together."""
    relative = {name: _relative(tensors[name]) for name in names}
    common = edge(np.concatenate([one.flatten().numpy() for one in relative.values()]), fraction) if relative else 0.0
    return {**tensors, **{name: tensors[name].masked_fill(relative[name] < common, 0) for name in names}}


def edge(numbers: np.ndarray, fraction: float) -> float:
    """What lies strictly below it lies below the linearly interpolated ``fraction``-quantile of ``numbers`` (n,), and nothing else does.

    O(n), any n; 0 for no numbers.
    """
    if not len(numbers):
        return 0.0
    # A product such as 0.14 · 50 must not come out above 7 by its last bit.
    rank = math.ceil(round(fraction * (len(numbers) - 1), 6))
    return float(np.partition(numbers, rank)[rank])


def _relative(tensor: Tensor) -> Tensor:
    magnitude = _magnitude(tensor)
    return magnitude / magnitude.amax(-1, keepdim=True).clamp_min(torch.finfo(magnitude.dtype).tiny)


def _magnitude(tensor: Tensor) -> Tensor:
    """In float32, or float64 for float64: numpy has no bfloat16."""
    return (tensor if tensor.dtype == torch.float64 else tensor.float()).abs()


class Trials:
    """Prunes and measures, and knows what to say when nothing fits."""

    def __init__(
        self,
        candidate: Candidate,
        size_bytes: Callable[[Candidate], int],
        *,
        prune: Prune,
        above_elements: int,
        max_bytes: int,
        at_most: int,
    ) -> None:
        self.candidate, self.size_bytes, self.prune, self.max_bytes, self.at_most = candidate, size_bytes, prune, max_bytes, at_most
        self.above_elements, self.names = above_elements, prunable(candidate.tensors, above_elements)
        self.n_bytes = self.done = 0

    def attempt(self, fraction: float) -> Candidate | None:
        """The candidate pruned, or None if it is too large."""
        pruned = replace(self.candidate, tensors=self.prune(self.candidate.tensors, self.names, fraction), chosen={"prune_fraction": fraction})
        self.done += 1
        label = f"prune_trial:{fraction:g}"
        self.n_bytes = measured(pruned, self.size_bytes, self.max_bytes, label=label, trial=self.done, at_most=self.at_most)
        return pruned if self.n_bytes <= self.max_bytes else None

    def overshoot(self, fraction: float, setting: str) -> ArtifactError:
        """Of the last trial; ``setting`` allows more pruning."""
        tensors = self.candidate.tensors
        n_weights = sum(tensors[name].numel() for name in self.names)
        total = sum(tensor.numel() for tensor in tensors.values())
        reach = f"{n_weights:,} of {total:,} weights can be pruned: those of matrices of more than fitter.above_elements = {self.above_elements:,}"
        remedy = f"raise {setting}" if self.names else "lower fitter.above_elements"
        return ArtifactError(
            f"with {fraction:.4g} of the large matrices' weights at zero the artifact takes {self.n_bytes:,} bytes, "
            f"{self.n_bytes - self.max_bytes:,} over export.max_bytes = {self.max_bytes:,}; nothing was written\n"
            f"  {reach}\n{remedy}, use fewer bits ([[quantizer]]), a smaller model, or a stronger codec"
        )
