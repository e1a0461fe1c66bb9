"""The .bin format: what is refused before anything is mapped, and what is written."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest

from titanlm.datasets.shard_file import ShardWriter, digest_of, dtype_for, open_shard, read_manifest, write_manifest
from titanlm.errors import DataError


def shard(path: Path, ids=(1, 5, 6), *, magic=20240520, version=1, claimed=None, dtype="<u2", order="<", tail=b"") -> Path:
    """A shard as other programs write it."""
    header = np.zeros(256, dtype=f"{order}i4")
    header[:3] = magic, version, len(ids) if claimed is None else claimed
    path.write_bytes(header.tobytes() + np.array(ids, dtype=dtype).tobytes() + tail)
    return path


def test_a_shard_of_parameter_golf_is_read(tmp_path: Path) -> None:
    opened = open_shard(shard(tmp_path / "a.bin", [1, 500, 65535]))
    assert (opened.n_tokens, opened.dtype, opened.tokenizer_digest) == (3, np.dtype("<u2"), b"")
    assert opened.tokens().tolist() == [1, 500, 65535]


def test_a_shard_of_the_large_variant_is_read(tmp_path: Path) -> None:
    opened = open_shard(shard(tmp_path / "a.bin", [1, 128_000], magic=20240801, version=7, dtype="<u4"))
    assert opened.tokens().tolist() == [1, 128_000]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"magic": 20240521}, "magic number is 20240521"),
        ({"version": 2}, "version 2"),
        ({"magic": 20240801, "version": 1}, "read in version 7"),
        ({"order": ">"}, "big-endian"),
        ({"tail": b"\0"}, "ends inside an id"),
        ({"claimed": 2}, "claims 2 tokens and 3 follow"),
        ({"claimed": -3}, "claims -3 tokens"),
        ({"claimed": 2**31 - 1}, "claims 2,147,483,647 tokens"),
        ({"dtype": "<u4"}, "claims 3 tokens and 6 follow"),
        ({"ids": ()}, "without tokens"),
    ],
    ids=["magic", "version", "other version", "big-endian", "odd", "fewer", "negative", "huge", "uint32 for uint16", "d6 no tokens"],
)
def test_d15_a_damaged_shard_is_refused_by_name(tmp_path: Path, settings, said: str) -> None:
    path = shard(tmp_path / "bad.bin", **settings)
    with pytest.raises(DataError) as error:
        open_shard(path)
    assert said in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("size", [0, 3, 1023])
def test_d15_a_cut_header_is_refused(tmp_path: Path, size: int) -> None:
    path = shard(tmp_path / "cut.bin")
    os.truncate(path, size)
    with pytest.raises(DataError, match=f"{size} bytes are too few"):
        open_shard(path)


def test_d10_a_shard_that_changes_is_noticed_before_it_is_read(tmp_path: Path) -> None:
    opened = open_shard(shard(tmp_path / "a.bin", range(1000)))
    shard(tmp_path / "a.bin", range(10))
    with pytest.raises(DataError, match="changed while it was in use"):
        opened.tokens()
    (tmp_path / "a.bin").unlink()
    with pytest.raises(DataError, match="gone while it was in use"):
        opened.tokens()


@pytest.mark.parametrize("vocab_size", [65536, 65537])
def test_what_is_written_is_read(tmp_path: Path, vocab_size: int) -> None:
    ids = np.array([0, 7, vocab_size - 1], dtype=np.int32)
    path = tmp_path / "a.bin"
    with ShardWriter(path, dtype_for(vocab_size), "a tokenizer") as writer:
        writer.write(ids[:2])
        assert not path.exists()
        writer.write(ids[2:])
        sha256 = writer.close()
    assert sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    opened = open_shard(path)
    assert opened.tokens().tolist() == ids.tolist()
    assert opened.tokenizer_digest == digest_of("a tokenizer") == hashlib.sha256(b"a tokenizer").digest()
    assert list(tmp_path.iterdir()) == [path]


def test_bytes_are_those_of_other_writers(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "a.bin", dtype_for(1024)) as writer:
        writer.write(np.array([1, 500, 2], dtype=np.int32))
        writer.close()
    assert (tmp_path / "a.bin").read_bytes() == shard(tmp_path / "b.bin", [1, 500, 2]).read_bytes()


def test_an_abandoned_shard_leaves_nothing(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "a.bin", dtype_for(1024)) as writer:
        writer.write(np.arange(10))
    assert not list(tmp_path.iterdir())


def test_a_manifest_comes_back_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) == {}
    write_manifest(tmp_path, {"a_train": {"tokenizer": "t"}})
    assert read_manifest(tmp_path) == {"a_train": {"tokenizer": "t"}}
    for text in ("{", "[]", '{"format": 2, "sets": {}}', '{"format": 1, "sets": {"a": 3}}'):
        (tmp_path / "shards.json").write_text(text)
        with pytest.raises(DataError, match=r"shards\.json"):
            read_manifest(tmp_path)
