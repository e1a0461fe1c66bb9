"""`titanlm tokenizer compare`: how many tokens a text takes, and how fast."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from titanlm.errors import DataError
from titanlm.registry import Component, Tokenizer
from titanlm.tokenizers.corpus import dataset_texts, documents
from titanlm.tokenizers.opening import open_tokenizer
from titanlm.tokenizers.text import n_words

DEFAULT_BYTES = 2_000_000
"""Of the embedded text, which is all the default reads."""
_SPACELESS = 16
"""Characters a word, on average, beyond which a text is taken to be in a script that writes no spaces."""


@dataclass(frozen=True)
class Row:
    """One tokenizer on one input."""

    tokenizer: str
    type: str
    input: str
    documents: int
    bytes: int
    """UTF-8 length of the documents that were encoded."""
    tokens: int
    """Special ids not among them."""
    characters_per_token: float
    bytes_per_token: float
    tokens_per_word: float | None
    """None for scripts without spaces; words are what stands between white space."""
    tokens_per_character: float
    superwords: float | None
    """Share of the tokens that stand for more than one word; None for a tokenizer that does not tell its pieces."""
    round_trip: float
    """Share of documents that come back; one that is refused does not."""
    refused: int
    """Documents that the tokenizer does not take; only ``documents`` and ``round_trip`` count them."""
    megabytes_per_s: float
    """Encoding, one document after the other in one thread; 10⁶ bytes."""


def compare(words: Sequence[str], inputs: Sequence[str], *, column: str = "text", max_bytes: int | None = None) -> list[Row]:
    """Every tokenizer on every input (files; none: the embedded text).

    Raises TitanError when a tokenizer cannot be opened or an input not read.
    """
    opened = [(word, *open_tokenizer(word)) for word in words]
    rows = []
    for name, texts in _inputs(inputs, column, max_bytes):
        spaced = sum(map(len, texts)) <= _SPACELESS * sum(len(text.split()) for text in texts)
        rows += [_measure(word, kind, tokenizer, name, texts, spaced) for word, kind, tokenizer in opened]
    return rows


def table(rows: Sequence[Row]) -> str:
    """Aligned columns, a block an input."""
    lines = [f"{word}: {kind}" for word, kind in dict.fromkeys((row.tokenizer, row.type) for row in rows)]
    labels = {row.tokenizer: row.type if row.tokenizer.startswith("{") else Path(row.tokenizer).name for row in rows}
    if len(set(labels.values())) < len(labels):
        labels = {word: word for word in labels}
    width = max(9, *map(len, labels.values()))
    for name, group in itertools.groupby(rows, key=lambda row: row.input):
        same = list(group)
        lines += ["", f"{name}: {same[0].documents:,} documents, {max(row.bytes for row in same) / 1e6:.2f} MB"]
        fertility = "tokens/char" if same[0].tokens_per_word is None else "tokens/word"
        lines.append(f"  {'tokenizer':<{width}}  {'tokens':>11}  chars/token  bytes/token  {fertility}  superwords  round trip    MB/s")
        for row in same:
            each = row.tokens_per_character if row.tokens_per_word is None else row.tokens_per_word
            superwords = "–" if row.superwords is None else _share(row.superwords)
            numbers = f"{row.tokens:>11,}  {row.characters_per_token:>11.3f}  {row.bytes_per_token:>11.3f}  {each:>11.3f}  {superwords:>10}"
            refused = f"  {row.refused:,} documents refused" if row.refused else ""
            lines.append(f"  {labels[row.tokenizer]:<{width}}  {numbers}  {_share(row.round_trip):>10}  {row.megabytes_per_s:>6.1f}{refused}")
    return "\n".join(lines)


def as_json(rows: Sequence[Row]) -> str:
    """A list of tables, one for each tokenizer on each input."""
    return json.dumps([asdict(row) for row in rows], ensure_ascii=False)


def _share(value: float) -> str:
    """Never 100 % for less than all."""
    return f"{int(value * 1000) / 10:.1f}%"


def _inputs(paths: Sequence[str], column: str, max_bytes: int | None) -> Iterator[tuple[str, list[str]]]:
    if not paths:
        name = "Python's standard library"
        yield name, _some(dataset_texts(Component.named("dataset", "python_stdlib")), max_bytes or DEFAULT_BYTES, name)
    for path in paths:
        yield path, _some(documents(path, column), max_bytes, path)


def _some(texts: Iterable[str], max_bytes: int | None, name: str) -> list[str]:
    found: list[str] = []
    n_bytes = 0
    for text in texts:
        if max_bytes is not None and n_bytes >= max_bytes:
            break
        found.append(text)
        n_bytes += len(text.encode("utf-8", "surrogatepass"))
    if not n_bytes:
        raise DataError(f"{name}: there is no text in it")
    return found


def _measure(word: str, kind: str, tokenizer: Tokenizer, name: str, texts: Sequence[str], spaced: bool) -> Row:
    pieces: Sequence[bytes | None] = getattr(tokenizer, "pieces", list)()
    super_ids = np.array([piece is not None and n_words(piece) > 1 for piece in pieces], dtype=bool)
    n_characters = n_bytes = words = n_tokens = n_super = same = refused = 0
    elapsed_s = 0.0
    for text in texts:
        start = time.perf_counter()
        try:
            ids = tokenizer.encode(text)
        except DataError:
            refused += 1
            continue
        elapsed_s += time.perf_counter() - start
        n_tokens += len(ids)
        n_super += int(super_ids[ids].sum()) if pieces else 0
        n_characters, n_bytes, words = n_characters + len(text), n_bytes + len(text.encode("utf-8")), words + len(text.split())
        same += tokenizer.decode(ids.tolist()) == text
    if not n_tokens:
        raise DataError(f"{name}: {word} makes no tokens of it ({refused} of {len(texts)} documents refused)")
    return Row(
        tokenizer=word,
        type=kind,
        input=name,
        documents=len(texts),
        bytes=n_bytes,
        tokens=n_tokens,
        characters_per_token=n_characters / n_tokens,
        bytes_per_token=n_bytes / n_tokens,
        tokens_per_word=n_tokens / words if spaced and words else None,
        tokens_per_character=n_tokens / n_characters,
        superwords=n_super / n_tokens if pieces else None,
        round_trip=same / len(texts),
        refused=refused,
        megabytes_per_s=n_bytes / 1e6 / max(elapsed_s, 1e-9),
    )
