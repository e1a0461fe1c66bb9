from __future__ import annotations

import numpy as np
import pytest

from titanlm.batch import IGNORE, Document
from titanlm.packers.boundaries import finish, mark
from titanlm.registry import Component


def document(number: int, length: int) -> tuple[Document, np.ndarray]:
    """Ids 100·number + 0, 1, 2...; each id stands for as many bytes as its place."""
    ids = np.arange(length, dtype=np.int32) + 100 * number
    return Document(ids, number, 0), mark(np.arange(length, dtype=np.int32))


def packer_with(*lengths: int):
    packer = Component.named("packer", "concat").build(seq_len=4)
    for number, length in enumerate(lengths, start=1):
        packer.add(*document(number, length))
    return packer


def test_rows_share_one_id_and_boundaries_are_masked():
    packer = packer_with(6, 3, 1)
    first = finish(packer.pop(4), document_mask=True)
    assert first.tokens.tolist() == [100, 101, 102, 103]
    assert first.labels.tolist() == [101, 102, 103, 104]
    assert first.target_bytes.tolist() == [1, 2, 3, 4]
    second = finish(packer.pop(4), document_mask=True)
    assert second.tokens.tolist() == [104, 105, 200, 201]
    assert second.labels.tolist() == [105, IGNORE, 201, 202]
    assert second.positions.tolist() == [0, 1, 0, 1]  # a piece that goes on restarts at 0
    assert second.document_ids.tolist() == [1, 1, 2, 2]
    assert second.target_bytes.tolist() == [5, 0, 1, 2]
    assert packer.pop(4) is None
    last = finish(packer.flush(4), document_mask=True)
    assert last.tokens[:2].tolist() == [202, 300]
    assert last.labels.tolist() == [IGNORE] * 4
    assert last.document_ids.tolist() == [2, 3, -1, -1]
    assert packer.flush(4) is None
    assert [array.dtype for array in (second.tokens, second.labels, second.positions, second.document_ids, second.target_bytes)] == [
        np.int64,
        np.int64,
        np.int32,
        np.int64,
        np.int32,
    ]


def test_plain_causal_keeps_labels_positions_and_byte_counts():
    packer = packer_with(6)
    ids = np.array([7, 8, 9], dtype=np.int32)
    packer.add(Document(ids, 5, 0), mark(np.array([3, 1, 1], dtype=np.int32)))
    packer.pop(4)
    row = finish(packer.pop(4), document_mask=False)
    assert row.labels.tolist() == [105, 7, 8, 9]
    assert row.positions.tolist() == [0, 1, 2, 3]
    assert row.target_bytes.tolist() == [5, 3, 1, 1]
    assert row.document_ids.tolist() == [1, 1, 5, 5]


def test_a_boundary_at_the_end_of_a_row_is_masked_too():
    packer = packer_with(4, 4)
    row = packer.pop(4)
    assert finish(row, document_mask=True).labels.tolist() == [101, 102, 103, IGNORE]
    assert finish(row, document_mask=False).labels.tolist() == [101, 102, 103, 200]


@pytest.mark.parametrize("seq_len", [1, 2, 5, 16, 100])
def test_every_id_but_the_first_of_a_document_is_a_label_once(seq_len):
    draw = np.random.default_rng(0)
    lengths = draw.integers(1, 30, size=20)
    packer = packer_with(*lengths)
    labels, n_bytes = [], 0
    while (row := packer.pop(seq_len) or packer.flush(seq_len)) is not None:
        row = finish(row, document_mask=True)
        labels += row.labels[row.labels != IGNORE].tolist()
        n_bytes += int(row.target_bytes.sum())
        assert len(row.tokens) == seq_len
        # A label is the token after, in the same document.
        assert (row.labels[row.labels != IGNORE] == row.tokens[row.labels != IGNORE] + 1).all()
    assert labels == [100 * number + i for number, length in enumerate(lengths, start=1) for i in range(1, length)]
    assert n_bytes == sum(length * (length - 1) // 2 for length in lengths)


def test_row_length_may_change_between_pops():
    lengths = (9, 7, 12, 5)
    whole = packer_with(*lengths)
    long = whole.pop(24)
    packer = packer_with(*lengths)
    rows = [packer.pop(seq_len) for seq_len in (4, 8, 2, 10)]
    assert np.concatenate([row.tokens for row in rows]).tolist() == long.tokens.tolist()
    assert np.concatenate([row.labels for row in rows]).tolist() == long.labels.tolist()


def test_state_refers_to_the_documents_and_restores_them():
    packer = packer_with(9, 7)
    packer.pop(4)
    state = packer.state()
    assert np.shares_memory(state["ids"][0], state["ids"][0].base)
    assert state["ids"][0].base is not None  # a view, no copy
    before = [array.copy() for array in state["ids"]]
    straight = [packer.pop(4) for _ in range(2)]
    assert all((left == right).all() for left, right in zip(before, state["ids"], strict=True))
    other = packer_with()
    other.restore(state)
    for row in straight:
        again = other.pop(4)
        assert again.tokens.tolist() == row.tokens.tolist()
        assert again.target_bytes.tolist() == row.target_bytes.tolist()
        assert again.document_ids.tolist() == row.document_ids.tolist()
