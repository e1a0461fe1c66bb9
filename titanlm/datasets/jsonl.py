"""Lines of JSON, a document an object.

Where every file is plain and local, the lines are found by one scan at the
start and then read in any order: memory holds an offset a line, and training
is shuffled over all of them. A file that is compressed or behind a URL can
only be read from its beginning and is one shard, read line by line.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import zlib
from array import array
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from titanlm.constraints import Fraction, PositiveInt
from titanlm.datasets.documents import OnError, TextDocuments, Unreadable, UnreadableRow, columns_of, shared
from titanlm.datasets.files import Files, Listing, Source, listed, one_line
from titanlm.datasets.template import RowText
from titanlm.errors import DataError
from titanlm.registry import Component, Slot, Tokenizer, did_you_mean, register

LINE_BYTES = 256 << 20
"""Longer lines are not read: a line is in memory whole, several times over while it is parsed."""
_OPEN_FILES = 64
_CHUNK_BYTES = 4 << 20
_VISIBLE = np.ones(256, dtype=bool)
_VISIBLE[list(b" \t\r\n")] = False


@dataclass(frozen=True)
class JsonlConfig:
    """JSON Lines files, and which keys are the text."""

    paths: tuple[str, ...]
    """Files, directories (every .jsonl and .jsonl.gz below, hidden ones left out), globs (`**` crosses directories) and URLs (`hf://`, `s3://` ...)."""
    validation_paths: tuple[str, ...] = ()
    """Files for validation; all of `paths` is then for training."""
    validation_fraction: Fraction = 0.0
    """Without `validation_paths`: share of the rows held out, chosen by the sha256 of their text, so that equal rows stay together."""
    column: str = "text"
    """The key under which an object has its text."""
    template: str = ""
    """In place of `column`: a text with keys in braces, as "Question: {question}\\nAnswer: {answer}"; `{{` and `}}` are literal braces."""
    max_bytes: PositiveInt = 262_144
    """Longer rows are cut into pieces of at most so many bytes, after a line's end where there is one; each piece is a document."""
    shuffle: bool = True
    """Train in another order every epoch; validation always goes in order of the files."""
    block_rows: PositiveInt = 256
    """In files that are compressed or behind a URL: so many rows are shuffled together, and each stream holds that many."""
    filter: tuple[Annotated[Component, Slot("filter")], ...] = ()
    """What a row must pass, besides having text; rows have the object's keys, `text` and `place`, file and line."""

    def __post_init__(self) -> None:
        if not self.paths:
            raise ValueError("paths is empty: name at least one file, directory, glob or URL")
        if self.validation_paths and self.validation_fraction:
            raise ValueError("validation_paths and validation_fraction exclude each other: give one")
        RowText(self.column, self.template)


@register("dataset", "jsonl")
def jsonl(
    config: JsonlConfig, *, tokenizer: Tokenizer, split: str, stream: int, n_streams: int, seed: int, epochs: int | None = None, on_error: OnError = "raise"
) -> TextDocuments:
    """Raises DataError when a path matches nothing or all files of a split are empty."""
    listing = listed(config.paths, config.validation_paths, (".jsonl", ".jsonl.gz"), split=split)
    alone = replace(config, shuffle=True, filter=())
    # Of an object only what is asked for is kept beside the text.
    columns = columns_of(config.filter)

    def build() -> JsonlRows | JsonlShards:
        files = listing.of(split, config.validation_fraction, "dataset 'jsonl'")
        plain = all(files.is_local(index) and not _compressed(files, index) for index in range(len(files)))
        return (JsonlRows if plain else JsonlShards)(alone, listing, split, columns)

    return TextDocuments(
        shared(("jsonl", Path.cwd(), listing, alone, columns, split), build),
        tokenizer=tokenizer,
        split=split,
        stream=stream,
        n_streams=n_streams,
        seed=seed,
        epochs=epochs,
        on_error=on_error,
        shuffle=config.shuffle,
        filters=config.filter,
        block_rows=config.block_rows,
        max_bytes=config.max_bytes,
    )


class _Lines:
    """What both ways of reading share: the files of one split, and a line's row."""

    name = "dataset 'jsonl'"

    def __init__(self, config: JsonlConfig, listing: Listing, split: str, columns: tuple[str, ...] | None) -> None:
        self._files = listing.of(split, config.validation_fraction, self.name)
        self._listing = listing  # lives as long as its rows
        self._text, self._columns = RowText(config.column, config.template), columns
        self.validation_fraction = 0.0 if len(listing.validation) else config.validation_fraction
        deciding = (self._text.key, config.max_bytes, config.block_rows, self.validation_fraction, split)
        self.fingerprint = f"jsonl: {hashlib.sha256(repr((self._files.fingerprint(), deciding)).encode()).hexdigest()}"

    def _parse(self, raw: bytes, first: bool) -> dict[str, Any]:
        """The row of a line, without its place. Raises ValueError that says what is wrong with it."""
        try:
            decoded = raw.rstrip(b"\r\n").decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"byte {error.start} is not UTF-8 ({error.reason})") from None
        try:
            value = json.loads(decoded.removeprefix("\ufeff") if first else decoded)
        except json.JSONDecodeError as error:
            raise ValueError(f"no JSON: {error.msg} at character {error.pos}") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"no JSON that can be read: {one_line(str(error))[:200]}") from None
        if not isinstance(value, dict):
            raise ValueError(f"no JSON object but {_kind(value)}")
        for name in self._text.columns:
            if name not in value:
                there = ", ".join(one_line(key)[:40] for key in list(value)[:10])
                raise ValueError(f"no key {name!r}{one_line(did_you_mean(name, value))} (keys: {there or 'none'}; {self._text.setting} names it)")
            text = value[name]
            if text is not None and not isinstance(text, str):
                raise ValueError(f"{name!r} is {_kind(text)}, no string ({self._text.setting} names it)")
            if text is not None and "\\u" in decoded:
                try:
                    text.encode("utf-8")
                except UnicodeEncodeError:
                    raise ValueError(f"{name!r} has half a surrogate pair, which is no text") from None
        others = value if self._columns is None else {name: value[name] for name in self._columns if name in value}
        return {**others, "text": self._text.of([value[name] for name in self._text.columns])}


class JsonlRows(_Lines):
    """The lines of plain local files, in any order. Raises DataError when there are none."""

    def __init__(self, config: JsonlConfig, listing: Listing, split: str, columns: tuple[str, ...] | None = ()) -> None:
        super().__init__(config, listing, split, columns)
        starts, counts = array("q"), []
        self._blank: list[np.ndarray] = []
        for index in range(len(self._files)):
            before = len(starts)
            with self._files.open(index) as file:
                self._blank.append(_find_lines(file, starts))
            counts.append(len(starts) - before)
        self._starts = np.frombuffer(starts, dtype=np.int64)
        self._ends = np.cumsum(counts, dtype=np.int64)
        self._open = lru_cache(maxsize=_OPEN_FILES)(self._files.open)
        if not len(self):
            raise DataError(f"{self.name}: {self._files.key} has no rows: all {len(self._files)} files are empty")

    def __len__(self) -> int:
        return len(self._starts)

    def row(self, index: int) -> Mapping[str, Any]:
        """Raises UnreadableRow for a line without a text, DataError when its file is gone or was changed."""
        file = int(np.searchsorted(self._ends, index, side="right"))
        start = int(self._starts[index])
        end = int(self._starts[index + 1] if index + 1 < self._ends[file] else self._files.sizes[file])
        number = index - (int(self._ends[file - 1]) if file else 0)
        # Blank lines are no rows, but an editor counts them.
        place = f"{self._files.name(file)} line {number + 1 + int(np.searchsorted(self._blank[file], number, side='right'))}"
        self._files.check(file)
        if end - start > LINE_BYTES:
            raise UnreadableRow(f"{place}: longer than {LINE_BYTES >> 20} MiB")
        raw = self._open(file).read_at(start, end - start)
        try:
            return {**self._parse(raw, start == 0), "place": place}
        except ValueError as error:
            raise UnreadableRow(f"{place}: {error}") from None


class JsonlShards(_Lines):
    """Files that are read from their beginning, each a shard."""

    n_rows: int | None = None

    def __init__(self, config: JsonlConfig, listing: Listing, split: str, columns: tuple[str, ...] | None = ()) -> None:
        super().__init__(config, listing, split, columns)
        if not self._files.sizes.any():
            raise DataError(f"{self.name}: {self._files.key} has no rows: all {len(self._files)} files are empty")

    def __len__(self) -> int:
        return len(self._files)

    def read(self, shard: int, start: int) -> Iterator[Mapping[str, Any] | Unreadable]:
        """The rows from ``start`` on; ``Unreadable`` for a bad line, and for what follows where decompressing fails.

        Raises DataError when the file is gone, was changed or cannot be fetched.
        """
        name = self._files.name(shard)
        number = row = 0
        with closing(self._files.open(shard)) as source:
            lines = io.BufferedReader(gzip.GzipFile(fileobj=source) if _compressed(self._files, shard) else source, 1 << 16)  # type: ignore[arg-type, type-var]
            while True:
                try:
                    raw = lines.readline(LINE_BYTES + 1)
                    too_long = len(raw) > LINE_BYTES
                    while len(raw) > LINE_BYTES and not raw.endswith(b"\n"):
                        raw = lines.readline(LINE_BYTES + 1)
                except (OSError, EOFError, zlib.error) as error:
                    if source.error is not None:
                        raise source.error from None
                    self._files.check(shard)
                    if row >= start:
                        yield Unreadable(1, f"{name}: cannot be decompressed behind line {number} ({one_line(str(error))[:200]})")
                    return
                if not raw:
                    return
                number += 1
                if not too_long and not raw.strip():
                    continue
                row += 1
                if row <= start:
                    continue
                place = f"{name} line {number}"
                if too_long:
                    yield Unreadable(1, f"{place}: longer than {LINE_BYTES >> 20} MiB")
                    continue
                try:
                    parsed = self._parse(raw, number == 1)
                except ValueError as error:
                    yield Unreadable(1, f"{place}: {error}")
                else:
                    yield {**parsed, "place": place}


def _find_lines(file: Source, starts: array[int]) -> np.ndarray:
    """Append where the lines begin that are not blank; return, for each blank one, how many others precede it."""
    blank: list[np.ndarray] = []
    n_lines = 0  # of the others
    begin, visible = 0, False  # of the line that the last chunk ended in
    offset = 0
    while chunk := file.read(_CHUNK_BYTES):
        data = np.frombuffer(chunk, dtype=np.uint8)
        ends = np.flatnonzero(data == 10)
        firsts = np.concatenate(([0], ends + 1))
        is_open = firsts[-1] < len(data)
        firsts = firsts if is_open else firsts[:-1]
        kept = np.logical_or.reduceat(_VISIBLE[data], firsts)
        begins = firsts + offset
        begins[0], kept[0] = begin, kept[0] | visible
        offset += len(data)
        done = len(ends)
        starts.extend(begins[:done][kept[:done]].tolist())
        blank.append(n_lines + np.cumsum(kept[:done])[~kept[:done]])
        n_lines += int(kept[:done].sum())
        begin, visible = (int(begins[-1]), bool(kept[-1])) if is_open else (offset, False)
    if visible:
        starts.append(begin)
    return np.concatenate(blank) if blank else np.zeros(0, dtype=np.int64)


def _compressed(files: Files, index: int) -> bool:
    return files.base(index).endswith(".gz")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "null")
