"""Text as one endless, resumable, splittable sequence of documents.

Every text dataset is a number of *shards* whose rows are read one after the
other (``Shards``), or of rows that can be read in any order (``Rows``, each a
shard by itself); order, epochs, streams, filters, tokenising and resuming are
the same for all and live here.

All shards of all epochs form one sequence of global positions 0, 1, 2...
Stream ``s`` of ``S`` owns the positions s, s + S, s + 2S... Position p belongs
to epoch p // N and is shard ``order[p % N]`` of the N shards, where ``order``
is a permutation drawn from seed and epoch. Within a shard rows are read in
blocks, and a block is permuted by a draw from seed, position and first row. So
the whole state of a stream is where its block begins and how much of it is
done: nothing is drawn on the way, no shuffle buffer can lose rows, streams
neither overlap nor leave gaps, and which process runs a stream does not
matter.

A document's id is ``position << 28 | index``, its index among the documents of
the shard, so it is the same in whatever order the block is read.

The permutation sorts 64-bit Philox words (Salmon et al., SC 2011) drawn raw:
numpy keeps those words the same across its versions, but not what
``Generator.permutation`` makes of them.
"""

from __future__ import annotations

import hashlib
import math
import sys
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar
from weakref import WeakValueDictionary

import numpy as np

from titanlm.batch import Document
from titanlm.errors import DataError
from titanlm.loggers.text import printable
from titanlm.registry import Component, Filter, Tokenizer

_T = TypeVar("_T")

OnError = Literal["raise", "skip"]
INDEX_BITS = 28
BLOCK_BYTES = 8 << 20
"""A block ends at the row that brings its text to so many bytes."""
NAMED_AT_MOST = 8
"""Unreadable places that a stream remembers by name."""


class Rows(Protocol):
    """Rows that can be read in any order."""

    name: str
    """What errors call it."""
    fingerprint: str
    """Of the data: file names, sizes and contents, and every setting that changes which rows there are."""

    def __len__(self) -> int: ...
    def row(self, index: int) -> Mapping[str, Any]: ...  # "text" (str or None) and "place" at least


class Shards(Protocol):
    """Rows that are read one after the other, in shards that can be read in any order."""

    name: str
    fingerprint: str
    n_rows: int | None
    """Rows of all shards, where that is known without reading them."""
    validation_fraction: float
    """Share of the rows held out by the hash of their text; 0 where the splits have files of their own."""

    def __len__(self) -> int: ...  # shards
    def read(self, shard: int, start: int) -> Iterator[Mapping[str, Any] | Unreadable]: ...  # from row `start` on


@dataclass(frozen=True)
class Unreadable:
    """Rows that are there and cannot be read; they keep their numbers."""

    n_rows: int
    reason: str
    """Names file and row (group)."""


class _EachItsShard:
    """Rows as shards of one."""

    def __init__(self, rows: Rows) -> None:
        self._row, self._n_rows = rows.row, len(rows)
        self.name, self.fingerprint = rows.name, rows.fingerprint
        # Rows that know their splits without reading, as those of `text`, have no such attribute.
        self.validation_fraction: float = getattr(rows, "validation_fraction", 0.0)
        self.n_rows = None if self.validation_fraction else self._n_rows

    def __len__(self) -> int:
        return self._n_rows

    def place(self, files: int, rows: int, rows_per_file: int) -> tuple[int, int]:
        return files * rows_per_file + rows, 0

    def read(self, shard: int, start: int) -> Iterator[Mapping[str, Any] | Unreadable]:
        if start == 0:
            try:
                yield self._row(shard)
            except UnreadableRow as error:
                yield Unreadable(1, str(error))


class UnreadableRow(DataError):
    """What ``Rows.row`` raises for a row that ``data.on_error`` may skip."""


class _Item(dict[str, Any]):
    """A row, or a piece of one; ``n_tokens`` is counted when it is asked for, unless the data has such a column."""

    def __init__(self, row: Mapping[str, Any], tokenizer: Tokenizer) -> None:
        super().__init__(row)
        self._tokenizer = tokenizer
        self._ids: np.ndarray | None = None

    @property
    def ids(self) -> np.ndarray:
        if self._ids is None:
            self._ids = self._tokenizer.encode(self["text"])
        return self._ids

    def __missing__(self, column: str) -> Any:
        if column != "n_tokens":
            raise KeyError(column)
        return len(self.ids)


class TextDocuments:
    """Stream ``stream`` of ``n_streams`` over ``rows``, tokenised.

    ``epochs`` passes for split "train", for ever when None; one pass in order
    of the data for other splits. A block is of ``block_rows`` rows, which are
    shuffled together. Rows longer than ``max_bytes`` of UTF-8 are cut, after a
    line's end where there is one; each piece is a document. Rows without text
    (None, empty, only whitespace) and rows that a filter refuses are passed
    over and counted, those that cannot be read, too, with ``on_error`` "skip".
    A document's ids are ``[bos] + encode(text) + [eos]``, each special id
    where the tokenizer has it.

    Raises DataError when this stream can only ever meet rows that are passed
    over, for a text that cannot be tokenised, and, with ``on_error`` "raise",
    for a row that cannot be read.
    """

    def __init__(
        self,
        rows: Rows | Shards,
        *,
        tokenizer: Tokenizer,
        split: str,
        stream: int,
        n_streams: int,
        seed: int,
        shuffle: bool = True,
        filters: Sequence[Component] = (),
        epochs: int | None = None,
        on_error: OnError = "raise",
        block_rows: int = 256,
        max_bytes: int | None = None,
    ) -> None:
        if not 0 <= stream < n_streams:
            raise DataError(f"stream {stream} of {n_streams} does not exist: streams are numbered from 0")
        self._shards: Shards = rows if hasattr(rows, "read") else _EachItsShard(rows)  # type: ignore[assignment, arg-type]
        self._n_shards = len(self._shards)
        self._unit = "rows" if self._shards is not rows else "shards"
        self.fingerprint = self._shards.fingerprint
        self._tokenizer = tokenizer
        self._begin, self._end = (
            np.array([] if special is None else [special], dtype=np.int32) for special in (tokenizer.bos_id, tokenizer.eos_id)
        )  # fmt: skip
        self._split = split
        self._epochs = epochs if split == "train" else 1
        self._shuffle = shuffle and split == "train"
        self._stream, self._n_streams, self._seed = stream, n_streams, seed
        self._filters: list[Filter] = [component.build() for component in filters]
        self._on_error, self._block_rows, self._max_bytes = on_error, block_rows, max_bytes
        self._taken = self._row = self._index = self._emitted = 0
        self._counts = {"documents": 0, "empty": 0, "filtered": 0, "unreadable": 0}
        self._unreadable: list[str] = []
        self._block: _Block | None = None
        self._reader: Iterator[Mapping[str, Any] | Unreadable] | None = None
        self._order, self._ordered = np.zeros(0, dtype=np.uint32), -1  # the present permutation and its epoch
        self._barren = 0  # shards since the last document
        self._sure = False  # that some row of this stream's is a document

    @property
    def n_rows(self) -> int | None:
        """Rows of one pass over all streams, before filters, where that is known."""
        return self._shards.n_rows

    @property
    def unreadable(self) -> int:
        """Rows passed over so far because they cannot be read."""
        return self._counts["unreadable"]

    @property
    def passed_over(self) -> int:
        """Rows so far that have no text, or that a filter refused."""
        return self._counts["empty"] + self._counts["filtered"]

    def __iter__(self) -> Iterator[Document]:
        return self

    def __next__(self) -> Document:
        return self.tokenise(*self.next_text())

    def next_text(self) -> tuple[Mapping[str, Any], int]:
        """The row of the next document, with its ``text`` (a piece of it, if it is long), and the document's id.

        For those who tokenise elsewhere. Raises StopIteration at the end.
        """
        while True:
            position = self._stream + self._taken * self._n_streams
            epoch, offset = divmod(position, self._n_shards)
            if self._epochs is not None and epoch >= self._epochs:
                raise StopIteration
            if self._block is None:
                if self._shuffle and epoch != self._ordered:
                    self._order, self._ordered = order(self._seed, epoch, self._n_shards), epoch
                shard = int(self._order[offset]) if self._shuffle else offset
                self._block = self._read_block(shard, position)
            if self._emitted == len(self._block.items):
                self._next_block()
                continue
            at = int(self._block.order[self._emitted])
            item, index = self._block.items[at], self._index + at
            assert item is not None
            self._block.items[at] = None  # with its ids it may be large, and it is not needed again
            self._emitted += 1
            fate = self._fate(item)
            self._counts[fate] += 1
            if fate == "documents":
                self._barren, self._sure = 0, True
                if self._block.last and self._emitted == len(self._block.items):
                    self._next_block()  # so that a finished shard is not read again after a resume
                return item, position << INDEX_BITS | index

    def state(self) -> dict[str, Any]:
        """Shards taken; in the present one the first row of the block, documents before it and of it; what became of rows."""
        return {
            "taken": self._taken,
            "row": self._row,
            "index": self._index,
            "emitted": self._emitted,
            "n_shards": self._n_shards,
            "counts": dict(self._counts),
            "unreadable": list(self._unreadable),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Raises DataError when the state belongs to data of another size."""
        if state["n_shards"] != self._n_shards:
            before = f"the state to resume was of {state['n_shards']}"
            raise DataError(f"{self._shards.name} has {self._n_shards} {self._unit}, but {before}: the data has changed")
        self._taken, self._row, self._index, self._emitted = (int(state[key]) for key in ("taken", "row", "index", "emitted"))
        self._counts = {name: int(state["counts"][name]) for name in self._counts}
        self._unreadable = [str(reason) for reason in state["unreadable"]]
        self._block = self._reader = None
        self._barren = 0

    def skip(self, files: int, rows: int, rows_per_file: int) -> None:
        """Begin behind the first ``files`` files of ``rows_per_file`` rows, and ``rows`` rows of the next; over all streams.

        Raises DataError when shards are shuffled (which ones come first then
        depends on the seed), and where this data cannot be counted so.
        """
        if self._shuffle:
            raise DataError(f"{self._shards.name}: to skip files by their number they must be read in order: dataset.shuffle = false")
        place = getattr(self._shards, "place", None)
        if place is None:
            raise DataError(f"{self._shards.name}: files and rows of it cannot be skipped by number; name a checkpoint or an exported state")
        shards, rows = place(files, rows, rows_per_file)
        self._taken, mine = divmod(shards - self._stream + self._n_streams - 1, self._n_streams)
        self._row = rows if mine == self._n_streams - 1 else 0  # the next shard is this stream's
        self._index = self._row

    def texts(self) -> Iterator[str]:
        """The texts of one pass over this stream's rows, untokenised and in order of the data; the state stays as it is."""
        for shard in range(self._stream, self._n_shards, self._n_streams):
            for item in self._items(self._shards.read(shard, 0)):
                if self._fate(item) == "documents":
                    yield item["text"]

    def _next_block(self) -> None:
        """Go on behind the present block, in the next shard if it was the last of its own."""
        assert self._block is not None
        self._row += self._block.n_rows
        self._index += len(self._block.items)
        self._emitted = 0
        if self._block.last:
            self._taken += 1
            self._row = self._index = 0
            self._reader = None
            self._barren += 1
            if self._epochs is None and not self._sure and self._barren * self._n_streams >= self._n_shards:
                self._make_sure()
        self._block = None

    def _read_block(self, shard: int, position: int) -> _Block:
        if self._reader is None:
            self._reader = self._shards.read(shard, self._row)
        items: list[_Item | None] = []
        n_rows = n_bytes = 0
        last = True
        for row in self._reader:
            n_rows += row.n_rows if isinstance(row, Unreadable) else 1
            for item in self._items([row], note=self._emitted == 0):
                items.append(item)
                n_bytes += len(item["text"] or "")
            if n_rows >= self._block_rows or n_bytes >= BLOCK_BYTES:
                last = False
                break
        if last:
            self._reader = None
        drawn = shuffled((self._seed, position, self._row), len(items)) if self._shuffle and len(items) > 1 else range(len(items))
        return _Block(items, drawn, n_rows, last)

    def _items(self, rows: Iterable[Mapping[str, Any] | Unreadable], note: bool = False) -> Iterator[_Item]:
        """The rows of this split, long ones in pieces; unreadable ones raise, or are counted when they are met first (``note``)."""
        fraction = self._shards.validation_fraction
        for row in rows:
            if isinstance(row, Unreadable):
                self._skip(row, note)
                continue
            text = row["text"]
            if fraction and text is not None and held_out(text.encode("utf-8", errors="surrogatepass"), fraction) == (self._split == "train"):
                continue
            if text is None or self._max_bytes is None or len(text) <= self._max_bytes // 4:  # a character is at most four bytes
                yield _Item(row, self._tokenizer)
                continue
            for start, piece in pieces(text, self._max_bytes):
                whole = row if len(piece) == len(text) else {**row, "text": piece, "place": f"{row['place']} byte {start}"}
                yield _Item(whole, self._tokenizer)

    def _skip(self, row: Unreadable, note: bool) -> None:
        if self._on_error == "raise":
            raise DataError(f'{row.reason}; mend or remove it, or pass over what cannot be read with data.on_error = "skip"')
        if note:
            self._counts["unreadable"] += max(1, row.n_rows)
            if len(self._unreadable) < NAMED_AT_MOST:
                self._unreadable.append(printable(row.reason))
                print(f"WARNING: passed over: {printable(row.reason)}", file=sys.stderr)

    def _fate(self, item: _Item) -> str:
        text = item["text"]
        if text is None or not text.strip():
            return "empty"
        return "documents" if all(one.keep(item) for one in self._filters) else "filtered"

    def tokenise(self, item: Mapping[str, Any], document_id: int) -> Document:
        """What ``next_text`` gave as a document. Raises DataError naming the row when it cannot be tokenised."""
        try:
            ids = item.ids if isinstance(item, _Item) else self._tokenizer.encode(item["text"])
        except DataError as error:
            raise DataError(f"{item['place']} (document {document_id}): {error}") from error
        whole = np.concatenate([self._begin, ids, self._end])
        whole.flags.writeable = False
        return Document(whole, document_id, len(item["text"].encode("utf-8")))

    def _make_sure(self) -> None:
        """After an epoch without a document: look for one row that would be one, and give up if there is none."""
        # Unshuffled, a stream meets the same shards in every epoch when the counts share a divisor.
        step = 1 if self._shuffle else math.gcd(self._n_streams, self._n_shards)
        reachable = range(self._stream % step, self._n_shards, step)
        if not any(self._fate(item) == "documents" for shard in reachable for item in self._items(self._shards.read(shard, 0))):
            which = "are empty, unreadable or refused by dataset.filter" if self._filters else "are empty or unreadable"
            advice = "loosen dataset.filter or look at the data" if self._filters else "look at the data"
            rows = f"all {len(reachable)} {self._unit} that stream {self._stream} of {self._n_streams} reads"
            raise DataError(f"{self._shards.name}: {rows} {which}; {advice}")
        self._sure = True


@dataclass(frozen=True)
class _Block:
    items: list[_Item | None]
    """None for those that are done."""
    order: Sequence[int] | np.ndarray
    n_rows: int
    """Rows of the shard that it covers, unreadable and other split's included."""
    last: bool
    """Whether the shard ends with it."""


def order(seed: int, epoch: int, n_shards: int) -> np.ndarray:
    """The permutation of an epoch: (n_shards,) uint32, or uint64 from 2³² on; one for all who hold it at the same time."""

    def draw() -> np.ndarray:
        permutation = shuffled((seed, epoch), n_shards).astype(np.uint32 if n_shards < 2**32 else np.uint64)
        permutation.flags.writeable = False
        return permutation

    return shared(("order", seed, epoch, n_shards), draw)


def shuffled(key: tuple[int, ...], n: int) -> np.ndarray:
    """A permutation of n numbers: (n,) int64, a function of the key."""
    words = np.random.Philox(np.random.SeedSequence(key)).random_raw(n)
    return np.argsort(words, kind="stable")


def cut(data: Any, start: int, end: int, max_bytes: int) -> Iterator[tuple[int, int]]:
    """Spans of at most ``max_bytes`` of UTF-8 ``data[start:end]``, cut at line ends or else between characters."""
    while end - start > max_bytes:
        at = data.rfind(b"\n", start, start + max_bytes) + 1
        if not at:
            at = start + max_bytes
            while at > start + 1 and data[at] & 0xC0 == 0x80:  # inside a UTF-8 character
                at -= 1
        yield start, at
        start = at
    yield start, end


def pieces(text: str, max_bytes: int) -> Iterator[tuple[int, str]]:
    """Pieces of a text as ``cut`` cuts it, each with the byte it begins at; the text is never encoded whole, for it may be large."""
    at = start = 0
    while at < len(text):
        # One character more than could fit: if less than that comes, it is the end of the text.
        raw = text[at : at + max_bytes + 1].encode("utf-8", errors="surrogatepass")
        _, end = next(cut(raw, 0, len(raw), max_bytes))
        piece = raw[:end].decode("utf-8", errors="surrogatepass")
        yield start, piece
        at, start = at + len(piece), start + end


def columns_of(filters: Sequence[Component]) -> tuple[str, ...] | None:
    """The columns that filters read beside the text; None when one does not say."""
    names: dict[str, None] = {}
    for one in filters:
        columns = getattr(one.build(), "columns", None)
        if columns is None:
            return None
        names.update(dict.fromkeys(columns))
    return tuple(names)


def held_out(key: bytes, fraction: float) -> bool:
    """Whether the row with this key belongs to validation.

    A function of the key alone, so training and validation are disjoint, equal
    keys stay together, and more data or a larger fraction move no row back.
    Salted: corpora are often sorted or split by the plain hash of their text.
    """
    return int.from_bytes(hashlib.sha256(b"titanlm validation\0" + key).digest()[:8], "big") < fraction * 2.0**64


_listings: WeakValueDictionary[Hashable, Any] = WeakValueDictionary()
_lock = threading.Lock()


def shared(key: Hashable, build: Callable[[], _T]) -> _T:
    """``build()``, once for all streams that are alive with this key.

    Sixty-four streams index their files once; when the last one is gone the
    listing goes too, so a later run in the same process sees changed files.
    """
    with _lock:
        found = _listings.get(key)
        if found is None:
            found = build()
            _listings[key] = found
        return found
