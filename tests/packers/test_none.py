from __future__ import annotations

import numpy as np

from titanlm.batch import IGNORE, Document
from titanlm.packers.boundaries import finish, mark
from titanlm.registry import Component


def packer_with(*lengths: int):
    """Document n has the ids 100·n + 0, 1, 2...; an id stands for as many bytes as its place."""
    packer = Component.named("packer", "none").build(seq_len=4)
    for number, length in enumerate(lengths, start=1):
        places = np.arange(length, dtype=np.int32)
        packer.add(Document(places + 100 * number, number, 0), mark(places))
    return packer


def all_rows(packer, seq_len: int) -> list:
    rows = []
    while (row := packer.pop(seq_len)) is not None:
        rows.append(finish(row, document_mask=True))
    assert packer.flush(seq_len) is None
    return rows


def test_every_document_begins_a_row_and_a_long_one_goes_on_in_the_next() -> None:
    first, second, third, fourth = all_rows(packer_with(2, 6, 1, 5), 4)
    assert first.tokens.tolist() == [100, 101, 0, 0]
    assert first.labels.tolist() == [101, IGNORE, IGNORE, IGNORE]
    assert first.document_ids.tolist() == [1, 1, -1, -1]
    assert second.tokens.tolist() == [200, 201, 202, 203]
    assert second.labels.tolist() == [201, 202, 203, 204]
    assert third.tokens.tolist() == [204, 205, 0, 0]
    assert third.labels.tolist() == [205, IGNORE, IGNORE, IGNORE]
    assert third.positions.tolist()[:2] == [0, 1]
    assert third.target_bytes.tolist() == [5, 0, 0, 0]
    # One more id than positions: the last is a label alone and needs no row. The document of one id had none.
    assert fourth.tokens.tolist() == [400, 401, 402, 403]
    assert fourth.labels.tolist() == [401, 402, 403, 404]


def test_the_row_length_may_change_inside_a_document() -> None:
    packer = packer_with(12)
    rows = [packer.pop(seq_len) for seq_len in (3, 6, 4)]
    assert [row.tokens.tolist() for row in rows] == [[100, 101, 102], [103, 104, 105, 106, 107, 108], [109, 110, 111, 0]]
    assert [row.labels.tolist() for row in rows] == [[101, 102, 103], [104, 105, 106, 107, 108, 109], [110, 111, IGNORE, IGNORE]]


def test_nothing_waits_for_other_documents() -> None:
    packer = packer_with()
    assert packer.pop(4) is None
    packer.add(Document(np.array([1, 2], dtype=np.int32), 1, 0), mark(np.array([1, 1], dtype=np.int32)))
    assert packer.pop(4) is not None
    assert packer.pop(4) is None
