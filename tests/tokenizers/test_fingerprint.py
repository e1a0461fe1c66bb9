from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from titanlm.errors import DataError
from titanlm.tokenizers.fingerprint import PROBES, difference, fingerprint, round_trips


@dataclass
class Fake:
    """A tokenizer as far as a fingerprint looks at it."""

    vocab_size: int = 300
    bos_id: int | None = 1
    eos_id: int | None = 2
    pad_id: int | None = None
    content: bytes = b"model"
    shift: int = 0
    refuses: str = "\x07"
    table: dict[str, Any] = field(default_factory=dict)

    def encode(self, text: str) -> np.ndarray:
        if self.refuses in text:
            raise DataError("no bell")
        return np.array([value + self.shift * (value == 0x7B) for value in text.encode()], dtype=np.int32)

    def decode(self, ids: Any) -> str:
        return bytes(ids).decode()

    def files(self) -> dict[str, bytes]:
        return {"a.model": self.content}


def made(**settings: Any) -> str:
    return fingerprint("fake", Fake(**settings), pattern=settings.get("table"))


def test_holds_what_decides_ids() -> None:
    tables = json.loads(made())
    assert tables == {
        "name": "fake",
        "files": {"a.model": hashlib.sha256(b"model").hexdigest()},
        "vocab_size": 300,
        "bos_id": 1,
        "eos_id": 2,
        "pad_id": None,
        "settings": {"pattern": None},
        "probes": [None if "\x07" in probe else list(probe.encode()) for probe in PROBES],
    }
    assert made() == made()
    assert "\n" not in made()
    assert ", " not in made()


def test_the_probes_are_those_of_stored_checkpoints() -> None:
    """Other probes would refuse every checkpoint there is."""
    assert hashlib.sha256("\0".join(PROBES).encode()).hexdigest() == "ef1af9a06000669bb2b6322c53158647447f34bf0541c2c3fdd59eebcaa6367d"


@pytest.mark.parametrize(
    ("settings", "lines"),
    [
        ({}, []),
        ({"vocab_size": 301}, ["vocabulary size: 300 → 301"]),
        ({"bos_id": None, "eos_id": 5, "pad_id": 5}, ["BOS id: 1 → none", "EOS id: 2 → 5", "PAD id: none → 5"]),
        ({"content": b"other"}, [f"sha256 of a.model: {hashlib.sha256(b'model').hexdigest()[:12]}… → {hashlib.sha256(b'other').hexdigest()[:12]}…"]),
        ({"table": {"x": 1}}, ['setting pattern: none → {"x": 1}']),
        (
            {"shift": 1},
            [
                "ids of \"def f(x):\\n    return {'a': x ** 2}  # co…\": "
                "46 ids, from the 22.: 123, 39, 97, 39, 58, 32, … → 46 ids, from the 22.: 124, 39, 97, 39, 58, 32, …"
            ],
        ),
    ],
)
def test_difference_in_words(settings: dict[str, Any], lines: list[str]) -> None:
    assert difference(made(), made(**settings)) == lines


def test_difference_of_types_and_of_refusals() -> None:
    now = fingerprint("other", Fake(refuses="\x00"), pattern=None)
    assert difference(made(), now) == ["type: fake → other"]  # both refuse the probe with NUL and BEL
    (line,) = difference(made(), made(refuses="fox"))[:1]
    assert line == "ids of 'The quick brown fox jumps over the lazy …': 62 ids: 84, 104, 101, 32, 113, 117, … → refused"


@pytest.mark.parametrize(
    "strange",
    [
        "byte: 257", "", "{", "[]", "1", "[" * 100_000, '{"name": 1}',
        made().replace("[84", "[[84").replace("46],", "46]],"),
        made().replace('"probes":[', '"probes":3,"x":['),
        made().replace('"vocab_size":300', '"vocab_size":{"a":[1]}'),
    ],
)  # fmt: skip
def test_opaque_and_hostile_fingerprints_are_shown_in_one_line(strange: str) -> None:
    assert difference(strange, strange) == []
    for lines in (difference(strange, made()), difference(made(), strange)):
        assert lines
        assert all("\n" not in line and len(line) < 300 for line in lines)


def test_difference_obeys_no_terminal_sequences() -> None:
    evil = made().replace('"fake"', '"\\u001b[31mfake"').replace("a.model", "\\u001b]0;x")
    assert "\x1b" not in "".join(difference(evil, made()) + difference("\x1b[2J", made()))


def test_any_other_text_is_a_difference() -> None:
    assert difference(made(), made().replace('"settings"', '"more":1,"settings"')) != []


def test_round_trips() -> None:
    assert round_trips(Fake(), "plain")  # type: ignore[arg-type]
    assert not round_trips(Fake(), "\x07")  # type: ignore[arg-type]
    assert not round_trips(Fake(shift=1), "{")  # type: ignore[arg-type]
