"""``vocab.json`` and ``merges.txt``, the pair of files of a byte-level BPE: reading, checking, writing.

``vocab.json`` maps the name of each token to its id, ``merges.txt`` has two
names a line, in the order of merging. Neither means anything without the other,
and both come in many versions that look alike, so they are held against each
other: what is read is a vocabulary in which every token can be made.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from titanlm.errors import DataError
from titanlm.tokenizers.byte_level import BYTE_OF, IN_UTF8
from titanlm.tokenizers.text import MAX_ID

VOCAB_FILE, MERGES_FILE = "vocab.json", "merges.txt"


@dataclass(frozen=True)
class Vocabulary:
    """A byte-level BPE; names are written in GPT-2's characters for bytes."""

    ids: Mapping[str, int]
    """Name → id, of single bytes and of what merges make."""
    merges: Sequence[tuple[str, str]]
    """In order of rank."""
    apart: Mapping[str, int]
    """Name → id of the tokens in ``vocab.json`` that were said to be special."""


def read_vocabulary(vocab: bytes, merges: bytes, special: Collection[str], where: str) -> Vocabulary:
    """The vocabulary of the two files' contents; ``special`` are names that no merge need make.

    Raises DataError, with line or name, for a file that is not what it should
    be, a merge whose parts or whole are not in the vocabulary, a token that no
    merge makes, and when one of the 243 bytes of UTF-8 is no token.
    """
    ids = _ids(vocab, f"{where}/{VOCAB_FILE}")
    pairs = _merges(merges, ids, f"{where}/{MERGES_FILE}", f"{where}/{VOCAB_FILE}")
    apart = {name: ids.pop(name) for name in special if name in ids}
    made = {left + right for left, right in pairs} | BYTE_OF.keys()
    if unmade := [name for name in ids if name not in made]:
        what = f"{len(unmade):,} tokens of {VOCAB_FILE} are made by no merge of {MERGES_FILE} ({_some(unmade)})"
        raise DataError(f"{where}: {what}; give the two files of one tokenizer, and name special tokens in tokenizer.special_tokens")
    if missing := sorted(value for name, value in BYTE_OF.items() if value in IN_UTF8 and name not in ids):
        some = ", ".join(f"0x{value:02X}" for value in missing[:4]) + (", …" if len(missing) > 4 else "")
        raise DataError(f"{where}/{VOCAB_FILE}: {len(missing)} of the 243 bytes of UTF-8 are no tokens ({some}), so some texts could not be written")
    return Vocabulary(ids, pairs, apart)


def written(names: Sequence[str], merges: Sequence[tuple[str, str]]) -> dict[str, bytes]:
    """The contents of the two files, by name; ids are places in ``names``."""
    vocab = json.dumps({name: i for i, name in enumerate(names)}, ensure_ascii=False, separators=(",", ":"))
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    return {VOCAB_FILE: vocab.encode("utf-8"), MERGES_FILE: ("\n".join(lines) + "\n").encode("utf-8")}


def _ids(content: bytes, where: str) -> dict[str, int]:
    try:
        ids = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is no JSON ({error}); it maps names of tokens to ids") from None
    if not isinstance(ids, dict) or not ids or not all(type(i) is int and 0 <= i <= MAX_ID for i in ids.values()):
        remedy = 'a tokenizer.json is read by name = "huggingface"' if isinstance(ids, dict) and "model" in ids else "it maps names of tokens to ids"
        raise DataError(f"{where} is no table of ids from 0 to {MAX_ID}; {remedy}")
    if len(set(ids.values())) < len(ids):
        raise DataError(f"{where}: some tokens have the same id; each has one of its own")
    return ids


def _merges(content: bytes, ids: Mapping[str, int], where: str, vocab: str) -> list[tuple[str, str]]:
    try:
        # Not splitlines(): U+0085 is a byte's character, and a line's end to it.
        lines = content.decode("utf-8").replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: byte {error.start} is not UTF-8; it has two names of tokens a line") from None
    first: dict[tuple[str, str], int] = {}
    for number, line in enumerate(lines, 1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        left, space, right = line.partition(" ")
        if not left or not space or not right or " " in right:
            raise DataError(f"{where}, line {number}: {line[:40]!r} are not two names with a space between them")
        for name in (left, right, left + right):
            if name not in ids:
                raise DataError(f"{where}, line {number}: merges {left!r} and {right!r}, and {vocab} has no {name!r}; give the two files of one tokenizer")
        if (before := first.setdefault((left, right), number)) != number:
            raise DataError(f"{where}, line {number}: the merge of line {before} again")
    return list(first)


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:4])) + (", …" if len(names) > 4 else "")
