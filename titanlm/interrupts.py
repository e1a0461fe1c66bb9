"""SIGINT and SIGTERM: finish cleanly at the first, leave at once at the second."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType


class Interrupted(Exception):
    """Raised between micro-batches; the step under way is abandoned."""


class Interrupts:
    """Inside ``with``, the first signal only sets a flag that ``check`` turns into Interrupted."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Interrupts:
        # Handlers can only be set in the main thread; elsewhere the surrounding program has its own.
        self.received = None
        if threading.current_thread() is threading.main_thread():
            for number in self.SIGNALS:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        for each, handler in self._before.items():
            signal.signal(each, handler)  # type: ignore[arg-type]

    def check(self) -> None:
        if self.received is not None:
            raise Interrupted(self.received.name)
