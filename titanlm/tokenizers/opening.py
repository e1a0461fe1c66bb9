"""A tokenizer out of what a user names on the command line."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from titanlm.errors import DataError, TitanError
from titanlm.registry import Component, Tokenizer, known
from titanlm.tokenizers.files import recognise
from titanlm.tokenizers.huggingface import TOKENIZER_FILE
from titanlm.tokenizers.vocab_merges import MERGES_FILE, VOCAB_FILE


def open_tokenizer(word: str) -> tuple[str, Tokenizer]:
    """What ``word`` was taken for, in words, and the tokenizer.

    ``byte``, ``NAME:FILE``, a config (.toml), whose tokenizer it is, a table of
    settings as a config has it, ``{name = "superbpe", path = …}``, or a
    tokenizer's file, whose type shows in its content, or folder.

    Raises TitanError when the content shows no type, or several, or leaves
    open what decides ids.
    """
    name, _, path = word.partition(":")
    if word == "byte":
        component = Component.named("tokenizer", "byte")
    elif word.startswith("{"):
        from titanlm.config import loads

        # A whole config, so that mistakes are told as in one.
        component = loads(f'tokenizer = {word}\nmodel = "decoder"\noptimizer = "adamw"\ntrain = {{steps = 1}}\n', word).tokenizer
    elif path and name in known("tokenizer"):
        component = _of_file(name, path)
    elif word.endswith(".toml"):
        from titanlm.config import load

        component = load(Path(word)).tokenizer
    else:
        component = _of_file(_only_type(word), word)
    settings = [f"{key} {getattr(component.config, key)}" for key in ("pattern", "cut") if hasattr(component.config, key)]
    return ", ".join([component.name, *settings]), component.build()


def _only_type(path: str) -> str:
    if all((Path(path) / name).is_file() for name in (VOCAB_FILE, MERGES_FILE)) and not (Path(path) / TOKENIZER_FILE).exists():
        return "superbpe"
    try:
        names = recognise(Path(path).read_bytes())
    except OSError as error:
        known_forms = "a file, NAME:FILE, a config (.toml), {settings} or the word byte"
        raise DataError(f"{path}: cannot be read ({error.strerror}); a tokenizer is {known_forms}") from error
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
