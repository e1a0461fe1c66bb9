"""Datasets out of what a user names on the command line, read once, in order."""

from __future__ import annotations

import dataclasses
import glob
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titanlm.batch import Document
from titanlm.config import FILE_DATASETS, RunConfig, load
from titanlm.datasets.remote import is_url, shown
from titanlm.datasets.shard_file import SIDECAR
from titanlm.errors import TitanError
from titanlm.registry import Component, Dataset, Tokenizer, lookup
from titanlm.tokenizers.opening import open_tokenizer

_COMPRESSED = (".gz", ".zst", ".xz", ".bz2", ".zip")


@dataclass(frozen=True)
class Target:
    """One dataset to look at."""

    label: str
    validation: bool
    """Whether it is a validation set of a config; files are not."""
    dataset: Component
    split: str
    tokenizer: Tokenizer | None
    """None: only text is looked at."""


@dataclass(frozen=True)
class Piece:
    """A document as it is met."""

    source: str
    text: str | None
    """None where the data has only tokens."""
    tokenise: Callable[[], Document]
    """Raises DataError for a text that cannot be tokenised."""


class Reading:
    """One pass over a target, or its first ``max_rows`` rows.

    Raises DataError when the data cannot be opened, TitanError when it knows
    no end and ``max_rows`` is None.
    """

    def __init__(self, target: Target, max_rows: int | None = None) -> None:
        component = target.dataset
        if component.name == "token_spans":  # what documents there are, not how training cuts them
            component = Component.named("dataset", "token_shards", paths=component.config.paths, validation_paths=component.config.validation_paths)
        if any(field.name == "shuffle" for field in dataclasses.fields(component.config)):
            component = dataclasses.replace(component, config=dataclasses.replace(component.config, shuffle=False))
        # Without a tokenizer bytes stand in for it: text is read before any is asked.
        runtime: dict[str, Any] = {"tokenizer": target.tokenizer or Component.named("tokenizer", "byte").build(), "split": target.split, "seed": 0}
        self.dataset: Dataset = component.build(stream=0, n_streams=1, epochs=1, on_error="skip", **runtime)
        self.n_rows: int | None = getattr(self.dataset, "n_rows", None)
        """Rows of one pass, where that is known."""
        endless = target.split == "train" and "epochs" not in lookup("dataset", component.name).runtime
        if endless and max_rows is None and self.n_rows is None:
            why = f"dataset {component.name!r} knows no end (its factory does not ask for `epochs`)"
            raise TitanError(f"{target.label}: {why}; say how much to read with --rows")
        self._max_rows = self.n_rows if endless and max_rows is None else max_rows
        self._n_documents = 0
        self.stopped = False
        """Whether there may be more than was read."""

    def __iter__(self) -> Iterator[Piece]:
        while self._max_rows is None or self.rows < self._max_rows:
            piece = self._next()
            if piece is None:
                return
            self._n_documents += 1
            yield piece
        self.stopped = self.rows != self.n_rows

    @property
    def counts(self) -> dict[str, int]:
        """What became of the rows so far: documents, empty, filtered, unreadable; of data that does not count, documents alone."""
        return dict(self.dataset.state().get("counts", {"documents": self._n_documents}))

    @property
    def rows(self) -> int:
        """Rows so far; a long one that is cut counts for each of its pieces."""
        return sum(self.counts.values())

    def _next(self) -> Piece | None:
        if hasattr(self.dataset, "next_text"):
            try:
                item, document_id = self.dataset.next_text()
            except StopIteration:
                return None
            return Piece(str(item.get("place", "")), item["text"], lambda: self.dataset.tokenise(item, document_id))  # type: ignore[attr-defined]
        document = next(self.dataset, None)
        return None if document is None else Piece(f"document {document.document_id}", None, lambda: document)


def open_targets(word: str, *, tokenizer: str | None = None, column: str | None = None, overrides: Sequence[str] = ()) -> list[Target]:
    """What ``word`` names: the sources and validation sets of a config (.toml), or files, by kind.

    ``tokenizer`` is a tokenizer as the tokenizer commands take it, in place of
    the config's; ``column`` is that of parquet and jsonl files.

    Raises TitanError when it names nothing that can be read as data.
    """
    named = None if tokenizer is None else open_tokenizer(tokenizer)[1]
    if word.endswith(".toml"):
        config = load(Path(word), overrides)
        return _of_config(word, config, named or config.tokenizer.build())
    return _of_files(word, named, column)


def _of_config(word: str, config: RunConfig, tokenizer: Tokenizer) -> list[Target]:
    targets = [Target(f"{word} source {source.label}", False, source.dataset, "train", tokenizer) for source in config.sources]
    for entry in config.validation:
        label, split = f"{word} validation {entry.name}", entry.split
        if entry.file is not None:
            targets += [dataclasses.replace(target, label=label, validation=True) for target in _of_files(entry.file, tokenizer, None)]
        elif entry.dataset is not None:
            targets.append(Target(label, True, entry.dataset, split, tokenizer))
        else:  # the run's own data
            several = len(config.sources) > 1
            targets += [Target(f"{label} of {one.label}" if several else label, True, one.dataset, split, tokenizer) for one in config.sources]
    return targets


def _of_files(word: str, tokenizer: Tokenizer | None, column: str | None) -> list[Target]:
    kinds: dict[str, list[str]] = {}
    for file in files_of(word):
        if kind := kind_of(file.partition("?")[0] if is_url(file) else file):
            kinds.setdefault(kind, []).append(file)
    label = shown(word)
    if not kinds:
        remedy = remedy_for(word) or "give a file, a folder, a glob or a config (.toml)"
        raise TitanError(f"{label}: names no file that titanlm reads ({', '.join(FILE_DATASETS)}); {remedy}")
    return [
        Target(label if len(kinds) == 1 else f"{label} ({kind})", False, _dataset(kind, tuple(files), column), "train", tokenizer)
        for kind, files in kinds.items()
    ]  # fmt: skip


def files_of(word: str) -> list[str]:
    """The files that a file's name, a folder or a glob stands for, sorted; a URL stands for itself."""
    path = Path(word).expanduser()
    if is_url(word) or path.is_file():
        return [word if is_url(word) else str(path)]
    if path.is_dir():
        below = [one for one in path.rglob("*") if not any(part.startswith(".") for part in one.relative_to(path).parts)]
    else:
        below = [Path(name) for name in glob.glob(str(path), recursive=True)]
    return [str(one) for one in sorted(below) if one.is_file() and SIDECAR not in one.name]


def kind_of(name: str) -> str | None:
    """The dataset that reads a file, by how its name ends; None when none does. Of compressed files those are .jsonl.gz."""
    return next((kind for end, kind in FILE_DATASETS.items() if name.endswith(end)), None)


def remedy_for(name: str) -> str | None:
    """What to do about a file that is not read because it is compressed; None for others."""
    return "decompress it first (of compressed files only .jsonl.gz is read)" if name.endswith(_COMPRESSED) else None


def _dataset(kind: str, paths: tuple[str, ...], column: str | None) -> Component:
    settings = {field.name for field in dataclasses.fields(lookup("dataset", kind).settings)}
    return Component.named("dataset", kind, paths=paths, **({"column": column} if column and "column" in settings else {}))
