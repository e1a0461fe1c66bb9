"""From documents to the batches of a step, resumable to the row.

    dataset ─documents─► Stream (packer) ─rows─► Loader ─micro-batches─► step
                          × n_streams

The run's rows are numbered g = 0, 1, 2... Row g is the next row of stream
g mod n_streams, and rank r of W owns the streams ≡ r (mod W), so the rows of a
step do not depend on how many ranks share them, and W may change at a resume.
State is the row counter and, for every stream, the dataset's cursor and the
packer's buffer. Arrays in it are shared, never changed, so a state is taken
after every step at no cost.

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
from dataclasses import dataclass
from typing import Any

import numpy as np

from titanlm.batch import IGNORE, Batch, Document, Row
from titanlm.errors import DataError
from titanlm.packers.boundaries import finish, mark_start
from titanlm.progress import Phase
from titanlm.registry import Component, Dataset, Packer, Tokenizer


class Stream:
    """One logical stream: its documents, tokenised, packed into rows."""

    def __init__(self, dataset: Dataset, packer: Packer, tokenizer: Tokenizer) -> None:
        self._dataset, self._packer, self._tokenizer = dataset, packer, tokenizer
        self.counts = {"documents": 0, "text_bytes": 0, "uncounted_bytes": 0}
        """Documents read, their UTF-8 length, and how much of it their tokens do not account for (may be negative)."""

    @property
    def fingerprint(self) -> str:
        """Of the dataset; the caller compares it before a resume."""
        return self._dataset.fingerprint

    @property
    def n_rows(self) -> int | None:
        """Rows of the dataset's split, where it knows."""
        return getattr(self._dataset, "n_rows", None)

    def next_row(self, seq_len: int, *, document_mask: bool = True) -> Row | None:
        """The next ``seq_len`` positions; None at the end of a stream of one pass.

        Raises DataError when a lossless tokenizer's target bytes do not add up
        to the UTF-8 length of a document.
        """
        while (row := self._packer.pop(seq_len)) is None:
            document = next(self._dataset, None)
            if document is None:
                row = self._packer.flush(seq_len)
                break
            self._packer.add(document, mark_start(self._target_bytes(document)))
        return None if row is None else finish(row, document_mask=document_mask)

    def state(self) -> dict[str, Any]:
        return {"dataset": self._dataset.state(), "packer": self._packer.state(), "counts": dict(self.counts)}

    def restore(self, state: dict[str, Any]) -> None:
        """Go back (or on) to a state; raises DataError when it is none of such a stream's."""
        try:
            self._dataset.restore(state["dataset"])
            self._packer.restore(state["packer"])
            self.counts = {name: int(state["counts"][name]) for name in self.counts}
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"not a state of this dataset and packer: {error!r}; resume with the ones it was saved with") from error

    def _target_bytes(self, document: Document) -> np.ndarray:
        ids = document.ids
        target_bytes = self._tokenizer.target_bytes(ids, np.concatenate([np.array([-1], dtype=ids.dtype), ids[:-1]]))
        missing = document.n_bytes - int(target_bytes.sum())
        if missing and self._tokenizer.lossless:
            raise DataError(
                f"document {document.document_id}: its tokens stand for {document.n_bytes - missing} bytes and its text has {document.n_bytes}, "
                "though the tokenizer says it loses nothing; bits per byte would be wrong"
            )
        self.counts["documents"] += 1
        self.counts["text_bytes"] += document.n_bytes
        self.counts["uncounted_bytes"] += missing
        return target_bytes


def build_streams(dataset: Component, packer: Component, tokenizer: Tokenizer, *, split: str, n_streams: int, seed: int, seq_len: int) -> list[Stream]:
    """All logical streams of a run, numbered as in the list; ``seq_len`` is the longest row a packer must expect."""
    return [
        Stream(
            dataset.build(tokenizer=tokenizer, split=split, stream=stream, n_streams=n_streams, seed=seed),
            packer.build(seq_len=seq_len),
            tokenizer,
        )
        for stream in range(n_streams)
    ]


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
    document_ids: tuple[int, ...]
    """Documents that this rank's rows touch, ascending."""


@dataclass(frozen=True)
class _Mark:
    """Where the streams stand between two steps."""

    row: int
    states: Mapping[int, dict[str, Any]]


class Loader:
    """Steps for one rank out of the run's logical streams.

    ``streams`` are all of them on every rank, since any rank may come to own
    any at a resume; only this rank's are ever read. ``prefetch`` is how many
    steps are built ahead, 0 for none. Used by one thread.

    Raises DataError when the ranks cannot share the streams evenly.
    """

    def __init__(self, streams: Sequence[Stream], *, world_size: int = 1, rank: int = 0, document_mask: bool = True, prefetch: int = 2) -> None:
        if not streams or len(streams) % world_size:
            raise DataError(f"data.n_streams = {len(streams)} must be a multiple of the world size {world_size}")
        self._n_streams, self._world_size, self._rank = len(streams), world_size, rank
        self._document_mask = document_mask
        self._streams = {number: stream for number, stream in enumerate(streams) if number % world_size == rank}
        self._prefetch = prefetch
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="titanlm-data") if prefetch else None
        self._ahead: deque[tuple[Phase, Future[tuple[StepData, _Mark]]]] = deque()
        # Three marks: built up to, handed out up to, done up to.
        self._built = self._handed = self._done = _Mark(0, {number: stream.state() for number, stream in self._streams.items()})
        self._stall_s = 0.0

    def next(self, phase: Phase) -> StepData:
        """The next step in the shape of ``phase``; blocks until it is built.

        Raises what went wrong while building it; the streams are then where
        they were before. DataError when a stream has no more rows.
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
        missing = [number for number in self._streams if str(number) not in state["streams"]]
        if missing:
            raise DataError(f"the state to resume lacks the data streams {missing}; it must hold those of every rank")
        mark = _Mark(int(state["row"]), {number: state["streams"][str(number)] for number in self._streams})
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
        for state in self._done.states.values():
            for name, value in state["counts"].items():
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
        for number, stream in self._streams.items():
            stream.restore(self._handed.states[number])
        self._built = self._handed

    def _build(self, phase: Phase) -> tuple[StepData, _Mark]:
        """The step after the last one built; in the thread, when there is one."""
        first = self._built.row
        end = first + phase.rows_per_rank * self._world_size
        rows: list[Row] = []
        touched: dict[int, Stream] = {}
        for g in range(first + (self._rank - first) % self._world_size, end, self._world_size):
            number = g % self._n_streams
            stream = touched[number] = self._streams[number]
            row = stream.next_row(phase.seq_len, document_mask=self._document_mask)
            if row is None:
                raise DataError(f"the training data of stream {number} has ended at row {g}: a training dataset must go on for ever (split 'train')")
            rows.append(row)
        self._built = _Mark(end, {**self._built.states, **{number: stream.state() for number, stream in touched.items()}})
        return _step_data(rows, phase, self._document_mask), self._built


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
    streams: Stream | Sequence[Stream], seq_len: int, micro_batch: int, *, document_mask: bool = True, max_tokens: int = 0
) -> Iterator[Batch]:
    """One pass over streams of a validation split, the same every time; each target once.

    Batches are (micro_batch, seq_len); the last row of a stream and the last
    batch are padded with labels of −100. Stops after ``max_tokens`` positions,
    rounded down to whole rows but to one at least; 0 scores everything. The
    streams are left as they were.

    Raises DataError when there is not one row.
    """
    streams = [streams] if isinstance(streams, Stream) else list(streams)
    states = [stream.state() for stream in streams]
    limit = max(1, max_tokens // seq_len) if max_tokens else None
    try:
        rows: list[Row] = []
        n_rows = 0
        for row in _round_robin(streams, seq_len, document_mask):
            rows.append(row)
            n_rows += 1
            if len(rows) == micro_batch:
                yield Batch.stack(rows, document_mask=document_mask)
                rows = []
            if n_rows == limit:
                break
        if not n_rows:
            raise DataError("the validation data has no text: every row is empty or refused by dataset.filter")
        if rows:
            rows += [_padding(seq_len)] * (micro_batch - len(rows))
            yield Batch.stack(rows, document_mask=document_mask)
    finally:
        for stream, state in zip(streams, states, strict=True):
            stream.restore(state)


def _round_robin(streams: Sequence[Stream], seq_len: int, document_mask: bool) -> Iterator[Row]:
    remaining = deque(streams)
    while remaining:
        stream = remaining.popleft()
        row = stream.next_row(seq_len, document_mask=document_mask)
        if row is not None:
            remaining.append(stream)
            yield row


def _padding(seq_len: int) -> Row:
    nothing = np.zeros(seq_len, dtype=np.int64)
    return Row(
        tokens=nothing,
        labels=nothing + IGNORE,
        positions=np.arange(seq_len, dtype=np.int32),
        document_ids=nothing - 1,
        target_bytes=np.zeros(seq_len, dtype=np.int32),
    )


def _shape(phase: Phase) -> tuple[int, int, int]:
    """All of a phase that a batch depends on."""
    return phase.seq_len, phase.micro_batch, phase.accumulation


def _step_data(rows: list[Row], phase: Phase, document_mask: bool) -> StepData:
    size = phase.micro_batch
    documents = np.unique(np.concatenate([row.document_ids for row in rows]))
    return StepData(
        micro_batches=tuple(Batch.stack(rows[i : i + size], document_mask=document_mask) for i in range(0, len(rows), size)),
        n_valid=sum(int((row.labels != IGNORE).sum()) for row in rows),
        n_tokens=len(rows) * phase.seq_len,
        n_bytes=sum(int(row.target_bytes.sum()) for row in rows),
        document_ids=tuple(int(document) for document in documents if document >= 0),
    )
