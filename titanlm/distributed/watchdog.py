"""Ends a run that hangs, and says which rank is to blame.

A rank that dies, is stopped or never comes back from its loader leaves the
others in a collective that waits for it, on a GPU even without an error. So
every rank counts its work (``beat``), and a thread of its own watches the
count. When it stands still for too long, the rank is either the culprit or
waits for one; the store in which every rank leaves a line a second tells
which. Ranks whose lines no longer change are dead or stopped. Else those with
the fewest beats are waited for, and of equals those outside a collective.

The first rank to reach a verdict leaves it in the store. The others take it
over within a second, rather than accuse the one that has ended meanwhile; so
all write their stacks in the same moment and name the same culprit. Then the
process ends without cleaning up, since cleaning up would wait as well.

Everything that may block has a thread of its own: the store (its server may be
stopped too) and the files (a hanging file system is a usual reason to be here).
A rank whose main thread holds the GIL cannot watch itself. The others see it
fall silent; a single process in that state is not noticed.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypedDict, TypeVar

HUNG = 75
"""Exit status of a run that was ended because it hung: EX_TEMPFAIL, worth another try."""

PERIOD_S = 1.0
"""Between two lines of a rank in the store."""
SILENT_PERIODS = 2.5
"""A rank that leaves no new line for so long is dead or stopped."""
STORE_S = 10.0
"""Longest wait for the store, and for files, when it is time to end."""

UNREACHABLE = "the ranks' common store does not answer: the process that serves it (the launcher, or rank 0) is gone, stopped or cut off"

T = TypeVar("T")


class Line(TypedDict):
    """What a rank leaves in the store."""

    tick: int
    """Grows with every line."""
    beats: int
    doing: str
    waited_s: float
    """Since the last beat."""
    at: str
    """Where the main thread is."""
    collective: bool
    """It is inside one."""
    host: str
    pid: int


class Watchdog:
    """``beat`` at every micro-batch, validation batch and save; the process ends when none comes for ``timeout_s``.

    Until ``started``, and again from ``starting`` on, ``first_timeout_s`` holds instead. 0 waits for ever.
    ``store`` is one that nothing of an earlier start is in; with it, ``stop``
    before the process group goes.
    """

    def __init__(
        self,
        *,
        timeout_s: float,
        first_timeout_s: float,
        rank: int = 0,
        size: int = 1,
        store: Any = None,
        folder: Path | None = None,
        exit: Callable[[int], Any] = os._exit,
    ) -> None:
        self.timeout_s, self.first_timeout_s, self.rank, self.size = timeout_s, first_timeout_s, rank, size
        self._folder, self._exit = folder, exit
        self._given = store if size > 1 else None
        self._writer: Any = None
        """One client for the lines and one for reading: a client that is blocked blocks whoever shares it."""
        self._reader: Any = None
        self._beat = (0, "starting")
        self._started = False
        self._waited_s = 0.0
        self._verdict: str | None = None
        """Of another rank."""
        self._stopped = threading.Event()
        self._threads: list[threading.Thread] = []

    # ------------------------------------------------------------ the main thread
    def beat(self, doing: str) -> None:
        """This rank is alive and begins this."""
        self._beat = (self._beat[0] + 1, doing)

    def started(self) -> None:
        """What takes long only once, compilation above all, is over."""
        self._started = True

    def starting(self) -> None:
        """What takes long once may come again: a step of another shape, say, that has to be compiled."""
        self._started = False

    def start(self) -> None:
        if self._given is not None:
            from torch.distributed import PrefixStore

            own: Any = PrefixStore("watchdog", self._given)
            self._writer, self._reader = own.clone(), own.clone()
            self._begin(self._publish)
        self._begin(self._watch)

    def _begin(self, target: Callable[[], None]) -> None:
        self._threads.append(threading.Thread(target=target, name=f"watchdog{target.__name__}", daemon=True))
        self._threads[-1].start()

    def stop(self) -> None:
        """Watch no more. The other ranks read that this one has ended."""
        self.beat(f"ended after {self._beat[1]}")
        self._stopped.set()
        for thread in self._threads:
            thread.join(PERIOD_S)
        self._threads = []

    def culprits(self) -> str:
        """Who is gone, after a collective has failed. Takes a few seconds."""
        if self._reader is None:
            return "there is no other rank"
        return _within(STORE_S + SILENT_PERIODS * PERIOD_S, self._who_is_gone) or UNREACHABLE

    # ------------------------------------------------------------ the threads
    def _publish(self) -> None:
        """Leave a line every period, and look for a verdict."""
        host, pid, tick = socket.gethostname(), os.getpid(), 0
        while True:
            ending, tick = self._stopped.is_set(), tick + 1
            beats, doing = self._beat
            at, collective = _whereabouts()
            line = Line(tick=tick, beats=beats, doing=doing, waited_s=self._waited_s, at=at, collective=collective, host=host, pid=pid)
            try:
                self._writer.set(str(self.rank), json.dumps(line))
                if self._writer.check(["verdict"]):
                    self._verdict = self._writer.get("verdict").decode()
            except RuntimeError:
                return  # the store ended with the process that serves it; ``_watch`` goes on alone
            if ending:
                return
            self._stopped.wait(PERIOD_S)

    def _watch(self) -> None:
        """Count the time since the last beat; end the process when it is too long."""
        seen, last = self._beat, time.monotonic()
        while not self._stopped.wait(PERIOD_S):
            now = time.monotonic()
            # A process that was itself stopped, as Ctrl-Z does, has not hung in that time.
            self._waited_s = self._waited_s + min(now - last, 2 * PERIOD_S) if self._beat is seen else 0.0
            seen, last = self._beat, now
            if self._verdict is not None:
                return self._end(self._verdict)
            limit = self.timeout_s if self._started else self.first_timeout_s
            if limit and self._waited_s > limit:
                verdict = self._judge(seen[1], limit)
                if self._beat is seen and not self._stopped.is_set():
                    return self._end(self._agree(verdict))
        return None

    def _end(self, verdict: str) -> None:
        """Write message and stacks, give the others time to read the verdict, and leave."""
        _within(STORE_S, lambda: self._report(verdict))
        if self._reader is not None:
            time.sleep(2 * PERIOD_S)
        self._exit(HUNG)

    def _report(self, verdict: str) -> None:
        message = f"[rank {self.rank}] titanlm: {verdict}\n".encode(errors="backslashreplace")
        # The terminal first: a folder may hang, and descriptor 2 is there even when sys.stderr was replaced.
        with contextlib.suppress(OSError, ValueError):
            os.write(2, message)
            faulthandler.dump_traceback(2, all_threads=True)
        if self._folder is not None:
            with contextlib.suppress(OSError), open(self._folder / f"stacks-rank-{self.rank:05d}.txt", "wb", buffering=0) as file:
                file.write(message)
                faulthandler.dump_traceback(file, all_threads=True)

    # ------------------------------------------------------------ the verdict
    def _judge(self, doing: str, limit: float) -> str:
        """Who is to blame for this rank's waiting since it began ``doing``."""
        if self._reader is None:
            who = f"no sign of life for {self._waited_s:.0f} s from this process (pid {os.getpid()}) at {_whereabouts()[0]}; last seen: {doing}"
        else:
            who = _within(STORE_S + SILENT_PERIODS * PERIOD_S, self._who_is_behind) or UNREACHABLE
            who = f"{who}. Rank {self.rank} stood still for {self._waited_s:.0f} s; last seen: {doing}"
        setting = "parallel.timeout_s" if self._started else "parallel.init_timeout_s"
        stacks = f" The stacks of all threads are in {self._folder}/stacks-rank-*.txt." if self._folder is not None else ""
        return f"{who}. The run ends here and can be started again. If that is meant to take more than {limit:g} s, raise {setting}.{stacks}"

    def _agree(self, verdict: str) -> str:
        """The first rank's verdict."""
        return _within(STORE_S, lambda: self._first("verdict", verdict)) or verdict

    def _first(self, key: str, value: str) -> str:
        if self._reader is None:
            return value
        text: str = self._reader.compare_set(key, "", value).decode()
        return text

    def _read(self) -> dict[int, Line]:
        keys = [str(rank) for rank in range(self.size)]
        present = keys if self._reader.check(keys) else [key for key in keys if self._reader.check([key])]
        return {int(key): json.loads(text) for key, text in zip(present, self._reader.multi_get(present), strict=True)}

    def _silent(self) -> tuple[list[int], dict[int, Line]]:
        """Ranks that are dead or stopped, and everyone's last line."""
        before = self._read()
        time.sleep(SILENT_PERIODS * PERIOD_S)
        lines = self._read()
        silent = [
            rank for rank in range(self.size) if rank != self.rank and (rank not in lines or lines[rank]["tick"] == before.get(rank, {"tick": 0})["tick"])
        ]
        return silent, lines

    def _who_is_gone(self) -> str:
        silent, lines = self._silent()
        if not silent:
            return "every rank is still there; the connection between them failed"
        # A rank that fails because of the first one is gone itself when a third looks.
        return self._first("gone", _gone(silent, lines))

    def _who_is_behind(self) -> str:
        silent, lines = self._silent()
        if silent:
            return _gone(silent, lines)
        fewest = min(line["beats"] for line in lines.values())
        behind = {rank for rank, line in lines.items() if line["beats"] == fewest}
        behind = {rank for rank in behind if not lines[rank]["collective"]} or behind
        listed = _listed(
            f"{_name(rank, lines)} stands at {lines[rank]['at']} for {lines[rank]['waited_s']:.0f} s; last seen: {lines[rank]['doing']}"
            for rank in sorted(behind)
        )
        return listed if len(behind) < self.size else f"no rank is behind the others, so a connection or a device hangs: {listed}"


def _gone(silent: list[int], lines: dict[int, Line]) -> str:
    return _listed(
        f"{_name(rank, lines)} gives no sign of life, it is dead or stopped; last seen: {lines[rank]['doing']}"
        if rank in lines
        else f"rank {rank} never gave a sign of life"
        for rank in silent
    )


def _name(rank: int, lines: dict[int, Line]) -> str:
    return f"rank {rank} ({lines[rank]['host']}, pid {lines[rank]['pid']})"


def _listed(items: Iterable[str], most: int = 8) -> str:
    texts = list(items)
    return "; ".join(texts[:most]) + (f"; and {len(texts) - most} more" if len(texts) > most else "")


def _whereabouts() -> tuple[str, bool]:
    """Where the main thread is, and whether it calls torch.distributed there."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return "its end", False
    code = frame.f_code
    path = Path(code.co_filename)
    return f"{path.parent.name}/{path.name}:{frame.f_lineno} {code.co_name}", "torch/distributed" in path.as_posix()


def _within(seconds: float, call: Callable[[], T]) -> T | None:
    """What the call gives; None when it fails or takes longer, and then it is left behind."""
    results: list[T] = []

    def run() -> None:
        with contextlib.suppress(RuntimeError, OSError, ValueError):
            results.append(call())

    thread = threading.Thread(target=run, name="watchdog_within", daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else None
