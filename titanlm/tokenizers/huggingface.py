"""Tokenizers out of a ``tokenizer.json``, read by the ``tokenizers`` library.

The file alone decides: no ``tokenizer_config.json``, no ``auto_map``, no code
of a repository, no network, and never ``AutoTokenizer``, which picks a class
by what it finds and has picked others than the one a model was trained with.
What the file says about truncation, padding, dropout and special tokens around
a text is switched off; documents get BOS and EOS from the settings.

Special tokens are never found in text: ``<|endoftext|>`` in a document is
written as the characters it is made of. The library does that for tokens
marked special, and those named here are marked. In a unigram model a special
token can also be an ordinary piece, which the library then finds all the same;
a text that has it is refused.

A byte-level model that changes nothing is lossless, and an id's bytes follow
from its name. Of others (Metaspace, WordPiece, normalizers) bytes are counted
from the pieces: U+2581, or the beginning of a word in WordPiece, is a space,
and it is free after a special token or at the start, where the model put it.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from titanlm.errors import DataError
from titanlm.registry import did_you_mean, register
from titanlm.tokenizers.byte_counts import ByteCounts
from titanlm.tokenizers.byte_level import IN_UTF8, bytes_of
from titanlm.tokenizers.files import carried, hint, read
from titanlm.tokenizers.fingerprint import PROBES, fingerprint, round_trips
from titanlm.tokenizers.text import MAX_ID, hf_library, joined, n_words, require_ids, rust_errors, utf8

TOKENIZER_FILE = "tokenizer.json"
SPACE = "\u2581"
_READ = ("version", "added_tokens", "normalizer", "pre_tokenizer", "decoder", "model")
"""The parts of the file that are used."""
_SUPERWORDS_TRIED = 64


@dataclass(frozen=True)
class HuggingFaceConfig:
    """A tokenizer.json and which of its added tokens go around a document."""

    path: str
    """The file, `tokenizer.json`; a relative path starts at the working directory."""
    bos: str | None = None
    """Begin every document with this added token, such as `<s>`."""
    eos: str | None = None
    """End every document with this added token."""
    pad: str | None = None
    """Fill padded positions with this added token; nothing is ever masked by it."""


@register("tokenizer", "huggingface")
class HuggingFaceTokenizer:
    """A tokenizer.json; lossless when it is byte-level and changes nothing.

    Raises DataError when the package is missing, when the file is missing or
    no tokenizer.json, and when it lacks an added token that is named.
    """

    def __init__(self, config: HuggingFaceConfig, *, files: Mapping[str, bytes] | None = None) -> None:
        self.config = config
        self._content = read(config.path, "correct the path") if files is None else carried(files, TOKENIZER_FILE)
        where = f"tokenizer.path: {config.path}" if files is None else TOKENIZER_FILE
        self._definition = definition = _definition(self._content, where)
        named = [name for name in (config.bos, config.eos, config.pad) if name is not None]
        added = {token["content"]: token for token in definition["added_tokens"]}
        for name in named:
            if name not in added:
                there = ", ".join(map(repr, list(added)[:8])) + (", …" if len(added) > 8 else "") or "none"
                raise DataError(f"{where} has no added token {name!r}{did_you_mean(name, added)} (there: {there})")
            added[name]["special"] = True  # else text could have it
        self._backend = _backend(definition, where, self._content)
        for name, token in added.items():
            if self._backend.token_to_id(name) != token["id"]:
                raise DataError(f"{where}: added token {name!r} has id {token['id']}, which the library makes {self._backend.token_to_id(name)}")
        self.bos_id, self.eos_id, self.pad_id = (None if name is None else added[name]["id"] for name in (config.bos, config.eos, config.pad))

        self._names: dict[int, str] = {i: token for token, i in self._backend.get_vocab(with_added_tokens=True).items()}
        self.vocab_size = max(self._names, default=-1) + 1
        if not 0 < self.vocab_size <= MAX_ID or len(self._names) < len(self._backend.get_vocab(with_added_tokens=True)):
            raise DataError(f"{where}: ids must be 0 to {MAX_ID}, each for one token; the largest is {self.vocab_size - 1}")
        self._special = {token["id"] for token in added.values() if token["special"]}
        self._count(added)
        self._require_superwords(where, {token["id"] for token in added.values()})
        self._reachable = [i for i in sorted(self._special) if i != self._unknown and self._finds(i)]
        self.lossless = self._byte_level and _keeps_text(definition, self._pieces) and all(round_trips(self, probe) for probe in PROBES)
        self.fingerprint = fingerprint("huggingface", self)

    def _count(self, added: Mapping[str, Any]) -> None:
        """The bytes of each id, and whether its first is a space that the model may have put there."""
        model = self._definition["model"]
        steps = list(_steps(self._definition["pre_tokenizer"]))
        self._byte_level = any(step["type"] == "ByteLevel" for step in steps)
        put_by_model = any(step.get("add_prefix_space") for step in steps) if self._byte_level else True
        words = model.get("type") in ("WordPiece", "WordLevel")  # pieces without marks of spaces; "##" continues a word
        continuing, ending = (model.get(f"{key}") or "" for key in ("continuing_subword_prefix", "end_of_word_suffix"))
        ordinary = {token["id"] for token in added.values() if not token["special"]}
        self._unknown = model.get("unk_id") if "unk_id" in model else self._backend.token_to_id(model.get("unk_token") or "")

        outside = np.ones(self.vocab_size, dtype=bool)
        space = np.zeros(self.vocab_size, dtype=bool)
        pieces: list[bytes | None] = [None] * self.vocab_size
        for i, name in self._names.items():
            if i in self._special or i == self._unknown:
                pieces[i] = b""
                continue
            outside[i] = False
            if i in ordinary:
                pieces[i] = name.encode("utf-8")
            elif self._byte_level:
                pieces[i] = bytes_of(name)
            elif re.fullmatch("<0x[0-9A-F]{2}>", name):
                pieces[i] = bytes([int(name[3:5], 16)])
                continue
            elif words:
                continues = bool(continuing) and name.startswith(continuing)
                pieces[i] = (name.removeprefix(continuing) if continues else f" {name}").encode("utf-8")
            else:
                text = name.removeprefix(continuing).replace(SPACE, " ")
                pieces[i] = (f"{text.removesuffix(ending)} " if ending and text.endswith(ending) else text).encode("utf-8")
            space[i] = put_by_model and pieces[i][:1] == b" "  # type: ignore[index]
        self._pieces = pieces
        self._counts = ByteCounts(np.array([len(piece or b"") for piece in pieces], dtype=np.int32), space, outside)

    def _require_superwords(self, where: str, added: set[int]) -> None:
        """A vocabulary learnt across spaces is worth little when text is cut at words: refuse what was only saved with the wrong class."""
        pieces = enumerate(self._pieces) if self._byte_level else ()
        superwords = [piece for i, piece in pieces if piece and i not in added and n_words(piece) > 1]  # added ones are found before any cut
        if len(superwords) * 100 < self.vocab_size:
            return
        texts = [piece.decode("utf-8", errors="ignore") for piece in superwords[:_SUPERWORDS_TRIED]]
        if all(len(self._backend.pre_tokenizer.pre_tokenize_str(text)) > 1 for text in texts):
            what = f"{len(superwords):,} of {self.vocab_size:,} ids stand for more than one word, but its pre_tokenizer cuts text at words, so none is used"
            raise DataError(f'{where}: {what}; name = "superbpe" reads the vocab.json and merges.txt of such a tokenizer')

    def _finds(self, special: int) -> bool:
        name = self._names[special]
        return any(special in self._backend.encode(text, add_special_tokens=False).ids for text in (name, f"a{name}a", f"a {name} a"))

    def __reduce__(self) -> Any:
        return functools.partial(HuggingFaceTokenizer, files=self.files()), (self.config,)

    def encode(self, text: str) -> np.ndarray:
        """(n,) int32, no special ids.

        Raises DataError for a lone surrogate, which no UTF-8 text contains,
        and for a text in which this file cannot but find a special token.
        """
        utf8(text)
        with rust_errors("a text cannot be encoded with this tokenizer.json"):
            ids = np.array(self._backend.encode(text, add_special_tokens=False).ids, dtype=np.int32)
        if self._reachable and (found := np.isin(ids, self._reachable)).any():
            name = self._names[int(ids[found][0])]
            raise DataError(f"a text contains {name!r}, a special token that is an ordinary piece of this tokenizer.json too; filter such texts out")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``; special ids vanish, broken UTF-8 becomes U+FFFD.

        Raises DataError for an id that the vocabulary does not have.
        """
        if self._byte_level:
            return joined(self._pieces, ids)
        array = np.asarray(ids, dtype=np.int64)
        require_ids(array, self.vocab_size)
        kept = [i for i in array.tolist() if i not in self._special]
        if (gap := next((i for i in kept if i not in self._names), None)) is not None:
            raise DataError(f"id {gap} is no token of this vocabulary, which has gaps")
        return self._backend.decode(kept, skip_special_tokens=False)

    def target_bytes(self, ids: np.ndarray, prev_ids: np.ndarray) -> np.ndarray:
        """UTF-8 bytes that each of ``ids`` stands for after ``prev_ids``: (n,) int32.

        Special and unknown tokens stand for none. Where the model may put a
        space before a text, the space of a piece is free after a special or
        unknown token or after nothing, -1.
        """
        return self._counts.of(ids, prev_ids)

    def files(self) -> Mapping[str, bytes]:
        return {TOKENIZER_FILE: self._content}

    def pieces(self) -> Sequence[bytes | None]:
        """The bytes of each id, U+2581 as a space; none for special ids, None where there is no such id."""
        return self._pieces

    def remarks(self) -> list[str]:
        """What a user should know about the file, a sentence each."""
        found = [f"model {self._definition['model'].get('type', 'of no stated type')}, {'byte-level' if self._byte_level else 'not byte-level'}"]
        if normalizers := [step["type"] for step in _steps(self._definition["normalizer"])]:
            found.append(f"characters are normalised ({', '.join(normalizers)})")
        if self._reachable:
            some = ", ".join(repr(self._names[i]) for i in self._reachable[:4])
            found.append(f"texts with {some} are refused: special tokens that are ordinary pieces too")
        return found


def _definition(content: bytes, where: str) -> dict[str, Any]:
    """The parts of a tokenizer.json that are used, with random merging switched off."""
    try:
        tables = json.loads(content)
        if not isinstance(tables, dict) or not isinstance(tables.get("model"), dict):
            raise ValueError("it has no table `model`")
        kept: dict[str, Any] = {key: tables.get(key) for key in _READ}
        kept["version"] = kept["version"] or "1.0"
        kept["added_tokens"] = [{"special": False, **token} for token in kept["added_tokens"] or ()]
        if not all(isinstance(token.get("content"), str) and type(token.get("id")) is int for token in kept["added_tokens"]):
            raise ValueError("an added token needs `content` and `id`")
    except (ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{where} is no tokenizer.json ({error}){hint(content, 'huggingface')}") from error
    if "dropout" in kept["model"]:
        kept["model"]["dropout"] = None
    return kept


def _backend(definition: Mapping[str, Any], where: str, content: bytes) -> Any:
    tokenizers = hf_library("tokenizer 'huggingface'")
    with rust_errors(f"{where} is a damaged tokenizer.json or one of another version{hint(content, 'huggingface')}"):
        backend = tokenizers.Tokenizer.from_str(json.dumps(definition))
    backend.encode_special_tokens = True  # special tokens in a text are text
    return backend


def _steps(part: Any) -> Iterator[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, sequences taken apart."""
    if isinstance(part, dict):
        inner = part.get("pretokenizers", part.get("normalizers"))
        if part.get("type") == "Sequence" and isinstance(inner, list):
            for step in inner:
                yield from _steps(step)
        else:
            yield part


def _keeps_text(definition: Mapping[str, Any], pieces: Sequence[bytes | None]) -> bool:
    """Whether nothing in the file changes or drops a part of a text, as far as its settings tell."""
    model = definition["model"]
    single = {piece[0] for piece in pieces if piece and len(piece) == 1}
    cutting = all(
        step["type"] in ("ByteLevel", "Digits", "FixedLength", "UnicodeScripts", "Split", "Punctuation")
        and not step.get("add_prefix_space")
        and step.get("behavior") != "Removed"
        for step in _steps(definition["pre_tokenizer"])
    )
    # An added token in a text may take the white space around it.
    plain = not any(token.get("lstrip") or token.get("rstrip") for token in definition["added_tokens"] if not token["special"])
    affixes = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    return definition["normalizer"] is None and model.get("type") == "BPE" and not affixes and cutting and plain and single >= IN_UTF8
