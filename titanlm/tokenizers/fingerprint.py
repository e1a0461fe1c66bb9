"""What identifies a tokenizer, and what to say when two differ.

A model knows ids, not text: with another tokenizer its weights mean nothing,
and nothing crashes. So checkpoints and artifacts store a fingerprint, and it
is compared before they are used. A hash of the file is not enough: a library's
next version may cut the same file's text otherwise. Hence the ids of a few
probes, which also make a difference readable.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from titanlm.errors import DataError
from titanlm.loggers.text import printable
from titanlm.registry import Tokenizer

# Never change: the ids of these are stored in checkpoints.
PROBES = (
    "The quick brown fox jumps over the lazy dog, 1234567890 times.",
    "  two leading spaces and two trailing  ",
    "a\ttab,  double spaces,   triple\n\nand newlines\r\n",
    "def f(x):\n    return {'a': x ** 2}  # comment\n",
    "\ud55c\uad6d\uc5b4 \ubb38\uc7a5, \u65e5\u672c\u8a9e\u3068\u4e2d\u6587\u3002",
    "\U0001f600\U0001f469\u200d\U0001f469\u200d\U0001f467 \u00e9 e\u0301 \ufb01 \u2460 \uff21 \u00a0\u3000",
    "\x00\x07\ufeff\ufffd\ufdd0\u2581\u2585",
    "<s></s><unk><0x41><pad>",
)
_PLAIN = {"name": "type", "vocab_size": "vocabulary size", "bos_id": "BOS id", "eos_id": "EOS id", "pad_id": "PAD id"}


def fingerprint(name: str, tokenizer: Any, **settings: Any) -> str:
    """Compact JSON that changes whenever any text would get other ids.

    ``tokenizer`` is one that has all but its fingerprint, ``name`` its
    registered name; ``settings`` are those that decide ids and are in no file. Of each file there is the sha256, of each probe the ids, or
    null where the tokenizer refuses it.
    """
    tables = {
        "name": name,
        "files": {file: hashlib.sha256(content).hexdigest() for file, content in tokenizer.files().items()},
        "vocab_size": tokenizer.vocab_size,
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
        "pad_id": getattr(tokenizer, "pad_id", None),
        "settings": settings,
        "probes": [_ids(tokenizer, probe) for probe in PROBES],
    }
    return json.dumps(tables, separators=(",", ":"))


def difference(saved: str, now: str) -> list[str]:
    """How two fingerprints differ, a line each difference, "before → after"; empty when they are the same.

    Fingerprints of outside tokenizers may be any text and are then shown as they are.
    """
    if saved == now:
        return []
    a, b = _parsed(saved), _parsed(now)
    if a is None or b is None:
        return [f"fingerprint: {_short(saved)} → {_short(now)}"]
    lines = [f"{what}: {_value(a[key])} → {_value(b[key])}" for key, what in _PLAIN.items() if a[key] != b[key]]
    for table, what in (("files", "sha256 of"), ("settings", "setting")):
        for key in dict.fromkeys([*a[table], *b[table]]):
            before, after = a[table].get(key), b[table].get(key)
            if before != after:
                lines.append(f"{what} {_short(str(key))}: {_value(before)} → {_value(after)}")
    for probe, before, after in zip(PROBES, a["probes"], b["probes"]):
        if before != after:
            at = next((i for i, (x, y) in enumerate(zip(before or [], after or [])) if x != y), min(len(before or []), len(after or [])))
            lines.append(f"ids of {_quoted(probe)}: {_some(before, at)} → {_some(after, at)}")
    return lines or [f"fingerprint: {_short(saved)} → {_short(now)}"]


def round_trips(tokenizer: Tokenizer, text: str) -> bool:
    """Whether a text comes back; a text that is refused does not."""
    try:
        return tokenizer.decode(tokenizer.encode(text).tolist()) == text
    except DataError:
        return False


def _ids(tokenizer: Any, text: str) -> list[int] | None:
    try:
        return tokenizer.encode(text).tolist()
    except DataError:
        return None


def _parsed(text: str) -> dict[str, Any] | None:
    """The tables of one of our fingerprints; None for any other text, such as a stranger's artifact may hold."""
    try:
        tables = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(tables, dict) or not {*_PLAIN, "files", "settings", "probes"} <= tables.keys():
        return None
    probes = tables["probes"]
    lists = isinstance(probes, list) and all(ids is None or isinstance(ids, list) for ids in probes)
    return tables if lists and isinstance(tables["files"], Mapping) and isinstance(tables["settings"], Mapping) else None


def _short(text: str, limit: int = 40) -> str:
    return printable(text if len(text) <= limit else f"{text[:limit]}…").replace("\n", "\\n")


def _quoted(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:40]}…")


def _value(value: Any) -> str:
    if value is None:
        return "none"
    text = value if isinstance(value, str) else json.dumps(value)
    return _short(text, 12 if len(text) == 64 else 40)  # a hash needs no more


def _some(ids: list[int] | None, at: int) -> str:
    """A few ids, from the first that differs."""
    if ids is None:
        return "refused"
    shown = ", ".join(_short(str(i), 12) for i in ids[at : at + 6])
    return f"{len(ids)} ids{f', from the {at + 1}.' if at else ''}: {shown}{', …' if len(ids) > at + 6 else ''}"
