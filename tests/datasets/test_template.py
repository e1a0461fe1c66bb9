"""Text out of several columns, of parquet and of jsonl: what is read is held against ``str.format`` and against files that have the text made beforehand."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from titanlm import cli
from titanlm.batch import Document
from titanlm.check import check
from titanlm.config import load
from titanlm.datasets.documents import TextDocuments
from titanlm.datasets.template import RowText
from titanlm.errors import ConfigError, DataError
from titanlm.evaluate import open_set
from titanlm.registry import Component, register

Row = dict[str, Any]
TEMPLATE = "Question: {question}\nAnswer: {answer}"
ENDINGS = pytest.mark.parametrize("ending", ["parquet", "jsonl", "jsonl.gz"])


def write(path: Path, rows: Sequence[Row], group: int = 7) -> Path:
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=group)
        return path
    raw = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def build(path: Path, *, split: str = "train", stream: int = 0, n_streams: int = 1, filters: Sequence[Component] = (), **settings: Any) -> TextDocuments:
    kind = "parquet" if path.suffix == ".parquet" else "jsonl"
    runtime = {key: settings.pop(key) for key in ("epochs", "on_error") if key in settings}
    component = Component.named("dataset", kind, paths=(str(path),), filter=tuple(filters), **settings)
    return component.build(tokenizer=Component.named("tokenizer", "byte").build(), split=split, stream=stream, n_streams=n_streams, seed=5, **runtime)


def text_of(document: Document) -> str:
    return bytes(document.ids[1:-1].astype(np.uint8)).decode()


def texts(path: Path, **settings: Any) -> list[str]:
    """Of one pass, in order of the file."""
    return [text_of(one) for one in build(path, epochs=1, shuffle=False, **settings)]


def questions(n: int) -> list[Row]:
    """Every sixth without an answer, some without letters, some longer than others, with characters of one to four bytes."""
    draw = random.Random(n)
    words = ("why", "größe", "가나다", "🙂", "{question}", "%s", "\n")
    rows = [{"question": f"{i} " + " ".join(draw.choices(words, k=draw.randint(0, 9))), "answer": draw.choice(("", "42", "x " * 40))} for i in range(n)]
    return [row | {"answer": None if i % 6 == 4 else row["answer"], "level": i % 4, "subject": ("sums", "words")[i % 2]} for i, row in enumerate(rows)]


def made(row: Row) -> str | None:
    return None if row["answer"] is None else f"Question: {row['question']}\nAnswer: {row['answer']}"


# ---------------------------------------------------------------- the language
def test_a_template_is_what_python_makes_of_it() -> None:
    draw = random.Random(0)
    for _ in range(500):
        names = draw.sample(["question", "answer", "größe", "two words", "text", "a-b"], k=3)
        pieces = draw.choices(["{{", "}}", "plain", "\n", "%s", "{{{{", "%(a)s", "0", *(f"{{{name}}}" for name in names)], k=draw.randint(1, 12))
        template = "".join([*pieces, f"{{{names[0]}}}"])
        row = {name: draw.choice(["{answer}", "", "}", "é", "{0}"]) for name in names}
        one = RowText("text", template)
        assert set(one.columns) == {name for name in names if f"{{{name}}}" in pieces} | {names[0]}
        assert one.of([row[name] for name in one.columns]) == template.format_map(row)


def test_what_has_no_text() -> None:
    damaged = object()
    one = RowText("text", "{a} {b} {a}")
    assert one.columns == ("a", "b")
    assert one.of(["x", ""]) == "x  x"
    assert one.of(["x", None]) is None
    assert one.of([None, damaged]) is one.of([damaged, None]) is damaged, "what cannot be read is never taken for what is not there"
    assert one.of_columns([["x", None, "y"], ["1", "2", damaged]]) == ["x 1 x", None, damaged]
    column = ["x", None]
    assert RowText("body").of_columns([column]) is column, "a column alone is not copied"


BAD = [
    ("no name", "'no name' names no column; put the name of at least one in braces"),
    ("{{literal}}", "names no column; put the name of at least one in braces"),
    ("{a} {", r"'\{' at character 4 has no counterpart; a literal brace is written '\{\{'"),
    ("a} {b}", r"'\}' at character 1 has no counterpart; a literal brace is written '\}\}'"),
    ("{a{b}}", r"'\{' at character 0 has no counterpart"),
    ("{a} {}", r"'\{\}' at character 4 names no column; literal braces are written '\{\{\}\}'"),
    ("{a.__class__}", r"'\{a\.__class__\}' is more than the name of a column; attributes, indices, conversions and formats are not to be had"),
    ("{a[0]}", "more than the name of a column"),
    ("{a!r}", "more than the name of a column"),
    ("{a:>10}", "more than the name of a column"),
]


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
@pytest.mark.parametrize(("template", "message"), BAD, ids=range(len(BAD)))
def test_templates_that_are_refused_are_config_errors_of_their_key(tiny: Path, kind: str, template: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"dataset\.template: .*{message}"):
        load(tiny, [f"--dataset={{name='{kind}',paths=['a.{kind}'],template='{template}'}}"])


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_template_excludes_a_column(tiny: Path, kind: str) -> None:
    with pytest.raises(ConfigError, match=r"dataset\.template: excludes `column`; give one of them"):
        load(tiny, [f"--dataset={{name='{kind}',paths=['a.{kind}'],template='{{a}}',column='b'}}"])


# ---------------------------------------------------------------- rows
@ENDINGS
@pytest.mark.parametrize("n_streams", [1, 3])
def test_documents_are_those_of_a_file_with_the_text_made_beforehand(tmp_path: Path, ending: str, n_streams: int) -> None:
    """Ids, order and counts, over two epochs, with shuffling, filters by the columns of the text and by others, pieces and held-out rows."""
    rows = questions(60)
    several = write(tmp_path / f"several.{ending}", rows)
    one = write(tmp_path / f"one.{ending}", [row | {"text": made(row)} for row in rows])
    filters = (
        Component.named("filter", "min_score", column="level", score=1.0),
        Component.named("filter", "one_of", column="answer", values=("42", "x " * 40)),
    )
    for split in ("train", "validation"):
        for settings in ({}, {"max_bytes": 24, "filters": filters}, {"filters": filters[:1], "block_rows": 4}):
            common = {"split": split, "n_streams": n_streams, "epochs": 2, "validation_fraction": 0.4, **settings}
            for stream in range(n_streams):
                first, second = (build(path, stream=stream, **extra, **common) for path, extra in ((several, {"template": TEMPLATE}), (one, {})))
                assert [(a.document_id, a.ids.tolist()) for a in first] == [(a.document_id, a.ids.tolist()) for a in second]
                assert first.state() == second.state()


@ENDINGS
def test_nulls_have_no_text_and_empty_strings_do(tmp_path: Path, ending: str) -> None:
    rows = [{"question": question, "answer": answer} for question, answer in (("a", "b"), (None, "b"), ("a", None), (None, None), ("", ""))]
    path = write(tmp_path / f"a.{ending}", rows)
    one = build(path, template=TEMPLATE, epochs=1, shuffle=False)
    assert [text_of(document) for document in one] == ["Question: a\nAnswer: b", "Question: \nAnswer: "]
    assert one.state()["counts"] == {"documents": 2, "empty": 3, "filtered": 0, "unreadable": 0}
    assert texts(path, template="{question}{answer}") == ["ab"], "what is made of empty strings alone is empty"


@ENDINGS
def test_rows_are_held_out_by_the_text_that_is_made(tmp_path: Path, ending: str) -> None:
    rows = [{"question": f"q{i % 50}", "answer": f"a{i % 3}"} for i in range(300)]
    path = write(tmp_path / f"a.{ending}", rows)
    every = [f"{row['answer']} is of {row['question']}" for row in rows]
    held_out = [int.from_bytes(hashlib.sha256(b"titanlm validation\0" + text.encode()).digest()[:8], "big") < 0.3 * 2**64 for text in every]
    assert 0.15 < np.mean(held_out) < 0.45
    for split in ("train", "validation"):
        found = texts(path, split=split, template="{answer} is of {question}", validation_fraction=0.3)
        assert found == [text for text, out in zip(every, held_out, strict=True) if out == (split == "validation")]


@ENDINGS
def test_long_texts_are_cut_once_they_are_made(tmp_path: Path, ending: str) -> None:
    path = write(tmp_path / f"a.{ending}", [{"prompt": "def f():\n", "solution": "    return '가나다'\n"}])
    pieces = texts(path, template="{prompt}{solution}", max_bytes=12)
    assert pieces[0] == "def f():\n"
    assert "".join(pieces) == "def f():\n    return '가나다'\n"
    assert max(len(piece.encode()) for piece in pieces) <= 12
    assert texts(path, template="{prompt}{solution}") == ["".join(pieces)]


@ENDINGS
def test_resumes_at_every_point(tmp_path: Path, ending: str) -> None:
    path = write(tmp_path / f"a.{ending}", questions(20))
    settings: dict[str, Any] = {"template": TEMPLATE, "max_bytes": 30, "block_rows": 5}
    documents = [(one.document_id, text_of(one)) for one in islice(build(path, **settings), 60)]
    for point in range(60):
        first, second = build(path, **settings), build(path, **settings)
        list(islice(first, point))
        second.restore(json.loads(json.dumps(first.state())))
        assert [(one.document_id, text_of(one)) for one in islice(second, 60 - point)] == documents[point:]


# ---------------------------------------------------------------- fingerprints
BEFORE = {
    "parquet": ("f77ebbd5af6a87b5f6cf6b1663d1f2b3c83473bb8c3b5dfd4a13a1d75ad59f70", "28a4a7f3c0fad6c8df489a269eda5c323c0a1e340304a1e5f4ad93ae03bbce75"),
    "jsonl": ("3750227addf31c0b122ded5e87303e65156c42cf376fa0c8e9a51461e2691de2", "589b4cb541081d3d1896cf0acc047eda0b1a403d5fa3645bd8c9b348677c4771"),
    "jsonl.gz": ("005cc196952e775c3d5ad5bf00954ffbc26189a9033e46e5661da49769966e29", "33c00aee37c58d6acd9cb172d4f6406c57ddd54dab66e2ec7f8683f8e0408c5f"),
}
"""Of datasets before there were templates, with the default column and with another."""


@ENDINGS
def test_fingerprints_without_a_template_are_what_they_were(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    path.write_bytes(b'{"text": "as it was", "body": "so"}\n')  # whatever the ending: nothing is read yet
    found = (build(path).fingerprint, build(path, column="body", validation_fraction=0.25).fingerprint)
    assert found == tuple(f"{ending.removesuffix('.gz')}: {before}" for before in BEFORE[ending])
    alike = [{}, {"template": "{text}"}, {"column": "{text}"}, {"template": "{text} "}, {"column": "body"}, {"template": "{body}"}]
    assert len({build(path, **settings).fingerprint for settings in alike}) == len(alike)


# ---------------------------------------------------------------- columns
@dataclass(frozen=True)
class SeenConfig:
    pass


SEEN: list[Row] = []


class Seen:
    """Keeps what it sees, ``place`` left out."""

    def __init__(self, config: SeenConfig) -> None:
        pass

    def keep(self, row: Row) -> bool:
        SEEN.append({name: value for name, value in dict(row).items() if name != "place"})
        return True


@register("filter", "template_test_none")
class SeenNone(Seen):
    columns = ()


@register("filter", "template_test_answer")
class SeenAnswer(Seen):
    columns = ("answer",)


@register("filter", "template_test_all")
class SeenAll(Seen):
    """Does not say which columns it reads."""


@ENDINGS
def test_rows_hold_the_columns_that_filters_ask_for(tmp_path: Path, ending: str) -> None:
    """A column named ``text`` may be one of the template's; in the row ``text`` is what was made."""
    path = write(tmp_path / f"a.{ending}", [{"text": "a", "answer": "b", "level": 1}])

    def seen(which: str, **settings: str) -> Row:
        SEEN.clear()
        texts(path, filters=[Component.named("filter", f"template_test_{which}")], **settings)
        return SEEN[0]

    assert seen("none", template="{text}={answer}") == {"text": "a=b"}
    assert seen("answer", template="{text}={answer}") == {"text": "a=b", "answer": "b"}
    assert seen("all", template="{text}={answer}") == {"text": "a=b", "answer": "b", "level": 1}
    assert seen("answer", column="answer") == {"text": "b", "answer": "b"}


def broken(path: Path, column: int, group: int = 0) -> None:
    """Overwrite the pages of a column."""
    place = parquet.ParquetFile(path).metadata.row_group(group).column(column)
    first = place.dictionary_page_offset or place.data_page_offset
    raw = bytearray(path.read_bytes())
    raw[first : first + place.total_compressed_size] = b"\xa5" * place.total_compressed_size
    path.write_bytes(raw)


def test_of_a_parquet_file_only_columns_that_are_named_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", [{"prompt": "a", "rest": "c", "text": "d", "solution": "b"}])
    broken(path, 1)
    broken(path, 2)
    assert texts(path, template="{solution}{prompt}") == ["ba"]
    with pytest.raises(DataError, match=r"a\.parquet: row group 0 is damaged from row 0 on"):
        texts(path, template="{solution}{rest}")


def test_every_kind_of_string_is_read(tmp_path: Path) -> None:
    values = ["añ", None, "b"]
    kinds = {"a": pa.string(), "b": pa.large_string(), "c": pa.string_view()}
    columns = {name: pa.array(values, kind) for name, kind in kinds.items()} | {"d": pa.array(values).dictionary_encode(), "e": pa.nulls(3)}
    parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet", template="{a}{b}{c}{d}") == ["añ" * 4, "b" * 4]
    assert texts(tmp_path / "a.parquet", template="{a}{e}") == []


# ---------------------------------------------------------------- damage and mistakes
def test_columns_that_are_missing_or_hold_no_strings_are_named_with_file_and_setting(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", [{"question": "a", "answers": "b", "level": 1}])
    for n_streams in (1, 4):
        with pytest.raises(DataError, match=r"a\.parquet has no column 'answer'; did you mean 'answers'\? \(columns: .*\); set dataset\.template"):
            list(build(path, template=TEMPLATE, n_streams=n_streams, on_error="skip"))
        with pytest.raises(DataError, match=r"a\.parquet: column 'level' is of type int64, not string; set dataset\.template or convert the file"):
            list(build(path, template="{question}{level}", n_streams=n_streams, on_error="skip"))


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz"])
@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"question": "a", "answers": "b"}', r"no key 'answer'; did you mean 'answers'\? \(keys: question, answers; dataset\.template names it\)"),
        (b'{"question": null, "answer": ["b"]}', r"'answer' is a list, no string \(dataset\.template names it\)"),
        (b'{"question": "\\ud83d", "answer": "\\ude42"}', "'question' has half a surrogate pair, which is no text"),
        (b'{"question": "a", "answer": "\\ude42"}', "'answer' has half a surrogate pair, which is no text"),
        (b'{"question": "a", "answer": "\xff"}', "byte 29 is not UTF-8"),
    ],
)
def test_bad_lines_are_errors_with_file_line_and_setting_or_skipped(tmp_path: Path, ending: str, line: bytes, message: str, capsys: Any) -> None:
    good = b'{"question": "\\ud83d\\ude42", "answer": "b"}\n'
    path = tmp_path / f"a.{ending}"
    path.write_bytes(gzip.compress(good + line + b"\n" + good) if ending.endswith("gz") else good + line + b"\n" + good)
    with pytest.raises(DataError, match=rf"a\.{ending} line 2: {message}.*data\.on_error"):
        texts(path, template=TEMPLATE)
    one = build(path, template=TEMPLATE, epochs=1, on_error="skip", shuffle=False)
    assert [text_of(document) for document in one] == ["Question: 🙂\nAnswer: b"] * 2
    assert one.unreadable == 1
    capsys.readouterr()


def test_text_of_a_column_that_is_not_utf8(tmp_path: Path, capsys: Any) -> None:
    def column(values: list[bytes]) -> pa.Array:
        offsets = np.cumsum([0, *map(len, values)], dtype=np.int32)
        return pa.StringArray.from_buffers(len(values), pa.py_buffer(offsets), pa.py_buffer(b"".join(values)))

    table = {"question": pa.array(["q0", "q1", None, "q3"]), "answer": column([b"a0", b"ab\xff", b"\xfe", b"a3"])}
    parquet.write_table(pa.table(table), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet row group 0 row 1: byte 2 of the text is not UTF-8 \(.*\) in column 'answer'.*data\.on_error"):
        texts(tmp_path / "a.parquet", template=TEMPLATE)
    one = build(tmp_path / "a.parquet", template=TEMPLATE, epochs=1, on_error="skip", shuffle=False)
    assert [text_of(document) for document in one] == ["Question: q0\nAnswer: a0", "Question: q3\nAnswer: a3"]
    assert one.state()["counts"] == {"documents": 2, "empty": 0, "filtered": 0, "unreadable": 2}
    capsys.readouterr()


# ---------------------------------------------------------------- commands and validation sets
def dataset(path: Path, more: str = "") -> str:
    kind = "parquet" if path.suffix == ".parquet" else "jsonl"
    return f'{{ name = "{kind}", paths = ["{path}"], template = "Question: {{question}}\\nAnswer: {{answer}}"{more} }}'


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_a_set_is_all_of_a_file_with_a_template(tmp_path: Path, tiny: Path, ending: str) -> None:
    rows = questions(30)
    path = write(tmp_path / f"questions.{ending}", rows)
    wanted = [made(row) for row in rows if row["answer"] is not None]
    twice, held_out = dataset(path, f', validation_paths = ["{path}"]'), dataset(path, ", validation_fraction = 1")
    config = load(tiny, [f'--validation=[{{ name = "twice", dataset = {twice} }}, {{ name = "held_out", dataset = {held_out} }}]'])
    assert not check(config).problems
    for entry in config.validation:
        documents = open_set(entry, config, config.tokenizer.build()).dataset
        assert [text_of(one) for one in documents] == wanted


def test_d14_what_is_in_both_splits_is_still_no_training_data(tmp_path: Path, tiny: Path) -> None:
    path = write(tmp_path / "questions.jsonl", questions(30))
    both = dataset(path, f', validation_paths = ["{path}"]')
    with pytest.raises(DataError, match=r"questions\.jsonl is in dataset\.paths and in dataset\.validation_paths; a file can be in one only"):
        load(tiny, [f"--dataset={both}"]).dataset.build(tokenizer=None, split="train", stream=0, n_streams=1, seed=0)
    assert any("a file can be in one only" in problem for problem in check(load(tiny, [f"--dataset={both}"])).problems)
    (problem,) = check(load(tiny, [f"--dataset={dataset(path)}", f"--validation=[{{ dataset = {both} }}]"])).problems
    assert problem == f"validation.0.dataset.validation_paths: {path} is training data too; a score on it would say nothing"


def test_d14_a_set_with_another_text_would_hold_out_other_rows(tmp_path: Path, tiny: Path) -> None:
    path = write(tmp_path / "questions.jsonl", questions(60))
    trained = dataset(path, ", validation_fraction = 0.3")
    assert not check(load(tiny, [f"--dataset={trained}", f"--validation=[{{ dataset = {trained} }}]"])).problems
    for own, key in (
        (trained.replace("Question: ", ""), "template"),
        (trained.replace("template", "column").replace("Question: {question}\\nAnswer: {answer}", "question"), "column"),
    ):
        (problem,) = check(load(tiny, [f"--dataset={trained}", f"--validation=[{{ dataset = {own} }}]"])).problems
        said = f"rows are held out by the hash of their text, and training makes other texts of {path}; have the same there"
        assert problem == f"validation.0.dataset.{key}: {said}"


def test_commands_read_a_config_with_a_template(tmp_path: Path, tiny: Path, capsys: Any) -> None:
    rows = questions(200)
    path = write(tmp_path / "questions.parquet", rows)
    every = [text for row in rows if (text := made(row)) is not None]
    with_template = ["--config", str(tiny), f"--dataset={dataset(path)}", "--validation=[]"]
    assert cli.main(["data", "inspect", str(tiny), *with_template[2:], "--json"]) == 0
    (said,) = json.loads(capsys.readouterr().out)["targets"]
    assert (said["counts"]["documents"], said["text_bytes"]) == (len(every), sum(len(text.encode()) for text in every))
    assert cli.main(["data", "prepare", "--output", str(tmp_path / "shards"), *with_template]) == 0
    shards = Component.named("dataset", "token_shards", paths=(str(tmp_path / "shards/*.bin"),), shuffle=False)
    read = shards.build(tokenizer=Component.named("tokenizer", "byte").build(), split="train", stream=0, n_streams=1, seed=0, epochs=1)
    assert [text_of(one) for one in read] == every
    spm = tmp_path / "spm.model"
    assert cli.main(["tokenizer", "train", "--type", "spm", "--vocab-size", "320", "--output", str(spm), *with_template]) == 0
    tokenizer = Component.named("tokenizer", "sentencepiece", path=str(spm)).build()
    assert max(len(tokenizer.decode([piece])) for piece in tokenizer.encode(every[0])) >= len("Question"), "what is in every text is a piece"
    capsys.readouterr()
