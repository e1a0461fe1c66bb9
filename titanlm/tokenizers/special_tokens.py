"""Special tokens of tokenizers whose files have none: names and ids in the settings, never found in a text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from titanlm.errors import DataError
from titanlm.registry import did_you_mean
from titanlm.tokenizers.text import MAX_ID


def require_named(settings: Any) -> None:
    """Raise ValueError when ``bos``, ``eos`` or ``pad`` of the settings is no name of its ``special_tokens``."""
    names = settings.special_tokens
    for key in ("bos", "eos", "pad"):
        name = getattr(settings, key)
        if name is not None and name not in names:
            there = ", ".join(map(repr, names)) or "none"
            raise ValueError(f"{key}: {name!r} is not among special_tokens{did_you_mean(name, names)} (there: {there})")


def pieces_with(tokens: Mapping[int, bytes], special_tokens: Mapping[str, int]) -> list[bytes | None]:
    """The bytes of each id: of ``tokens`` theirs, none for special ones, None where there is no such id.

    Raises DataError for a special id that is taken or not 0 to MAX_ID.
    """
    taken = dict(tokens)
    for name, special in special_tokens.items():
        if not 0 <= special <= MAX_ID or special in taken:
            why = "is that of another token" if special in taken else f"is not 0 to {MAX_ID}"
            raise DataError(f"tokenizer.special_tokens: the id {special} of {name!r} {why}; the file's ids end at {max(tokens)}")
        taken[special] = b""
    return [taken.get(i) for i in range(max(taken) + 1)]
