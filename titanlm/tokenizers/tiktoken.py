"""Byte-level BPE out of a tiktoken rank file.

A rank file has a token and its rank a line: the bytes in base64, and the id,
which is also the order of merging. It does not say how text is cut before
merging; that is ``pattern``, and other patterns give other ids.

The file is read here and never through ``tiktoken.get_encoding``, which wants
a network, or ``tiktoken.load``, which caches files by their path and so gives
yesterday's content after a file was replaced.

Every byte is a token and special tokens are never looked for in text, so every
text comes back.
"""

from __future__ import annotations

import base64
import binascii
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from titanlm.errors import DataError
from titanlm.registry import register
from titanlm.tokenizers.files import carried, hint, read
from titanlm.tokenizers.fingerprint import PROBES, fingerprint
from titanlm.tokenizers.special_tokens import pieces_with, require_named
from titanlm.tokenizers.text import MAX_ID, joined, rust_errors, utf8

RANK_FILE = "tokenizer.tiktoken"
PATTERNS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    "cl100k_base": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
    "o200k_base": (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
        r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}
"""How the published vocabularies cut text; possessive where that changes nothing but speed."""

PUBLISHED = {
    "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930": "gpt2",
    "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7": "cl100k_base",
    "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d": "o200k_base",
}
"""sha256 of published rank files → the pattern they were made with; for commands that are given a file and no config."""


@dataclass(frozen=True)
class TiktokenConfig:
    """A rank file, how text is cut, and special tokens."""

    path: str
    """The rank file (`.tiktoken`): a token in base64 and its id a line."""
    pattern: str
    """How text is cut before merging: `gpt2`, `cl100k_base`, `o200k_base` or a regular expression."""
    special_tokens: dict[str, int] = field(default_factory=dict)
    """Names and ids of special tokens, such as `{"<|endoftext|>" = 50256}`; text never has them."""
    bos: str | None = None
    """Begin every document with this special token."""
    eos: str | None = None
    """End every document with this special token."""
    pad: str | None = None
    """Fill padded positions with this special token; nothing is ever masked by it."""

    def __post_init__(self) -> None:
        require_named(self)


@register("tokenizer", "tiktoken")
class TiktokenTokenizer:
    """Byte-level BPE; lossless.

    Raises DataError when the file is missing or no full vocabulary, when ids
    are taken twice and when the pattern leaves out part of a text.
    """

    lossless = True

    def __init__(self, config: TiktokenConfig, *, files: Mapping[str, bytes] | None = None) -> None:
        import tiktoken

        self.config = config
        self._content = read(config.path, "correct the path") if files is None else carried(files, RANK_FILE)
        ranks = read_ranks(self._content, f"tokenizer.path: {config.path}" if files is None else RANK_FILE)
        self._pieces = pieces_with({rank: token for token, rank in ranks.items()}, config.special_tokens)
        self._bytes = np.array([len(piece or b"") for piece in self._pieces], dtype=np.int32)
        self.vocab_size = len(self._pieces)
        self.bos_id, self.eos_id, self.pad_id = (None if name is None else config.special_tokens[name] for name in (config.bos, config.eos, config.pad))
        self._pattern = PATTERNS.get(config.pattern, config.pattern)
        with rust_errors(f"tokenizer.pattern: {config.pattern!r} is neither {', '.join(PATTERNS)} nor a regular expression"):
            self._encoding = tiktoken.Encoding("titanlm", pat_str=self._pattern, mergeable_ranks=ranks, special_tokens={})
        self._require_whole_texts()
        self.fingerprint = fingerprint("tiktoken", self, pattern=self._pattern, special_tokens=config.special_tokens)

    def _require_whole_texts(self) -> None:
        for probe in PROBES:
            if (back := self.decode(self.encode(probe).tolist())) != probe:
                what = f"{self.config.pattern!r} leaves out part of a text: {probe!r} comes back as {back!r}"
                raise DataError(f"tokenizer.pattern: {what}; known names are {', '.join(PATTERNS)} (gpt2 cuts for r50k_base and p50k_base too)")

    def __reduce__(self) -> Any:
        return functools.partial(TiktokenTokenizer, files=self.files()), (self.config,)

    def encode(self, text: str) -> np.ndarray:
        """(n,) int32; what looks like a special token is text.

        Raises DataError for a lone surrogate, which no UTF-8 text contains,
        and for more white space in a row than the library's expressions take,
        about 900,000 characters.
        """
        utf8(text)
        with rust_errors("a text cannot be cut by tokenizer.pattern, perhaps for a very long run of white space; give shorter documents"):
            return np.array(self._encoding.encode_ordinary(text), dtype=np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``; special ids vanish, broken UTF-8 becomes U+FFFD.

        Raises DataError for an id that the vocabulary does not have.
        """
        return joined(self._pieces, ids)

    def target_bytes(self, ids: np.ndarray, prev_ids: np.ndarray) -> np.ndarray:
        """Bytes of each token: (n,) int32, 0 for special ids."""
        return self._bytes.take(ids)

    def files(self) -> Mapping[str, bytes]:
        return {RANK_FILE: self._content}

    def pieces(self) -> Sequence[bytes | None]:
        """The bytes of each id; none for special ids, None where there is no such id."""
        return self._pieces


def read_ranks(content: bytes, where: str) -> dict[bytes, int]:
    """Token → rank of a rank file.

    Raises DataError, with the line, for what is no token and rank, and for a
    token or rank that stands twice; and when a single byte is no token, which
    would make texts that cannot be written.
    """
    ranks: dict[bytes, int] = {}
    lines: dict[bytes | int, int] = {}  # where each token and each rank stands
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            encoded, digits = line.split()
            token, rank = base64.b64decode(encoded, validate=True), int(digits)
        except (ValueError, binascii.Error):
            remedy = "a rank file has a token in base64 and its rank on each line"
            raise DataError(f"{where}, line {number}: {line[:40]!r} is no token and rank; {remedy}{hint(content, 'tiktoken')}") from None
        if not token or not 0 <= rank <= MAX_ID:
            raise DataError(f"{where}, line {number}: {'an empty token' if not token else f'rank {rank} is not 0 to {MAX_ID}'}")
        for thing, what in ((token, f"token {token!r}"), (rank, f"rank {rank}")):
            if (first := lines.setdefault(thing, number)) != number:
                raise DataError(f"{where}, line {number}: {what} stands in line {first} already")
        ranks[token] = rank
    missing = [value for value in range(256) if bytes([value]) not in ranks]
    if missing:
        some = ", ".join(f"0x{value:02X}" for value in missing[:4]) + (", …" if len(missing) > 4 else "")
        raise DataError(f"{where}: {len(missing)} of the 256 single bytes are no tokens ({some}), so some texts could not be written")
    return ranks
