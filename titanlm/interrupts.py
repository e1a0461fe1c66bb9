"""SIGINT, SIGTERM and SIGUSR1: finish cleanly at the first, leave at once at the second.

Batch systems announce with SIGUSR1 that they will take the machine away.

Ctrl-C reaches every process of a terminal, and then the launcher passes it on
to its children once more. Such an echo must not end the save that the first
one asked for.
"""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType

from titanlm.distributed.world import Peers

ALONE = Peers()


class Interrupted(Exception):
    """Raised between micro-batches; the step under way is abandoned."""

    def __init__(self, number: signal.Signals, *, elsewhere: bool = False) -> None:
        super().__init__(f"{number.name} on another rank" if elsewhere else number.name)
        self.signal = number

    @property
    def status(self) -> int:
        """Exit status, as a shell reports a process that the signal ended: SIGINT 130, SIGUSR1 138, SIGTERM 143."""
        return 128 + self.signal


class Interrupts:
    """Inside ``with``, the first signal only sets a flag that ``check`` turns into Interrupted.

    Within ``echo_s`` of the first, further signals are ignored: pass a few
    seconds where a launcher repeats them, and keep inside ``with`` whatever an
    echo must not end.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self, echo_s: float = 0.0) -> None:
        self.echo_s = echo_s
        self.received: signal.Signals | None = None
        self._at = 0.0
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Interrupts:
        # Handlers can only be set in the main thread; elsewhere the surrounding program has its own.
        self.received = None
        if threading.current_thread() is threading.main_thread():
            for number in self.SIGNALS:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._at = signal.Signals(number), now
            if not self.echo_s:
                self._restore()  # at once: the system's own handlers work even while this thread is in foreign code
        elif now - self._at >= self.echo_s:
            self._restore()
            signal.raise_signal(number)

    def check(self, peers: Peers = ALONE) -> None:
        """Raise Interrupted on every rank when any of them got a signal. Collective."""
        own = self.received or 0
        if agreed := peers.max(own):
            raise Interrupted(signal.Signals(agreed), elsewhere=agreed != own)
