"""Sliding rows against a loop over windows of the whole text, one target after the other."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from titanlm.batch import IGNORE, Document, Row
from titanlm.errors import DataError
from titanlm.packers.boundaries import finish, mark
from titanlm.registry import Component

LENGTHS = (6, 1, 9, 0, 3, 14, 1, 1, 40, 2, 7)


def packer(seq_len: int, **settings):
    return Component.named("packer", "sliding", **settings).build(seq_len=seq_len)


def documents(*lengths: int) -> list[Document]:
    """Document n has the ids 100·n + 0, 1, 2...; each stands for as many bytes as its place. Every fifth id is not trained on."""
    places = [np.arange(length, dtype=np.int32) for length in lengths]
    return [Document(one + 100 * number, number, None, (one + 1) % 5 != 0) for number, one in enumerate(places, start=1)]


def rows_of(one, given: list[Document], seq_len: int) -> list[Row]:
    """As a stream asks for them: documents one at a time, when there is no row."""
    remaining = iter(given)
    rows: list[Row] = []
    while True:
        while (row := one.pop(seq_len)) is None:
            document = next(remaining, None)
            if document is None:
                break
            one.add(document, mark(document.ids % 100, document.trained))
        row = row or one.flush(seq_len)
        if row is None:
            return rows
        rows.append(row)


def expected(given: list[Document], seq_len: int, stride: int, *, document_mask: bool, drop_tail: bool) -> list[list[tuple]]:
    """(token, label, position, document, bytes) of every window ws = 0, stride, ... with ws + T − stride < N, from T − stride on scored."""
    text = [(int(id), place, document) for document in given for place, id in enumerate(document.ids)]
    n_targets = len(text) - 1
    if drop_tail:
        n_targets = n_targets // seq_len * seq_len
    rows = []
    for start in range(0, n_targets, stride):
        if start and start + seq_len - stride >= n_targets:
            break
        row: list[tuple] = []
        for at in range(start, start + seq_len):
            if at >= len(text):
                row.append((0, IGNORE, None, -1, 0))
                continue
            id, place, document = text[at]
            position = min(place, at - start) if document_mask else at - start
            label, n_bytes = IGNORE, 0
            if at < n_targets and (start == 0 or at >= start + seq_len - stride):
                target, target_place, target_document = text[at + 1]
                trained = target_document.trained
                assert trained is not None
                if (target_place or not document_mask) and trained[target_place]:
                    label, n_bytes = target, target_place
            row.append((id, label, position, document.document_id, n_bytes))
        rows.append(row)
    return rows


def shown(row: Row, document_mask: bool) -> list[tuple]:
    row = finish(row, document_mask=document_mask)
    columns = (row.tokens, row.labels, row.positions, row.document_ids, row.target_bytes)
    values = zip(*(column.tolist() for column in columns), strict=True)
    return [(token, label, None if document < 0 else position, document, n_bytes) for token, label, position, document, n_bytes in values]


@pytest.mark.parametrize("document_mask", [True, False])
@pytest.mark.parametrize(
    ("seq_len", "stride", "drop_tail"),
    [
        *((8, stride, False) for stride in (1, 2, 3, 7, 8, None)),
        *((8, stride, True) for stride in (1, 2, 8, None)),
        *((seq_len, stride, drop_tail) for seq_len, stride in ((1, 1), (80, 16), (100, 10)) for drop_tail in (False, True)),
    ],
)
def test_rows_are_the_windows_of_the_rule(seq_len: int, stride: int | None, drop_tail: bool, document_mask: bool) -> None:
    given = documents(*LENGTHS)
    if drop_tail and seq_len > 80:
        with pytest.raises(DataError, match=r"packer\.drop_tail: all 84 tokens are a tail"):
            rows_of(packer(seq_len, stride=stride, drop_tail=True), given, seq_len)
        return
    rows = rows_of(packer(seq_len, stride=stride, drop_tail=drop_tail), given, seq_len)
    assert [shown(row, document_mask) for row in rows] == expected(given, seq_len, stride or seq_len, document_mask=document_mask, drop_tail=drop_tail)
    assert all(len(getattr(row, name)) == seq_len for row in rows for name in ("tokens", "labels", "positions", "document_ids", "target_bytes"))
    assert all((row.target_bytes[row.labels == IGNORE] == 0).all() for row in rows)


@pytest.mark.parametrize("document_mask", [True, False])
@pytest.mark.parametrize("stride", [1, 5, 32, None])
def test_targets_are_those_of_concat(stride: int | None, document_mask: bool) -> None:
    lengths = np.random.default_rng(0).integers(1, 90, size=40)
    given = documents(*lengths.tolist())

    def targets(rows: list[Row]) -> tuple[list[int], int]:
        done = [finish(row, document_mask=document_mask) for row in rows]
        return [label for row in done for label in row.labels[row.labels != IGNORE].tolist()], sum(int(row.target_bytes.sum()) for row in done)

    concat = Component.named("packer", "concat").build(seq_len=32)
    assert targets(rows_of(packer(32, stride=stride), given, 32)) == targets(rows_of(concat, given, 32))


@pytest.mark.parametrize("n_targets", [2048, 2049, 2111, 2112, 2113, 5000, 6144])
def test_b17_no_target_is_scored_twice_at_the_end(n_targets: int) -> None:
    """The first sliding scores kept every window with 64 targets left, so that 31 of them scored the last 64 again."""
    seq_len, stride = 2048, 64
    old = [min(start + seq_len, n_targets) for start in range(0, n_targets, stride) if n_targets - start >= stride]
    again = sum(end == n_targets for end in old) - 1
    given = [Document(np.arange(n_targets + 1, dtype=np.int32), 1, None)]
    rows = rows_of(packer(seq_len, stride=stride), given, seq_len)
    assert np.concatenate([row.labels[row.labels != IGNORE] for row in rows]).tolist() == list(range(1, n_targets + 1))
    assert len(rows) == 1 + -(-(n_targets - seq_len) // stride)
    if n_targets % stride == 0:
        assert len(rows) == len(old) - again
        assert again == seq_len // stride - 1 == 31


def test_a_row_waits_until_no_tail_can_take_it() -> None:
    one, given = packer(8, stride=2, drop_tail=True), []
    for n_ids in range(1, 34):
        one.add(Document(np.array([n_ids - 1], dtype=np.int32), n_ids, None), mark(np.ones(1, dtype=np.int32)))
        while (row := one.pop(8)) is not None:
            given.append((n_ids, int(row.tokens[0])))
    assert given == [(9, 0), *((n_ids, start) for n_ids in (17, 25, 33) for start in range(n_ids - 15, n_ids - 8, 2))]
    assert one.flush(8) is None


@pytest.mark.parametrize("drop_tail", [True, False])
@pytest.mark.parametrize("stride", [2, 8])
def test_resume_at_every_row(stride: int, drop_tail: bool) -> None:
    given = documents(*LENGTHS)
    straight = rows_of(packer(8, stride=stride, drop_tail=drop_tail), given, 8)
    for cut in range(len(straight)):
        one, remaining = packer(8, stride=stride, drop_tail=drop_tail), iter(given)
        rows = 0
        while rows < cut:
            if one.pop(8) is not None:
                rows += 1
                continue
            document = next(remaining)
            one.add(document, mark(document.ids % 100, document.trained))
        state = one.state()
        kept = copy.deepcopy(state)
        rest = list(remaining)
        ahead = rows_of(one, rest, 8)
        assert all(np.array_equal(state[name], kept[name]) for name in kept), "what a state refers to must not change"
        other = packer(8, stride=stride, drop_tail=drop_tail)
        other.restore({name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in kept.items()})
        again = rows_of(other, rest, 8)
        assert [shown(row, True) for row in again] == [shown(row, True) for row in ahead] == [shown(row, True) for row in straight[cut:]]


def test_a_state_holds_no_more_than_a_row_needs() -> None:
    one = packer(8, stride=2)
    document = documents(1000)[0]
    one.add(document, mark(document.ids % 100))
    for _ in range(400):
        one.pop(8)
    state = one.state()
    assert len(state["ids"]) == 1000 - 399 * 2
    assert np.shares_memory(state["ids"], document.ids) or state["ids"].base is not None


def test_a_state_whose_parts_do_not_fit_is_refused() -> None:
    one = packer(8, stride=2)
    one.add(documents(20)[0], mark(np.zeros(20, dtype=np.int32)))
    one.pop(8)
    state = one.state()
    for change in ({"ids": state["ids"][1:]}, {"scored": 21}, {"first": 9}, {"first": -1}):
        with pytest.raises(ValueError, match="do not belong together"):
            packer(8, stride=2).restore(state | change)


def test_row_length_may_change_between_pops() -> None:
    one, again = packer(8, stride=2), packer(8, stride=2)
    document = documents(200)[0]
    for packed in (one, again):
        packed.add(Document(document.ids, 1, None), mark(document.ids % 100))
    rows = [one.pop(seq_len) for seq_len in (8, 4, 2, 16, 8, 4)]
    assert np.concatenate([row.labels[row.labels != IGNORE] for row in rows]).tolist() == list(
        range(101, 101 + sum(len(row.labels[row.labels != IGNORE]) for row in rows))
    )
    for seq_len in (8, 4, 2):
        again.pop(seq_len)
    resumed = packer(8, stride=2)
    resumed.restore(again.state())  # what was left behind is not needed by a longer row either
    for row, seq_len in zip(rows[3:], (16, 8, 4), strict=True):
        assert shown(resumed.pop(seq_len), True) == shown(row, True)


def test_strides_that_do_not_suit_the_rows_are_refused() -> None:
    with pytest.raises(DataError, match=r"packer\.stride: 9 positions between rows of 8 would leave labels out"):
        packer(8, stride=9)
    with pytest.raises(DataError, match=r"packer\.stride: 3 does not divide rows of 8, as packer\.drop_tail needs"):
        packer(8, stride=3, drop_tail=True)
    with pytest.raises(DataError, match=r"packer\.stride: 8 positions between rows of 4"):
        packer(8, stride=8).pop(4)
    assert packer(8, stride=3).stride(8) == 3
    assert packer(8).stride(8) == 8
