"""What holds of every packer, against a loop over the documents."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from titanlm.batch import IGNORE, Document, Row
from titanlm.packers.boundaries import finish, mark
from titanlm.registry import Component

PACKERS = {
    "concat": Component.named("packer", "concat"),
    "best_fit": Component.named("packer", "best_fit", buffer_rows=3),
    "best_fit_1": Component.named("packer", "best_fit", buffer_rows=1),
    "none": Component.named("packer", "none"),
}
PER_DOCUMENT = 1000


def document(number: int, length: int, trained: np.ndarray | None = None) -> tuple[Document, np.ndarray]:
    """Ids 1000·number + 0, 1, 2...; an id stands for as many bytes as its place modulo 7. Both arrays are read-only."""
    ids = np.arange(length, dtype=np.int32) + PER_DOCUMENT * number
    target_bytes = mark(np.arange(length, dtype=np.int32) % 7, trained)
    ids.flags.writeable = target_bytes.flags.writeable = False
    return Document(ids, number, length, trained), target_bytes


def some_lengths(seed: int, n: int = 60, longest: int = 120) -> list[int]:
    draw = np.random.default_rng(seed)
    return np.minimum(draw.geometric(1 / 15, size=n), longest).tolist() + [1, 2, longest, 1]


def rows_of(packer, pairs, seq_lens) -> list[Row]:
    """All rows, each as long as the next of ``seq_lens``."""
    rows, left = [], list(pairs)
    for seq_len in seq_lens:
        while (row := packer.pop(seq_len)) is None:
            if not left:
                row = packer.flush(seq_len)
                break
            packer.add(*left.pop(0))
        if row is None:
            return rows
        assert {len(array) for array in vars(row).values()} == {seq_len}
        rows.append(row)
    raise AssertionError("the packer never ends")


def lengths_of_rows(seed: int, lengths: list[int]):
    draw = np.random.default_rng(seed)
    return (int(length) for length in draw.choice(lengths, size=3000))


def content(row: Row) -> tuple:
    return tuple((array.dtype.str, array.tolist()) for array in vars(row).values())


def labels_of(rows: list[Row]) -> Counter[int]:
    return Counter(label for row in rows for label in row.labels.tolist() if label != IGNORE)


@pytest.mark.parametrize("seq_lens", [[1], [2], [7], [32], [500], [32, 5, 8, 64], [3, 40]], ids=str)
@pytest.mark.parametrize("name", PACKERS)
def test_every_id_but_the_first_of_a_document_is_a_label_once(name: str, seq_lens: list[int]) -> None:
    for seed in range(4):
        lengths = some_lengths(seed)
        pairs = [document(number, length) for number, length in enumerate(lengths, start=1)]
        rows = [finish(row, document_mask=True) for row in rows_of(PACKERS[name].build(seq_len=64), pairs, lengths_of_rows(seed, seq_lens))]
        assert labels_of(rows) == Counter(PER_DOCUMENT * number + place for number, length in enumerate(lengths, start=1) for place in range(1, length))
        assert sum(int(row.target_bytes.sum()) for row in rows) == sum(place % 7 for length in lengths for place in range(length))
        for row in rows:
            there = row.document_ids >= 0
            n_tokens = int(there.sum())
            assert there[:n_tokens].all(), "padding is at the end"
            assert (row.tokens[there] // PER_DOCUMENT == row.document_ids[there]).all()
            assert (row.labels[row.labels != IGNORE] == row.tokens[row.labels != IGNORE] + 1).all()
            assert (row.target_bytes == np.where(row.labels == IGNORE, 0, row.labels % PER_DOCUMENT % 7)).all()
            # Positions are places in the document less that of the piece's first token.
            begins = np.flatnonzero(np.diff(row.document_ids[:n_tokens], prepend=-2))
            for begin, end in zip(begins, [*begins[1:], n_tokens], strict=True):
                assert (row.tokens[begin:end] == row.tokens[begin] + np.arange(end - begin)).all()
                assert (row.positions[begin:end] == np.arange(end - begin)).all()
            assert not row.tokens[~there].any()
            assert not row.target_bytes[~there].any()
            assert (row.document_ids[~there] == -1).all()
            assert (row.labels[~there] == IGNORE).all()


@pytest.mark.parametrize("name", PACKERS)
def test_as_plain_text_no_id_is_a_label_twice(name: str) -> None:
    for seed in range(4):
        lengths = some_lengths(seed)
        pairs = [document(number, length) for number, length in enumerate(lengths, start=1)]
        rows = [finish(row, document_mask=False) for row in rows_of(PACKERS[name].build(seq_len=64), pairs, lengths_of_rows(seed, [8, 32]))]
        found = labels_of(rows)
        assert max(found.values()) == 1
        everything = {PER_DOCUMENT * number + place for number, length in enumerate(lengths, start=1) for place in range(length)}
        firsts = {PER_DOCUMENT * number for number in range(1, len(lengths) + 1)}
        assert everything - firsts <= set(found) <= everything
        if name == "concat":
            assert everything - set(found) == {PER_DOCUMENT}
        assert sum(int(row.target_bytes.sum()) for row in rows) == sum(label % PER_DOCUMENT % 7 for label in found)


@pytest.mark.parametrize("name", PACKERS)
def test_ids_that_are_only_read_stay_so(name: str) -> None:
    draw = np.random.default_rng(0)
    masks = [draw.random(length) < 0.5 for length in some_lengths(0)]
    pairs = [document(number, len(mask), mask) for number, mask in enumerate(masks, start=1)]
    rows = [finish(row, document_mask=True) for row in rows_of(PACKERS[name].build(seq_len=16), pairs, lengths_of_rows(0, [16]))]
    assert labels_of(rows) == Counter(PER_DOCUMENT * number + place for number, mask in enumerate(masks, start=1) for place in np.flatnonzero(mask) if place)


@pytest.mark.parametrize("name", PACKERS)
def test_resumed_at_any_row_it_goes_on_as_it_would_have(name: str) -> None:
    pairs = [document(number, length) for number, length in enumerate(some_lengths(3), start=1)]
    seq_lens = list(lengths_of_rows(3, [8, 8, 8, 30]))
    packer, left, states, rows = PACKERS[name].build(seq_len=32), list(pairs), [], []
    while True:
        states.append((packer.state(), len(left)))
        seq_len = seq_lens[len(rows)]
        while (row := packer.pop(seq_len)) is None and left:
            packer.add(*left.pop(0))
        row = packer.flush(seq_len) if row is None else row
        if row is None:
            break
        rows.append(row)
    straight = [content(row) for row in rows]
    assert sum(bool(state["ids"]) for state, _ in states) > 10, "no buffer was in play"
    for cut, (state, n_left) in enumerate(states):
        stored = json.loads(json.dumps(state, default=np.ndarray.tolist))  # taken long before, and still as it was then
        resumed = PACKERS[name].build(seq_len=32)
        resumed.add(*document(99, 50))  # gone after restoring
        resumed.restore(stored)
        assert json.dumps(resumed.state(), default=np.ndarray.tolist) == json.dumps(state, default=np.ndarray.tolist)
        again = rows_of(resumed, pairs[len(pairs) - n_left :], seq_lens[cut:])
        assert [content(row) for row in again] == straight[cut:]


@pytest.mark.parametrize("name", PACKERS)
def test_a_state_copies_no_ids_and_a_foreign_one_is_refused(name: str) -> None:
    packer = PACKERS[name].build(seq_len=8)
    pair = document(1, 40)
    packer.add(*pair)
    packer.pop(8)
    (ids,), (target_bytes,) = packer.state()["ids"], packer.state()["target_bytes"]
    assert np.shares_memory(ids, pair[0].ids)
    assert np.shares_memory(target_bytes, pair[1])
    before = json.dumps(packer.state(), default=np.ndarray.tolist)
    for wrong in ({}, {**packer.state(), "document_ids": []}, {**packer.state(), "ids": [["x"]]}):
        with pytest.raises((KeyError, TypeError, ValueError)):
            packer.restore(wrong)
        assert json.dumps(packer.state(), default=np.ndarray.tolist) == before


@pytest.mark.parametrize("name", PACKERS)
def test_rows_have_the_dtypes_of_a_row(name: str) -> None:
    packer = PACKERS[name].build(seq_len=8)
    packer.add(*document(1, 5))
    row = packer.flush(8)
    assert [array.dtype for array in vars(row).values()] == [np.int32, np.int32, np.int32, np.int64, np.int32]
    finished = finish(row, document_mask=True)
    assert [array.dtype for array in vars(finished).values()] == [np.int64, np.int64, np.int32, np.int64, np.int32]
    assert row.tokens.tolist() == [1000, 1001, 1002, 1003, 1004, 0, 0, 0]
    assert row.labels.tolist() == [1001, 1002, 1003, 1004, *[IGNORE] * 4]
    assert row.document_ids.tolist() == [1] * 5 + [-1] * 3
    assert row.target_bytes.tolist() == [1, 2, 3, 4, 0, 0, 0, 0]
    assert row.positions.tolist() == list(range(8))
    assert packer.flush(8) is None
    assert packer.pop(8) is None
