from __future__ import annotations

import math
from decimal import Decimal

import numpy as np
import pytest

from titanlm.config import load
from titanlm.datasets.documents import TextDocuments
from titanlm.describe import describe, listing
from titanlm.errors import ConfigError, DataError
from titanlm.registry import Component


def keeps(name: str, row: dict, **settings) -> bool:
    return Component.named("filter", name, **settings).build().keep({"text": "some text", "place": "a.parquet, row 7", **row})


def test_min_score_compares_a_column_with_a_bound() -> None:
    for score, kept in ((3.49, False), (3.5, True), (4, True), (np.float32(3.5), True), (np.int64(3), False), (-1, False), (math.inf, True)):
        assert keeps("min_score", {"score": score}, score=3.5) is kept
    assert keeps("min_score", {"score": 0, "int_score": 4}, score=4.0, column="int_score")


def test_min_tokens_takes_a_column_or_counts() -> None:
    for count, kept in ((9, False), (10, True), (10.0, True), (1000, True)):
        assert keeps("min_tokens", {"token_count": count}, tokens=10, column="token_count") is kept
        assert keeps("min_tokens", {"n_tokens": count}, tokens=10) is kept


def test_one_of_compares_a_column_with_texts() -> None:
    for source, kept in (("math", True), ("code", True), ("Math", False), ("math ", False), ("web", False), ("", False), (None, False)):
        assert keeps("one_of", {"source": source}, values=("math", "code")) is kept
    assert keeps("one_of", {"source": "web", "language": "ko"}, values=("ko",), column="language")
    assert Component.named("filter", "one_of", values=("a",), column="language").build().columns == ("language",)
    with pytest.raises(DataError, match=r"^a\.parquet, row 7: filter 'one_of' finds int 3 in column 'source', where it needs text$"):
        keeps("one_of", {"source": 3}, values=("3",))
    with pytest.raises(DataError, match=r"filter 'one_of' finds no column 'domian'; did you mean 'domain'\? \(there: text, place, domain\)"):
        keeps("one_of", {"domain": "x"}, values=("x",), column="domian")


def test_a_row_without_a_value_is_refused() -> None:
    assert not keeps("min_score", {"score": None}, score=-1e9)
    assert not keeps("min_score", {"score": math.nan}, score=-1e9)
    assert not keeps("min_tokens", {"token_count": None}, tokens=1, column="token_count")


def test_they_say_which_columns_they_read() -> None:
    for settings, columns in ((("min_score", {"score": 1.0}), ("score",)), (("min_score", {"score": 1.0, "column": "edu"}), ("edu",))):
        assert Component.named("filter", settings[0], **settings[1]).build().columns == columns
    assert Component.named("filter", "min_tokens", tokens=3).build().columns == ()
    assert Component.named("filter", "min_tokens", tokens=3, column="token_count").build().columns == ("token_count",)


def test_a_missing_column_is_named_with_those_there() -> None:
    with pytest.raises(DataError) as caught:
        keeps("min_score", {"score": 1.0, "url": "x"}, score=1.0, column="scoer")
    assert str(caught.value) == (
        "a.parquet, row 7: filter 'min_score' finds no column 'scoer'; did you mean 'score'? (there: text, place, score, url); set the filter's `column`"
    )
    with pytest.raises(DataError, match=r"filter 'min_tokens' finds no column 'words' \(there: text, place, token_count\)"):
        keeps("min_tokens", {"token_count": 3}, tokens=2, column="words")


@pytest.mark.parametrize("value", ["4", True, [4.0], {"a": 1}, Decimal(4), 1j, np.bool_(True)], ids=repr)
def test_what_is_no_number_is_an_error(value: object) -> None:
    for name, column, settings in (("min_score", "score", {"score": 1.0}), ("min_tokens", "n", {"tokens": 1, "column": "n"})):
        with pytest.raises(DataError, match=rf"^a\.parquet, row 7: filter '{name}' finds .* in column '{column}', where it needs a number$"):
            keeps(name, {column: value}, **settings)


def test_a_long_value_is_not_printed_whole() -> None:
    with pytest.raises(DataError) as caught:
        keeps("min_score", {"score": "x" * 10_000}, score=1.0)
    assert len(str(caught.value)) < 200


class ScoredRows:
    """Row n is n words long and scored n / 2; every fifth has no score."""

    name = "dataset 'scored'"
    fingerprint = "scored"

    def __len__(self) -> int:
        return 20

    def row(self, index: int) -> dict:
        return {"text": "w" * index, "place": f"row {index}", "score": None if index % 5 == 0 else index / 2}


def kept_by(*filters: Component) -> list[int]:
    tokenizer = Component.named("tokenizer", "byte").build()
    documents = TextDocuments(ScoredRows(), tokenizer=tokenizer, split="validation", stream=0, n_streams=1, seed=0, filters=filters)
    return [len(document.ids) - 2 for document in documents]


def test_a_dataset_passes_over_what_they_refuse() -> None:
    score, tokens = Component.named("filter", "min_score", score=4.0), Component.named("filter", "min_tokens", tokens=12)
    scored = [n for n in range(20) if n % 5 and n >= 8]
    assert kept_by(score) == scored
    assert kept_by(tokens) == list(range(12, 20)), "BOS and EOS do not count"
    assert kept_by(score, tokens) == [n for n in scored if n >= 12]


def test_they_are_listed_described_and_chosen_in_a_config(tiny) -> None:
    assert "min_score " in listing("filter")
    assert "one_of " in listing("filter")
    assert "min_tokens " in listing("filter")
    assert "Fewest tokens kept." in describe("filter", "min_tokens")
    assert "Lowest score kept." in describe("filter", "min_score")
    chosen = load(tiny, ['--dataset.filter=[{name="min_tokens", tokens=9, column="n"}, {name="min_score", score=3}]']).dataset.config.filter
    assert chosen == (Component.named("filter", "min_tokens", tokens=9, column="n"), Component.named("filter", "min_score", score=3.0))
    with pytest.raises(ConfigError, match=r"dataset\.filter\.0\.values: empty, so no row would be kept"):
        load(tiny, ['--dataset.filter=[{name="one_of", values=[]}]'])
    with pytest.raises(ConfigError, match=r"tokens: .*greater than 0"):
        load(tiny, ['--dataset.filter=[{name="min_tokens", tokens=0}]'])
