"""SuperBPE (Liu et al., March 2025, arXiv:2503.13423): byte-level BPE whose later merges cross spaces.

The first merges are learnt from text that is cut at words, the later ones from
text that is not, so that "of the" or "by the way" can be one token, a
superword. In a vocabulary of 200,000, of which 80,000 are learnt within words,
that is a third fewer tokens on English text.

It all hangs on how text is cut before merging. The two files do not say; the
published ones lie beside a ``tokenizer_config.json`` that names GPT-2's class,
which cuts at words: every text comes back, nothing crashes, and not one
superword is used. Here it is a setting, ``cut``, whose default is right, and a
vocabulary that does not fit the setting is refused.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from titanlm.errors import DataError
from titanlm.registry import register
from titanlm.tokenizers.byte_level import bytes_of
from titanlm.tokenizers.files import carried, read
from titanlm.tokenizers.fingerprint import fingerprint
from titanlm.tokenizers.special_tokens import pieces_with, require_named
from titanlm.tokenizers.text import hf_library, joined, n_words, rust_errors, utf8
from titanlm.tokenizers.vocab_merges import MERGES_FILE, VOCAB_FILE, read_vocabulary

Cut = Literal["digits", "words"]
_DIGITS = r"(?=(\d{3})+(?!\d))"
EXPRESSIONS: dict[Cut, str] = {"digits": _DIGITS, "words": rf"{_DIGITS}| ?\p{{L}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+"}
"""Where text is cut, after numbers were set apart: before every three digits that end a number, and at words."""
_NUMBER_PART = 30
_LONG_NUMBER = re.compile(rf"\d{{{_NUMBER_PART},}}")


@dataclass(frozen=True)
class SuperBpeConfig:
    """A vocabulary with superwords, how text is cut, and special tokens."""

    path: str
    """Folder with `vocab.json` and `merges.txt`."""
    cut: Cut = "digits"
    """Where text is cut before merging: `digits`, at numbers and, in them, in threes from the right; `words`, at words too, so that no superword is used."""
    special_tokens: dict[str, int] = field(default_factory=dict)
    """Names and ids of special tokens, such as `{"<|endoftext|>" = 200004}`; text never has them."""
    bos: str | None = None
    """Begin every document with this special token."""
    eos: str | None = None
    """End every document with this special token."""
    pad: str | None = None
    """Fill padded positions with this special token; nothing is ever masked by it."""

    def __post_init__(self) -> None:
        require_named(self)


@register("tokenizer", "superbpe")
class SuperBpeTokenizer:
    """BPE with tokens of several words; lossless.

    The 13 bytes that UTF-8 never has may be missing, as they are from the
    published vocabularies; the other 243 must be tokens.

    Raises DataError when the package is missing, when a file is missing or
    damaged, when the two do not belong together, when ids are taken twice, and
    for a vocabulary without superwords unless ``cut`` is ``words``.
    """

    lossless = True

    def __init__(self, config: SuperBpeConfig, *, files: Mapping[str, bytes] | None = None) -> None:
        hf_library("tokenizer 'superbpe'")
        self.config = config
        self._files = {name: _content(config.path, name) if files is None else carried(files, name) for name in (VOCAB_FILE, MERGES_FILE)}
        where = f"tokenizer.path: {config.path}" if files is None else "the tokenizer's files"
        vocabulary = read_vocabulary(self._files[VOCAB_FILE], self._files[MERGES_FILE], config.special_tokens, where)
        for name, i in vocabulary.apart.items():
            if config.special_tokens[name] != i:
                raise DataError(f"tokenizer.special_tokens: {name!r} has id {i} in {VOCAB_FILE}, not {config.special_tokens[name]}")
        tokens = {i: bytes_of(name) for name, i in vocabulary.ids.items()}
        self._pieces = pieces_with(tokens, config.special_tokens)
        self._bytes = np.array([len(piece or b"") for piece in self._pieces], dtype=np.int32)
        self._superwords = sum(n_words(piece) > 1 for piece in tokens.values())
        if config.cut == "digits" and not self._superwords and not any(map(_crosses, tokens.values())):
            ours = 'if titanlm learnt it within words, set tokenizer.cut = "words"'
            others = "GPT-2's and others' are cut in ways of their own, and their tokenizer.json is read by name = \"huggingface\""
            raise DataError(f"{where}: no token stands for more than one word; {ours}; {others}")
        self.vocab_size = len(self._pieces)
        self.bos_id, self.eos_id, self.pad_id = (None if name is None else config.special_tokens[name] for name in (config.bos, config.eos, config.pad))
        with rust_errors(f"{where} cannot be read by the package `tokenizers`"):
            self._backend = backend(dict(vocabulary.ids), list(vocabulary.merges), config.cut)
        self.fingerprint = fingerprint("superbpe", self, cut=config.cut, special_tokens=config.special_tokens)

    def __reduce__(self) -> Any:
        return functools.partial(SuperBpeTokenizer, files=self.files()), (self.config,)

    def encode(self, text: str) -> np.ndarray:
        """(n,) int32; what looks like a special token is text.

        Raises DataError for a lone surrogate, which no UTF-8 text contains.
        """
        utf8(text)
        with rust_errors("a text cannot be encoded with this vocabulary"):
            ids = [self._backend.encode(part, add_special_tokens=False).ids for part in parts(text)]
        return np.array(ids[0] if len(ids) == 1 else [i for part in ids for i in part], dtype=np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``; special ids vanish, broken UTF-8 becomes U+FFFD.

        Raises DataError for an id that the vocabulary does not have.
        """
        return joined(self._pieces, ids)

    def target_bytes(self, ids: np.ndarray, prev_ids: np.ndarray) -> np.ndarray:
        """Bytes of each token: (n,) int32, 0 for special ids."""
        return self._bytes.take(ids)

    def files(self) -> Mapping[str, bytes]:
        return self._files

    def pieces(self) -> Sequence[bytes | None]:
        """The bytes of each id; none for special ids, None where there is no such id."""
        return self._pieces

    def remarks(self) -> list[str]:
        """What a user should know about the vocabulary, a sentence each."""
        cut = self._superwords and self.config.cut == "words"
        return [f"text is cut at words, so none of {self._superwords:,} superwords is used"] if cut else []


def _crosses(piece: bytes) -> bool:
    """Whether a letter is followed by punctuation or space, which no cut at words leaves together; in scripts without spaces that is what tells."""
    text = piece.decode("utf-8", errors="ignore")
    return any(a.isalpha() and b not in "'’" and unicodedata.category(b)[0] in "PSZ" for a, b in pairwise(text))


def backend(ids: dict[str, int], merges: list[tuple[str, str]], cut: Cut) -> Any:
    """The library's tokenizer of a vocabulary; special tokens it does not know, so it finds none."""
    import tokenizers

    made = tokenizers.Tokenizer(tokenizers.models.BPE(ids, merges))
    steps = tokenizers.pre_tokenizers
    made.pre_tokenizer = steps.Sequence(
        [
            steps.Digits(individual_digits=False),
            steps.Split(tokenizers.Regex(EXPRESSIONS[cut]), "isolated"),
            steps.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return made


def parts(text: str) -> Iterator[str]:
    """The text, cut where it is cut anyway: inside long numbers, for whose n digits the expression takes n² time."""
    start = 0
    for number in _LONG_NUMBER.finditer(text):
        length = number.end() - number.start()
        for cut in range(number.end() - (length - 1) // _NUMBER_PART * _NUMBER_PART, number.end(), _NUMBER_PART):
            yield text[start:cut]
            start = cut
    yield text[start:]


def _content(folder: str, name: str) -> bytes:
    try:
        return read(f"{folder}/{name}", f"it names a folder with {VOCAB_FILE} and {MERGES_FILE}")
    except DataError as error:
        raise DataError(f'{error}; a tokenizer.json is read by name = "huggingface"') from error
