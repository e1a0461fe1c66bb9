"""Files of tokenizers: reading and writing one, and telling by its content which tokenizer reads it.

The type of a tokenizer is what the config says. Content is looked at only to
say, when that type cannot read the file, which one could, and where a command
is given a file and no config. There is no falling back from one type to
another: a model trained on the ids of the wrong one is lost.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

from titanlm.errors import DataError
from titanlm.tokenizers.model_proto import fields

_KINDS = {"sentencepiece": "a SentencePiece model", "huggingface": "a tokenizer.json", "tiktoken": "a tiktoken rank file"}


def read(path: str, remedy: str) -> bytes:
    """The content of a tokenizer's file.

    Raises DataError with the path and ``remedy`` when it cannot be read.
    """
    file = Path(path).expanduser()
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"tokenizer.path: cannot read {file.absolute()} ({error.strerror}); {remedy}") from error


def write(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def carried(files: Mapping[str, bytes], name: str) -> bytes:
    """The file ``name`` out of those that travelled with an artifact; DataError when it is not among them."""
    if name not in files:
        raise DataError(f"the tokenizer's files lack {name!r} (there: {', '.join(sorted(files)) or 'none'})")
    return bytes(files[name])


def recognise(content: bytes) -> list[str]:
    """Names of the tokenizers that a file looks made for: none, one or, in theory, several."""
    tests = {"sentencepiece": _is_sentencepiece, "huggingface": _is_tokenizer_json, "tiktoken": _is_ranks}
    return [name for name, test in tests.items() if test(content)]


def hint(content: bytes, name: str) -> str:
    """For the error of a tokenizer that cannot read a file: which other could, or nothing."""
    return "".join(f'; it looks like {_KINDS[other]}, which name = "{other}" reads' for other in recognise(content) if other != name)


def _is_tokenizer_json(content: bytes) -> bool:
    if not content.lstrip().startswith(b"{"):
        return False
    try:
        tables = json.loads(content)
    except (ValueError, RecursionError):
        return False
    return isinstance(tables.get("model"), dict)


def _is_ranks(content: bytes) -> bool:
    return re.match(rb"\s*[A-Za-z0-9+/]+={0,2} \d+\s*(\n|$)", content) is not None


def _is_sentencepiece(content: bytes) -> bool:
    """Whether the file starts with pieces, each a text and perhaps a score and a type."""
    try:
        first = list(itertools.islice(fields(content), 3))
        pieces = [dict(fields(value)) for number, value in first if number == 1 and isinstance(value, bytes)]
        texts = [piece[1].decode("utf-8") for piece in pieces if isinstance(piece[1], bytes)]
    except (LookupError, ValueError):
        return False
    return len(texts) == len(first) > 0 and all(piece.keys() <= {1, 2, 3} for piece in pieces)
