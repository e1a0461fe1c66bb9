"""A tokenizer out of what a user names on the command line."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from titanlm.errors import DataError, TitanError
from titanlm.registry import Component, Tokenizer, known
from titanlm.tokenizers.files import recognise


def open_tokenizer(word: str) -> tuple[str, Tokenizer]:
    """What ``word`` was taken for, in words, and the tokenizer.

    ``byte``, ``NAME:FILE``, a config (.toml), whose tokenizer it is, or a
    tokenizer's file, whose type shows in its content.

    Raises TitanError when the content shows no type, or several, or leaves
    open what decides ids.
    """
    name, _, path = word.partition(":")
    if word == "byte":
        component = Component.named("tokenizer", "byte")
    elif path and name in known("tokenizer"):
        component = _of_file(name, path)
    elif word.endswith(".toml"):
        from titanlm.config import load

        component = load(Path(word)).tokenizer
    else:
        component = _of_file(_only_type(word), word)
    settings = [f"{key} {getattr(component.config, key)}" for key in ("pattern",) if hasattr(component.config, key)]
    return ", ".join([component.name, *settings]), component.build()


def _only_type(path: str) -> str:
    try:
        names = recognise(Path(path).read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); a tokenizer is a file, NAME:FILE, a config (.toml) or the word byte") from error
    if len(names) != 1:
        what = f"may be a file of {' or '.join(names)}" if names else "is no tokenizer's file by its content"
        raise DataError(f"{path}: {what}; say which tokenizer reads it, NAME:{path} (names: {', '.join(known('tokenizer'))})")
    return names[0]


def _of_file(name: str, path: str) -> Component:
    settings: dict[str, Any] = {}
    if name == "tiktoken":
        from titanlm.tokenizers.tiktoken import PUBLISHED

        try:
            pattern = PUBLISHED.get(hashlib.sha256(Path(path).read_bytes()).hexdigest())
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from error
        if pattern is None:
            raise TitanError(f"{path}: a rank file does not say how text is cut; name a config whose [tokenizer] has this path and a `pattern`")
        settings["pattern"] = pattern
    try:
        return Component.named("tokenizer", name, path=path, **settings)
    except TypeError as error:
        raise TitanError(f"{name}:{path}: tokenizer {name!r} is not made of a file alone ({error}); name a config") from error
