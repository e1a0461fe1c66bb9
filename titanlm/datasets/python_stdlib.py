"""The embedded default: source text of the running Python's standard library.

Nothing is downloaded and nothing is shipped, so a first run works anywhere.
The text differs from one Python to the next; the fingerprint says which it
was, and no golden number may depend on it.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
import tokenize
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

from titanlm.constraints import Fraction, PositiveInt
from titanlm.datasets.documents import OnError, TextDocuments, UnreadableRow, held_out, shared
from titanlm.errors import DataError
from titanlm.registry import Component, Slot, Tokenizer, register

# Tests hold files that are broken on purpose, in encoding too; installed packages are not the library.
_EXCLUDED = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})
_HEAD_BYTES = 4096


@dataclass(frozen=True)
class PythonStdlibConfig:
    """Source files of the standard library, a document each."""

    validation_fraction: Fraction = 0.05
    """Share of the files held out for validation, chosen by the sha256 of their paths."""
    validation_files: tuple[str, ...] = ()
    """Globs of the paths of the files held out, such as `json/*`, in place of that share; a validation set of its own may name some of what training leaves."""
    max_files: PositiveInt | None = None
    """Use only so many files, the first by path."""
    max_bytes_per_file: PositiveInt | None = None
    """Cut longer files after the last line that fits, or inside the first one."""
    shuffle: bool = True
    """Train in another order every epoch; validation always goes by path."""
    filter: tuple[Annotated[Component, Slot("filter")], ...] = ()
    """What a row must pass, besides having text; rows have `text` and `place`, the path."""


@register("dataset", "python_stdlib")
def python_stdlib(
    config: PythonStdlibConfig,
    *,
    tokenizer: Tokenizer,
    split: str,
    stream: int,
    n_streams: int,
    seed: int,
    epochs: int | None = None,
    on_error: OnError = "raise",
) -> TextDocuments:
    """Raises DataError when this Python has no library sources or the split has no files."""
    # Listings depend on which files there are, not on their order or on filters.
    listing = replace(config, shuffle=True, filter=())
    rows = shared(("python_stdlib", listing, split), lambda: SourceFiles(Path(sysconfig.get_path("stdlib")), listing, split))
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


class SourceFiles:
    """The files of one split, sorted by relative path."""

    def __init__(self, root: Path, config: PythonStdlibConfig, split: str) -> None:
        self.name = f"dataset 'python_stdlib' ({root})"
        self._root, self._config = root, config
        found = _sources(root)
        if not found:
            raise DataError(
                f"{self.name}: this Python comes without the source files of its standard library; "
                "install them (the full python package of the system, or a Python from python.org or uv), "
                'or train on files of your own: [dataset] name = "text"'
            )
        found = found[: config.max_files]
        if unknown := [pattern for pattern in config.validation_files if not any(fnmatchcase(path, pattern) for path in found)]:
            raise DataError(f"{self.name}: dataset.validation_files: {unknown[0]!r} matches none of {len(found)} files, such as {found[0]!r}")
        self._paths = [path for path in found if _held_out(path, config) == (split != "train")]
        if not self._paths:
            change = "validation_files" if config.validation_files else "validation_fraction"
            raise DataError(f"{self.name}: none of {len(found)} files is left for {split!r}; change dataset.{change} or dataset.max_files")
        digest = hashlib.sha256(repr((split, config.validation_fraction, config.max_files, config.max_bytes_per_file)).encode())
        if config.validation_files:
            digest.update(repr(config.validation_files).encode())
        for path in self._paths:
            with open(root / path, "rb") as file:
                head = file.read(_HEAD_BYTES)
                digest.update(repr((path, os.fstat(file.fileno()).st_size, hashlib.sha256(head).hexdigest())).encode())
        self.fingerprint = f"python_stdlib: {digest.hexdigest()}"

    def __len__(self) -> int:
        return len(self._paths)

    def row(self, index: int) -> Mapping[str, Any]:
        path = self._paths[index]
        try:
            # In the encoding that the file declares, as the interpreter reads it.
            with tokenize.open(self._root / path) as file:
                text = file.read()
        except (OSError, SyntaxError, UnicodeDecodeError) as error:
            raise UnreadableRow(f"{self.name}: cannot read {path}: {error}") from error
        return {"text": _cut(text, self._config.max_bytes_per_file), "place": path}


def files_of(config: PythonStdlibConfig) -> tuple[set[str], set[str]]:
    """Relative paths of the files that are trained on, and of those held out."""
    found = set(_sources(Path(sysconfig.get_path("stdlib")))[: config.max_files])
    held = {path for path in found if _held_out(path, config)}
    return found - held, held


def _held_out(path: str, config: PythonStdlibConfig) -> bool:
    if config.validation_files:
        return any(fnmatchcase(path, pattern) for pattern in config.validation_files)
    return held_out(path.encode(), config.validation_fraction)


def _sources(root: Path) -> list[str]:
    """Relative paths with forward slashes; links to folders are not followed."""
    found = []
    for folder, names, files in os.walk(root):
        names[:] = [name for name in names if name not in _EXCLUDED]
        found += [Path(folder, name).relative_to(root).as_posix() for name in files if name.endswith(".py")]
    return sorted(found)


def _cut(text: str, max_bytes: int | None) -> str:
    raw = text.encode("utf-8")
    if max_bytes is None or len(raw) <= max_bytes:
        return text
    end = raw.rfind(b"\n", 0, max_bytes) + 1 or max_bytes
    return raw[:end].decode("utf-8", errors="ignore")
