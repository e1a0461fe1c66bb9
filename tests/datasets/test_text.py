from __future__ import annotations

import os
import re
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from titanlm.datasets import text as text_module
from titanlm.datasets.files import listed
from titanlm.datasets.text import TextConfig, TextRows
from titanlm.errors import DataError
from titanlm.registry import Component


def build(*paths, split="train", stream=0, n_streams=1, **settings):
    tokenizer = Component.named("tokenizer", "byte").build()
    component = Component.named("dataset", "text", paths=tuple(str(path) for path in paths), **settings)
    return component.build(tokenizer=tokenizer, split=split, stream=stream, n_streams=n_streams, seed=0)


def rows_of(config, split="train"):
    return TextRows(config, listed(config.paths, config.validation_paths, ("",)), split)


def texts_of(rows):
    return [rows.row(index)["text"] for index in range(len(rows))]


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "deep/er").mkdir(parents=True)
    (tmp_path / "b.txt").write_bytes("\ufeffone\r\ntwo\n\n  \nthree 😀\nfour\r\n\r\nfive".encode())
    (tmp_path / "a.md").write_text("first\n\n\n\nsecond\n")
    (tmp_path / "deep/er/c.txt").write_text("deep")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / ".hidden").write_bytes(b"\xff")
    return tmp_path


def test_directories_files_and_globs(corpus):
    whole = ["first\n\n\n\nsecond\n", "one\r\ntwo\n\n  \nthree 😀\nfour\r\n\r\nfive", "deep"]
    assert list(build(corpus).texts()) == whole
    assert list(build(corpus / "**/*.txt").texts()) == whole[1:]
    assert list(build(corpus / "deep", corpus / "a.md").texts()) == [whole[2], whole[0]]


def test_folders_come_before_files_that_begin_like_them(tmp_path):
    """The order in which seeded runs of the first versions read."""
    for name in ("a/x", "a-b/x", "a.txt", "B"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    paths = sorted(one for one in tmp_path.rglob("*") if one.is_file())
    assert list(build(tmp_path).texts()) == [one.read_text() for one in paths] == ["B", "a/x", "a-b/x", "a.txt"]


def test_d11_a_file_named_twice(corpus):
    with pytest.raises(DataError, match=r"dataset\.paths: .*a\.md is named twice"):
        build(corpus, corpus / "a.md")


def test_d14_equal_content_under_another_name(corpus):
    (corpus / "deep/copy").write_bytes((corpus / "a.md").read_bytes())
    with pytest.raises(DataError, match=r"a\.md and .*copy have the same content"):
        build(corpus / "a.md", validation_paths=(str(corpus / "deep"),))


def test_h3_pipes_are_not_opened(corpus):
    os.mkfifo(corpus / "pipe")
    assert len(list(build(corpus).texts())) == 3
    with pytest.raises(DataError, match="a pipe, a socket or a device"):
        build(corpus / "pipe")


def test_h8_control_characters_in_names_are_escaped(corpus):
    evil = corpus / "x\x1b[31m\n.txt"
    evil.write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"x\\x1b\[31m\\n\.txt: byte 0 is not UTF-8") as error:
        list(build(evil).texts())
    assert str(error.value).isprintable()


@pytest.mark.parametrize("url", ["https://me:canary@host/a.txt?canary", "memory://x/a.txt", "simplecache::https://host/?canary"])
def test_h5_urls_are_refused(url):
    with pytest.raises(DataError, match=r"dataset\.paths: .* is a URL, and text is read from local files only; download it first") as error:
        build(url)
    assert "canary" not in str(error.value)


def test_paths_start_at_the_working_directory(corpus, monkeypatch):
    monkeypatch.chdir(corpus)
    assert list(build("a.md").texts()) == ["first\n\n\n\nsecond\n"]
    monkeypatch.chdir(corpus / "deep")
    assert list(build("er").texts()) == ["deep"]


def test_units(corpus):
    assert list(build(corpus / "b.txt", unit="line").texts()) == ["one", "two", "three 😀", "four", "five"]
    assert list(build(corpus / "b.txt", unit="paragraph").texts()) == ["one\r\ntwo", "three 😀\nfour", "five"]
    assert list(build(corpus / "a.md", unit="paragraph").texts()) == ["first", "second\n"]
    mixed = build(corpus, unit="line")
    assert list(mixed.texts()) == ["first", "second", "one", "two", "three 😀", "four", "five", "deep"]


def test_lines_against_plain_splitting(tmp_path):
    lines = [f"line {i} " + "é" * (i % 7) for i in range(500)]
    for number in range(5):
        (tmp_path / f"{number}.txt").write_text("\n".join(lines[number * 100 : number * 100 + 100]))
    rows = rows_of(TextConfig(paths=(str(tmp_path),), unit="line"))
    assert texts_of(rows) == lines
    assert rows.row(101)["place"] == f"{tmp_path / '1.txt'} byte {len(lines[100].encode()) + 1}"


@pytest.mark.parametrize("unit", ["file", "paragraph", "line"])
def test_held_out_rows_are_disjoint_by_text_and_cover(tmp_path, unit):
    for number in range(60):
        (tmp_path / f"{number}.txt").write_text("\n\n".join(f"row {(number * 3 + i) % 120}" for i in range(5)))
    train, validation = (list(build(tmp_path, unit=unit, validation_fraction=0.3, split=split).texts()) for split in ("train", "validation"))
    assert train
    assert validation
    assert not set(train) & set(validation)  # equal rows are on one side
    assert sorted(train + validation) == sorted(build(tmp_path, unit=unit).texts())


def test_separate_validation_files(corpus):
    settings = {"validation_paths": (str(corpus / "a.md"),), "unit": "line"}
    assert list(build(corpus / "deep", **settings).texts()) == ["deep"]
    assert list(build(corpus / "deep", split="validation", **settings).texts()) == ["first", "second"]
    with pytest.raises(DataError, match=r"a\.md is in dataset\.paths and in dataset\.validation_paths"):
        build(corpus, **settings)
    with pytest.raises(ValueError, match="exclude each other"):
        TextConfig(paths=("x",), validation_paths=("y",), validation_fraction=0.1)
    with pytest.raises(DataError, match=r"no validation data; set dataset\.validation_paths or dataset\.validation_fraction"):
        build(corpus, split="validation")


def test_bad_utf8_names_file_and_byte(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"good\nfine \xff here\n")
    with pytest.raises(DataError, match=r"bad\.txt: byte 10 is not UTF-8 .*dataset\.errors = \"replace\""):
        list(build(tmp_path, unit="line").texts())
    assert list(build(tmp_path, unit="line", errors="replace").texts()) == ["good", "fine \ufffd here"]


def test_missing_and_empty_paths_name_the_key(corpus):
    for nothing in ("absent.txt", "*.nothing"):
        with pytest.raises(DataError, match=r"dataset\.paths: .* is no file, no directory with files and no glob"):
            build(corpus / nothing)
    with pytest.raises(ValueError, match="paths is empty"):
        TextConfig(paths=())
    with pytest.raises(DataError, match=r"dataset\.validation_paths: "):
        build(corpus, validation_paths=("absent",))
    with pytest.raises(DataError, match=r"dataset\.paths has no rows for 'train' .*every file is empty"):
        build(corpus / "empty.txt")


def test_fingerprint_follows_contents_and_not_the_place(corpus):
    prints = [build(corpus).fingerprint, build(corpus, unit="line").fingerprint, build(corpus / "a.md").fingerprint]
    (corpus / "a.md").write_text("First\n\n\n\nsecond\n")
    prints.append(build(corpus).fingerprint)
    assert len(set(prints)) == 4
    moved = corpus.rename(corpus.with_name("moved"))
    assert build(moved).fingerprint == prints[-1]


def test_more_files_than_stay_open(tmp_path):
    for number in range(150):
        (tmp_path / f"{number:03}.txt").write_text(f"file {number}")
    streams = [build(tmp_path, stream=s, n_streams=4) for s in range(4)]
    assert len({bytes(one.ids.tolist()[1:-1]) for stream in streams for one in islice(stream, 37)}) == 148


def test_a_file_that_changed_is_an_error(corpus):
    one = build(corpus / "a.md")
    (corpus / "a.md").write_text("shorter")
    with pytest.raises(DataError, match=r"a\.md changed while it was in use"):
        next(one)


@pytest.mark.parametrize("how", ["shorter", "rewritten", "gone"])
def test_d10_a_file_that_changes_while_it_is_open(tmp_path, how):
    path = tmp_path / "a.txt"
    path.write_bytes(b"line\n" * 100_000)
    config = TextConfig(paths=(str(path),), unit="line")
    rows = rows_of(config)
    assert rows.row(99_999)["text"] == "line"  # open from here on
    if how == "gone":
        path.unlink()
    elif how == "shorter":
        os.truncate(path, 10)  # touching the rest of a mapping of it would be SIGBUS
    else:
        path.write_bytes(b"Line\n" * 100_000)
        os.utime(path, (1, 1))
    with pytest.raises(DataError, match=r"a\.txt (was listed and cannot be read any more|changed while it was in use)"):
        rows.row(99_998)


def test_d10_a_file_that_is_truncated_between_check_and_read(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_bytes(b"line\n" * 100_000)
    rows = rows_of(TextConfig(paths=(str(path),), unit="line"))
    monkeypatch.setattr(rows._files, "check", lambda index: None)
    os.truncate(path, 10)
    with pytest.raises(DataError, match=r"a\.txt changed while it was in use: it ends at byte"):
        rows.row(99_998)


def test_long_documents_are_cut_at_line_ends_or_between_characters(tmp_path: Path) -> None:
    """Pieces add up to the file, none is too long, and a single book can be split and gives every stream text of its own."""
    book = tmp_path / "book.txt"
    text = "".join(f"line {number} größe 가나다\n" for number in range(400)) + "가" * 500
    book.write_text(text, encoding="utf-8")
    config = TextConfig(paths=(str(book),), max_bytes=1000)
    rows = rows_of(config)
    pieces = texts_of(rows)
    assert "".join(pieces) == text
    assert max(len(piece.encode()) for piece in pieces) <= 1000
    assert sum(piece.endswith("\n") for piece in pieces) >= len(pieces) - 3


@pytest.mark.parametrize("unit", ["file", "paragraph"])
def test_d14_pieces_of_a_document_are_on_one_side(tmp_path, unit):
    """The split is decided before long documents are cut, so no book is both trained on and validated with."""
    books = {f"{number}: {letter}" * 400 for number in range(10) for letter in "abcd"}
    if unit == "file":
        for number, book in enumerate(sorted(books)):
            (tmp_path / f"{number}.txt").write_text(book)
    else:
        (tmp_path / "all.txt").write_text("\n\n".join(sorted(books)))
    config = TextConfig(paths=(str(tmp_path),), unit=unit, max_bytes=300, validation_fraction=0.4)
    found = [texts_of(rows_of(config, split)) for split in ("train", "validation")]
    whole = [{book for book in books if any(piece in book for piece in pieces)} for pieces in found]
    assert all(whole)
    assert not whole[0] & whole[1]
    assert [sum(map(len, pieces)) for pieces in found] == [sum(map(len, own)) for own in whole]
    assert whole[0] | whole[1] == books


@pytest.mark.parametrize("unit", ["paragraph", "line"])
@pytest.mark.parametrize("chunk_bytes", [1, 2, 7, 4 << 20])
def test_separators_across_the_pieces_in_which_a_file_is_read(tmp_path, monkeypatch, unit, chunk_bytes):
    separator = {"line": rb"\r?\n", "paragraph": rb"\r?\n(?:[ \t]*\r?\n)+"}[unit]
    monkeypatch.setattr(text_module, "_CHUNK_BYTES", chunk_bytes)
    rng = np.random.default_rng(0)
    for number in range(40):
        raw = bytes(rng.choice(list(b"\n\n\n\r\r \tab"), int(rng.integers(1, 60))))
        path = tmp_path / f"{number}.txt"
        path.write_bytes(raw)
        expected = re.split(separator, raw)
        expected = expected if expected[-1] else expected[:-1]
        assert texts_of(rows_of(TextConfig(paths=(str(path),), unit=unit))) == [one.decode() for one in expected]
