"""What a SentencePiece model file says about itself.

The message definitions that come with sentencepiece need the protobuf package;
a few fields do not justify it. Numbers are those of sentencepiece_model.proto.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

_PIECES, _TRAINER, _NORMALIZER, _DENORMALIZER = 1, 2, 3, 5
_TYPE, _USER_DEFINED = 3, 4  # of a piece
_NAME, _CHARSMAP, _DUMMY_PREFIX, _REMOVE_EXTRA, _ESCAPE, _RULES = 1, 2, 3, 4, 5, 6
_WHITESPACE_AS_SUFFIX = 24


def changes(model: bytes) -> list[str]:
    """What the settings stored in a model do to a text before it is cut into pieces, in words; empty: nothing.

    ``model`` is one that sentencepiece has accepted.
    """
    trainer, normalizer, denormalizer = (
        dict(field for number, value in fields(model) if number == message and isinstance(value, bytes) for field in fields(value))
        for message in (_TRAINER, _NORMALIZER, _DENORMALIZER)
    )
    found = []
    if normalizer.get(_CHARSMAP) or normalizer.get(_RULES):
        name = normalizer.get(_NAME, b"")
        found.append(f"characters are normalised ({name.decode('utf-8', 'replace') if isinstance(name, bytes) and name else 'own rules'})")
    if denormalizer.get(_CHARSMAP) or denormalizer.get(_RULES):
        found.append("characters are changed when decoding")
    if normalizer.get(_DUMMY_PREFIX, 1):
        found.append("a space is put before the first word")
    if normalizer.get(_REMOVE_EXTRA, 1):
        found.append("spaces at the ends and repeated spaces are dropped")
    if not normalizer.get(_ESCAPE, 1):
        found.append("spaces are not marked")
    if trainer.get(_WHITESPACE_AS_SUFFIX, 0):
        found.append("spaces end pieces")
    return found


def is_user_defined(model: bytes, piece: int) -> bool:
    """Whether that piece (its number) is one the trainer was told to have."""
    pieces = (value for number, value in fields(model) if number == _PIECES and isinstance(value, bytes))
    found = next(itertools.islice(pieces, piece, None), b"")
    return dict(fields(found)).get(_TYPE) == _USER_DEFINED


def fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of every field of a protobuf message.

    Raises LookupError where the message ends too early or is none.
    """
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            value |= (byte & 0x7F) << shift
            at, shift = at + 1, shift + 7
            if byte < 0x80:
                return value

    while at < len(message):
        tag = varint()
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            yield number, varint()
        else:
            length = varint() if wire == 2 else {1: 8, 5: 4}[wire]
            if at + length > len(message):
                raise IndexError(f"field {number} is longer than the message")
            yield number, message[at : at + length]
            at += length
