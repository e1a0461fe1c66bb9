"""Plain UTF-8 text files: a document a file, a paragraph or a line.

Files are mapped, not read: memory holds two offsets a row. Finding the rows
takes one scan of the files at the start (none for whole files, unless a
fraction is held out, which hashes every row).
"""

from __future__ import annotations

import glob
import hashlib
import mmap
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from titanlm.constraints import Fraction, PositiveInt
from titanlm.datasets.documents import OnError, TextDocuments, UnreadableRow, cut, held_out, shared
from titanlm.errors import DataError
from titanlm.registry import Component, Slot, Tokenizer, register

_HEAD_BYTES = 65536
_OPEN_FILES = 64
_SEPARATOR = {"line": re.compile(rb"\r?\n"), "paragraph": re.compile(rb"\r?\n(?:[ \t]*\r?\n)+")}


@dataclass(frozen=True)
class TextConfig:
    """Text files, and what in them is a document."""

    paths: tuple[str, ...]
    """Files, directories (every file below, hidden ones left out) and globs (`**` crosses directories), relative to the working directory."""
    validation_paths: tuple[str, ...] = ()
    """Files for validation; all of `paths` is then for training."""
    validation_fraction: Fraction = 0.0
    """Without `validation_paths`: share of the rows held out, chosen by the sha256 of their text, so that equal rows stay together."""
    unit: Literal["file", "paragraph", "line"] = "file"
    """What a document is; paragraphs end at blank lines."""
    max_bytes: PositiveInt = 262_144
    """Longer documents are cut into pieces of at most so many bytes, after a line's end where there is one; each piece is a document."""
    errors: Literal["strict", "replace"] = "strict"
    """At bytes that are not UTF-8: stop, or read U+FFFD."""
    shuffle: bool = True
    """Train in another order every epoch; validation always goes in order of the files."""
    filter: tuple[Annotated[Component, Slot("filter")], ...] = ()
    """What a row must pass, besides having text; rows have `text` and `source`, path and byte offset."""

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
    # Listings depend on which files there are, not on their order or on filters.
    listing = replace(config, shuffle=True, filter=())
    rows = shared(("text", Path.cwd(), listing, split), lambda: TextRows(listing, split))
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
    """Byte ranges of the files of one split."""

    def __init__(self, config: TextConfig, split: str) -> None:
        self.name = "dataset 'text'"
        train, validation = _expand(config.paths, "dataset.paths"), _expand(config.validation_paths, "dataset.validation_paths")
        if both := set(train) & set(validation):
            raise DataError(f"{self.name}: {min(both)} is in dataset.paths and in dataset.validation_paths; a file can be in one only")
        if split != "train" and not (validation or config.validation_fraction):
            raise DataError(f"{self.name}: there is no validation data; set dataset.validation_paths or dataset.validation_fraction")
        own = validation if split != "train" and validation else train
        fraction = None if validation or not config.validation_fraction else config.validation_fraction
        self._config = config
        self._map = lru_cache(maxsize=_OPEN_FILES)(_map)
        self._files: list[tuple[Path, int]] = []
        digest = hashlib.sha256(repr((config.unit, config.errors, config.max_bytes, fraction, split)).encode())
        spans, counts = array("q"), []
        for path in own:
            with open(path, "rb") as file:
                head = file.read(_HEAD_BYTES)
            size = path.stat().st_size
            digest.update(repr((path.name, size, hashlib.sha256(head).hexdigest())).encode())
            if not size:
                continue
            before = len(spans)
            if config.unit == "file" and fraction is None and size <= config.max_bytes:
                spans.extend((0, size))
            else:
                data = _map(path, size)
                for start, end in _pieces(data, _spans(data, config.unit), config.max_bytes):
                    if fraction is None or held_out(data[start:end], fraction) == (split != "train"):
                        spans.extend((start, end))
            self._files.append((path, size))
            counts.append((len(spans) - before) // 2)
        self._spans = np.frombuffer(spans, dtype=np.int64).reshape(-1, 2) if spans else np.zeros((0, 2), dtype=np.int64)
        self._ends = np.cumsum(counts, dtype=np.int64)
        self.fingerprint = f"text: {digest.hexdigest()}"
        if not len(self._spans):
            key = "dataset.validation_paths" if own is validation else "dataset.paths"
            why = "every file is empty" if fraction is None else "change dataset.validation_fraction or give more text"
            raise DataError(f"{self.name}: {key} has no rows for {split!r} in {len(own)} files: {why}")

    def __len__(self) -> int:
        return len(self._spans)

    def row(self, index: int) -> Mapping[str, Any]:
        path, size = self._files[int(np.searchsorted(self._ends, index, side="right"))]
        start, end = (int(offset) for offset in self._spans[index])
        raw = self._map(path, size)[start:end]
        try:
            decoded = raw.decode("utf-8", errors=self._config.errors)
        except UnicodeDecodeError as error:
            at = start + error.start
            raise UnreadableRow(f'{path}: byte {at} is not UTF-8 ({error.reason}); convert the file, or set dataset.errors = "replace"') from error
        # A byte order mark is no part of the text.
        return {"text": decoded.removeprefix("\ufeff") if start == 0 else decoded, "source": f"{path} byte {start}"}


def _map(path: Path, size: int) -> mmap.mmap:
    with open(path, "rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if len(data) != size:
        raise DataError(f"{path} changed while it was in use: {len(data)} bytes, {size} when it was indexed; start again")
    return data


def _spans(data: mmap.mmap, unit: str) -> Iterator[tuple[int, int]]:
    start = 0
    if unit != "file":
        for separator in _SEPARATOR[unit].finditer(data):
            yield start, separator.start()
            start = separator.end()
    if start < len(data):
        yield start, len(data)


def _pieces(data: mmap.mmap, spans: Iterable[tuple[int, int]], max_bytes: int) -> Iterator[tuple[int, int]]:
    for start, end in spans:
        yield from cut(data, start, end, max_bytes)


def _expand(entries: tuple[str, ...], key: str) -> list[Path]:
    """The files that the entries name, in their order and sorted within each, every file once."""
    found: dict[Path, None] = {}
    for entry in entries:
        path = Path(entry).expanduser()
        below: Iterable[Path]
        if path.is_dir():
            below = (one for one in path.rglob("*") if not any(part.startswith(".") for part in one.relative_to(path).parts))
        elif path.exists():
            below = [path]
        else:
            below = (Path(name) for name in glob.glob(str(path), recursive=True))
        files = sorted(one.resolve() for one in below if one.is_file())
        if not files:
            base = f"relative paths start at {Path.cwd()}"
            raise DataError(f"{key}: {entry!r} is no file, no directory with files and no glob that matches any ({base})")
        found.update(dict.fromkeys(files))
    return list(found)
