"""How files of byte-level tokenizers write bytes: GPT-2's characters, one for each."""

from __future__ import annotations

_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = sorted({*range(256)} - {*_PRINTABLE})
BYTE_OF = {chr(value): value for value in _PRINTABLE} | {chr(256 + i): value for i, value in enumerate(_OTHERS)}
"""Character → byte: printable Latin-1 is itself, the other 68 bytes are U+0100 and on, in order."""
IN_UTF8 = frozenset((*range(0xC0), *range(0xC2, 0xF5)))
"""The 243 bytes that UTF-8 text can have."""


def bytes_of(name: str) -> bytes:
    """The bytes that a token's name stands for; of a name that is not written so, its UTF-8, as the `tokenizers` library has it."""
    if all(character in BYTE_OF for character in name):
        return bytes(BYTE_OF[character] for character in name)
    return name.encode("utf-8")
