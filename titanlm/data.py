"""From documents to the batches of a step, resumable to the row.

    dataset ─documents─► Stream (packer) ─rows─► Loader ─micro-batches─► step
                          × n_streams

The run's rows are numbered g = 0, 1, 2... Row g is the next row of stream
g mod n_streams, and rank r of W owns the streams ≡ r (mod W), so the rows of a
step do not depend on how many ranks share them, and W may change at a resume.
State is the row counter and, for every stream, the dataset's cursor and the
packer's buffer. Arrays in it are shared, never changed, so a state is taken
after every step at no cost.

A stream that has come to the end of its data gives padding; when no rank has a
row left for a step, the data has ended.

Rows are made in this process or by worker processes (``titanlm.workers``).
The loader builds ahead of the training loop in one thread, for the phase that
was asked for last. When another one is asked for, what was built ahead is
thrown away and the streams go back to the last step that was handed out: rows
are the same with and without building ahead. A step counts only when it is
committed; what a run abandons half-way is built again after a resume.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from titanlm.batch import IGNORE, Batch, Row, padding, stacked
from titanlm.distributed.world import Peers
from titanlm.errors import DataError
from titanlm.packers.boundaries import BoundaryLabel, document_starts, finish
from titanlm.progress import Phase
from titanlm.stream import Stream, counts_of
from titanlm.workers import InProcess, RowSource, Workers


class DataEnded(DataError):
    """The training data has been read as often as it was to be."""


@dataclass(frozen=True)
class StepData:
    """What one rank trains on in one step."""

    micro_batches: tuple[Batch, ...]
    """``phase.accumulation`` batches of ``phase.micro_batch`` rows."""
    n_valid: int
    """Labels that are not −100, on this rank."""
    n_tokens: int
    """Positions on this rank, padding included."""
    n_bytes: int
    """UTF-8 bytes that the valid labels stand for, on this rank."""
    source_tokens: np.ndarray
    """(M,) int64, valid labels of each source of a mixture, on this rank."""
    document_ids: tuple[int, ...]
    """Documents that this rank's rows touch, ascending."""
    exhausted: bool = False
    """Every row is padding, because none of this rank's streams has one left."""

    def over(self, peers: Peers) -> StepData:
        """The same step with the counts of all ranks, and this rank's batches and documents. Collective.

        Raises DataEnded on every rank when all of them are exhausted.
        """
        remaining, *counts = peers.sum([not self.exhausted, self.n_valid, self.n_tokens, self.n_bytes, *self.source_tokens.tolist()])
        if not remaining:
            raise DataEnded("the training data has been read as often as `epochs` says")
        n_valid, n_tokens, n_bytes, *source_tokens = counts
        return replace(self, n_valid=n_valid, n_tokens=n_tokens, n_bytes=n_bytes, source_tokens=np.array(source_tokens), exhausted=False)


@dataclass(frozen=True)
class _Mark:
    """Where the streams stand between two steps."""

    row: int
    states: Mapping[int, dict[str, Any]]
    counts: Mapping[int, dict[str, int]]


class Loader:
    """Steps for one rank out of the run's logical streams.

    ``streams`` are all of them on every rank, since any rank may come to own
    any at a resume; only this rank's are ever read. ``prefetch`` is how many
    steps are built ahead, 0 for none; ``workers`` how many processes make
    rows, 0 for this one. ``pin`` puts batches into page-locked memory, from
    which copies to a GPU do not block. Used by one thread.

    Raises DataError when the ranks cannot share the streams evenly.
    """

    def __init__(
        self,
        streams: Sequence[Stream],
        *,
        world_size: int = 1,
        rank: int = 0,
        document_mask: bool = True,
        boundary_label: BoundaryLabel = "ignore",
        pad_id: int = 0,
        prefetch: int = 2,
        workers: int = 0,
        pin: bool = False,
    ) -> None:
        if not streams or len(streams) % world_size:
            raise DataError(f"data.n_streams = {len(streams)} must be a multiple of the world size {world_size}")
        self._n_streams, self._world_size, self._rank = len(streams), world_size, rank
        self._document_mask, self._pin = document_mask, pin
        self._finish = partial(finish, document_mask=document_mask, boundary_label=boundary_label, pad_id=pad_id)
        self.n_sources = streams[0].n_sources
        own = {number: stream for number, stream in enumerate(streams) if number % world_size == rank}
        states = {number: stream.state() for number, stream in own.items()}
        self._rows: RowSource = Workers(own, workers) if workers else InProcess(own)
        self._rows.start(states)
        self._prefetch = prefetch
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="titanlm-data") if prefetch else None
        self._ahead: deque[tuple[Phase, Future[tuple[StepData, _Mark]]]] = deque()
        # Three marks: built up to, handed out up to, done up to.
        self._built = self._handed = self._done = _Mark(0, states, {number: state["counts"] for number, state in states.items()})
        self._stall_s = 0.0

    def next(self, phase: Phase) -> StepData:
        """The next step in the shape of ``phase``; blocks until it is built.

        Raises what went wrong while building it; the streams are then where
        they were before.
        """
        started = time.perf_counter()
        if self._ahead and _shape(self._ahead[0][0]) != _shape(phase):
            self._rewind()
        try:
            if self._thread is None:
                step, mark = self._build(phase)
            else:
                self._build_ahead(phase, max(1, len(self._ahead)))
                step, mark = self._ahead.popleft()[1].result()
        except BaseException:
            self._rewind()
            raise
        self._handed = mark
        self._stall_s += time.perf_counter() - started
        if self._thread is not None:
            self._build_ahead(phase, self._prefetch)
        return step

    def commit(self) -> None:
        """The step handed out last, and all before it, are done."""
        self._done = self._handed

    def state(self) -> dict[str, Any]:
        """After the last committed step: the run's row counter and this rank's streams by number."""
        return {
            "n_streams": self._n_streams,
            "row": self._done.row,
            "streams": {str(number): state for number, state in self._done.states.items()},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on after ``state``, which may hold more streams than this rank's (``merge_states``).

        Raises DataError when the number of streams differs or a stream is missing.
        """
        if state["n_streams"] != self._n_streams:
            raise DataError(
                f"data.n_streams = {self._n_streams}, but the state to resume has {state['n_streams']}; the order of the data depends on it: set it back"
            )
        own = list(self._done.states)
        missing = [number for number in own if str(number) not in state["streams"]]
        if missing:
            raise DataError(f"the state to resume lacks the data streams {missing}; it must hold those of every rank")
        states = {number: state["streams"][str(number)] for number in own}
        mark = _Mark(int(state["row"]), states, {number: counts_of(one) for number, one in states.items()})
        previous, self._handed = self._handed, mark
        try:
            self._rewind()
        except DataError:
            self._handed = previous
            self._rewind()
            raise
        self._done = mark

    def counts(self) -> dict[str, int]:
        """``Stream.counts`` summed over this rank's streams, after the last committed step."""
        total: dict[str, int] = {}
        for counts in self._done.counts.values():
            for name, value in counts.items():
                total[name] = total.get(name, 0) + value
        return total

    def take_stall_s(self) -> float:
        """Seconds that ``next`` has made the training loop wait since this was last read."""
        stall_s, self._stall_s = self._stall_s, 0.0
        return stall_s

    def close(self) -> None:
        """Stop building ahead; the loader is of no use afterwards."""
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
        self._ahead.clear()
        self._rows.close()

    def _build_ahead(self, phase: Phase, n_steps: int) -> None:
        assert self._thread is not None
        while len(self._ahead) < n_steps:
            self._ahead.append((phase, self._thread.submit(self._build, phase)))

    def _rewind(self) -> None:
        """Throw away what was built ahead; the streams go back to the last step handed out."""
        for _, future in self._ahead:
            future.cancel()
        wait([future for _, future in self._ahead])
        self._ahead.clear()
        self._rows.start(self._handed.states)
        self._built = self._handed

    def _build(self, phase: Phase) -> tuple[StepData, _Mark]:
        """The step after the last one built; in the thread, when there is one."""
        first = self._built.row
        end = first + phase.rows_per_rank * self._world_size
        rows: list[Row | None] = []
        touched: dict[int, None] = {}
        for g in range(first + (self._rank - first) % self._world_size, end, self._world_size):
            number = g % self._n_streams
            touched[number] = None
            rows.append(self._rows.next_row(number, phase.seq_len))
        self._built = _Mark(
            end,
            {**self._built.states, **{number: self._rows.state(number) for number in touched}},
            {**self._built.counts, **{number: self._rows.counts(number) for number in touched}},
        )
        return self._step_data(rows, phase), self._built

    def _step_data(self, found: list[Row | None], phase: Phase) -> StepData:
        rows = [padding(phase.seq_len) if row is None else row for row in found]
        # One micro-batch after the other: arrays that fit a cache are worked on faster than those of a whole step.
        parts = [self._micro_batch(rows[start : start + phase.micro_batch]) for start in range(0, len(rows), phase.micro_batch)]
        documents = np.unique(np.concatenate([part.documents for part in parts]))
        return StepData(
            micro_batches=tuple(part.batch for part in parts),
            n_valid=sum(part.n_valid for part in parts),
            n_tokens=len(rows) * phase.seq_len,
            n_bytes=sum(part.n_bytes for part in parts),
            source_tokens=np.sum([part.source_tokens for part in parts], axis=0),
            document_ids=tuple(documents[documents >= 0].tolist()),
            exhausted=all(row is None for row in found),
        )

    def _micro_batch(self, rows: list[Row]) -> _MicroBatch:
        whole = self._finish(stacked(rows))
        valid = whole.labels != IGNORE
        n_valid = int(np.count_nonzero(valid))
        source_tokens = np.array([n_valid])
        if self.n_sources > 1:
            source_tokens = np.bincount((whole.document_ids % self.n_sources)[valid], minlength=self.n_sources)
        documents = whole.document_ids.ravel()[document_starts(whole.document_ids)]
        batch = Batch.of(whole, document_mask=self._document_mask, n_sources=self.n_sources)
        return _MicroBatch(batch.pinned() if self._pin else batch, n_valid, int(whole.target_bytes.sum()), source_tokens, documents)


class _MicroBatch(NamedTuple):
    """A batch and what it adds to a step, as in ``StepData``."""

    batch: Batch
    n_valid: int
    n_bytes: int
    source_tokens: np.ndarray
    documents: np.ndarray


def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One state out of the ``Loader.state()`` of every rank, to resume at any world size.

    Raises DataError when the ranks do not stand at the same row or leave a stream out.
    """
    heads = {(state["n_streams"], state["row"]) for state in states}
    if len(heads) != 1:
        raise DataError(f"the ranks' data states do not belong to one step: (n_streams, row) are {sorted(heads)}")
    n_streams, row = heads.pop()
    streams = {number: stream for state in states for number, stream in state["streams"].items()}
    if missing := [number for number in range(n_streams) if str(number) not in streams]:
        raise DataError(f"the ranks' data states leave out the streams {missing}")
    return {"n_streams": n_streams, "row": row, "streams": streams}


def validation_batches(
    streams: Stream | Sequence[Stream],
    seq_len: int,
    micro_batch: int,
    *,
    document_mask: bool = True,
    boundary_label: BoundaryLabel = "ignore",
    pad_id: int = 0,
    max_tokens: int = 0,
) -> Iterator[Batch]:
    """``validation_rows`` as batches of (micro_batch, seq_len)."""
    n_sources = (streams if isinstance(streams, Stream) else streams[0]).n_sources
    for rows in validation_rows(streams, seq_len, micro_batch, max_tokens=max_tokens):
        yield batch_of(rows, document_mask=document_mask, boundary_label=boundary_label, pad_id=pad_id, n_sources=n_sources)


def validation_rows(streams: Stream | Sequence[Stream], seq_len: int, micro_batch: int, *, max_tokens: int = 0) -> Iterator[list[Row]]:
    """One pass over streams of a validation split, the same every time; each target once: ``micro_batch`` rows at a time, as the packer made them.

    The last row of a stream and the last batch are padded with labels of −100.
    Stops after ``max_tokens`` positions, without those that an earlier row has
    scored, rounded down to whole rows but to one at least; 0 scores everything.
    The streams are left as they were, but for ``passed``.

    Raises DataError when there is not one row.
    """
    streams = [streams] if isinstance(streams, Stream) else list(streams)
    states = [stream.state() for stream in streams]
    limit = _rows_within(max_tokens, seq_len, streams[0].stride(seq_len), len(streams)) if max_tokens else None
    found = islice(_round_robin(streams, seq_len), limit)
    try:
        n_rows = 0
        while rows := list(islice(found, micro_batch)):
            n_rows += len(rows)
            yield rows + [padding(seq_len)] * (micro_batch - len(rows))
        if not n_rows:
            raise DataError("there is no text to score: every row is empty, unreadable or refused by dataset.filter")
    finally:
        for stream, state in zip(streams, states, strict=True):
            stream.passed = {name: n - state["counts"][name] for name, n in stream.counts.items()}
            stream.restore(state)


def batch_of(rows: Sequence[Row], *, document_mask: bool, boundary_label: BoundaryLabel, pad_id: int, n_sources: int) -> Batch:
    """Rows of packers as a batch on the CPU, boundaries resolved (``titanlm.packers.boundaries``)."""
    whole = finish(stacked(rows), document_mask=document_mask, boundary_label=boundary_label, pad_id=pad_id)
    return Batch.of(whole, document_mask=document_mask, n_sources=n_sources)


def _rows_within(max_tokens: int, seq_len: int, stride: int, n_streams: int) -> int:
    """How many rows score so many positions: the first of each stream all of its own, every other ``stride``."""
    beyond = max_tokens - n_streams * seq_len
    return max(1, max_tokens // seq_len) if beyond < 0 else n_streams + beyond // stride


def _round_robin(streams: Sequence[Stream], seq_len: int) -> Iterator[Row]:
    remaining = deque(streams)
    while remaining:
        stream = remaining.popleft()
        row = stream.next_row(seq_len)
        if row is not None:
            remaining.append(stream)
            yield row


def _shape(phase: Phase) -> tuple[int, int, int]:
    """All of a phase that a batch depends on."""
    return phase.seq_len, phase.micro_batch, phase.accumulation
