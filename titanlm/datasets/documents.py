"""Rows of text as one endless, resumable, splittable sequence of documents.

Every text dataset is an indexable sequence of rows (``Rows``); order, epochs,
streams, filters, tokenising and resuming are the same for all and live here.

All rows of all epochs form one sequence of global positions 0, 1, 2...
Stream ``s`` of ``S`` owns the positions s, s + S, s + 2S... Position p belongs
to epoch p // N and is row ``order[p % N]`` of the N rows, where ``order`` is a
permutation drawn from seed and epoch. So the whole state of a stream is the
number of positions it has taken: nothing is drawn on the way, no shuffle
buffer can lose rows, streams neither overlap nor leave gaps, and which process
runs a stream does not matter. A document's id is its global position.

The permutation sorts 64-bit Philox words (Salmon et al., SC 2011) drawn raw:
numpy keeps those words the same across its versions, but not what
``Generator.permutation`` makes of them.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Protocol, TypeVar
from weakref import WeakValueDictionary

import numpy as np

from titanlm.batch import Document
from titanlm.errors import DataError
from titanlm.registry import Component, Filter, Tokenizer

_T = TypeVar("_T")


class Rows(Protocol):
    """What a dataset gives to ``TextDocuments``."""

    name: str
    """What errors call it."""
    fingerprint: str
    """Of the data: file names, sizes and contents, and every setting that changes which rows there are."""

    def __len__(self) -> int: ...
    def row(self, index: int) -> Mapping[str, Any]: ...  # "text" (str or None) and "source" at least


class TextDocuments:
    """Stream ``stream`` of ``n_streams`` over ``rows``, tokenised.

    Endless over epochs for split "train", one pass in row order otherwise.
    Rows without text (None, empty, only whitespace) and rows that a filter
    refuses are passed over and counted. A document's ids are
    ``[bos] + encode(text) + [eos]``, each special id where the tokenizer has
    it.

    Raises DataError when this stream can only ever meet rows that are passed
    over, and for a text that cannot be tokenised.
    """

    def __init__(
        self,
        rows: Rows,
        *,
        tokenizer: Tokenizer,
        split: str,
        stream: int,
        n_streams: int,
        seed: int,
        shuffle: bool = True,
        filters: Sequence[Component] = (),
    ) -> None:
        if not 0 <= stream < n_streams:
            raise DataError(f"stream {stream} of {n_streams} does not exist: streams are numbered from 0")
        self.fingerprint = rows.fingerprint
        self._rows = rows
        self._tokenizer = tokenizer
        self._endless = split == "train"
        self._shuffle = shuffle and self._endless
        self._stream, self._n_streams, self._seed = stream, n_streams, seed
        self._filters: list[Filter] = [component.build() for component in filters]
        self._taken = 0
        self._counts = {"documents": 0, "empty": 0, "filtered": 0}
        self._passed_over = 0
        self._sure = False  # that some row of this stream's is a document

    @property
    def n_rows(self) -> int:
        """Rows of one pass over all streams, before filters."""
        return len(self._rows)

    def __iter__(self) -> Iterator[Document]:
        return self

    def __next__(self) -> Document:
        n_rows = len(self._rows)
        while True:
            position = self._stream + self._taken * self._n_streams
            epoch, offset = divmod(position, n_rows)
            if epoch and not self._endless:
                raise StopIteration
            row = self._rows.row(int(order(self._seed, epoch, n_rows)[offset]) if self._shuffle else offset)
            self._taken += 1
            fate = self._fate(row)
            self._counts[fate] += 1
            if fate == "documents":
                self._passed_over, self._sure = 0, True
                return self._document(row, position)
            self._passed_over += 1
            if self._endless and not self._sure and self._passed_over * self._n_streams >= n_rows:
                self._make_sure()

    def state(self) -> dict[str, Any]:
        """Positions taken, what became of them, and the number of rows as a check."""
        return {"taken": self._taken, "n_rows": len(self._rows), **self._counts}

    def restore(self, state: dict[str, Any]) -> None:
        """Raises DataError when the state belongs to data of another size."""
        if state["n_rows"] != len(self._rows):
            raise DataError(f"{self._rows.name} has {len(self._rows)} rows, but the state to resume was of {state['n_rows']}: the data has changed")
        self._taken = int(state["taken"])
        self._counts = {name: int(state[name]) for name in self._counts}
        self._passed_over = 0

    def texts(self) -> Iterator[str]:
        """The texts of one pass over this stream's rows, untokenised and in row order; the state stays as it is."""
        for index in range(self._stream, len(self._rows), self._n_streams):
            row = self._rows.row(index)
            if self._fate(row) == "documents":
                yield row["text"]

    def _fate(self, row: Mapping[str, Any]) -> str:
        text = row["text"]
        if text is None or not text.strip():
            return "empty"
        return "documents" if all(one.keep(row) for one in self._filters) else "filtered"

    def _document(self, row: Mapping[str, Any], position: int) -> Document:
        text, tokenizer = row["text"], self._tokenizer
        try:
            ids = tokenizer.encode(text)
        except DataError as error:
            raise DataError(f"{row['source']} (document {position}): {error}") from error
        begin, end = (np.array([] if special is None else [special], dtype=np.int32) for special in (tokenizer.bos_id, tokenizer.eos_id))
        whole = np.concatenate([begin, ids, end])
        whole.flags.writeable = False
        return Document(whole, position, len(text.encode("utf-8")))

    def _make_sure(self) -> None:
        """After an epoch without a document: look for one row that would be one, and give up if there is none."""
        n_rows = len(self._rows)
        # Unshuffled, a stream meets the same rows in every epoch when the counts share a divisor.
        step = 1 if self._shuffle else math.gcd(self._n_streams, n_rows)
        reachable = range(self._stream % step, n_rows, step)
        if not any(self._fate(self._rows.row(index)) == "documents" for index in reachable):
            which = "are empty or refused by dataset.filter" if self._filters else "are empty"
            advice = "loosen dataset.filter or look at the data" if self._filters else "look at the data"
            rows = f"all {len(reachable)} rows that stream {self._stream} of {self._n_streams} reads"
            raise DataError(f"{self._rows.name}: {rows} {which}; {advice}")
        self._sure = True


@lru_cache(maxsize=4)
def order(seed: int, epoch: int, n_rows: int) -> np.ndarray:
    """The permutation of an epoch: (n_rows,) uint32, or uint64 from 2³² rows on. Shared by all streams of the process."""
    words = np.random.Philox(np.random.SeedSequence((seed, epoch))).random_raw(n_rows)
    permutation = np.argsort(words, kind="stable").astype(np.uint32 if n_rows < 2**32 else np.uint64)
    permutation.flags.writeable = False
    return permutation


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
