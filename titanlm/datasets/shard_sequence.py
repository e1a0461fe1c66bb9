"""The shards of a split as one sequence of tokens, and where documents begin in it.

Shared by the datasets that read shards. Tokens are read by their position in
the whole, from as many files as they are in; what the files are, and whether
they are this tokenizer's, is checked once, when they are opened. How documents
are told apart, and which run on into the next file, is said in
``titanlm.datasets.token_shards``.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from titanlm.batch import Document
from titanlm.datasets.files import Files, is_url, one_line
from titanlm.datasets.shard_file import SIDECAR, Shard, digest_of, open_shard, read_manifest
from titanlm.errors import DataError
from titanlm.registry import Tokenizer
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


@dataclass(frozen=True)
class Slice:
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


class ShardSequence:
    """The tokens of a split's files, in the order of the files; ``name`` is what errors call the dataset.

    Raises DataError when a path matches nothing or a file is named twice, for
    a file that is no shard or a damaged one, and for shards of another
    tokenizer or another convention. ``split`` "train" reads ``paths``, others
    ``validation_paths``; both are listed, since they must differ.
    """

    def __init__(self, name: str, paths: Sequence[str], validation_paths: Sequence[str], split: str, tokenizer: Tokenizer) -> None:
        self.name = name
        train, validation = expand(paths, "dataset.paths"), expand(validation_paths, "dataset.validation_paths")
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
        for file in np.flatnonzero(self._row_begins == self._begins):
            self._require_convention(int(file))

    @property
    def n_tokens(self) -> int:
        return int(self._ends[-1])

    @property
    def separated(self) -> bool:
        """Whether the tokenizer puts anything around a document, so that documents are told apart."""
        return self._bos is not None or self._eos is not None

    def digest(self, *settings: object) -> str:
        """Of the files (names, sizes, heads) and of the settings that decide what is made of them."""
        content = [(shard.path.name, shard.n_tokens, shard.dtype.str, shard.head_digest) for shard in self.shards]
        return hashlib.sha256(repr((*settings, content)).encode()).hexdigest()

    def slices(self, n_tokens: int) -> list[tuple[int, int, int]]:
        """(file, start, end) of pieces of at most so many tokens, none of them in two files."""
        return [
            (file, start, min(start + n_tokens, int(end)))
            for file, (begin, end) in enumerate(zip(self._begins, self._ends))
            for start in range(int(begin), int(end), n_tokens)
        ]

    def ids(self, start: int, end: int) -> np.ndarray:
        """(n,) int32, read-only, the tokens from ``start`` to ``end``. Raises DataError for ids that the tokenizer lacks."""
        raw = self._read(start, end)
        self._require_ids(raw, start)
        ids = raw.astype(np.int32)
        ids.flags.writeable = False
        return ids

    def read_slice(self, file: int, start: int, end: int) -> Slice:
        """The documents that begin from ``start`` to ``end``, in order; without separators the slice is one.

        Raises DataError for ids that the tokenizer lacks and documents without an end.
        """
        starts = self._starts(file, start, end) if self.separated else np.array([start])
        if not len(starts):
            return Slice(np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.int32), [], ())
        stop = self._end_after(file, int(starts[-1]), end) if self.separated else end
        first = int(starts[0])
        ids = self.ids(first, stop)
        previous = np.empty_like(ids)
        previous[1:] = ids[:-1]
        previous[starts - first] = -1
        return Slice(ids, self._count(ids, previous), [*(starts - first).tolist(), stop - first], range(len(starts)))

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


def tokens_of(paths: Sequence[str]) -> int:
    """Tokens of the shards that are named for training. Raises DataError as ``expand`` and ``open_shard`` do."""
    return sum(open_shard(path).n_tokens for path in expand(paths, "dataset.paths"))
