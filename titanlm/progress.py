"""Where a run stands, and what that makes of the step.

``Progress`` is the only clock: schedules, phases and checkpoints are functions
of it. A ``Phase`` is the part of the set-up that may change while a run goes
on (row length, batch shape, clip, learning-rate multiplier, structural
switches of the model). It is frozen and hashable, because it is the key under
which a compiled step is kept and a prefetched batch is recognised.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, NamedTuple

from titanlm.schedulers.warmup import warmup


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
    rewarmup_steps: int = 0
    """Steps from ``start_step`` on over which the learning rate rises to its full height."""
    start_step: int = 0
    """Where the warm-up begins; 0 where there is none, so that phases that are equal but for their start are one."""
    switches: tuple[tuple[str, bool], ...] = ()
    """Structural switches of modules, such as ("qat", True), sorted by name."""

    @property
    def rows_per_rank(self) -> int:
        return self.micro_batch * self.accumulation

    @property
    def shape(self) -> Shape:
        """What a rank does in a step, however it is cut into micro-batches."""
        return Shape(self.rows_per_rank, self.seq_len)

    def lr_factor(self, progress: Progress) -> float:
        """What multiplies the scheduler's factor: the multiplier, and (t + 1) / W in step t of W of the warm-up, never 0."""
        return self.lr_multiplier * warmup(max(0, progress.step - self.start_step), self.rewarmup_steps)

    def changes(self, before: Phase) -> str:
        """What is other than in an earlier phase, for people."""
        pairs = [({**vars(phase), **dict(phase.switches)}) for phase in (self, before)]
        now, then = ({name: value for name, value in pair.items() if name not in ("switches", "start_step")} for pair in pairs)
        again = {"rewarmup_steps"} if self.start_step != before.start_step and self.rewarmup_steps else set()
        return ", ".join(f"{name} {value}" for name, value in now.items() if then.get(name) != value or name in again)


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


class Start(NamedTuple):
    """Reached when both are: steps done, and a share of the run by the horizon."""

    step: int = 0
    share: float = 0.0


MEASURED_TOKENS = 65_536
"""Of a forward pass whose rows are not known yet: many enough to keep a device busy, few enough to fit beside a model."""


class Phases:
    """A run's phases: the last one whose start has been reached holds.

    A start is a step (int), a share of the run by the horizon (float, from 0 to
    under 1) or both (``Start``). The first is 0, and none follows that is
    reached no later than one before it. Raises ValueError otherwise. Where the
    horizon is in seconds, ranks have to agree on ``elapsed_s`` or they come to
    different phases.
    """

    def __init__(self, stages: Sequence[tuple[int | float | Start, Phase]], horizon: Horizon | None = None) -> None:
        given = [start for start, _ in stages]
        starts = [start if isinstance(start, Start) else Start(share=start) if isinstance(start, float) else Start(start) for start in given]
        hidden = any(later.step <= start.step and later.share <= start.share for start, later in combinations(starts, 2))
        if starts[:1] != [Start()] or hidden or any(start.step < 0 or not 0 <= start.share < 1 for start in starts):
            raise ValueError(f"phase starts must increase strictly from 0, shares of the run (floats) to under 1, got {given}")
        if any(start.share for start in starts) and horizon is None:
            raise ValueError(f"phase starts {given} hold shares of the run; give its horizon")
        self.stages, self.horizon, self._starts = tuple(stages), horizon, starts

    def at(self, progress: Progress) -> Phase:
        """The phase of the step that follows this progress."""
        return self.stages[self._index(progress.step, self._share(progress))][1]

    def after(self, progress: Progress) -> tuple[Phase, ...]:
        """The phase that holds and those that may still come, each once: what there is to warm up.

        One may come if it holds as soon as it can be reached from here: what hides it then hides it ever after.
        """
        here = self._share(progress)
        return tuple(dict.fromkeys(phase for index, (_, phase) in enumerate(self.stages) if self._index(*self._reached(index, progress.step, here)) == index))

    def _share(self, progress: Progress) -> float:
        return 0.0 if self.horizon is None else self.horizon.fraction(progress)

    def _index(self, step: int, share: float) -> int:
        return max(index for index, start in enumerate(self._starts) if start.step <= step and start.share <= share)

    def _reached(self, index: int, step: int, share: float) -> tuple[int, float]:
        """The least step and share of a run at this step and share that have reached a start."""
        step, share, horizon = max(step, self._starts[index].step), max(share, self._starts[index].share), self.horizon
        if horizon is None:
            return step, share
        if horizon.max_wallclock_s is None:
            step = max(step, bisect_left(range(horizon.total_steps), share, key=lambda done: done / horizon.total_steps))
        return step, max(share, min(1.0, step / horizon.total_steps))

    def cut(self, rows: Mapping[Shape, int]) -> Phases:
        """The same steps in micro-batches of ``rows`` of each shape."""

        def resized(phase: Phase) -> Phase:
            n = rows[phase.shape]
            return replace(phase, micro_batch=n, accumulation=phase.rows_per_rank // n)

        return Phases([(start, resized(phase)) for start, phase in self.stages], self.horizon)

    @property
    def max_seq_len(self) -> int:
        return max(phase.seq_len for _, phase in self.stages)

    @property
    def longest(self) -> Phase:
        """The first of those with the longest rows."""
        return max((phase for _, phase in self.stages), key=lambda phase: phase.seq_len)

    def largest_pass(self, rows_known: bool) -> tuple[int, int]:
        """Rows and positions a row of the largest forward pass (of equals, that of the longest rows), for measurements; before ``cut`` so many rows as well
        may be."""
        phase = max((phase for _, phase in self.stages), key=lambda phase: (phase.micro_batch * phase.seq_len, phase.seq_len))
        rows = phase.micro_batch if rows_known else min(phase.rows_per_rank, max(1, MEASURED_TOKENS // phase.seq_len))
        return rows, phase.seq_len


def largest_divisor(n: int, most: int) -> int:
    """The largest divisor of ``n`` that is not above ``most``; 1 where there is none."""
    return next((divisor for divisor in range(min(n, most), 0, -1) if n % divisor == 0), 1)


def enter(phase: Phase, model: Any) -> None:
    """Set the structural switches of a phase on the modules that have them."""
    for name, on in phase.switches:
        for module in model.modules():
            if getattr(module, name, on) is not on:
                setattr(module, name, on)
