"""Texts that tokenizers are trained on and compared with."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from titanlm.datasets.files import is_url, one_line, shown
from titanlm.datasets.opening import kind_of, remedy_for
from titanlm.errors import DataError, TitanError
from titanlm.registry import Component

_UNCUT = 1 << 62
"""Bytes of a document, so that none is cut."""


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
        plain = [path for path in inputs if kind_of(path) in (None, "text") and not remedy_for(path)]
        for path in inputs:
            if path not in plain:
                yield from documents(path, column)
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


def documents(path: str | Path, column: str = "text") -> Iterator[str]:
    """The texts of a file, uncut: rows of a .parquet, lines of a .jsonl or .jsonl.gz, the whole of any other; none for those without visible text.

    Raises DataError when the file or its column cannot be read, TitanError for
    a file that has no texts.
    """
    name = str(path)
    kind = kind_of(name.partition("?")[0] if is_url(name) else name)
    if (remedy := remedy_for(name)) and kind is None:
        raise DataError(f"{one_line(shown(name))}: is compressed; {remedy}")
    if kind == "token_shards":
        raise DataError(f"{one_line(shown(name))}: has tokens and no texts; texts come from .parquet, .jsonl and UTF-8 files")
    settings = {"column": column} if kind in ("parquet", "jsonl") else {}
    try:
        yield from dataset_texts(Component.named("dataset", kind or "text", paths=(name,), max_bytes=_UNCUT, **settings))
    except DataError as error:
        if "dataset.column" in str(error):
            raise DataError(f"{error} (here by --column)") from error
        raise


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
