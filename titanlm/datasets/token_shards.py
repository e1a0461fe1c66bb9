"""Documents that are tokens already, out of .bin shards.

The files of a split, in the order of their numbers, are one sequence of tokens.
Nothing in a shard says where a document is but its special ids, so what the
tokenizer puts around a document says where documents begin:

* BOS: at every BOS, whether or not there is an EOS too;
* EOS alone: after every EOS;
* BOS and EOS the same id: separators in a row are, in turn, the end of one
  document and the start of the next, so between two documents there is an even
  number of them. Shards with one separator between documents are refused;
* neither: nowhere; every slice is a document.

Shards are cut at a number of tokens and the documents with them. So where a
file's name continues the one before it (the same but for a number that is one
higher) the head of the file, up to its first start, belongs to the last
document of the file before. The head of any other file is a document.

Order, epochs and streams are those of text (``titanlm.datasets.documents``);
what is permuted are *slices* of files, and the documents within a slice. A
slice's documents are those that begin in it; the last may run on into the
next slice or file. Where they begin is found once for a slice, with numpy.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from titanlm.batch import Document
from titanlm.constraints import PositiveInt
from titanlm.datasets.documents import INDEX_BITS, order, shared, shuffled
from titanlm.datasets.files import Files, is_url, one_line
from titanlm.datasets.shard_file import SIDECAR, Shard, digest_of, open_shard, read_manifest
from titanlm.errors import DataError
from titanlm.registry import Tokenizer, register
from titanlm.tokenizers.fingerprint import difference

LONGEST = 1 << 24
"""Tokens of a document; shards with longer ones were written with another tokenizer."""
_PROBED = 1 << 20
"""Tokens at the beginning of a sequence in which its special ids are looked for..."""
_ENOUGH = 100_000
"""... and must be found, when there are so many."""
_RUN = 4096
"""Separators in a row that still are documents."""
_OPEN_FILES = 64
_SLICES_A_STREAM = 4
_SMALLEST = 1024
"""Tokens of a slice, however little data there is."""


@dataclass(frozen=True)
class TokenShardsConfig:
    """Token shards (.bin), as `titanlm data prepare`, llm.c and Parameter Golf write them."""

    paths: tuple[str, ...] = ()
    """Files, directories (every .bin below) and globs, relative to the working directory; names with `_bytes_` are no tokens and left out."""
    validation_paths: tuple[str, ...] = ()
    """Shards for validation."""
    shuffle: bool = True
    """Train in another order every epoch; validation always goes in order of the files."""
    slice_tokens: PositiveInt = 1 << 18
    """What is shuffled are pieces of files of so many tokens, and the documents that begin in a piece; each stream holds one piece in memory."""

    def __post_init__(self) -> None:
        if not (self.paths or self.validation_paths):
            raise ValueError("paths is empty: name at least one file, directory or glob")


@register("dataset", "token_shards")
class TokenShards:
    """Stream ``stream`` of ``n_streams`` over the shards of a split; ids are (n,) int32, read-only, ``n_bytes`` is None.

    ``epochs`` passes for split "train", for ever when None; one pass in order
    otherwise. Raises DataError when a path matches nothing or a file is named
    twice, for a file that is no shard or a damaged one, for shards of another
    tokenizer or another convention, and for ids that the tokenizer lacks.
    """

    def __init__(
        self, config: TokenShardsConfig, *, tokenizer: Tokenizer, split: str, stream: int, n_streams: int, seed: int, epochs: int | None = None
    ) -> None:
        if not 0 <= stream < n_streams:
            raise DataError(f"stream {stream} of {n_streams} does not exist: streams are numbered from 0")
        listing = replace(config, shuffle=True)
        key = ("token_shards", Path.cwd(), listing, split, tokenizer.fingerprint, n_streams)
        self._sequence: _Sequence = shared(key, lambda: _Sequence(listing, split, tokenizer, n_streams))
        self.fingerprint = self._sequence.fingerprint
        self._n_slices = len(self._sequence.slices)
        self._epochs = epochs if split == "train" else 1
        self._shuffle = config.shuffle and split == "train"
        self._stream, self._n_streams, self._seed = stream, n_streams, seed
        self._taken = self._emitted = self._documents = 0
        self._order, self._ordered = np.zeros(0, dtype=np.uint32), -1  # the present permutation and its epoch
        self._slice: _Slice | None = None

    def __iter__(self) -> Iterator[Document]:
        return self

    def __next__(self) -> Document:
        one = self._slice or self._next_slice()
        index = one.order[self._emitted]
        document = one.document(index)
        self._emitted += 1
        self._documents += 1
        if self._emitted == len(one.order):  # so that a finished slice is not read again after a resume
            self._taken, self._emitted, self._slice = self._taken + 1, 0, None
        return document

    def state(self) -> dict[str, Any]:
        """Slices taken, documents emitted of the present one, slices there are, documents of all."""
        return {"taken": self._taken, "emitted": self._emitted, "n_shards": self._n_slices, "counts": {"documents": self._documents}}

    def restore(self, state: dict[str, Any]) -> None:
        """Raises DataError when the state belongs to data of another size."""
        if state["n_shards"] != self._n_slices:
            before = f"the state to resume was of {state['n_shards']}"
            raise DataError(f"{self._sequence.name} has {self._n_slices} slices, but {before}: the data or dataset.slice_tokens has changed")
        self._taken, self._emitted = int(state["taken"]), int(state["emitted"])
        self._documents = int(state["counts"]["documents"])
        self._slice = None

    def _next_slice(self) -> _Slice:
        """The slice whose turn it is, or the next in which a document begins."""
        for barren in count():
            position = self._stream + self._taken * self._n_streams
            epoch, offset = divmod(position, self._n_slices)
            if self._epochs is not None and epoch >= self._epochs:
                raise StopIteration
            if barren >= self._n_slices and not self._shuffle:  # shuffled, its turn comes
                where = f"in the slices of stream {self._stream} of {self._n_streams}"
                raise DataError(f"{self._sequence.name}: no document begins {where}; change data.n_streams or dataset.slice_tokens")
            if self._shuffle and epoch != self._ordered:
                self._order, self._ordered = order(self._seed, epoch, self._n_slices), epoch
            number = int(self._order[offset]) if self._shuffle else offset
            one = self._sequence.read_slice(number)
            if n := len(one.order):
                drawn = shuffled((self._seed, position), n).tolist() if self._shuffle else one.order
                self._slice = replace(one, order=drawn, first_id=position << INDEX_BITS)
                return self._slice
            self._taken += 1
        raise AssertionError


@dataclass(frozen=True)
class _Slice:
    """The documents that begin in a slice; ids and bytes are converted and counted for all at once, which is what makes a document cheap."""

    ids: np.ndarray
    """int32, read-only, of all its documents."""
    target_bytes: np.ndarray
    """int32, of all its documents."""
    bounds: list[int]
    """Where in ``ids`` documents begin, and where the last one ends."""
    order: Sequence[int]
    first_id: int = 0

    def document(self, index: int) -> Document:
        start, end = self.bounds[index], self.bounds[index + 1]
        return Document(self.ids[start:end], self.first_id + index, None, None, self.target_bytes[start:end])


class _Sequence:
    """The tokens of a split's files as one sequence, read by global position; shared by all streams of a process."""

    def __init__(self, config: TokenShardsConfig, split: str, tokenizer: Tokenizer, n_streams: int) -> None:
        self.name = "dataset 'token_shards'"
        train, validation = expand(config.paths, "dataset.paths"), expand(config.validation_paths, "dataset.validation_paths")
        if both := set(train) & set(validation):
            raise DataError(f"{self.name}: {min(both)} is in dataset.paths and in dataset.validation_paths; a file can be in one only")
        _require_one_split(train)
        own, other = (train, validation) if split == "train" else (validation, train)
        if not own:
            what = "training data; set dataset.paths" if split == "train" else "validation data; set dataset.validation_paths"
            raise DataError(f"{self.name}: there is no {what}")
        self._bos, self._eos, self._vocab_size = tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size
        self._count = tokenizer.target_bytes
        self.shards = shards = [open_shard(path) for path in own]
        self._require_apart([open_shard(path) for path in other])
        self._require_tokenizer(tokenizer)
        self._map = lru_cache(maxsize=_OPEN_FILES)(lambda file: shards[file].tokens())
        self._ends = np.cumsum([shard.n_tokens for shard in self.shards], dtype=np.int64)
        self._begins = self._ends - [shard.n_tokens for shard in self.shards]
        # For every file, where the row of files begins and ends whose documents may run on into each other.
        fresh = [not _continues(before.path, shard.path) for before, shard in zip(self.shards, self.shards[1:])]
        rows = np.cumsum([0, *fresh])
        self._row_begins = self._begins[np.searchsorted(rows, rows, side="left")]
        self._row_ends = self._ends[np.searchsorted(rows, rows, side="right") - 1]
        n_tokens = config.slice_tokens
        if self._bos is not None or self._eos is not None:
            # Little data: small slices, so that no stream is without. Where slices are the documents they are what the user says.
            n_tokens = min(n_tokens, max(_SMALLEST, int(self._ends[-1]) // (_SLICES_A_STREAM * n_streams)))
        self.slices = [
            (file, int(start), min(int(start) + n_tokens, int(end)))
            for file, (begin, end) in enumerate(zip(self._begins, self._ends))
            for start in range(begin, end, n_tokens)
        ]
        content = [(shard.path.name, shard.n_tokens, shard.dtype.str, shard.head_digest) for shard in self.shards]
        self.fingerprint = f"token_shards: {hashlib.sha256(repr((split, n_tokens, content)).encode()).hexdigest()}"
        for file in np.flatnonzero(self._row_begins == self._begins):
            self._require_convention(int(file))

    def read_slice(self, number: int) -> _Slice:
        """Raises DataError for ids that the tokenizer lacks and documents without an end."""
        file, start, end = self.slices[number]
        separated = self._bos is not None or self._eos is not None
        starts = self._starts(file, start, end) if separated else np.array([start])
        if not len(starts):
            return _Slice(np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.int32), [], ())
        stop = self._end_after(file, int(starts[-1]), end) if separated else end
        first = int(starts[0])
        raw = self._read(first, stop)
        self._require_ids(raw, first)
        ids = raw.astype(np.int32)
        previous = np.empty_like(ids)
        previous[1:] = ids[:-1]
        previous[starts - first] = -1
        ids.flags.writeable = False
        return _Slice(ids, self._count(ids, previous), [*(starts - first).tolist(), stop - first], range(len(starts)))

    # ---------------------------------------------------------------- where documents begin
    def _starts(self, file: int, start: int, end: int) -> np.ndarray:
        """Positions from ``start`` to ``end`` where a document begins; they lie in the row of files of ``file``."""
        head, tail = int(self._row_begins[file]), int(self._row_ends[file])
        if self._bos is not None and self._bos == self._eos:
            starts = self._alternating(head, tail, start, end)
        elif self._bos is not None:
            starts = np.flatnonzero(self._read(start, end) == self._bos) + start
        else:
            before = max(start - 1, head)
            starts = np.flatnonzero(self._read(before, end - 1) == self._eos) + before + 1
        return starts if start != head or (len(starts) and starts[0] == head) else np.concatenate([[head], starts])

    def _alternating(self, head: int, tail: int, start: int, end: int) -> np.ndarray:
        """Starts where a separator begins and ends documents: in a run of separators every second one, the first being an end."""
        separator = self._bos
        low, high = start, end  # with the whole runs at both sides
        while low > head and self._read(low - 1, low)[0] == separator and start - low <= _RUN:
            low -= 1
        while high < tail and self._read(high, high + 1)[0] == separator and high - end <= _RUN:
            high += 1
        at = np.flatnonzero(self._read(low, high) == separator) + low
        if not len(at):
            return at
        firsts = np.flatnonzero(np.diff(at, prepend=at[0] - 2) != 1)
        lengths = np.diff(np.append(firsts, len(at)))
        # At either end of the sequence a run lacks a document's end or start.
        odd = lengths % 2 == 1
        whole = odd & (at[firsts] != head) & (at[firsts] + lengths != tail)
        if whole.any():
            file, offset = self._place(int(at[firsts[np.argmax(whole)]]))
            raise DataError(
                f"{self.shards[file].path}: token {offset:,}: one separator (id {separator}) where the tokenizer writes two, a document's end and the next "
                "one's start: shards of another convention; read them with a tokenizer that writes one (sentencepiece: tokenizer.add_eos = false), "
                "or prepare them again"
            )
        turn = np.arange(len(at)) - np.repeat(firsts, lengths)
        if odd[0] and at[0] == head:
            turn[: lengths[0]] += 1  # begins with a start
        starts = at[turn % 2 == 1]
        return starts[(starts >= start) & (starts < end)]

    def _end_after(self, file: int, last: int, position: int) -> int:
        """Where the document that begins at ``last`` ends, from ``position`` on."""
        tail, step = int(self._row_ends[file]), 1 << 14
        while position < tail:
            upto = min(position + step, tail)
            if len(starts := self._starts(file, position, upto)):
                return int(starts[0])
            position, step = upto, min(2 * step, 1 << 20)
            if position - last > LONGEST:
                file, offset = self._place(last)
                raise DataError(
                    f"{self.shards[file].path}: the document at token {offset:,} has no end within {LONGEST:,} tokens ({self._separators()} would be); "
                    "is it the tokenizer that the shards were written with?"
                )
        return tail

    # ---------------------------------------------------------------- checks
    def _require_apart(self, other: Sequence[Shard]) -> None:
        mine = {(shard.n_tokens, shard.head_digest): shard.path for shard in self.shards}
        for shard in other:
            if (same := mine.get((shard.n_tokens, shard.head_digest))) is not None:
                raise DataError(f"{self.name}: {same} and {shard.path} begin with the same tokens and have as many: training and validation must differ")

    def _require_tokenizer(self, tokenizer: Tokenizer) -> None:
        now = digest_of(tokenizer.fingerprint)
        for shard in self.shards:
            if shard.tokenizer_digest in (b"", now):
                continue
            sets = read_manifest(shard.path.parent).values()
            saved = next((text for one in sets if digest_of(text := str(one.get("tokenizer"))) == shard.tokenizer_digest), None)
            lines = ["what differs is not known: no shards.json beside it says"] if saved is None else difference(saved, tokenizer.fingerprint)
            head = f"{shard.path}: written with another tokenizer; use that one, or prepare the shards again (shards → this run):"
            raise DataError("\n  ".join([head, *lines]))

    def _require_convention(self, file: int) -> None:
        """Raises DataError when the beginning of a sequence shows that its documents are separated in another way."""
        start = int(self._begins[file])
        end = min(start + _PROBED, int(self._ends[file]))
        self._require_ids(probe := self._read(start, end), start)
        path = self.shards[file].path
        if self._bos is not None and self._bos == self._eos:
            self._starts(file, start, end)
        begin_or_end = self._eos if self._bos is None else self._bos
        if begin_or_end is None:
            return
        at = np.flatnonzero(probe == begin_or_end)
        if not len(at) and len(probe) >= _ENOUGH:
            raise DataError(
                f"{path}: none of the first {len(probe):,} tokens separates documents ({self._separators()} does); "
                "is it the tokenizer that the shards were written with?"
            )
        inner = at[at > 0]
        if self._bos is not None and self._eos not in (None, self._bos) and len(inner) and not (probe[inner - 1] == self._eos).any():
            raise DataError(
                f"{path}: documents begin with BOS (id {self._bos}) and do not end with EOS (id {self._eos}), as those of the tokenizer do; "
                "set tokenizer.add_eos = false, or prepare the shards again"
            )

    def _require_ids(self, tokens: np.ndarray, position: int) -> None:
        if tokens.size and int(tokens.max()) >= self._vocab_size:
            at = int(np.argmax(tokens >= self._vocab_size))
            file, offset = self._place(position + at)
            raise DataError(
                f"{self.shards[file].path}: token {offset:,} is {tokens[at]}, but the tokenizer has ids 0 to {self._vocab_size - 1}; "
                "use the tokenizer that the shards were written with"
            )

    def _separators(self) -> str:
        return " and ".join(f"{name} {one}" for name, one in (("BOS", self._bos), ("EOS", self._eos)) if one is not None)

    # ---------------------------------------------------------------- tokens
    def _tokens(self, file: int) -> np.ndarray:
        self.shards[file].require_unchanged()
        return self._map(file)

    def _place(self, position: int) -> tuple[int, int]:
        """File and offset."""
        file = int(np.searchsorted(self._ends, position, side="right"))
        return file, position - int(self._begins[file])

    def _read(self, start: int, end: int) -> np.ndarray:
        """The tokens from ``start`` to ``end``, from as many files as they are in."""
        parts = []
        while start < end:
            file, offset = self._place(start)
            parts.append(self._tokens(file)[offset : offset + end - start])
            start += len(parts[-1])
        return parts[0] if len(parts) == 1 else np.concatenate(parts or [np.empty(0, dtype=np.uint16)])


def _require_one_split(paths: Sequence[Path]) -> None:
    """Raises DataError for training and validation shards in one list: a folder holds both when it was downloaded or prepared whole."""
    train = next((path for path in paths if "_train_" in path.name), None)
    validation = next((path for path in paths if "_val_" in path.name or "_validation_" in path.name), None)
    if train and validation:
        remedy = f'paths = ["{train.parent}/*_train_*.bin"], validation_paths = ["{validation.parent}/*_val*.bin"]'
        raise DataError(f"dataset.paths: {train.name} and {validation.name} are, by their names, training and validation shards; keep them apart: {remedy}")


def _continues(before: Path, path: Path) -> bool:
    """Whether ``path`` is named like ``before`` but for a number that is one higher."""
    (a, n), (b, m) = _numbered(before), _numbered(path)
    return n >= 0 and (a, n + 1) == (b, m)


def _numbered(path: Path) -> tuple[str, int]:
    """The name without the last number in it, and the number; −1 when it has none."""
    match = re.fullmatch(r"(.*?)(\d+)(\D*)", path.name)
    return (f"{path.parent}/{match[1]}#{match[3]}", int(match[2])) if match else (str(path), -1)


def expand(entries: Sequence[str], key: str) -> list[Path]:
    """The shards that the entries name, in their order and by number within each.

    Raises DataError when an entry names none, or a file is named twice.
    """
    if any(map(is_url, entries)):
        raise DataError(f"{key}: shards are mapped into memory, which no URL can be; download them and name the copies")
    found = Files(entries, key, (".bin",)).by
    shards: dict[str, list[Path]] = {entry: [] for entry in entries}
    for real, entry in found.items():
        if SIDECAR not in os.path.basename(real):
            shards[entry].append(Path(real))
    for entry, own in shards.items():
        if not own:
            raise DataError(f"{key}: {one_line(entry)!r} is no shard and has none; files with {SIDECAR} in their name hold no tokens")
        own.sort(key=lambda one: (*_numbered(one), one))
    return [path for own in shards.values() for path in own]
