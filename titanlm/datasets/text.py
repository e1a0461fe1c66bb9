"""Plain UTF-8 text files: a document a file, a paragraph or a line.

Memory holds two offsets a row, and what is being read. Finding the rows takes
one scan of the files at the start (none for whole files, unless they are cut or
a fraction is held out, which hashes every document before it is cut).
"""

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from titanlm.constraints import Fraction, PositiveInt
from titanlm.datasets.documents import OnError, TextDocuments, UnreadableRow, cut, held_out, shared
from titanlm.datasets.files import Listing, Source, is_url, listed, one_line, shown
from titanlm.errors import DataError
from titanlm.registry import Component, Slot, Tokenizer, register

_HEAD_BYTES = 65536
_CHUNK_BYTES = 4 << 20
_OPEN_FILES = 64
_SEPARATOR = {"line": re.compile(rb"\r?\n"), "paragraph": re.compile(rb"\r?\n(?:[ \t]*\r?\n)+")}
_WHITE = {"line": b"\r", "paragraph": b" \t\r\n"}
"""What a separator that is not whole may begin with."""


@dataclass(frozen=True)
class TextConfig:
    """Text files, and what in them is a document."""

    paths: tuple[str, ...]
    """Files, directories (every file below, hidden ones left out) and globs (`**` crosses directories), relative to the working directory."""
    validation_paths: tuple[str, ...] = ()
    """Files for validation; all of `paths` is then for training."""
    validation_fraction: Fraction = 0.0
    """Without `validation_paths`: share of the documents held out, chosen by the sha256 of their text before it is cut, so that equal ones stay together."""
    unit: Literal["file", "paragraph", "line"] = "file"
    """What a document is; paragraphs end at blank lines."""
    max_bytes: PositiveInt = 262_144
    """Longer documents are cut into pieces of at most so many bytes, after a line's end where there is one; each piece is a document."""
    errors: Literal["strict", "replace"] = "strict"
    """At bytes that are not UTF-8: stop, or read U+FFFD."""
    shuffle: bool = True
    """Train in another order every epoch; validation always goes in order of the files."""
    filter: tuple[Annotated[Component, Slot("filter")], ...] = ()
    """What a row must pass, besides having text; rows have `text` and `place`, path and byte offset."""

    def __post_init__(self) -> None:
        if not self.paths:
            raise ValueError("paths is empty: name at least one file, directory or glob")
        if self.validation_paths and self.validation_fraction:
            raise ValueError("validation_paths and validation_fraction exclude each other: give one")


@register("dataset", "text")
def text(
    config: TextConfig, *, tokenizer: Tokenizer, split: str, stream: int, n_streams: int, seed: int, epochs: int | None = None, on_error: OnError = "raise"
) -> TextDocuments:
    """Raises DataError when a path matches nothing, a split has no rows, or text is not UTF-8."""
    for key, entries in (("dataset.paths", config.paths), ("dataset.validation_paths", config.validation_paths)):
        if (url := next(filter(is_url, entries), None)) is not None:
            remedy = "download it first, or have it as jsonl or parquet, which are read from URLs"
            raise DataError(f"{key}: {one_line(shown(url))!r} is a URL, and text is read from local files only; {remedy}")
    listing = listed(config.paths, config.validation_paths, ("",), _in_parts, split)
    # Rows depend on which files there are, not on their order or on filters.
    alone = replace(config, shuffle=True, filter=())
    rows = shared(("text", Path.cwd(), listing, alone, split), lambda: TextRows(alone, listing, split))
    return TextDocuments(
        rows,
        tokenizer=tokenizer,
        split=split,
        stream=stream,
        n_streams=n_streams,
        seed=seed,
        epochs=epochs,
        on_error=on_error,
        shuffle=config.shuffle,
        filters=config.filter,
    )


class TextRows:
    """Byte ranges of the files of one split.

    ``listing`` is passed in because it is shared, too, and what is shared
    cannot be asked for while something else that is shared is being built.
    """

    def __init__(self, config: TextConfig, listing: Listing, split: str) -> None:
        self.name = "dataset 'text'"
        self._files = files = listing.of(split, config.validation_fraction, self.name)
        self._listing = listing  # lives as long as its rows
        fraction = None if len(listing.validation) or not config.validation_fraction else config.validation_fraction
        self._config = config
        self._open = lru_cache(maxsize=_OPEN_FILES)(lambda index: (files.open(index), files.name(index)))
        self._own: list[int] = []  # files that are not empty
        digest = hashlib.sha256(repr((config.unit, config.errors, config.max_bytes, fraction, split)).encode())
        spans, counts = array("q"), []
        was_cut = False
        for index, size in enumerate(files.sizes.tolist()):
            before = len(spans)
            with closing(files.open(index)) as source:
                head = source.read_at(0, _HEAD_BYTES)
                digest.update(repr((files.path(index).name, size, hashlib.sha256(head).hexdigest())).encode())
                for start, end in _spans(source, size, config.unit):
                    if fraction is not None and held_out(self._read(source, index, start, end), fraction) == (split == "train"):
                        continue
                    if end - start > config.max_bytes:
                        was_cut = True
                        spans.extend(self._cut(source, index, start, end))
                    else:
                        spans.extend((start, end))
            files.check(index)  # not while it was searched either
            if size:
                self._own.append(index)
                counts.append((len(spans) - before) // 2)
        if was_cut and fraction is not None:
            digest.update(b"split before cutting")  # it used to be the other way round, which gives other rows
        self._spans = np.frombuffer(spans, dtype=np.int64).reshape(-1, 2) if spans else np.zeros((0, 2), dtype=np.int64)
        self._ends = np.cumsum(counts, dtype=np.int64)
        self.fingerprint = f"text: {digest.hexdigest()}"
        if not len(self._spans):
            why = "every file is empty" if not self._own else "change dataset.validation_fraction, give more text or divide it with dataset.unit"
            raise DataError(f"{self.name}: {files.key} has no rows for {split!r} in {len(files)} files: {why}")

    def __len__(self) -> int:
        return len(self._spans)

    def row(self, index: int) -> Mapping[str, Any]:
        """Raises UnreadableRow for bytes that are not UTF-8, DataError when the file is gone or was changed."""
        file = self._own[int(np.searchsorted(self._ends, index, side="right"))]
        start, end = (int(offset) for offset in self._spans[index])
        self._files.check(file)
        source, name = self._open(file)
        raw = self._read(source, file, start, end)
        try:
            decoded = raw.decode("utf-8", errors=self._config.errors)
        except UnicodeDecodeError as error:
            at = start + error.start
            raise UnreadableRow(f'{name}: byte {at} is not UTF-8 ({error.reason}); convert the file, or set dataset.errors = "replace"') from error
        # A byte order mark is no part of the text.
        return {"text": decoded.removeprefix("\ufeff") if start == 0 else decoded, "place": f"{name} byte {start}"}

    def _cut(self, source: Source, file: int, start: int, end: int) -> Iterator[int]:
        """Where the pieces of a long document begin and end, one after the other."""
        while start < end:
            # One byte more than could fit: if less than that comes, it is the end of the document.
            raw = self._read(source, file, start, min(end, start + self._config.max_bytes + 1))
            _, length = next(cut(raw, 0, len(raw), self._config.max_bytes))
            yield from (start, start + length)
            start += length

    def _read(self, source: Source, file: int, start: int, end: int) -> bytes:
        """Read, not mapped: to touch a mapped file that was truncated kills the process."""
        parts = []
        while start < end:
            parts.append(part := source.read_at(start, end - start))
            if not part:
                raise DataError(f"{self._files.name(file)} changed while it was in use: it ends at byte {start}; start again")
            start += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


def _spans(source: Source, size: int, unit: str) -> Iterator[tuple[int, int]]:
    """Where documents begin and end. Read in pieces; a separator at the end of one may go on in the next and waits for it."""
    start = 0
    if unit != "file":
        data, offset, white = b"", 0, _WHITE[unit]
        while True:
            chunk = source.read_at(offset + len(data), max(_CHUNK_BYTES, len(data)))
            data += chunk
            whole = len(data.rstrip(white)) if chunk else len(data)
            for separator in _SEPARATOR[unit].finditer(data):
                if separator.start() >= whole:
                    break
                yield start, offset + separator.start()
                start = offset + separator.end()
            if not chunk:
                break
            data, offset = data[whole:], offset + whole
    if start < size:
        yield start, size


def _in_parts(found: tuple[str, int, int, str]) -> list[str]:
    """Sorts files by the folders and the name that links lead to: `a/b` before `a-c`."""
    return found[3].split("/")
