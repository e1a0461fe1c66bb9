"""clip_dial: one factor on the step of every quantizer that can be made coarser, the smallest with which the artifact fits.

A grid twice as wide takes about a bit a weight less after an entropy coder
(Gish and Pierce 1968: the entropy of a finely quantized source falls by log2 of
the step), and its squared error is four times as large. So the size is a
straight line in log2 of the factor, as long as steps are not much wider than a
row's deviation, and the next trial is where the line meets the limit. The
second trial takes the line to fall by a bit a weight, the later ones know how it
falls: less where other quantizers hold much of the model. From
openai/parameter-golf (pull request 1394), whose author turned k by hand until
the artifact fitted, in place of pruning.

The search ends when little of the limit is left unused. It goes both ways: an
artifact that is smaller than it has to be gets a finer grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from titanlm.constraints import Fraction, PositiveFloat, PositiveInt
from titanlm.errors import ArtifactError
from titanlm.exporters.encoding import Candidate
from titanlm.fitters.trial import measured
from titanlm.registry import register


@dataclass(frozen=True)
class ClipDialConfig:
    """Settings of the fitter ``clip_dial``."""

    finest: PositiveFloat = 0.5
    """Least factor on the steps; 1: an artifact that fits as it is stays as it is. Where k of ``sdclip`` comes below about 3 (5 bits) to 4 (8 bits),
    clipping costs more than finer steps gain."""
    coarsest: PositiveFloat = 2.0
    """Give up rather than make steps wider than so many times what the config says."""
    unused: Fraction = 0.0005
    """Share of export.max_bytes that may be left over; the search ends there."""
    trials: PositiveInt = 8
    """Exports that are tried at most. After the last the finest grid that fitted is kept."""

    def __post_init__(self) -> None:
        if not self.finest <= 1 <= self.coarsest or self.finest == self.coarsest:
            raise ValueError(f"finest: the factor goes from finest over 1 to coarsest; {self.finest:g} and {self.coarsest:g} leave nothing to turn")
        if max(1 / self.finest, self.coarsest) > _WIDEST:
            raise ValueError(
                f"coarsest: at most {_WIDEST}, and finest at least 1/{_WIDEST}, not {self.coarsest:g} and {self.finest:g}; change the quantizer instead"
            )


_WIDEST = 1024


@register("fitter", "clip_dial")
class ClipDial:
    """Regula falsi in log2 of the factor, kept inside its bracket; quantizers without a method ``coarser`` in their settings stay as they are."""

    def __init__(self, config: ClipDialConfig, *, max_bytes: int) -> None:
        self.config, self.max_bytes = config, max_bytes

    def fit(self, candidate: Candidate, size_bytes: Callable[[Candidate], int]) -> Candidate:
        """The candidate with the finest steps tried that fit; the size of each was measured.

        Raises ArtifactError when no quantizer can be made coarser, when
        ``coarsest`` is too large still, and when ``trials`` end before one fits.
        """
        if not any(hasattr(entry.config, "coarser") for entry in candidate.quantizers):
            raise ArtifactError("fitter 'clip_dial' turns quantizers such as 'sdclip', and the config has none; use one, or a fitter that prunes")
        first, last = math.log2(self.config.finest), math.log2(self.config.coarsest)
        over: _Point | None = None
        fits: _Point | None = None
        points: list[_Point] = []
        best, place = candidate, 0.0
        for trial in range(1, self.config.trials + 1):
            turned = _turned(candidate, place)
            label = f"clip_trial:{turned.chosen['clip_factor']:.5g}"
            point = _Point(place, measured(turned, size_bytes, self.max_bytes, label=label, trial=trial, at_most=self.config.trials))
            points.append(point)
            if point.n_bytes > self.max_bytes:
                over = point
            else:
                fits, best = point, turned
            if fits is not None and (fits.place == first or self.max_bytes - fits.n_bytes <= self.config.unused * self.max_bytes):
                break
            if over is not None and over.place == last:
                break
            place = min(max(self._next(candidate, over, fits, points), first), last)
        if fits is None:
            assert over is not None
            raise ArtifactError(
                f"with steps {2**over.place:.4g} times as wide the artifact takes {over.n_bytes:,} bytes ({points[0].n_bytes:,} as it was), "
                f"{over.n_bytes - self.max_bytes:,} over export.max_bytes = {self.max_bytes:,}; nothing was written\n"
                f"raise fitter.{'coarsest' if over.place == last else 'trials'}, use fewer bits ([[quantizer]]), a smaller model, or a stronger codec"
            )
        return best

    def _next(self, candidate: Candidate, over: _Point | None, fits: _Point | None, points: Sequence[_Point]) -> float:
        """Where the line through the last two points, or those on both sides of the limit, meets it; with one point, by a bit a weight and octave."""
        aim = self.max_bytes * (1 - self.config.unused / 2)
        if over is not None and fits is not None:
            share = (over.n_bytes - aim) / (over.n_bytes - fits.n_bytes)
            return over.place + min(max(share, 0.05), 0.95) * (fits.place - over.place)
        point = points[-1]
        octave_bytes = sum(tensor.numel() for tensor in candidate.tensors.values()) / 8
        if len(points) > 1:
            octave_bytes = (points[-2].n_bytes - point.n_bytes) / (point.place - points[-2].place)
        missing = point.n_bytes - aim
        # No line holds for more than an octave, and a very small step would tell nothing of it.
        step = min(max(abs(missing) / octave_bytes, 0.01), 1.0) if octave_bytes > 0 else 1.0
        return point.place + math.copysign(step, missing)


@dataclass(frozen=True)
class _Point:
    place: float
    """log2 of the factor."""
    n_bytes: int


def _turned(candidate: Candidate, place: float) -> Candidate:
    factor = 2.0**place
    quantizers = tuple(replace(entry, config=entry.config.coarser(factor)) if hasattr(entry.config, "coarser") else entry for entry in candidate.quantizers)
    return replace(candidate, quantizers=quantizers, chosen={"clip_factor": factor})
