"""Start a trainer again when it crashes: ``titanlm train FILE --restarts N``.

The trainer is a child process, so nothing that kills it (a driver, the kernel's
memory killer) kills the loop around it. What it did is read from its run folder
and never from the child, which may have been stopped at any instant.

A crash that comes back at the same place is not the weather but a bug, a row or
a full disk, and starting again would burn a night on it: three starts in a row
without progress end the loop.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

from titanlm import checkpoint
from titanlm.errors import TitanError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
FINAL = frozenset({0, 2, *(128 + number for number in SIGNALS)})
"""Statuses after which another start would do no better: done, wrong input, and interrupted."""
MAX_IDLE = 3
"""Starts in a row without progress."""
PAUSE_S = 1.0
"""Before the first restart; doubled while there is no progress, up to a minute."""
_POLL_S = 0.1
_TAIL_BYTES = 1 << 16


def supervise(run_dir: Path, command: Sequence[str], restarts: int) -> int:
    """Run ``command`` until it ends by itself, at most 1 + ``restarts`` times; the last child's exit status, as a shell counts it.

    ``run_dir`` is where the command trains. Raises TitanError under torchrun,
    which starts its ranks again itself, all of them at once.
    """
    if "WORLD_SIZE" in os.environ:
        raise TitanError(f"--restarts: under torchrun, torchrun starts the ranks again; use torchrun --max-restarts={restarts}")
    saved = furthest = idle = 0
    with noted_signals() as received:
        for left in range(restarts, -1, -1):
            status, interrupted = run_child(command, received)
            if status in FINAL or interrupted:
                return status
            saved_now, step = _progress(run_dir)
            # A start that gets further is the first of those that may end there.
            idle = 1 if saved_now > saved or step > furthest else idle + 1
            saved, furthest = max(saved, saved_now), max(furthest, step)
            what = f"training ended with status {status} at step {step}"
            if idle == MAX_IDLE:
                _say(f"{what}; no progress: three starts ended at step {furthest}. `titanlm data state {run_dir}` says where it stands in its data")
                return status
            if not left:
                _say(f"{what}; no restarts are left")
                return status
            pause = min(PAUSE_S * 2 ** (idle - 1), 60.0)
            _say(f"{what}; starting again in {pause:g} s from step {saved_now}, restarts left after that: {left - 1}")
            _wait(pause, lambda: bool(received))
            if received:
                return 128 + received[0]
    raise AssertionError("the last start returns")


@contextlib.contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Inside, signals are only noted, in the list."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_child(command: Sequence[str], received: list[int], instead: Mapping[int, int] | None = None) -> tuple[int, int]:
    """(exit status, the last signal that was passed on or 0) of one child; ``instead`` says what a child gets for a signal that it would not understand."""
    # A session of its own: Ctrl-C reaches a terminal's whole process group, and the trainer takes a second signal as "leave at once".
    child = subprocess.Popen(command, start_new_session=True)
    passed_on = 0

    def ended() -> bool:
        nonlocal passed_on
        while received:
            passed_on = received.pop(0)
            child.send_signal((instead or {}).get(passed_on, passed_on))
        return child.poll() is not None

    _wait(float("inf"), ended)
    return child.returncode if child.returncode >= 0 else 128 - child.returncode, passed_on


def _wait(seconds: float, done: Callable[[], bool]) -> None:
    end = time.monotonic() + seconds
    while not done() and time.monotonic() < end:
        time.sleep(min(_POLL_S, seconds))


def _progress(run_dir: Path) -> tuple[int, int]:
    """(step of the newest checkpoint, furthest step known) of a run folder."""
    saved = max((step for step, _ in checkpoint.steps(run_dir / "checkpoints")), default=0)
    return saved, max(saved, _last_logged(run_dir / "metrics.jsonl"))


def _last_logged(metrics: Path) -> int:
    """The newest step in a file of metrics, whose last line a kill may have torn; 0 without one."""
    try:
        with metrics.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
            lines = file.read().split(b"\n")
    except OSError:
        return 0
    for line in reversed(lines):
        with contextlib.suppress(ValueError, TypeError, KeyError):
            return int(json.loads(line)["step"])
    return 0


def _say(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # whoever read standard error is gone
        print(f"titanlm: {text}", file=sys.stderr, flush=True)
