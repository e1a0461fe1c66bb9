"""Where a run stands, and what that makes of the step.

``Progress`` is the only clock: schedules, phases and checkpoints are functions
of it. A ``Phase`` is the part of the set-up that may change while a run goes
on (row length, batch shape, clip, learning-rate multiplier, structural
switches of the model). It is frozen and hashable, because it is the key under
which a compiled step is kept and a prefetched batch is recognised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Completed work."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Positions trained on by all ranks, padding included."""
    elapsed_s: float = 0.0
    """Training time by the wall clock, validation and saving excluded, summed over resumes."""


@dataclass(frozen=True)
class Phase:
    """One shape of the training step; equal phases share one compiled step."""

    seq_len: int
    """Positions a row."""
    micro_batch: int
    """Rows a forward pass on each rank."""
    accumulation: int
    """Forward passes a step on each rank."""
    clip: float | None = None
    """Largest gradient norm; None leaves gradients as they are."""
    lr_multiplier: float = 1.0
    switches: tuple[tuple[str, bool], ...] = ()
    """Structural switches of modules, such as ("qat", True), sorted by name."""

    @property
    def rows_per_rank(self) -> int:
        return self.micro_batch * self.accumulation


class Phases:
    """A run's phases: the last one whose start is not after the progress holds.

    ``starts`` are steps, strictly increasing from 0.
    """

    def __init__(self, stages: Sequence[tuple[int, Phase]]) -> None:
        starts = [start for start, _ in stages]
        if not starts or starts[0] != 0 or any(later <= earlier for earlier, later in zip(starts, starts[1:], strict=False)):
            raise ValueError(f"phase starts must increase strictly from 0, got {starts}")
        self.stages = tuple(stages)

    def at(self, progress: Progress) -> Phase:
        current = self.stages[0][1]
        for start, phase in self.stages:
            if start <= progress.step:
                current = phase
        return current

    @property
    def max_seq_len(self) -> int:
        return max(phase.seq_len for _, phase in self.stages)
