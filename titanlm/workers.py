"""Rows of the run's streams, made in this process or by worker processes.

Tokenising is what takes time, and Python does it on one core. With workers,
worker w of W makes the rows of every W-th stream of its rank, packing
included, and hands them over in large blocks: ``BLOCK_TOKENS`` of one stream
at a time, streams in turn. torchdata's StatefulDataLoader starts, feeds and
watches the processes; the state is ours, because its own depends on the number
of workers. A block brings the state that its stream had before its first row,
so a stream stands at that state and so many rows: restoring makes those rows
again (``Stream.restore``), in whatever process the stream then is.

Every worker hands over equally many items a round, fillers included, because
the engine asks the workers strictly in turn: otherwise the streams of workers
that have fewer would run ahead without end.

Workers are forked, so streams built from components of any module are there.
They ignore SIGINT, SIGTERM and SIGUSR1, which reach the whole process group: the
trainer decides what ends, saves, and stops them. When it is gone they end too.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import signal
import threading
import time
import traceback
import warnings
import weakref
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from titanlm.batch import Row
from titanlm.errors import DataError, TitanError
from titanlm.stream import Stream, counts_of

BLOCK_TOKENS = 32768


class RowSource(Protocol):
    """Where a rank's rows come from; ``number`` is a stream's."""

    def start(self, states: Mapping[int, dict[str, Any]]) -> None: ...  # go on from these
    def next_row(self, number: int, seq_len: int) -> Row | None: ...
    def state(self, number: int) -> dict[str, Any]: ...
    def counts(self, number: int) -> dict[str, int]: ...
    def close(self) -> None: ...


class InProcess:
    """Rows made where they are asked for."""

    def __init__(self, streams: Mapping[int, Stream]) -> None:
        self._streams = streams

    def start(self, states: Mapping[int, dict[str, Any]]) -> None:
        for number, stream in self._streams.items():
            stream.restore(states[number])

    def next_row(self, number: int, seq_len: int) -> Row | None:
        return self._streams[number].next_row(seq_len)

    def state(self, number: int) -> dict[str, Any]:
        return self._streams[number].state()

    def counts(self, number: int) -> dict[str, int]:
        return dict(self._streams[number].counts)

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class _Block:
    """Consecutive rows of one stream."""

    number: int
    state: dict[str, Any]
    """Before the first row."""
    rows: list[Row | None]
    """None: the stream has ended."""
    counts: list[dict[str, int]]
    """After each row."""
    failure: Exception | None
    """What making the row after them raised."""


class _Rounds:
    """What a worker makes: a block of each of its streams in turn, for ever."""

    def __init__(self, streams: Mapping[int, Stream], states: Mapping[int, dict[str, Any]], seq_len: int, n_workers: int) -> None:
        self._streams, self._states, self._seq_len, self.n_workers = streams, states, seq_len, n_workers
        self.per_worker = -(-len(streams) // n_workers)
        """Items of a worker in a round."""

    def of(self, worker: int) -> Iterator[_Block | None]:
        own = list(self._streams)[worker :: self.n_workers]
        for number in own:
            self._streams[number].restore(self._states[number])
        while True:
            for number in own:
                yield _block(number, self._streams[number], self._seq_len)
            for _ in range(self.per_worker - len(own)):
                yield None


def _block(number: int, stream: Stream, seq_len: int) -> _Block:
    state = stream.state()
    rows: list[Row | None] = []
    counts: list[dict[str, int]] = []
    try:
        for _ in range(max(1, BLOCK_TOKENS // seq_len)):
            rows.append(stream.next_row(seq_len))
            counts.append(dict(stream.counts))
            if rows[-1] is None:
                break
    except TitanError as error:
        return _Block(number, state, rows, counts, DataError(str(error)))
    except Exception:  # a bug: its place would be lost on the way
        return _Block(number, state, rows, counts, RuntimeError(f"in a data worker:\n{traceback.format_exc()}"))
    return _Block(number, state, rows, counts, None)


class Workers:
    """Rows made by ``n_workers`` forked processes; at most as many as there are streams.

    ``next_row`` raises DataError when a worker has died.
    """

    def __init__(self, streams: Mapping[int, Stream], n_workers: int) -> None:
        self._streams = streams
        self._n_workers = min(n_workers, len(streams))
        self._states: dict[int, dict[str, Any]] = {}
        self._seq_len = 0
        self._engine: _Engine | None = None
        self._clear()

    def _clear(self) -> None:
        self._waiting: dict[int, deque[tuple[_Block, int]]] = {number: deque() for number in self._streams}
        self._before: dict[int, tuple[_Block, int]] = {}  # of each stream: its block and how many of the block's rows are taken

    def start(self, states: Mapping[int, dict[str, Any]]) -> None:
        self.close()
        self._states = dict(states)
        for number, stream in self._streams.items():
            stream.restore({key: value for key, value in states[number].items() if key != "replay"})  # refused here rather than in a worker

    def next_row(self, number: int, seq_len: int) -> Row | None:
        if self._engine is not None and seq_len != self._seq_len:
            self.start({one: self.state(one) for one in self._streams})
        if self._engine is None:
            self._seq_len = seq_len
            self._engine = _Engine(_Rounds(self._streams, self._states, seq_len, self._n_workers))
        waiting = self._waiting[number]
        while not waiting:
            block = self._engine.receive()
            if block is not None:
                places = len(block.rows) + (block.failure is not None)
                self._waiting[block.number].extend((block, at) for at in range(places))
        block, at = waiting[0]  # a failure, or the end, is met again until the streams are started anew
        if at == len(block.rows):
            assert block.failure is not None
            raise block.failure
        if block.rows[at] is None:
            return None
        waiting.popleft()
        self._before[number] = block, at + 1
        return block.rows[at]

    def state(self, number: int) -> dict[str, Any]:
        if number not in self._before:
            return self._states[number]
        block, taken = self._before[number]
        return {**block.state, "replay": {"rows": taken, "seq_len": self._seq_len, "counts": block.counts[taken - 1]}}

    def counts(self, number: int) -> dict[str, int]:
        if number not in self._before:
            return counts_of(self._states[number])
        block, taken = self._before[number]
        return block.counts[taken - 1]

    def close(self) -> None:
        """End the processes."""
        if self._engine is not None:
            self._engine.stop()
            self._engine = None
        self._clear()


class _Engine:
    """The worker processes, and a thread that listens to them.

    The thread is there because a worker may die in the middle of what it says:
    whoever listens then waits for ever, and it must not be the trainer. It also
    keeps the engine from installing a handler that raises wherever the main
    thread is when a child dies.
    """

    def __init__(self, rounds: _Rounds) -> None:
        self.processes: list[Any] = []
        self._blocks: queue.Queue[_Block | None | BaseException] = queue.Queue(maxsize=1)
        self._stopped = threading.Event()
        # At the latest when this process ends: they ignore SIGTERM, and multiprocessing would wait for them.
        self._kill = weakref.finalize(self, _kill, self.processes)
        listening = threading.Thread(target=_listen, args=(rounds, self.processes, self._blocks, self._stopped), daemon=True, name="titanlm-workers")
        listening.start()

    def receive(self) -> _Block | None:
        """What the workers say next. Raises DataError within seconds when one has died."""
        while True:
            try:
                said = self._blocks.get(timeout=1)
            except queue.Empty:
                said = None
                if not self._dead():
                    continue
            dead = self._dead()
            if dead and not isinstance(said, _Block):
                remedy = "if it was killed for want of memory, use fewer data.workers, or 0"
                raise DataError(f"data worker {dead} has died; start again to go on from the last checkpoint ({remedy})")
            if isinstance(said, BaseException):
                raise said
            return said

    def stop(self) -> None:
        self._stopped.set()
        self._kill()

    def _dead(self) -> str:
        return ", ".join(f"{process.pid} (exit code {process.exitcode})" for process in self.processes if not process.is_alive())


def _listen(rounds: _Rounds, processes: list[Any], blocks: queue.Queue[Any], stopped: threading.Event) -> None:
    """Start the workers and pass on what they say, until stopped."""

    def say(what: Any) -> None:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                blocks.put(what, timeout=0.2)
                return

    try:
        for block in _start(rounds, processes):
            say(block)
            if stopped.is_set():
                return
    except BaseException as error:
        say(error)


def _start(rounds: _Rounds, processes: list[Any]) -> Iterator[_Block | None]:
    import torch
    from torchdata.stateful_dataloader import StatefulDataLoader

    before = set(multiprocessing.active_children())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fork beside threads, which run no Python of ours; deprecations inside the engine
        loader: Any = StatefulDataLoader(
            _iterable(rounds),
            batch_size=None,
            num_workers=rounds.n_workers,
            collate_fn=_as_it_is,
            multiprocessing_context="fork",
            generator=torch.Generator(),  # of the engine's own seed, which would else come from what dropout draws from
            prefetch_factor=max(2, rounds.per_worker),
            worker_init_fn=partial(_serve, os.getpid()),
            snapshot_every_n_steps=1 << 62,
        )
        blocks = iter(loader)
    processes += [process for process in multiprocessing.active_children() if process not in before]
    return blocks


def _kill(processes: list[Any]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.join()


def _iterable(rounds: _Rounds) -> Any:
    from torch.utils.data import IterableDataset, get_worker_info

    class Rounds(IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Iterator[_Block | None]:
            info = get_worker_info()
            assert info is not None
            return rounds.of(info.id)

    return Rounds()


def serve(parent: int) -> None:
    """In a forked process: leave signals to the parent, and end when it has ended, however that was.

    A killed parent tells nobody. The engine notices, and then waits for a pipe
    that nobody empties.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # they reach the whole process group; the parent decides what ends
        signal.signal(number, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _serve(parent: int, worker: int) -> None:
    serve(parent)


def _as_it_is(item: Any) -> Any:
    return item
