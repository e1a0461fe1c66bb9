from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import pytest

from titanlm.batch import IGNORE, Document, Row
from titanlm.config import load
from titanlm.packers.boundaries import finish, mark
from titanlm.registry import Component


def best_fit(buffer_rows: int):
    return Component.named("packer", "best_fit", buffer_rows=buffer_rows).build(seq_len=8)


def pair(number: int, length: int) -> tuple[Document, np.ndarray]:
    """Ids 1000·number + 0, 1, 2...; each stands for one byte."""
    return Document(np.arange(length, dtype=np.int32) + 1000 * number, number, length), mark(np.ones(length, dtype=np.int32))


def packed(packer, lengths: Iterable[int], seq_len: int) -> Iterator[Row]:
    for number, length in enumerate(lengths, start=1):
        packer.add(*pair(number, length))
        while (row := packer.pop(seq_len)) is not None:
            yield row
    while (row := packer.flush(seq_len)) is not None:
        yield row


def runs(row: Row) -> list[tuple[int, int]]:
    """(document, positions) in the order of the row, padding left out."""
    edges = np.flatnonzero(np.diff(row.document_ids, prepend=-2, append=-2))
    found = [(int(row.document_ids[start]), int(end - start)) for start, end in zip(edges, edges[1:], strict=False)]
    return [(number, n) for number, n in found if number >= 0]


def efficiency(rows: Iterable[Row]) -> float:
    shares = [(row.document_ids >= 0).mean() for row in rows]
    return float(np.mean(shares))


def web_like(n: int, median: int, seed: int = 0) -> list[int]:
    """Lengths with a long tail, as on the web: the mean is twice the median."""
    draw = np.random.default_rng(seed)
    return np.maximum(1, np.exp(draw.normal(np.log(median), 1.18, size=n))).astype(int).tolist()


# ---------------------------------------------------------------- which row
def test_the_oldest_begins_and_the_longest_that_fits_follows() -> None:
    packer = best_fit(4)
    for number, length in enumerate((3, 7, 5, 2, 5, 4, 3), start=1):
        assert packer.pop(8) is None  # fewer than 4 rows wait
        packer.add(*pair(number, length))
    assert packer.flush(8) is not None
    rows = [runs(row) for row in packed(best_fit(4), (3, 7, 5, 2, 5, 4, 3), 8)]
    # 5 beside 3, the older of two; 7 alone, since nothing has one position; 2 with the other 5; then what is left.
    assert rows == [[(1, 3), (3, 5)], [(2, 7)], [(4, 2), (5, 5)], [(6, 4), (7, 3)]]


def test_a_row_needs_buffer_rows_of_waiting_ids_unless_a_document_fills_it() -> None:
    packer = best_fit(2)
    packer.add(*pair(1, 8))
    assert packer.pop(8) is None
    packer.add(*pair(2, 9))  # nine ids are eight positions and a label
    assert runs(packer.pop(8)) == [(2, 8)]
    assert packer.pop(8) is None
    packer.add(*pair(3, 8))
    assert runs(packer.pop(8)) == [(1, 8)]


def test_a_long_document_is_cut_at_once_and_its_rest_keeps_its_age() -> None:
    packer = best_fit(3)
    for number, length in ((1, 3), (2, 21), (3, 6)):
        packer.add(*pair(number, length))
    assert [runs(packer.pop(8)) for _ in range(2)] == [[(2, 8)], [(2, 8)]]
    assert packer.state()["document_ids"] == [1, 2, 3]
    assert [len(ids) for ids in packer.state()["ids"]] == [3, 5, 6]
    assert [runs(packer.flush(8)) for _ in range(2)] == [[(1, 3), (2, 5)], [(3, 6)]]


def test_what_goes_on_behind_another_document_is_no_label_of_it() -> None:
    packer = best_fit(2)
    packer.add(*pair(1, 3))
    packer.add(*pair(2, 13))
    assert runs(packer.pop(8)) == [(2, 8)]
    row = packer.flush(8)
    assert runs(row) == [(1, 3), (2, 5)]
    for document_mask in (True, False):  # 2008 was the last label of the row before
        finished = finish(row, document_mask=document_mask)
        assert finished.labels.tolist() == [1001, 1002, IGNORE, 2009, 2010, 2011, 2012, IGNORE]
        assert finished.target_bytes.tolist() == [1, 1, 0, 1, 1, 1, 1, 0]
    packer.add(*pair(3, 3))
    packer.add(*pair(4, 2))
    row = packer.flush(8)  # a document's first id is, in plain text
    assert finish(row, document_mask=False).labels.tolist()[:4] == [3001, 3002, 4000, 4001]
    assert finish(row, document_mask=True).labels.tolist()[:4] == [3001, 3002, IGNORE, 4001]


@pytest.mark.parametrize("buffer_rows", [1, 4, 16])
def test_no_document_is_cut_unless_it_is_longer_than_a_row(buffer_rows: int) -> None:
    seq_len = 64
    for seed in range(5):
        lengths = [length + 1 for length in web_like(400, 30, seed)]
        where: dict[int, list[int]] = {}
        for row in packed(best_fit(buffer_rows), lengths, seq_len):
            for number, n in runs(row):
                where.setdefault(number, []).append(n)
        assert sorted(where) == list(range(1, len(lengths) + 1))
        for number, length in enumerate(lengths, start=1):
            if length <= seq_len:
                assert where[number] == [length]
            else:
                full, rest = divmod(length - 1, seq_len)
                assert sorted(where[number], reverse=True) == [seq_len] * full + [rest + 1] * bool(rest)


def test_what_waits_is_cut_further_when_rows_become_shorter() -> None:
    packer = best_fit(2)
    for number, length in enumerate((20, 30, 20), start=1):
        packer.add(*pair(number, length))
    assert runs(packer.pop(32)) == [(1, 20)]
    rows = [packer.flush(8) for _ in range(7)]
    # The longest first, as long as there is one that fills a row.
    assert [runs(row) for row in rows] == [[(2, 8)], [(2, 8)], [(3, 8)], [(2, 8)], [(3, 8)], [(2, 6)], [(3, 4)]]
    labels = sorted(label for row in rows for label in finish(row, document_mask=True).labels.tolist() if label != IGNORE)
    assert labels == [2000 + place for place in range(1, 30)] + [3000 + place for place in range(1, 20)]
    assert packer.flush(8) is None


# ---------------------------------------------------------------- what it holds
@pytest.mark.parametrize("lengths", [[5] + [17] * 200, [5, 3] + [18] * 200, web_like(400, 30)], ids=["no rest", "small rests", "web"])
def test_nothing_waits_for_ever(lengths: list[int]) -> None:
    """Of ``buffer_rows + 1`` consecutive rows one is of the oldest piece, whatever else arrives."""
    buffer_rows, seq_len = 3, 8
    packer, since = best_fit(buffer_rows), 0
    for number, length in enumerate(lengths, start=1):
        packer.add(*pair(number, length))
        while packer.state()["document_ids"]:
            oldest = packer.state()["document_ids"][0]
            row = packer.pop(seq_len)
            if row is None:
                break
            since = 0 if runs(row)[0][0] == oldest else since + 1
            assert since <= buffer_rows


def test_what_waits_is_bounded() -> None:
    buffer_rows, seq_len, lengths = 4, 32, web_like(500, 40)
    packer, most = best_fit(buffer_rows), 0
    for number, length in enumerate(lengths, start=1):
        packer.add(*pair(number, length))
        most = max(most, sum(len(ids) for ids in packer.state()["ids"]))
        while packer.pop(seq_len) is not None:
            pass
        assert sum(len(ids) for ids in packer.state()["ids"]) < buffer_rows * seq_len
    assert most < buffer_rows * seq_len + max(lengths)


def test_it_packs_tightly_and_more_so_with_more_to_choose_from() -> None:
    seq_len, lengths = 256, web_like(4000, 100)
    shares = [efficiency(packed(best_fit(buffer_rows), lengths, seq_len)) for buffer_rows in (1, 4, 16, 64)]
    assert shares == sorted(shares)
    assert shares[2] > 0.98
    assert shares[3] > 0.99

    # Next fit, the plainest way to keep documents whole: a new row when the next one does not fit.
    n_rows, room = 0, 0
    for length in lengths:
        full, rest = divmod(length, seq_len)
        n_rows += full
        if rest > room:
            n_rows, room = n_rows + 1, seq_len
        room -= rest
    assert sum(lengths) / (n_rows * seq_len) < 0.9


def test_it_is_chosen_in_a_config(tiny) -> None:
    assert load(tiny, ["--packer=best_fit"]).packer == Component.named("packer", "best_fit", buffer_rows=16)
    assert load(tiny, ["--packer.name=best_fit", "--packer.buffer_rows=64"]).packer.config.buffer_rows == 64
    assert load(tiny, ["--packer=none"]).packer.name == "none"
