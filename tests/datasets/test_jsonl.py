from __future__ import annotations

import gzip
import json
import os
import random
import subprocess
import sys
import uuid
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from titanlm.datasets import jsonl as module
from titanlm.errors import DataError
from titanlm.registry import Component

ROOT = Path(__file__).parents[2]
RUNTIME = {"split": "train", "stream": 0, "n_streams": 1, "seed": 0}


def build(*paths, filters=(), **settings):
    runtime = {**RUNTIME, **{key: settings.pop(key) for key in [*RUNTIME, "epochs", "on_error"] if key in settings}}
    component = Component.named("dataset", "jsonl", paths=tuple(map(str, paths)), filter=tuple(filters), **settings)
    return component.build(tokenizer=Component.named("tokenizer", "byte").build(), **runtime)


def text_of(document) -> str:
    return bytes(document.ids[1:-1].astype(np.uint8)).decode()


def epoch(*paths, n_streams=1, **settings) -> list[list[str]]:
    """The texts of one pass, by stream."""
    return [[text_of(one) for one in build(*paths, stream=stream, n_streams=n_streams, epochs=1, **settings)] for stream in range(n_streams)]


def lines(texts) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def write(path, raw: bytes):
    """Compressed where the name says so."""
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def numbered(start, end) -> list[str]:
    return [f"row {number}" for number in range(start, end)]


ENDINGS = pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz"])


@ENDINGS
@pytest.mark.parametrize("n_streams", [1, 2, 5])
def test_streams_together_hold_every_row_of_an_epoch_once(tmp_path, ending, n_streams):
    for number in range(3):
        write(tmp_path / f"{number}.{ending}", lines(numbered(number * 20, number * 20 + 20)))
    streams = epoch(tmp_path, n_streams=n_streams)
    assert Counter(text for stream in streams for text in stream) == Counter(numbered(0, 60))
    assert all(streams[:3])
    assert build(tmp_path).n_rows == (60 if ending == "jsonl" else None)
    assert epoch(tmp_path, shuffle=False) == [numbered(0, 60)]
    twice = [text_of(one) for one in build(tmp_path, epochs=2)]
    assert Counter(twice) == Counter(numbered(0, 60) * 2)
    assert twice[:60] != twice[60:]


def test_a_large_file_is_shuffled_as_a_whole(tmp_path):
    write(tmp_path / "a.jsonl", lines(numbered(0, 2000)))
    first = [int(text.split()[1]) for text in epoch(tmp_path)[0][:200]]
    assert max(first) > 1500
    assert min(first) < 500


def test_lines_are_found_whatever_the_chunks(tmp_path, monkeypatch):
    rng = random.Random(0)
    for case in range(60):
        monkeypatch.setattr(module, "_CHUNK_BYTES", rng.randint(1, 40))
        parts = [rng.choice([b"", b" \t", b"\r", b'{"text": "%d"}' % i, b' {"text": "%d"}\r' % i]) for i in range(rng.randint(1, 30))]
        raw = b"\n".join(parts) + rng.choice([b"", b"\n", b"\n\n "])
        path = write(tmp_path / f"{case}.jsonl", raw)
        wanted = {number: json.loads(line)["text"] for number, line in enumerate(raw.split(b"\n"), 1) if line.strip()}
        if not wanted:
            continue
        one = build(path, shuffle=False, epochs=1)
        rows = [one.next_text()[0] for _ in range(len(wanted))]
        assert [(row["place"], row["text"]) for row in rows] == [(f"{path} line {number}", text) for number, text in wanted.items()]
        assert next(one, None) is None


BAD = [
    (b"{not json}", "no JSON: Expecting property name"),
    (b"[1, 2]", "no JSON object but a list"),
    (b'{"txt": "x"}', r"no key 'text'; did you mean 'txt'\? \(keys: txt; dataset\.column names it\)"),
    (b'{"text": 5}', "'text' is a number, no string"),
    (b'{"text": "\xff"}', "byte 10 is not UTF-8"),
    (b'{"text": "\\ud800"}', "'text' has half a surrogate pair"),
    (b"[" * 200_000, "no JSON"),
    (b'{"text": "cut of', "no JSON: Unterminated string"),
]


@ENDINGS
@pytest.mark.parametrize(("line", "message"), BAD, ids=range(len(BAD)))
def test_d2_bad_lines_are_errors_with_file_and_line_or_skipped(tmp_path, ending, line, message, capsys):
    path = write(tmp_path / f"a.{ending}", b"\xef\xbb\xbf" + lines(["a", "b"]) + b"\n" + line + b"\n" + lines(["c"]))
    with pytest.raises(DataError, match=rf"a\.{ending} line 4: {message}.*data\.on_error"):
        epoch(path)
    one = build(path, epochs=1, on_error="skip", shuffle=False)
    assert [text_of(document) for document in one] == ["a", "b", "c"]
    assert one.unreadable == 1
    assert "line 4" in capsys.readouterr().err


@ENDINGS
def test_d1_null_and_blank_texts_are_counted_and_blank_lines_are_nothing(tmp_path, ending):
    write(tmp_path / f"a.{ending}", lines(["x", None, "", " \n"]) + b"\n \t\r\n" + lines(["y"]).rstrip())
    one = build(tmp_path, epochs=1, shuffle=False)
    assert [text_of(document) for document in one] == ["x", "y"]
    assert one.state()["counts"] == {"documents": 2, "empty": 3, "filtered": 0, "unreadable": 0}


@ENDINGS
def test_resumes_at_every_point_with_pieces_and_bad_lines(tmp_path, ending, capsys):
    texts = [None if i % 7 == 3 else f"{i} " * (1 + i % 4 * 3) for i in range(40)]
    raw = lines(texts[:17]) + b"bad\n\n" + lines(texts[17:])
    write(tmp_path / f"a.{ending}", raw)
    write(tmp_path / f"b.{ending}", lines(["b" * 40, "c"]))
    settings = {"on_error": "skip", "max_bytes": 16, "block_rows": 7, "n_streams": 2, "stream": 1}
    straight = build(tmp_path, **settings)
    documents = [(one.document_id, text_of(one)) for one in islice(straight, 100)]
    for point in range(100):
        first = build(tmp_path, **settings)
        list(islice(first, point))
        second = build(tmp_path, **settings)
        second.restore(json.loads(json.dumps(first.state())))
        assert [(one.document_id, text_of(one)) for one in islice(second, 100 - point)] == documents[point:]
        assert second.state() == straight.state()
    capsys.readouterr()


def test_processes_that_share_an_open_file_do_not_disturb_each_other(tmp_path):
    write(tmp_path / "a.jsonl", lines([f"{i} " * 3000 for i in range(300)]))
    one = build(tmp_path, epochs=1)
    next(one)  # opens the file before the fork
    state = one.state()
    children = []
    for _ in range(3):
        if (child := os.fork()) == 0:
            failed = 1
            try:
                one.restore(state)
                failed = int(len(list(one)) != 299)
            finally:
                os._exit(failed)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0]


def test_long_texts_are_cut_into_pieces(tmp_path):
    write(tmp_path / "a.jsonl", lines(["first line\nsecond line\nend", "short"]))
    one = build(tmp_path, max_bytes=12, epochs=1, shuffle=False)
    documents = list(one)
    assert [text_of(document) for document in documents] == ["first line\n", "second line\n", "end", "short"]
    assert len({document.document_id for document in documents}) == 4


@pytest.mark.parametrize("damage", ["truncated", "flipped", "not gzip"])
def test_d5_damaged_gzip_keeps_what_comes_before(tmp_path, damage, capsys):
    rng = random.Random(0)
    texts = ["".join(rng.choices("abcdefgh", k=100)) for _ in range(3000)]
    path = write(tmp_path / "a.jsonl.gz", lines(texts))
    raw = bytearray(path.read_bytes())
    if damage == "truncated":
        raw = raw[: len(raw) // 2]
    elif damage == "flipped":
        raw[len(raw) // 2] ^= 255
    path.write_bytes(b"plain" if damage == "not gzip" else raw)
    write(tmp_path / "b.jsonl.gz", lines(["good"]))
    with pytest.raises(DataError, match=r"a\.jsonl\.gz( line \d+|: cannot be decompressed behind line \d+)"):
        epoch(tmp_path, shuffle=False)
    one = build(tmp_path, epochs=1, on_error="skip", shuffle=False)
    read = [text_of(document) for document in one]
    assert read[-1] == "good"
    assert one.unreadable >= 1
    assert (len(read) > 1) == (damage != "not gzip")
    assert read[:-1][:1000] == texts[: len(read) - 1][:1000]
    capsys.readouterr()


@ENDINGS
def test_d5_nothing_but_empty_files(tmp_path, ending):
    (tmp_path / f"a.{ending}").write_bytes(b"")
    with pytest.raises(DataError, match=r"dataset\.paths has no rows: all 1 files are empty"):
        build(tmp_path)


@ENDINGS
def test_held_out_rows_are_disjoint_by_text_and_cover(tmp_path, ending):
    texts = [f"row {number % 300}" for number in range(600)]
    write(tmp_path / f"a.{ending}", lines(texts))
    train, validation = (epoch(tmp_path, split=split, validation_fraction=0.3)[0] for split in ("train", "validation"))
    assert 0.15 < len(validation) / 600 < 0.45
    assert not set(train) & set(validation)
    assert Counter(train + validation) == Counter(texts)
    assert build(tmp_path, validation_fraction=0.3).n_rows is None


def test_other_keys_are_there_for_filters(tmp_path):
    write(tmp_path / "a.jsonl", b'{"body": "x", "score": 1}\n{"score": 5, "body": "y", "text": 3}\n')
    score = Component.named("filter", "min_score", score=2.0)
    assert epoch(tmp_path, column="body", filters=[score]) == [["y"]]
    with pytest.raises(DataError, match=r"a\.jsonl line \d: filter 'min_score' finds no column 'scor'; did you mean|finds no column 'scor'"):
        epoch(tmp_path, column="body", filters=[Component.named("filter", "min_score", score=2.0, column="scor")])


@pytest.mark.parametrize("how", ["gone", "longer"])
def test_d10_a_file_that_changes_while_it_is_read(tmp_path, how):
    path = write(tmp_path / "a.jsonl", lines(numbered(0, 50)))
    one = build(path, on_error="skip")
    next(one)
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(lines(numbered(0, 51)))
    with pytest.raises(DataError, match=r"a\.jsonl (was listed and cannot be read any more|changed while it was in use)"):
        next(one)


def test_files_behind_a_url(tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    root = uuid.uuid4().hex
    for ending in ("jsonl", "jsonl.gz"):
        path = write(tmp_path / f"a.{ending}", lines(numbered(0, 50)))
        memory.pipe(f"/{root}/{ending}/a.{ending}", path.read_bytes())
        assert epoch(f"memory://{root}/{ending}", shuffle=False) == [numbered(0, 50)]
    memory.rm(f"/{root}", recursive=True)


@ENDINGS
def test_d7_a_line_that_is_too_long_is_not_read(tmp_path, ending, monkeypatch, capsys):
    monkeypatch.setattr(module, "LINE_BYTES", 100)
    write(tmp_path / f"a.{ending}", lines(["a", "x" * 500, "b"]))
    one = build(tmp_path, epochs=1, on_error="skip", shuffle=False)
    assert [text_of(document) for document in one] == ["a", "b"]
    assert "line 2: longer than" in capsys.readouterr().err


MEASURE = """
import sys
from titanlm.registry import Component
def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) // 1024
tokenizer = Component.named("tokenizer", "byte").build()
dataset = Component.named("dataset", "jsonl", paths=(sys.argv[1],))
base = peak()
stream = dataset.build(tokenizer=tokenizer, split="train", stream=0, n_streams=1, seed=0, epochs=1)
documents = n_bytes = 0
for one in stream:
    documents += 1
    n_bytes += one.n_bytes
print(documents, n_bytes, peak() - base)
"""


@ENDINGS
def test_d7_many_tiny_rows_and_a_huge_one(tmp_path, ending):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for texts, n_documents, n_bytes in ((["x"] * 50_000, 50_000, 50_000), (["a", "line of text\n" * 4_000_000, "b"], 201, 52_000_002)):
        path = write(tmp_path / f"a.{ending}", lines(texts))
        done = subprocess.run([sys.executable, "-c", MEASURE, str(path)], env=environment, capture_output=True, text=True, timeout=200, check=True)
        assert list(map(int, done.stdout.split()[:2])) == [n_documents, n_bytes]
        assert int(done.stdout.split()[2]) < 300
