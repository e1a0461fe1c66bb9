"""`titanlm tokenizer inspect`: what a tokenizer is, and whether text comes back."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

from titanlm.errors import DataError
from titanlm.loggers.text import printable
from titanlm.registry import Tokenizer
from titanlm.tokenizers.fingerprint import PROBES
from titanlm.tokenizers.opening import open_tokenizer
from titanlm.tokenizers.text import n_words

_SAMPLES = 24
_LONGEST = 8


def inspect(word: str) -> str:
    """A tokenizer named on the command line, described.

    Raises TitanError when it cannot be opened.
    """
    kind, tokenizer = open_tokenizer(word)
    pieces: Sequence[bytes | None] = getattr(tokenizer, "pieces", list)()
    rows = [("type", kind), *_rows(tokenizer, pieces)]
    width = max(len(name) for name, _ in rows)
    return "\n".join([word, *(f"  {name:<{width}}  {value}".rstrip() for name, value in rows)])


def _rows(tokenizer: Tokenizer, pieces: Sequence[bytes | None]) -> Iterator[tuple[str, str]]:
    present = [piece for piece in pieces if piece]
    known = f": {len(present):,} pieces, {pieces.count(b''):,} special or unknown, {pieces.count(None):,} unused" if pieces else ""
    yield "vocabulary", f"{tokenizer.vocab_size:,} ids{known}"
    special = (("BOS", tokenizer.bos_id), ("EOS", tokenizer.eos_id), ("PAD", getattr(tokenizer, "pad_id", None)))
    yield "special ids", ", ".join(f"{name} {'none' if i is None else i}" for name, i in special)
    for remark in getattr(tokenizer, "remarks", list)():
        yield "note", remark
    lost = [(probe, back) for probe in PROBES if (back := _back(tokenizer, probe)) != probe]
    counting = "bytes are counted from the pieces" if lost else "but its settings do not say that every text does"
    yield "lossless", "yes" if tokenizer.lossless else f"no; {len(PROBES) - len(lost)} of {len(PROBES)} probes come back, {counting}"
    for probe, back in lost:
        yield "", f"{_quoted(probe)} → {_quoted(back)}"
    if present:
        single = len({piece for piece in present if len(piece) == 1})
        yield "bytes", f"{single} of 256 single bytes are pieces"
        longest = sorted(set(present), key=lambda piece: (-len(piece), piece))[:_LONGEST]
        yield "superwords", f"{sum(n_words(piece) > 1 for piece in present) / len(present):.1%} of the pieces stand for more than one word"
        yield "longest", " ".join(_shown(piece) for piece in longest)
        yield "sample", " ".join(_shown(piece) for piece in present[:: max(1, len(present) // _SAMPLES)][:_SAMPLES])
    yield "fingerprint", f"sha256 {hashlib.sha256(tokenizer.fingerprint.encode('utf-8')).hexdigest()}"
    for name, content in tokenizer.files().items():
        yield "", f"{name}: {len(content):,} bytes, sha256 {hashlib.sha256(content).hexdigest()}"


def _back(tokenizer: Tokenizer, text: str) -> str | None:
    try:
        return tokenizer.decode(tokenizer.encode(text).tolist())
    except DataError:
        return None


def _quoted(text: str | None) -> str:
    return "refused" if text is None else printable(repr(text))


def _shown(piece: bytes) -> str:
    """A piece between bars, shortened; bytes that are no text as in a bytes literal."""
    try:
        text = repr(piece.decode("utf-8"))[1:-1]
    except UnicodeDecodeError:
        text = repr(piece)[2:-1]
    return f"|{printable(text if len(text) <= 40 else f'{text[:36]}…')}|"
