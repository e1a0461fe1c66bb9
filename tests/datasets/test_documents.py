from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from titanlm.datasets.documents import INDEX_BITS, TextDocuments, held_out, order, shared
from titanlm.errors import DataError
from titanlm.registry import Component, register


@dataclass(frozen=True)
class MaxLengthConfig:
    length: int


@register("filter", "documents_test_max_length")
class MaxLength:
    def __init__(self, config: MaxLengthConfig) -> None:
        self.length = config.length

    def keep(self, row) -> bool:
        return len(row["text"]) <= self.length


class ListRows:
    name = "dataset 'list'"
    fingerprint = "list"

    def __init__(self, texts):
        self.texts = texts

    def __len__(self):
        return len(self.texts)

    def row(self, index):
        return {"text": self.texts[index], "place": f"row {index}"}


def stream(texts, number=0, n_streams=1, split="train", **settings):
    tokenizer = Component.named("tokenizer", "byte").build()
    return TextDocuments(ListRows(texts), tokenizer=tokenizer, split=split, stream=number, n_streams=n_streams, seed=3, **settings)


def text_of(document) -> str:
    return bytes(document.ids[1:-1].astype(np.uint8)).decode()


TEXTS = [f"text {i}" for i in range(10)]


def test_documents_carry_special_ids_bytes_and_unique_ids():
    first, second = islice(stream(["añ"]), 2)
    assert first.ids.tolist() == [256, *"añ".encode(), 256]
    assert first.ids.dtype == np.int32
    assert not first.ids.flags.writeable
    assert (first.n_bytes, first.document_id, second.document_id) == (3, 0, 1 << INDEX_BITS)


@pytest.mark.parametrize("n_streams", [1, 3, 4, 10, 16])
@pytest.mark.parametrize("shuffle", [True, False])
def test_streams_together_hold_every_epoch_once(n_streams, shuffle):
    per_stream = 20 * 10 // n_streams  # 20 epochs or a little less
    documents = [one for s in range(n_streams) for one in islice(stream(TEXTS, s, n_streams, shuffle=shuffle), per_stream)]
    assert sorted(one.document_id >> INDEX_BITS for one in documents) == list(range(n_streams * per_stream))
    by_epoch: dict[int, list[str]] = {}
    for one in sorted(documents, key=lambda one: one.document_id):
        by_epoch.setdefault((one.document_id >> INDEX_BITS) // 10, []).append(text_of(one))
    whole = [texts for texts in by_epoch.values() if len(texts) == 10]
    assert len(whole) >= 16
    assert all(sorted(texts) == TEXTS for texts in whole)
    assert (len({tuple(texts) for texts in whole}) > 10) == shuffle


def test_other_splits_are_one_pass_in_order():
    assert [text_of(one) for one in stream(TEXTS, split="validation")] == TEXTS
    halves = [[text_of(one) for one in stream(TEXTS, s, 2, split="validation")] for s in (0, 1)]
    assert halves == [TEXTS[0::2], TEXTS[1::2]]
    assert list(stream(TEXTS, 12, 16, split="validation")) == []


def test_order_is_a_permutation_that_depends_on_seed_and_epoch():
    drawn = {tuple(order(seed, epoch, 50).tolist()) for seed in range(3) for epoch in range(3)}
    assert len(drawn) == 9
    assert all(sorted(permutation) == list(range(50)) for permutation in drawn)
    # Fixed for good: a resumed run on another numpy must go on in the same order.
    assert order(0, 0, 8).tolist() == np.argsort(np.random.Philox(np.random.SeedSequence((0, 0))).random_raw(8)).tolist()
    assert order(0, 0, 8) is order(0, 0, 8)


def test_empty_and_filtered_rows_are_passed_over_and_counted():
    texts = ["ok", "", None, " \n\t", "far too long", "fine"]
    short = Component.named("filter", "documents_test_max_length", length=5)
    one = stream(texts, split="validation", filters=(short,))
    assert [text_of(document) for document in one] == ["ok", "fine"]
    assert one.state() == {
        "taken": 6,
        "row": 0,
        "index": 0,
        "emitted": 0,
        "n_shards": 6,
        "unreadable": [],
        "counts": {"documents": 2, "empty": 3, "filtered": 1, "unreadable": 0},
    }
    assert list(one.texts()) == ["ok", "fine"]


def test_resumes_at_every_point():
    texts = [*TEXTS, "", None]
    straight = [(one.document_id, text_of(one)) for one in islice(stream(texts, 1, 3), 30)]
    for cut in range(30):
        first = stream(texts, 1, 3)
        list(islice(first, cut))
        second = stream(texts, 1, 3)
        second.restore(first.state())
        assert [(one.document_id, text_of(one)) for one in islice(second, 30 - cut)] == straight[cut:]
        assert second.state()["counts"]["documents"] == 30


def test_a_state_of_other_data_is_refused():
    with pytest.raises(DataError, match="has 9 rows, but the state to resume was of 10"):
        stream(TEXTS[:9]).restore(stream(TEXTS).state())


def test_nothing_but_empty_or_filtered_rows_is_an_error_and_no_endless_loop():
    with pytest.raises(DataError, match="all 3 rows that stream 0 of 1 reads are empty"):
        next(stream(["", " ", None]))
    nothing = Component.named("filter", "documents_test_max_length", length=0)
    with pytest.raises(DataError, match=r"all 10 rows .* refused by dataset\.filter"):
        next(stream(TEXTS, 3, 64, filters=(nothing,)))
    # Unshuffled, stream 1 of 4 meets row 1 only, in every epoch.
    with pytest.raises(DataError, match="all 1 rows that stream 1 of 4"):
        next(stream(["a", "", "b", "c"], 1, 4, shuffle=False))


def test_one_good_row_among_many_is_found_for_every_stream():
    texts = ["", *[None] * 30, "here"]
    for number in range(8):
        assert {text_of(one) for one in islice(stream(texts, number, 8), 5)} == {"here"}


def test_a_text_that_cannot_be_tokenised_names_its_source():
    with pytest.raises(DataError, match=r"row 0 \(document 0\): .*surrogate"):
        next(stream(["\ud800"]))


def test_held_out_is_a_share_that_only_grows():
    keys = [str(i).encode() for i in range(4000)]
    at = {fraction: {key for key in keys if held_out(key, fraction)} for fraction in (0.0, 0.05, 0.2, 1.0)}
    assert (len(at[0.0]), len(at[1.0])) == (0, 4000)
    assert 150 < len(at[0.05]) < 250
    assert at[0.05] < at[0.2]


def test_listings_are_shared_while_in_use_only(tmp_path: Path):
    built = Counter()

    class Listing:
        pass

    def build():
        built["n"] += 1
        return Listing()

    first = shared(("test", tmp_path), build)
    assert shared(("test", tmp_path), build) is first
    assert built["n"] == 1
    del first
    shared(("test", tmp_path), build)
    assert built["n"] == 2
