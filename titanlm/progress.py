"""Where a run stands, and what that makes of the step.

``Progress`` is the only clock: schedules, phases and checkpoints are functions
of it. A ``Phase`` is the part of the set-up that may change while a run goes
on (row length, batch shape, clip, learning-rate multiplier, structural
switches of the model). It is frozen and hashable, because it is the key under
which a compiled step is kept and a prefetched batch is recognised.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Progress:
    """Completed work."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Positions trained on by all ranks, padding included."""
    elapsed_s: float = 0.0
    """Training time by the wall clock, validation and saving excluded, summed over resumes."""


class Shape(NamedTuple):
    """Rows of so many positions."""

    rows: int
    seq_len: int


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

    @property
    def shape(self) -> Shape:
        """What a rank does in a step, however it is cut into micro-batches."""
        return Shape(self.rows_per_rank, self.seq_len)

    def changes(self, before: Phase) -> str:
        """What is other than in an earlier phase, for people."""
        pairs = [({**vars(phase), **dict(phase.switches)}) for phase in (self, before)]
        now, then = ({name: value for name, value in pair.items() if name != "switches"} for pair in pairs)
        return ", ".join(f"{name} {value}" for name, value in now.items() if then.get(name) != value)


@dataclass(frozen=True)
class Horizon:
    """Where a run ends: after its steps, or before them when its seconds are up."""

    total_steps: int
    max_wallclock_s: float | None = None
    """Seconds of training, counted as ``Progress.elapsed_s`` is; None: as long as the steps take."""

    def fraction(self, progress: Progress) -> float:
        """Share of the run that is done, from 0 to 1: of its steps or its seconds, whichever end is nearer."""
        done = progress.step / self.total_steps
        if self.max_wallclock_s is not None:
            done = max(done, progress.elapsed_s / self.max_wallclock_s)
        return min(1.0, done)


MEASURED_TOKENS = 65_536
"""Of a forward pass whose rows are not known yet: many enough to keep a device busy, few enough to fit beside a model."""


class Phases:
    """A run's phases: the last one whose start has been reached holds.

    A start is a step (int) or a share of the run by the horizon (float, from 0
    to under 1). The first is 0; steps increase strictly, and so do shares. Raises
    ValueError otherwise. Where the horizon is in seconds, ranks have to agree
    on ``elapsed_s`` or they come to different phases.
    """

    def __init__(self, stages: Sequence[tuple[int | float, Phase]], horizon: Horizon | None = None) -> None:
        starts = [start for start, _ in stages]
        shares = [start for start in starts if isinstance(start, float)]
        steps = [start for start in starts if not isinstance(start, float)]
        rising = all(earlier < later for ordered in (steps, shares) for earlier, later in pairwise(ordered))
        if not starts or starts[0] != 0 or 0 in starts[1:] or not rising or any(not 0 <= share < 1 for share in shares):
            raise ValueError(f"phase starts must increase strictly from 0, shares of the run (floats) to under 1, got {starts}")
        if any(shares) and horizon is None:
            raise ValueError(f"phase starts {starts} hold shares of the run; give its horizon")
        self.stages, self.horizon = tuple(stages), horizon

    def at(self, progress: Progress) -> Phase:
        """The phase of the step that follows this progress."""
        return self.after(progress)[0]

    def after(self, progress: Progress) -> tuple[Phase, ...]:
        """The phase that holds and those that may still come, each once: what there is to warm up."""
        present = max(index for index, (start, _) in enumerate(self.stages) if self._reached(start, progress))
        return tuple(dict.fromkeys(phase for _, phase in self.stages[present:]))

    def cut(self, rows: Mapping[Shape, int]) -> Phases:
        """The same steps in micro-batches of ``rows`` of each shape."""

        def resized(phase: Phase) -> Phase:
            n = rows[phase.shape]
            return replace(phase, micro_batch=n, accumulation=phase.rows_per_rank // n)

        return Phases([(start, resized(phase)) for start, phase in self.stages], self.horizon)

    def _reached(self, start: int | float, progress: Progress) -> bool:
        if not isinstance(start, float):
            return start <= progress.step
        return start == 0 or (self.horizon is not None and start <= self.horizon.fraction(progress))

    @property
    def max_seq_len(self) -> int:
        return max(phase.seq_len for _, phase in self.stages)

    def largest_pass(self, rows_known: bool) -> tuple[int, int]:
        """Rows and positions a row of the largest forward pass, for measurements; before ``cut`` so many rows as well may be."""
        phase = max((phase for _, phase in self.stages), key=lambda phase: phase.micro_batch * phase.seq_len)
        rows = phase.micro_batch if rows_known else min(phase.rows_per_rank, max(1, MEASURED_TOKENS // phase.seq_len))
        return rows, phase.seq_len


def enter(phase: Phase, model: Any) -> None:
    """Set the structural switches of a phase on the modules that have them."""
    for name, on in phase.switches:
        for module in model.modules():
            if getattr(module, name, on) is not on:
                setattr(module, name, on)
