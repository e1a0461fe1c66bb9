"""Texts that tokenizers are trained on and compared with."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from titanlm.errors import DataError, TitanError
from titanlm.registry import Component


def training_texts(config: Path | None, overrides: Sequence[str], inputs: Sequence[str] | None, column: str = "text") -> Iterator[str]:
    """The texts a tokenizer is trained on: of a config's training split, of files, or of the embedded default.

    Raises TitanError for overrides without a config and for a dataset that has
    no texts, DataError for a file that cannot be read.
    """
    if overrides and config is None:
        raise TitanError(f"{overrides[0]}: overrides change the config of --config FILE, which is not given")
    if config is not None:
        from titanlm.config import load

        datasets = [source.dataset for source in load(config, overrides).sources]
    elif inputs:
        plain = [path for path in inputs if Path(path).suffix not in (".parquet", ".jsonl")]
        for path in inputs:
            if path not in plain:
                yield from documents(Path(path), column)
        datasets = [Component.named("dataset", "text", paths=tuple(plain))] if plain else []
    else:
        datasets = [Component.named("dataset", "python_stdlib")]
    for dataset in datasets:
        yield from dataset_texts(dataset)


def dataset_texts(dataset: Component) -> Iterator[str]:
    """The texts of a dataset's training split, once.

    Raises TitanError when it gives none.
    """
    # Texts are read before any tokenizer; bytes stand in for the one that is being made.
    runtime: dict[str, Any] = {"split": "train", "stream": 0, "n_streams": 1, "seed": 0, "epochs": 1, "on_error": "raise"}
    rows = dataset.build(tokenizer=Component.named("tokenizer", "byte").build(), **runtime)
    if not hasattr(rows, "texts"):
        raise TitanError(f"dataset {dataset.name!r} gives no texts (it has no `texts` method), so no tokenizer can be trained on it")
    return iter(rows.texts())


def documents(path: Path, column: str = "text") -> Iterator[str]:
    """The texts of a file: rows of a .parquet, lines of a .jsonl, the whole of any other.

    Raises DataError when the file or its column cannot be read.
    """
    try:
        if path.suffix == ".parquet":
            yield from _parquet(path, column)
        elif path.suffix == ".jsonl":
            yield from _jsonl(path, column)
        else:
            yield path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}; texts come from .parquet, .jsonl and UTF-8 files") from error


def _parquet(path: Path, column: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if column not in file.schema_arrow.names:
                raise DataError(f"{path}: no column {column!r} (there: {', '.join(file.schema_arrow.names)}); name one with --column")
            for batch in file.iter_batches(256, columns=[column]):
                yield from (text for text in batch[0].to_pylist() if isinstance(text, str))
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path}: no parquet file or a damaged one ({error})") from error


def _jsonl(path: Path, column: str) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}, line {number}: no JSON ({error})") from error
            if not isinstance(row, dict) or not isinstance(row.get(column), str):
                raise DataError(f"{path}, line {number}: no text {column!r} in it; name the key with --column")
            yield row[column]


def counted(texts: Iterable[str]) -> Iterator[str]:
    """The same texts, with a live count on a terminal."""
    live = sys.stderr.isatty()
    n_texts = n_bytes = 0
    for text in texts:
        n_texts, n_bytes = n_texts + 1, n_bytes + len(text)
        if live and n_texts % 100 == 0:
            print(f"\rreading: {n_texts:,} texts, {n_bytes / 1e6:.1f} MB", end="", file=sys.stderr, flush=True)
        yield text
    print(f"{chr(13) if live else ''}read {n_texts:,} texts, {n_bytes / 1e6:.1f} MB; training", file=sys.stderr, flush=True)
