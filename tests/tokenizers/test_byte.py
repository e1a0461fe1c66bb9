from __future__ import annotations

import numpy as np
import pytest

from titanlm.errors import DataError
from titanlm.registry import Component
from titanlm.tokenizers.rebuild import rebuild

TEXTS = ["", "plain", "  a\t\tb\n\n c \r\n", "한국어 日本語", "😀👩‍👩‍👧 e\u0301", "\x00\x01\ufeff\uffff", "\u2581"]


@pytest.fixture
def byte():
    return Component.named("tokenizer", "byte").build()


def test_ids_are_the_utf8_bytes_and_come_back(byte):
    for text in TEXTS:
        ids = byte.encode(text)
        assert ids.dtype == np.int32
        assert ids.tolist() == list(text.encode("utf-8"))
        assert byte.decode([256, *ids, 256]) == text
    assert (byte.vocab_size, byte.bos_id, byte.eos_id, byte.lossless) == (257, 256, 256, True)


def test_target_bytes_count_bytes_and_not_the_separator(byte):
    ids = np.array([256, *byte.encode("añ"), 256], dtype=np.int32)
    counted = byte.target_bytes(ids, np.array([-1, *ids[:-1]]))
    assert counted.dtype == np.int32
    assert counted.tolist() == [0, 1, 1, 1, 0]


def test_lone_surrogates_and_foreign_ids_are_errors(byte):
    with pytest.raises(DataError, match=r"character 2 .*surrogate"):
        byte.encode("ab\ud800")
    with pytest.raises(DataError, match="ids 0 to 256"):
        byte.decode([257])
    assert byte.decode([0xE2, 0x96]) == "\ufffd"


def test_rebuilds_from_no_files(byte):
    assert dict(byte.files()) == {}
    assert rebuild(Component.named("tokenizer", "byte"), {}).fingerprint == byte.fingerprint
    with pytest.raises(DataError, match="lacks the keyword `files"):
        rebuild(Component.named("tokenizer", "byte"), {"vocab": b""})
