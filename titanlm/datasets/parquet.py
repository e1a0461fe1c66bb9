"""Parquet files with columns of text.

A shard, the unit that order and streams deal in, is a file when there is one
for every stream, and then no footer is read before its turn: hundreds of
thousands of files start in seconds. With fewer files it is a row group, and
with fewer of those than streams a range of rows of one.

Reading is row by row in effect: a row group is decoded in small batches, whose
size follows from the file alone. So neither a file nor a row group is ever in
memory, and what cannot be decoded begins at the same row whoever reads it and
wherever it resumes. The price: a range inside a row group is reached by
decoding what lies before it, so a single huge row group is decoded by every
stream; write row groups of some thousand rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from titanlm.constraints import Fraction, PositiveInt
from titanlm.datasets.documents import OnError, TextDocuments, Unreadable, columns_of, shared
from titanlm.datasets.files import Listing, Source, listed, one_line
from titanlm.datasets.template import RowText
from titanlm.errors import DataError
from titanlm.registry import Component, Slot, Tokenizer, did_you_mean, register

_BATCH_BYTES = 1 << 20
_BATCH_ROWS = 128
"""A batch has at most so many rows, and on average so many bytes: one row can be large."""
_LARGE_BYTES = 16 << 20
"""After a batch of so many bytes Arrow is told to give back what it keeps for the next."""
_COMPUTED = ("n_tokens", "place", "text")
"""Columns that every row has whether the file does or not."""


@dataclass(frozen=True)
class ParquetConfig:
    """Parquet files, and which columns are the text."""

    paths: tuple[str, ...]
    """Files, directories (every .parquet below, hidden ones left out), globs (`**` crosses directories) and URLs (`hf://`, `s3://`, `https://` ...)."""
    validation_paths: tuple[str, ...] = ()
    """Files for validation; all of `paths` is then for training."""
    validation_fraction: Fraction = 0.0
    """Without `validation_paths`: share of the rows held out, chosen by the sha256 of their text, so that equal rows stay together."""
    column: str = "text"
    """Where a row has its text; a column of strings."""
    template: str = ""
    """In place of `column`: a text with columns of strings in braces, as "Question: {question}\\nAnswer: {answer}"; `{{` and `}}` are literal braces."""
    max_bytes: PositiveInt = 262_144
    """Longer rows are cut into pieces of at most so many bytes, after a line's end where there is one; each piece is a document."""
    shuffle: bool = True
    """Train on the shards in another order every epoch, and on the rows of each block in another order; validation always goes in order of the files."""
    block_rows: PositiveInt = 256
    """So many rows of a shard are shuffled together; each stream holds that many."""
    filter: tuple[Annotated[Component, Slot("filter")], ...] = ()
    """What a row must pass, besides having text; rows have the file's columns, `text` and `place`, file and row."""

    def __post_init__(self) -> None:
        if not self.paths:
            raise ValueError("paths is empty: name at least one file, directory, glob or URL")
        if self.validation_paths and self.validation_fraction:
            raise ValueError("validation_paths and validation_fraction exclude each other: give one")
        RowText(self.column, self.template)


@register("dataset", "parquet")
def parquet(
    config: ParquetConfig, *, tokenizer: Tokenizer, split: str, stream: int, n_streams: int, seed: int, epochs: int | None = None, on_error: OnError = "raise"
) -> TextDocuments:
    """Raises DataError when a path matches nothing, a split has no rows, or a file has no such column of strings."""
    files = listed(config.paths, config.validation_paths, (".parquet",), split=split)
    # Shards do not depend on their order, nor on filters beyond the columns that these read.
    columns = columns_of(config.filter)
    alone = replace(config, shuffle=True, filter=())
    shards = shared(("parquet", Path.cwd(), files, alone, columns, split, n_streams), lambda: ParquetShards(alone, files, split, n_streams, columns))
    return TextDocuments(
        shards,
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


class _Part(NamedTuple):
    """Rows ``start`` to ``end`` of a row group; of a file that cannot be read the group is −1."""

    file: int
    group: int
    start: int
    end: int


class ParquetShards:
    """Files, row groups or ranges of rows of one split.

    ``columns`` are those that are read beside the text, None for all of them.
    Nothing stays open, so processes may fork after this.
    Raises DataError when there are no rows, if footers had to be read.
    """

    name = "dataset 'parquet'"

    def __init__(self, config: ParquetConfig, listing: Listing, split: str, n_streams: int, columns: Sequence[str] | None = ()) -> None:
        self._files = listing.of(split, config.validation_fraction, self.name)
        self._listing = listing  # lives as long as its shards
        self._text, self._columns = RowText(config.column, config.template), columns
        self.validation_fraction = 0.0 if len(listing.validation) else config.validation_fraction
        self.n_rows: int | None = None
        self._parts: list[_Part] | None = None
        unit: tuple[Any, ...] = ("files",)
        if len(self._files) < n_streams:
            groups = [part for file in range(len(self._files)) for part in self._groups(file)]
            n_rows = sum(part.end for part in groups)
            if not groups:
                raise DataError(f"{self.name}: {self._files.key} has no rows: all {len(self._files)} files are empty")
            if len(groups) >= n_streams or not n_rows:
                self._parts, unit = groups, ("groups",)
            else:
                self._parts, unit = [piece for part in groups for piece in _cut(part, max(1, n_rows // n_streams))], ("rows", n_streams)
            if not self.validation_fraction:
                self.n_rows = n_rows
        deciding = (self._text.key, config.max_bytes, config.block_rows, self.validation_fraction, split, unit)
        self.fingerprint = f"parquet: {hashlib.sha256(repr((self._files.fingerprint(), deciding)).encode()).hexdigest()}"

    def __len__(self) -> int:
        return len(self._files) if self._parts is None else len(self._parts)

    def place(self, files: int, rows: int, rows_per_file: int) -> tuple[int, int]:
        """Shard and row behind so many files of so many rows, and so many rows more."""
        if self._parts is None:
            return files, rows
        left = files * rows_per_file + rows
        for shard, part in enumerate(self._parts):
            if left < part.end - part.start:
                return shard, left
            left -= part.end - part.start
        return len(self._parts), 0

    def read(self, shard: int, start: int) -> Iterator[Mapping[str, Any] | Unreadable]:
        """The rows from ``start`` on; ``Unreadable`` for the rest of a row group that is damaged, and for a whole file that is.

        Raises DataError when a file is gone or was changed, has no such column, or cannot be fetched.
        """
        part = _Part(shard, -1, 0, 0) if self._parts is None else self._parts[shard]
        opened = self._open(part.file)
        if isinstance(opened, Unreadable):
            if start == 0:
                yield opened
            return
        with opened:
            if part.group >= 0:
                yield from opened.rows(part.group, part.start + start, part.end)
                return
            for group in range(opened.n_groups):
                n_rows = opened.n_rows(group)
                if start < n_rows:
                    yield from opened.rows(group, start, n_rows)
                start = max(0, start - n_rows)

    def _open(self, index: int) -> _File | Unreadable:
        source = self._files.open(index)
        try:
            return _File(source, self._files.name(index), self._text, self._columns, lambda: self._files.check(index))
        except _Damaged as error:
            source.close()
            return Unreadable(1, str(error))
        except BaseException:
            source.close()
            raise

    def _groups(self, index: int) -> list[_Part]:
        opened = self._open(index)
        if isinstance(opened, Unreadable):
            return [_Part(index, -1, 0, 0)]
        with opened:
            counts = [opened.n_rows(group) for group in range(opened.n_groups)]
        return [_Part(index, group, 0, n_rows) for group, n_rows in enumerate(counts) if n_rows]


class _Damaged(Exception):
    """What is no parquet file, or no longer."""


class _File:
    """An open file."""

    def __init__(self, source: Source, name: str, text: RowText, columns: Sequence[str] | None, check: Any) -> None:
        from pyarrow.parquet import ParquetFile

        self._source, self._name, self._text, self._columns, self._check = source, name, text, columns, check
        try:
            self._file = ParquetFile(source, buffer_size=1 << 20, pre_buffer=False, memory_map=False, page_checksum_verification=True)
            schema = self._file.schema_arrow
            self._leaves = [self._file.schema.column(leaf).path.split(".")[0] for leaf in range(len(self._file.schema))]
            self.n_groups = self._file.num_row_groups
        except (OSError, ValueError, NotImplementedError) as error:  # ArrowException's subclasses are one of these
            raise self._failure(error, "is no readable parquet file") from error
        self._wanted = self._select(schema)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close(force=True)
        self._source.close()

    def n_rows(self, group: int) -> int:
        return max(0, int(self._file.metadata.row_group(group).num_rows))

    def rows(self, group: int, start: int, end: int) -> Iterator[Mapping[str, Any] | Unreadable]:
        """Rows of a row group; numbers count from its beginning."""
        if start >= end:
            return
        self._check()
        place = f"{self._name} row group {group}"
        # From the group's beginning, wherever `start` is: batches, and so what a damaged page takes along, are always the same.
        batches = self._file.iter_batches(batch_size=self._batch_rows(group), row_groups=[group], columns=self._wanted, use_threads=False)
        at = 0
        while at < end:
            try:
                batch = next(batches, None)
                if batch is not None and at + batch.num_rows > start:
                    texts, others = self._decoded(batch, f"{place} row", at)
            except (OSError, ValueError, NotImplementedError) as error:
                yield Unreadable(end - max(at, start), str(self._failure(error, f"row group {group} is damaged from row {at} on")))
                return
            if batch is None:
                yield Unreadable(end - max(at, start), f"{place} ends after {at} rows, before the {self.n_rows(group)} that the file promises")
                return
            n_rows = batch.num_rows
            is_large = batch.nbytes > _LARGE_BYTES
            batch = None  # what is handed out is not held here: one text may be large
            if is_large:
                _release()
            for row in range(max(start - at, 0), min(n_rows, end - at)):
                yield _row(texts, others, row, f"{place} row {at + row}")
            at += n_rows
            if at < end:
                self._check()

    def _batch_rows(self, group: int) -> int:
        metadata = self._file.metadata.row_group(group)
        leaves = range(min(len(self._leaves), metadata.num_columns))
        n_bytes = sum(metadata.column(leaf).total_uncompressed_size for leaf in leaves if self._wanted is None or self._leaves[leaf] in self._wanted)
        return max(1, min(_BATCH_ROWS, _BATCH_BYTES * max(1, metadata.num_rows) // max(1, n_bytes)))

    def _decoded(self, batch: Any, place: str, first: int) -> tuple[list[str | Unreadable | None], dict[str, list[Any]]]:
        parts = {name: _texts(batch.column(name), name, place, first) for name in self._text.columns}
        names = [name for name in batch.schema.names if name not in parts or (name != "text" and (self._columns is None or name in self._columns))]
        others = {name: parts[name] if name in parts else batch.column(name).to_pylist() for name in names}
        return self._text.of_columns(list(parts.values())), others

    def _failure(self, error: Exception, what: str) -> Exception:
        """What to say of an error while reading: of a file that went away or a failed read DataError, or else that the content is damaged."""
        if self._source.error is not None:
            raise self._source.error from None
        self._check()
        return _Damaged(f"{self._name}: {what} ({one_line(' '.join(str(error).split()))[:300]})")

    def _select(self, schema: Any) -> list[str] | None:
        """Names of the columns to read, None for all. Raises DataError when one is missing or the text is no text."""
        there, of_text = schema.names, self._text.columns
        for name in (*of_text, *(self._columns or ())):
            if name not in there and (name in of_text or name not in _COMPUTED):
                setting = f"set {self._text.setting}" if name in of_text else "a filter asks for it"
                listing = ", ".join(map(one_line, there[:20])) + (", …" if len(there) > 20 else "")
                raise DataError(f"{self._name} has no column {name!r}{one_line(did_you_mean(name, there))} (columns: {listing or 'none'}); {setting}")
        for name in of_text:
            if there.count(name) > 1:
                raise DataError(f"{self._name} has {there.count(name)} columns {name!r}; rename all but one")
            kind = schema.field(name).type
            if not _is_text(kind):
                raise DataError(f"{self._name}: column {name!r} is of type {one_line(str(kind))}, not string; set {self._text.setting} or convert the file")
        return None if self._columns is None else list(dict.fromkeys([*of_text, *(name for name in self._columns if name in there)]))


def _release() -> None:
    from pyarrow import default_memory_pool

    default_memory_pool().release_unused()


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    # A column of nulls alone has no other type when it is written by pandas.
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind) or types.is_null(kind)


def _row(texts: list[str | Unreadable | None], others: Mapping[str, Sequence[Any]], row: int, place: str) -> dict[str, Any] | Unreadable:
    text = texts[row]
    found = text if isinstance(text, Unreadable) else {**{name: values[row] for name, values in others.items()}, "text": text, "place": place}
    texts[row] = None  # last: without a template the column is among the others too if a filter names it
    return found


def _texts(column: Any, name: str, place: str, first: int) -> list[str | Unreadable | None]:
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_text(scalar, name, f"{place} {row}") for row, scalar in enumerate(column, first)]


def _text(scalar: Any, name: str, place: str) -> str | Unreadable | None:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return Unreadable(1, f"{place}: byte {error.start} of the text is not UTF-8 ({error.reason}) in column {name!r}")


def _cut(part: _Part, n_rows: int) -> list[_Part]:
    """The part in pieces of nearly equal size, at most ``n_rows`` each."""
    if part.group < 0:
        return [part]
    n_pieces = -(-part.end // n_rows)
    edges = [part.end * piece // n_pieces for piece in range(n_pieces + 1)]
    return [_Part(part.file, part.group, start, end) for start, end in zip(edges, edges[1:])]
