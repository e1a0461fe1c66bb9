"""One Parquet file for training and validation: ``text``, and beside it ``source``, ``score`` and ``num_tokens`` or some of them.

What is read is compared with the table itself, filtered and split here by the rules in the docs.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from titanlm.batch import IGNORE, Batch
from titanlm.data import Loader, validation_batches
from titanlm.errors import DataError
from titanlm.progress import Phase
from titanlm.registry import Component
from titanlm.stream import Stream, build_streams

SEQ_LEN, FRACTION, BOUNDARY = 32, 0.05, 256
SCORE_3_5 = Component.named("filter", "min_score", score=3.5)
TOKENS_1000 = Component.named("filter", "min_tokens", tokens=1000, column="num_tokens")


def held_out(text: str) -> bool:
    return int.from_bytes(hashlib.sha256(b"titanlm validation\0" + text.encode()).digest()[:8], "big") < FRACTION * 2**64


def rows(n: int, seed: int = 0) -> list[dict[str, Any]]:
    """From shorter than a row of the model to many times as long; every tenth text is there twice, with another score."""
    draw = random.Random(seed)
    found: list[dict[str, Any]] = []
    for number in range(n):
        text = found[draw.randrange(number)]["text"] if number % 10 == 9 else f"{number} " + "größe " * draw.choice((0, 1, 2, 5, 20, 60))
        score, n_tokens = draw.choice((None, 3.49, 3.5, 4.0, 2.0)), draw.choice((None, 999, 1000, 5000))
        found.append({"text": text, "source": draw.choice(("web", "books")), "score": score, "num_tokens": n_tokens})
    return found


def write(path: Path, table: list[dict[str, Any]], group: int = 1000) -> Path:
    parquet.write_table(pa.Table.from_pylist(table), path, row_group_size=group)
    return path


def streams(
    *paths: Path, split: str = "train", n_streams: int = 4, packer: str = "concat", filters: tuple[Component, ...] = (), **settings: Any
) -> list[Stream]:
    dataset = Component.named("dataset", "parquet", paths=tuple(map(str, paths)), filter=filters, **{"validation_fraction": FRACTION} | settings)
    tokenizer = Component.named("tokenizer", "byte").build()
    epochs = 1 if split == "train" else None
    return build_streams(dataset, Component.named("packer", packer), tokenizer, split=split, n_streams=n_streams, seed=3, seq_len=SEQ_LEN, epochs=epochs)


def texts(*paths: Path, **settings: Any) -> Counter[str]:
    """The documents of one pass, before they are packed."""
    return Counter(bytes(document.ids[1:-1].tolist()).decode() for stream in streams(*paths, **settings) for document in stream.dataset)


def steps(loaders: list[Loader]) -> Iterator[Batch]:
    """The micro-batches of one pass, rank by rank in each step."""
    phase = Phase(SEQ_LEN, 2, 2)
    while True:
        data = [loader.next(phase) for loader in loaders]
        if all(step.exhausted for step in data):
            return
        for loader, step in zip(loaders, data, strict=True):
            loader.commit()
            yield from step.micro_batches


def predicted(batches: Iterator[Batch]) -> Counter[str]:
    """Documents out of the labels of packed rows: all their ids but the first. Their pieces come in order."""
    found: dict[int, list[int]] = {}
    for batch in batches:
        for labels, documents in zip(batch.labels, batch.document_ids, strict=True):
            for document in dict.fromkeys(documents.tolist()):
                found.setdefault(document, []).extend(labels[(documents == document) & (labels != IGNORE)].tolist())
    assert not found.pop(-1, []), "padding has labels"
    assert all(ids[-1] == BOUNDARY for ids in found.values()), "a document lacks its end"
    return Counter(bytes(ids[:-1]).decode() for ids in found.values())


# ---------------------------------------------------------------- filters
def test_scores_and_lengths_of_the_file_decide(tmp_path: Path) -> None:
    table = rows(600)
    path = write(tmp_path / "all.parquet", table, 70)
    good = [row for row in table if row["score"] is not None and row["score"] >= 3.5]
    long = [row for row in table if row["num_tokens"] is not None and row["num_tokens"] >= 1000]
    for filters, kept in (((), table), ((SCORE_3_5,), good), ((TOKENS_1000,), long), ((SCORE_3_5, TOKENS_1000), [row for row in good if row in long])):
        assert kept
        expected = Counter(row["text"] for row in kept)
        assert texts(path, filters=filters) + texts(path, filters=filters, split="validation") == expected
        assert texts(path, filters=filters) == Counter({text: n for text, n in expected.items() if not held_out(text)}), (
            "a filter moves no row to the other split"
        )


def test_domains_of_one_file_by_its_source(tmp_path: Path) -> None:
    table = rows(900)
    path = write(tmp_path / "all.parquet", table, 70)
    for split in ("train", "validation"):
        by_source = [texts(path, split=split, filters=(Component.named("filter", "one_of", values=(source,)),)) for source in ("web", "books")]
        assert all(by_source)
        for source, found in zip(("web", "books"), by_source, strict=True):
            assert found == Counter(row["text"] for row in table if row["source"] == source and held_out(row["text"]) == (split == "validation"))
        assert by_source[0] + by_source[1] == texts(path, split=split)


@pytest.mark.parametrize("n_streams", [1, 4])
def test_a_file_without_the_columns_serves_until_a_filter_asks(tmp_path: Path, n_streams: int) -> None:
    path = write(tmp_path / "bare.parquet", [{"text": f"text {number}", "num_toks": 5} for number in range(200)])
    assert sum(texts(path, n_streams=n_streams).values()) + sum(texts(path, n_streams=n_streams, split="validation").values()) == 200
    with pytest.raises(DataError, match=r"bare\.parquet has no column 'score' \(columns: text, num_toks\); a filter asks for it"):
        texts(path, n_streams=n_streams, filters=(SCORE_3_5,))
    with pytest.raises(
        DataError, match=r"bare\.parquet has no column 'num_tokens'; did you mean 'num_toks'\? \(columns: text, num_toks\); a filter asks for it"
    ):
        texts(path, n_streams=n_streams, filters=(TOKENS_1000,))
    odd = write(tmp_path / "odd.parquet", [{"text": f"text {number}", "score": "high"} for number in range(200)])
    with pytest.raises(DataError, match=r"odd\.parquet row group 0 row \d+: filter 'min_score' finds str 'high' in column 'score', where it needs a number"):
        texts(odd, n_streams=n_streams, filters=(SCORE_3_5,))


# ---------------------------------------------------------------- the split
def test_five_in_a_hundred_are_held_out(tmp_path: Path) -> None:
    """637,270 rows would give 31,864; of 8,000 the share is within four standard deviations."""
    n = 8000
    path = write(tmp_path / "all.parquet", [{"text": f"document {number}"} for number in range(n)])
    train, validation = texts(path), texts(path, split="validation")
    assert not train.keys() & validation.keys()
    assert train + validation == Counter(f"document {number}" for number in range(n))
    assert validation == Counter(text for text in train + validation if held_out(text))
    assert abs(validation.total() / n - FRACTION) < 4 * np.sqrt(FRACTION * (1 - FRACTION) / n)
    end = [f"document {number}" for number in range(n - n // 20, n)]
    assert sum(text in train for text in end) > 0.9 * len(end), "not the last rows of the file"


def test_equal_texts_fall_on_the_same_side(tmp_path: Path) -> None:
    table = rows(2000)
    assert len({row["text"] for row in table}) < 1900
    path = write(tmp_path / "all.parquet", table, 90)
    train, validation = texts(path), texts(path, split="validation")
    assert not train.keys() & validation.keys()
    assert train + validation == Counter(row["text"] for row in table)
    assert max(validation.values()) > 1, "no text that is there twice was held out"
    cut = texts(path, max_bytes=40), texts(path, split="validation", max_bytes=40)
    whole = {text for text in train if len(text.encode()) > 40}
    assert whole
    assert sum(len(text.encode()) * n for text, n in cut[0].items()) == sum(len(text.encode()) * n for text, n in train.items()), "cut after the split"


@pytest.mark.parametrize("packer", ["concat", "best_fit", "none"])
def test_every_token_of_a_split_is_trained_on_however_it_is_read(tmp_path: Path, packer: str) -> None:
    """No document is cut short or dropped, the other split stays out, and files, row groups, streams, workers and ranks change nothing."""
    table = rows(240)
    one = write(tmp_path / "one.parquet", table, 50)
    pieces = [write(tmp_path / f"{name}.parquet", part, 9) for name, part in (("a", table[80:]), ("b", table[:80]))]
    train = Counter(row["text"] for row in table if not held_out(row["text"]))
    validation = Counter(row["text"] for row in table) - train
    assert validation
    for paths, n_streams, size, workers in (
        ((one,), 1, 1, 0),
        ((one,), 4, 1, 2),
        ((one,), 4, 2, 0),
        (tuple(pieces), 8, 4, 0),
        (tuple(reversed(pieces)), 4, 2, 1),
    ):
        loaders = [Loader(streams(*paths, n_streams=n_streams, packer=packer), world_size=size, rank=rank, workers=workers) for rank in range(size)]
        try:
            assert predicted(steps(loaders)) == train
        finally:
            for loader in loaders:
                loader.close()
        scored = validation_batches(streams(*paths, split="validation", n_streams=1, packer=packer), SEQ_LEN, 3)
        assert predicted(scored) == validation
