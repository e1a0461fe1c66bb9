from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from titanlm.errors import DataError
from titanlm.registry import Component, register

ROOT = Path(__file__).parents[2]
RUNTIME = {"split": "train", "stream": 0, "n_streams": 1, "seed": 0}


def build(*paths, filters=(), **settings):
    runtime = {**RUNTIME, **{key: settings.pop(key) for key in [*RUNTIME, "epochs", "on_error"] if key in settings}}
    component = Component.named("dataset", "parquet", paths=tuple(map(str, paths)), filter=tuple(filters), **settings)
    return component.build(tokenizer=Component.named("tokenizer", "byte").build(), **runtime)


def text_of(document) -> str:
    return bytes(document.ids[1:-1].astype(np.uint8)).decode()


def epoch(*paths, n_streams=1, **settings) -> list[list[str]]:
    """The texts of one pass, by stream."""
    return [[text_of(one) for one in build(*paths, stream=stream, n_streams=n_streams, epochs=1, **settings)] for stream in range(n_streams)]


def write(path, texts, group=None, **options):
    table = texts if isinstance(texts, pa.Table) else pa.table({"text": pa.array(texts, pa.string())})
    parquet.write_table(table, path, row_group_size=group or max(1, len(table)), **options)
    return path


def numbered(start, end) -> list[str]:
    return [f"row {number}" for number in range(start, end)]


def broken_group(path, group, column=0):
    """Overwrite the pages of a row group's column."""
    place = parquet.ParquetFile(path).metadata.row_group(group).column(column)
    first = place.dictionary_page_offset or place.data_page_offset
    raw = bytearray(path.read_bytes())
    raw[first : first + place.total_compressed_size] = b"\xa5" * place.total_compressed_size
    path.write_bytes(raw)


# ---------------------------------------------------------------- shards
@pytest.mark.parametrize(
    ("n_files", "rows", "group", "n_streams", "n_shards"),
    [
        (1, 100, None, 1, 1),  # a file for the only stream
        (3, 40, 10, 8, 12),  # few files: row groups
        (2, 50, 25, 8, 12),  # few row groups: ranges of rows
        (1, 1000, None, 64, 67),  # one giant row group
        (9, 20, 7, 4, 9),  # more files than streams
        (1, 5, None, 16, 5),  # fewer rows than streams
    ],
)
@pytest.mark.parametrize("shuffle", [True, False])
def test_streams_together_hold_every_row_of_an_epoch_once(tmp_path, n_files, rows, group, n_streams, n_shards, shuffle):
    for number in range(n_files):
        write(tmp_path / f"{number}.parquet", numbered(number * rows, number * rows + rows), group)
    streams = epoch(tmp_path, n_streams=n_streams, shuffle=shuffle)
    assert Counter(text for stream in streams for text in stream) == Counter(numbered(0, n_files * rows))
    assert all(streams[: min(n_streams, rows)])
    one = build(tmp_path, n_streams=n_streams)
    assert one.state()["n_shards"] == n_shards
    assert one.n_rows == (n_files * rows if n_files < n_streams else None)
    if n_streams == 1 and not shuffle:
        assert streams[0] == numbered(0, n_files * rows)


def test_epochs_end_and_differ(tmp_path):
    for number in range(4):
        write(tmp_path / f"{number}.parquet", numbered(number * 10, number * 10 + 10), 5)
    twice = [text_of(one) for one in build(tmp_path, epochs=2)]
    assert Counter(twice) == Counter(numbered(0, 40) * 2)
    assert twice[:40] != twice[40:]
    assert Counter(text_of(one) for one in islice(build(tmp_path), 120)) == Counter(numbered(0, 40) * 3)


def test_no_footer_is_read_when_there_is_a_file_for_every_stream(tmp_path, monkeypatch):
    for number in range(8):
        write(tmp_path / f"{number}.parquet", numbered(0, 1))
    opened = []
    real = parquet.ParquetFile
    monkeypatch.setattr(parquet, "ParquetFile", lambda *args, **kwargs: opened.append(1) or real(*args, **kwargs))
    streams = [build(tmp_path, stream=stream, n_streams=8) for stream in range(8)]
    assert not opened
    next(streams[0])
    assert len(opened) == 1
    build(tmp_path, n_streams=9)
    assert len(opened) == 9


def test_what_a_fingerprint_depends_on(tmp_path):
    write(tmp_path / "a.parquet", numbered(0, 100), 10)
    base = build(tmp_path, n_streams=4).fingerprint
    assert base == build(tmp_path, n_streams=8).fingerprint == build(tmp_path, n_streams=4, shuffle=False).fingerprint
    others = [{"n_streams": 1}, {"n_streams": 20}, {"n_streams": 30}]
    others += [{"n_streams": 4, **one} for one in ({"max_bytes": 99}, {"block_rows": 9}, {"validation_fraction": 0.5})]
    assert len({base, *(build(tmp_path, **one).fingerprint for one in others)}) == 7


# ---------------------------------------------------------------- resume
@dataclass(frozen=True)
class OddConfig:
    pass


@register("filter", "parquet_test_odd")
class Odd:
    """Refuses rows whose number is a multiple of five."""

    columns = ("number",)

    def __init__(self, config: OddConfig) -> None:
        pass

    def keep(self, row) -> bool:
        return row["number"] % 5 != 0


@pytest.mark.parametrize("n_streams", [1, 3, 8])
def test_d4_resumes_at_every_point_with_blocks_pieces_filters_and_damage(tmp_path, n_streams, capsys):
    """Through JSON, with blocks smaller than a row group, rows in pieces, rows without text, and row groups that cannot be read."""
    for number in range(2):
        texts = [None if i % 7 == 3 else f"{number}:{i} " * (1 + i % 4 * 3) for i in range(60)]
        table = pa.table({"text": texts, "number": list(range(60))})
        write(tmp_path / f"{number}.parquet", table, 20, use_dictionary=False)
    broken_group(tmp_path / "1.parquet", 1)
    settings = {"on_error": "skip", "filters": (Component.named("filter", "parquet_test_odd"),), "block_rows": 7, "max_bytes": 16, "n_streams": n_streams}

    def make():
        return build(tmp_path, stream=n_streams - 1, **settings)

    n = 120
    straight = make()
    documents = [(one.document_id, text_of(one)) for one in islice(straight, n)]
    assert straight.unreadable > 0 or n_streams > 1
    for point in range(n):
        first = make()
        list(islice(first, point))
        second = make()
        second.restore(json.loads(json.dumps(first.state())))
        assert [(one.document_id, text_of(one)) for one in islice(second, n - point)] == documents[point:]
        assert second.state() == straight.state()
    capsys.readouterr()


# ---------------------------------------------------------------- damage
def test_d1_rows_without_text_are_passed_over_and_counted(tmp_path):
    write(tmp_path / "a.parquet", ["x", None, "", " \n\t", "y"])
    one = build(tmp_path, epochs=1, shuffle=False)
    assert [text_of(document) for document in one] == ["x", "y"]
    assert one.state()["counts"] == {"documents": 2, "empty": 3, "filtered": 0, "unreadable": 0}


def bad_utf8(texts: list[bytes]) -> pa.Table:
    offsets = np.cumsum([0, *map(len, texts)], dtype=np.int32)
    return pa.table({"text": pa.StringArray.from_buffers(len(texts), pa.py_buffer(offsets), pa.py_buffer(b"".join(texts)))})


def test_d2_text_that_is_not_utf8(tmp_path, capsys):
    texts = [f"row {i}".encode() for i in range(10)]
    texts[7] = b"ab\xff\xfe"
    write(tmp_path / "a.parquet", bad_utf8(texts), 5)
    with pytest.raises(DataError, match=r"a\.parquet row group 1 row 2: byte 2 of the text is not UTF-8 .* data\.on_error"):
        epoch(tmp_path)
    one = build(tmp_path, epochs=1, on_error="skip", shuffle=False)
    assert [text_of(document) for document in one] == [f"row {i}" for i in range(10) if i != 7]
    assert one.unreadable == 1
    assert "row group 1 row 2" in capsys.readouterr().err


@pytest.mark.parametrize("codec", ["none", "snappy", "zstd"])
def test_d3_flipped_bits_in_data_pages_are_noticed_or_harmless(tmp_path, codec, capsys):
    rng = np.random.default_rng(0)
    texts = ["".join(map(chr, rng.integers(97, 123, 200))) for _ in range(200)]
    path = write(tmp_path / "a.parquet", texts, 50, compression=codec, use_dictionary=False, write_page_checksum=True)
    good = path.read_bytes()
    metadata = parquet.ParquetFile(path).metadata
    silent = 0
    for _ in range(60):
        place = metadata.row_group(int(rng.integers(4))).column(0)
        bit = int(rng.integers(place.data_page_offset * 8, (place.data_page_offset + place.total_compressed_size) * 8))
        raw = bytearray(good)
        raw[bit // 8] ^= 1 << bit % 8
        path.write_bytes(raw)
        one = build(path, epochs=1, on_error="skip", shuffle=False)
        read = [text_of(document) for document in one]
        assert len(read) + one.unreadable >= 200 or read == texts
        silent += not set(read) <= set(texts) or (len(read) < 200 and not one.unreadable)
        del one
    assert silent == 0
    capsys.readouterr()


def test_d4_a_damaged_row_group_is_passed_over(tmp_path, capsys):
    path = write(tmp_path / "a.parquet", numbered(0, 40), 10, write_page_checksum=True)
    broken_group(path, 2)
    with pytest.raises(DataError, match=r"a\.parquet: row group 2 is damaged from row 0 on"):
        epoch(path)
    for n_streams in (1, 3, 16):  # the file, row groups, ranges of rows
        streams = [build(path, stream=stream, n_streams=n_streams, epochs=1, on_error="skip") for stream in range(n_streams)]
        assert Counter(text_of(one) for stream in streams for one in stream) == Counter([*numbered(0, 20), *numbered(30, 40)])
        assert sum(stream.unreadable for stream in streams) == 10
    assert "row group 2 is damaged" in capsys.readouterr().err


def test_d4_damage_within_a_row_group_takes_the_rest_of_it_wherever_reading_begins(tmp_path, capsys):
    texts = [f"{i:04} " * 200 for i in range(3000)]
    path = write(tmp_path / "a.parquet", texts, 2000, use_dictionary=False, data_page_size=20_000, write_batch_size=20, write_page_checksum=True)
    place = parquet.ParquetFile(path).metadata.row_group(0).column(0)
    raw = bytearray(path.read_bytes())
    middle = place.data_page_offset + place.total_compressed_size // 2
    raw[middle : middle + 50] = b"\xa5" * 50
    path.write_bytes(raw)
    whole = build(path, epochs=1, on_error="skip", shuffle=False)
    read = [text_of(one)[:4] for one in whole]
    assert 128 < len(read) - 1000 < 2000
    assert read[-1000:] == [f"{i:04}" for i in range(2000, 3000)]
    assert whole.unreadable == 3000 - len(read)
    parts = [build(path, stream=stream, n_streams=16, epochs=1, on_error="skip", shuffle=False) for stream in range(16)]
    assert sorted(text_of(one)[:4] for part in parts for one in part) == read
    assert sum(part.unreadable for part in parts) == whole.unreadable
    capsys.readouterr()


@pytest.mark.parametrize("damage", ["empty", "truncated", "text", "no footer"])
@pytest.mark.parametrize("n_streams", [1, 8])
def test_d5_files_that_are_no_parquet_among_good_ones(tmp_path, damage, n_streams, capsys):
    for number in range(3):
        write(tmp_path / f"{number}.parquet", numbered(number * 10, number * 10 + 10))
    bad = tmp_path / "1.parquet"
    raw = bad.read_bytes()
    bad.write_bytes({"empty": b"", "truncated": raw[:100], "text": b"hello, this is a text file", "no footer": raw[:-50] + b"\0" * 42 + raw[-8:]}[damage])
    with pytest.raises(DataError, match=r"1\.parquet: is no readable parquet file .*data\.on_error"):
        epoch(tmp_path, n_streams=n_streams)
    streams = [build(tmp_path, stream=stream, n_streams=n_streams, epochs=1, on_error="skip") for stream in range(n_streams)]
    assert Counter(text_of(one) for stream in streams for one in stream) == Counter([*numbered(0, 10), *numbered(20, 30)])
    assert sum(stream.unreadable for stream in streams) == 1
    del streams  # and with them the listing
    for good in ("0.parquet", "2.parquet"):
        (tmp_path / good).unlink()
    with pytest.raises(DataError, match="all 1 shards that stream 0 of 1 reads are empty or unreadable"):
        next(build(tmp_path, on_error="skip"))
    capsys.readouterr()


@pytest.mark.parametrize("n_streams", [1, 8])
def test_d5_files_without_rows(tmp_path, n_streams):
    write(tmp_path / "0.parquet", [])
    write(tmp_path / "1.parquet", numbered(0, 10))
    assert Counter(text for stream in epoch(tmp_path, n_streams=n_streams) for text in stream) == Counter(numbered(0, 10))
    (tmp_path / "1.parquet").unlink()
    with pytest.raises(DataError, match=r"dataset\.paths has no rows: all 1 files are empty|all 1 shards that stream 0 of 1 reads are empty"):
        next(build(tmp_path, n_streams=n_streams))


# ---------------------------------------------------------------- columns
def test_d9_every_kind_of_string_is_read(tmp_path):
    texts = ["añ", None, "b", "añ"]
    kinds = [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string()), pa.string_view()]
    for number, kind in enumerate(kinds):
        array = pa.array(texts, pa.string()).dictionary_encode() if pa.types.is_dictionary(kind) else pa.array(texts, kind)
        write(tmp_path / f"{number}.parquet", pa.table({"text": array}))
    assert epoch(tmp_path, shuffle=False) == [["añ", "b", "añ"] * 4]


@pytest.mark.parametrize("column", [[1, 2], [[b"x"[0]], []], [b"x", b"y"], [{"a": "b"}, None]])
@pytest.mark.parametrize("n_streams", [1, 8])
def test_d9_another_type_is_an_error_and_never_made_text(tmp_path, column, n_streams):
    write(tmp_path / "0.parquet", ["text"])
    write(tmp_path / "1.parquet", pa.table({"text": column}))
    with pytest.raises(DataError, match=r"1\.parquet: column 'text' is of type .*, not string; set dataset\.column"):
        epoch(tmp_path, n_streams=n_streams, on_error="skip")


def test_d9_a_missing_column_is_named_with_those_there(tmp_path):
    write(tmp_path / "0.parquet", pa.table({"txt": ["a"], "sc\x1bore": [1.0]}))
    with pytest.raises(DataError, match=r"0\.parquet has no column 'text'; did you mean 'txt'\? \(columns: txt, sc\\x1bore\); set dataset\.column"):
        next(build(tmp_path))
    assert epoch(tmp_path, column="txt") == [["a"]]
    missing = Component.named("filter", "min_score", score=1.0)
    with pytest.raises(DataError, match=r"has no column 'score'; did you mean .* a filter asks for it"):
        next(build(tmp_path, column="txt", filters=[missing]))


@dataclass(frozen=True)
class AnyConfig:
    pass


SEEN: list[dict] = []


@register("filter", "parquet_test_any")
class Any_:
    """Does not say which columns it reads."""

    def __init__(self, config: AnyConfig) -> None:
        pass

    def keep(self, row) -> bool:
        SEEN.append(dict(row))
        return True


def test_only_columns_that_are_asked_for_are_read(tmp_path):
    path = write(tmp_path / "0.parquet", pa.table({"score": [1, 5, 3], "text": ["a", "b", "c"], "rest": [[1], [2], [3]], "n_tokens": [9, 9, 9]}))
    score = Component.named("filter", "min_score", score=2.0)
    assert epoch(tmp_path, filters=[score], shuffle=False) == [["b", "c"]]
    assert epoch(tmp_path, filters=[Component.named("filter", "min_tokens", tokens=2)]) == [[]]
    assert epoch(tmp_path, filters=[Component.named("filter", "min_tokens", tokens=2, column="n_tokens")], shuffle=False) == [["a", "b", "c"]]
    broken_group(path, 0, column=2)
    assert epoch(tmp_path, filters=[score], shuffle=False) == [["b", "c"]]
    write(path, pa.table({"score": [1], "text": ["a"], "rest": [[1]]}))
    SEEN.clear()
    epoch(tmp_path, filters=[Component.named("filter", "parquet_test_any")])
    (seen,) = SEEN
    assert seen == {"score": 1, "rest": [1], "text": "a", "place": f"{path} row group 0 row 0"}


# ---------------------------------------------------------------- splits
@pytest.mark.parametrize("n_streams", [1, 4])
def test_held_out_rows_are_disjoint_by_text_and_cover(tmp_path, n_streams):
    texts = [f"row {number % 300}" for number in range(600)]
    write(tmp_path / "0.parquet", texts, 100)
    train, validation = (
        [text for stream in epoch(tmp_path, n_streams=n_streams, split=split, validation_fraction=0.3) for text in stream] for split in ("train", "validation")
    )
    assert 0.15 < len(validation) / 600 < 0.45
    assert not set(train) & set(validation)
    assert Counter(train + validation) == Counter(texts)


def test_separate_validation_files(tmp_path):
    train, validation = write(tmp_path / "t.parquet", ["a"]), write(tmp_path / "v.parquet", ["b"])
    assert epoch(train, validation_paths=(str(validation),)) == [["a"]]
    assert epoch(train, validation_paths=(str(validation),), split="validation") == [["b"]]
    with pytest.raises(DataError, match=r"no validation data; set dataset\.validation_paths"):
        build(train, split="validation")
    (tmp_path / "copy.parquet").write_bytes(train.read_bytes())
    with pytest.raises(DataError, match="have the same content"):  # D14
        build(train, validation_paths=(str(tmp_path / "copy.parquet"),))


# ---------------------------------------------------------------- files that change, URLs, memory
@pytest.mark.parametrize("how", ["gone", "replaced", "cut"])
def test_d10_a_file_that_changes_while_it_is_read(tmp_path, how):
    path = write(tmp_path / "0.parquet", [f"{i} " * 50 for i in range(2000)], 500)
    one = build(path, on_error="skip", shuffle=False)
    list(islice(one, 300))
    if how == "gone":
        path.unlink()
    elif how == "replaced":
        time.sleep(0.02)
        (tmp_path / "other").write_bytes(path.read_bytes())
        os.replace(tmp_path / "other", path)
    else:
        os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(DataError, match=r"0\.parquet (was listed and cannot be read any more|changed while it was in use)"):
        list(islice(one, 3000))


def test_files_behind_a_url_are_read_like_local_ones(tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    root = uuid.uuid4().hex
    for number in range(3):
        path = write(tmp_path / f"{number}.parquet", numbered(number * 10, number * 10 + 10), 4)
        memory.pipe(f"/{root}/{number}.parquet", path.read_bytes())
    for n_streams in (1, 5, 16):
        assert epoch(f"memory://{root}", n_streams=n_streams) == epoch(tmp_path, n_streams=n_streams)
        assert build(f"memory://{root}", n_streams=n_streams).fingerprint == build(tmp_path, n_streams=n_streams).fingerprint
    memory.rm(f"/{root}", recursive=True)


def test_streams_work_in_forked_processes(tmp_path):
    for number in range(4):
        write(tmp_path / f"{number}.parquet", numbered(number * 10, number * 10 + 10))
    streams = [build(tmp_path, stream=stream, n_streams=2, epochs=1) for stream in range(2)]
    first = text_of(next(streams[0]))  # open in this process
    state = streams[0].state()
    expected = [text_of(one) for one in streams[0]]
    streams[0].restore(state)
    assert first not in expected
    read, written = os.pipe()
    if (child := os.fork()) == 0:
        try:
            os.write(written, json.dumps([text_of(one) for one in streams[0]]).encode())
        finally:
            os._exit(0)
    os.close(written)
    with os.fdopen(read, "rb") as pipe:
        assert json.loads(pipe.read()) == expected
    os.waitpid(child, 0)


MEASURE = """
import itertools, sys
from titanlm.registry import Component
import pyarrow.parquet
name, path, n_streams, *only = sys.argv[1:]
dataset = Component.named("dataset", name, paths=(path,))
tokenizer = Component.named("tokenizer", "byte").build()
def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) // 1024
base = peak()
stream = dataset.build(tokenizer=tokenizer, split="train", stream=0, n_streams=int(n_streams), seed=0, epochs=1)
documents = n_bytes = 0
for one in stream:
    documents += 1
    n_bytes += one.n_bytes
print(documents, n_bytes, peak() - base)
"""


def measure(name, path, n_streams=1) -> tuple[int, int, int]:
    """Documents, bytes, and by how many MiB the peak of resident memory grew."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MEASURE, name, str(path), str(n_streams)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=True)
    documents, n_bytes, grown = map(int, done.stdout.split())
    return documents, n_bytes, grown


def test_d7_many_tiny_rows_and_a_huge_one(tmp_path):
    write(tmp_path / "tiny.parquet", pa.table({"text": pa.array(["x"] * 200_000)}))
    documents, _, grown = measure("parquet", tmp_path / "tiny.parquet")
    assert documents == 200_000
    assert grown < 100
    write(tmp_path / "huge.parquet", ["a", "line of text\n" * 4_000_000, "b"])
    documents, n_bytes, grown = measure("parquet", tmp_path / "huge.parquet")
    assert n_bytes == 2 + 52_000_000
    assert documents == 2 + 199
    assert grown < 300


def test_d8_a_giant_row_group_is_never_in_memory(tmp_path):
    noise = np.random.default_rng(0).integers(97, 123, 1 << 21, dtype=np.uint8).tobytes().decode()
    texts = [noise[i * 97 : i * 97 + 20_000] for i in range(20_000)]  # 400 MB
    write(tmp_path / "giant.parquet", pa.table({"text": pa.array(texts)}), use_dictionary=False, compression="zstd")
    documents, n_bytes, grown = measure("parquet", tmp_path / "giant.parquet")
    assert (documents, n_bytes) == (20_000, 400_000_000)
    assert grown < 150


def test_benchmark_of_listing_runs():
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "benchmarks/listing.py", "--files", "50", "--streams", "4"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout.startswith("50 files, 4 streams: built in ")
