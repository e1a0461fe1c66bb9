"""Cases B: checkpoints that were damaged, cut, mixed or forged. Each is refused with a CheckpointError before a tensor is used."""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from titanlm import checkpoint
from titanlm.errors import CheckpointError
from titanlm.tensor_file import write_tensors


def save(root: Path, step: int = 3, seed: int = 0) -> Path:
    draw = torch.Generator().manual_seed(seed)
    state = {"model": {"w": torch.randn(6, 5, generator=draw), "b": torch.randn(3, generator=draw).bfloat16()}, "list": [1, {"n": 2}], "seed": seed}
    return checkpoint.save(root, step, state, {"rng": torch.arange(9), "ids": np.arange(4)}, "x = 1\n")


def save_of_two(root: Path) -> Path:
    """As two ranks write it: the second's part put beside the first's."""
    folder = save(root)
    rows = torch.arange(12.0).view(4, 3)
    edit_json(folder, "state-00000.json", lambda document: document["state"].update(split={"rows": {"$tensor": ["F32", [4, 3]]}}))
    edit_json(folder, "state-00000.json", lambda document: document["shards"].update({"split/rows": [[0, 0], [1, 3]]}))
    write_tensors(folder / "split-00000.safetensors", {"split/rows": rows[:1]})
    write_tensors(folder / "split-00001.safetensors", {"split/rows": rows[1:]})
    other = {"format": 2, "step": 3, "rank": 1, "state": None, "own": {}, "shards": {"split/rows": [[1, 0], [3, 3]]}}
    (folder / "state-00001.json").write_text(json.dumps(other))
    seal(folder, world_size=2)
    assert torch.equal(checkpoint.load(folder).state["split"]["rows"], rows)
    return folder


def seal(folder: Path, **changes: Any) -> None:
    """A manifest that fits what is there, as a forger would write it."""
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    files = {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "MANIFEST.json"}
    manifest["files"] = {name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()} for name, content in files.items()}
    (folder / "MANIFEST.json").write_text(json.dumps(manifest | changes))


def edit_json(folder: Path, name: str, change: Callable[[dict], Any]) -> None:
    document = json.loads((folder / name).read_text())
    change(document)
    (folder / name).write_text(json.dumps(document))
    if name != "MANIFEST.json":
        seal(folder)


def test_b1_every_bit_flip_is_found_and_its_file_named(tmp_path: Path) -> None:
    folder = save(tmp_path)
    files = sorted(folder.iterdir())
    rng = random.Random(0)
    for _ in range(1000):
        file = rng.choice(files)
        before = file.read_bytes()
        position, bit = rng.randrange(len(before)), rng.randrange(8)
        damaged = bytearray(before)
        damaged[position] ^= 1 << bit
        file.write_bytes(damaged)
        problem = checkpoint.verify(folder)
        assert problem is not None
        assert file.name in problem or file.name == "MANIFEST.json", problem
        file.write_bytes(before)
    checkpoint.load(folder)


def test_b2_every_truncation_is_found(tmp_path: Path) -> None:
    folder = save(tmp_path)
    for file in sorted(folder.iterdir()):
        content = file.read_bytes()
        for length in range(len(content)):
            os.truncate(file, length)
            assert file.name in (checkpoint.verify(folder) or ""), (file, length)
            file.write_bytes(content)
    assert checkpoint.verify(folder) is None


def test_b3_missing_extra_linked_and_swapped_files_are_named(tmp_path: Path) -> None:
    first, folder = save(tmp_path, 10, seed=1), save(tmp_path, 20, seed=2)
    for name in sorted(file.name for file in folder.iterdir()):
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        assert name in checkpoint.verify(folder)
        assert "missing" in checkpoint.verify(folder)
        (folder / name).symlink_to(first / name)
        assert f"{name} " in checkpoint.verify(folder).replace("MANIFEST.json cannot be read: ", "")
        (folder / name).unlink()
        (folder / name).mkdir()
        assert checkpoint.verify(folder) is not None
        (folder / name).rmdir()
        shutil.copy(first / name, folder / name)
        if content != (first / name).read_bytes():
            assert name in checkpoint.verify(folder)
        (folder / name).write_bytes(content)
        assert checkpoint.verify(folder) is None
    (folder / "extra").touch()
    assert checkpoint.verify(folder) == "extra is not in the manifest"
    shutil.rmtree(folder)
    first.rename(folder)
    assert "is of step 10" in checkpoint.verify(folder)


@pytest.mark.timeout(30)
def test_b3_a_pipe_in_place_of_any_file_is_not_waited_for(tmp_path: Path) -> None:
    folder = save(tmp_path)
    for file in sorted(folder.iterdir()):
        content = file.read_bytes()
        file.unlink()
        os.mkfifo(file)
        assert "is not a file" in checkpoint.verify(folder)
        file.unlink()
        file.write_bytes(content)


def test_b5_the_missing_part_of_a_rank_is_named(tmp_path: Path) -> None:
    folder = save_of_two(tmp_path)
    for name in ("state-00001.json", "split-00001.safetensors"):
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        assert checkpoint.verify(folder) == f"{name} (part of rank 1) is missing"
        seal(folder)  # even where the manifest agrees
        with pytest.raises(CheckpointError, match="state-00001.json|rank 1"):
            checkpoint.load(folder)
        (folder / name).write_bytes(content)
        seal(folder)
    assert checkpoint.verify(folder) is None


@pytest.mark.parametrize(("version", "words"), [(1, "written by an earlier titanlm"), (3, "written by a later titanlm"), (10**30, "a later titanlm")])
def test_b7_other_formats_are_told_apart(tmp_path: Path, version: int, words: str) -> None:
    folder = save(tmp_path)
    edit_json(folder, "MANIFEST.json", lambda manifest: manifest.update(format=version))
    problem = checkpoint.verify(folder)
    assert words in problem
    assert "this version reads format 2" in problem
    with pytest.raises(CheckpointError, match=words):
        checkpoint.load(folder)


def manifest_change(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder, "MANIFEST.json", lambda manifest: manifest.update(changes))


def entry(name: str, described: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder, "MANIFEST.json", lambda manifest: manifest["files"].update({name: described}))


def part(change: Callable[[dict], Any], name: str = "state-00000.json") -> Callable[[Path], None]:
    return lambda folder: edit_json(folder, name, change)


def text(name: str, content: bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(content)
        if name != "MANIFEST.json":
            seal(folder)

    return change


def leaf(described: Any, kind: str = "$tensor") -> Callable[[Path], None]:
    return part(lambda document: document["state"]["model"].update(w={kind: described}))


def shard(path: str, placed: Any) -> Callable[[Path], None]:
    return part(lambda document: document["shards"].update({path: placed}))


def cut_tensors(folder: Path) -> None:
    content = (folder / "model-00000.safetensors").read_bytes()
    (folder / "model-00000.safetensors").write_bytes(content[:-8])
    seal(folder)


def other_tensors(folder: Path) -> None:
    (folder / "model-00000.safetensors").unlink()
    write_tensors(folder / "model-00000.safetensors", {"model/w": torch.zeros(6, 5, dtype=torch.int32), "model/b": torch.zeros(3).bfloat16()})
    seal(folder)


DEEP = b'{"a":' * 100_000
FORGED: dict[str, Callable[[Path], None]] = {
    "manifest is a list": text("MANIFEST.json", b"[]"),
    "manifest is deep": text("MANIFEST.json", DEEP),
    "manifest is not utf-8": text("MANIFEST.json", b'{"format": "\xff"}'),
    "manifest has a long number": text("MANIFEST.json", b'{"format": ' + b"9" * 5000 + b"}"),
    "format is text": manifest_change(format="2"),
    "format is true": manifest_change(format=True),
    "step is text": manifest_change(step="3"),
    "step is a fraction": manifest_change(step=3.0),
    "no rank": manifest_change(world_size=0),
    "world size is null": manifest_change(world_size=None),
    "more ranks than files": manifest_change(world_size=5_000_000),
    "files is a list": manifest_change(files=["config.toml"]),
    "name with a slash": entry("../outside-00000.json", {"bytes": 0, "sha256": ""}),
    "absolute name": entry("/etc/hostname", {"bytes": 0, "sha256": ""}),
    "empty name": entry("", {"bytes": 0, "sha256": ""}),
    "name of the folder above": entry("..", {"bytes": 0, "sha256": ""}),
    "entry is null": entry("config.toml", None),
    "entry without a hash": entry("config.toml", {"bytes": 6}),
    "size is text": entry("config.toml", {"bytes": "6", "sha256": ""}),
    "size is negative": entry("config.toml", {"bytes": -1, "sha256": ""}),
    "part is a list": text("state-00000.json", b"[]"),
    "part is deep": text("state-00000.json", DEEP),
    "part of another step": part(lambda document: document.update(step=4)),
    "part of another rank": part(lambda document: document.update(rank=1)),
    "no state": part(lambda document: document.pop("state")),
    "state is a list": part(lambda document: document.update(state=[])),
    "own is null": part(lambda document: document.update(own=None)),
    "shards is a list": part(lambda document: document.update(shards=[1])),
    "config is not utf-8": text("config.toml", b"\xff"),
    "leaf is a number": leaf(3),
    "leaf of one": leaf(["F32"]),
    "unknown dtype": leaf(["F33", [6, 5]]),
    "dtype is a list": leaf([["F32"], [6, 5]]),
    "another dtype": leaf(["I32", [6, 5]]),
    "shape is text": leaf(["F32", "65"]),
    "negative shape": leaf(["F32", [-6, -5]]),
    "fractional shape": leaf(["F32", [6.0, 5]]),
    "shape of booleans": leaf(["F32", [True, 5]]),
    "another shape": leaf(["F32", [5, 6]]),
    "larger shape": leaf(["F32", [6, 50]]),
    "shape whose product overflows": leaf(["F32", [2**40, 2**40]]),
    "empty shape that overflows": leaf(["F32", [0, 2**40, 2**40]]),
    "a thousand dimensions": leaf(["F32", [1] * 1000]),
    "array of bfloat16": leaf(["BF16", [0]], "$array"),
    "items is a number": part(lambda document: document["state"].update(list={"$items": 3})),
    "items of one": part(lambda document: document["state"].update(list={"$items": [[1]]})),
    "items with a list for a key": part(lambda document: document["state"].update(list={"$items": [[[1], 2]]})),
    "shard is null": shard("model/w", None),
    "shard of another length": shard("model/w", [[0], [6, 5]]),
    "shard outside": shard("model/w", [[1, 0], [6, 5]]),
    "shard too small": shard("model/w", [[0, 0], [5, 5]]),
    "shard at a fraction": shard("model/w", [[0.0, 0], [6, 5]]),
    "shard at a negative place": shard("model/w", [[-1, 0], [7, 5]]),
    "shard of another file": shard("../model/w", [[0, 0], [6, 5]]),
    "shard of no file": shard("other/w", [[0, 0], [6, 5]]),
    "no shard": part(lambda document: document["shards"].pop("model/w")),
    "huge shape and shard that agree": part(
        lambda document: (document["state"]["model"].update(w={"$tensor": ["F32", [2**38]]}), document["shards"].update({"model/w": [[0], [2**38]]}))
    ),
    "tensors cut": cut_tensors,
    "tensors are noise": text("model-00000.safetensors", b"\xff" * 64),
    "tensors are none": text("model-00000.safetensors", b""),
    "tensors of another dtype": other_tensors,
}


@pytest.mark.parametrize("name", FORGED)
@pytest.mark.timeout(30)
def test_b4_what_is_forged_with_fitting_hashes_is_refused_as_such(tmp_path: Path, name: str) -> None:
    """That it was forged is not found (nothing is signed); that it makes no sense is, without memory being taken for it."""
    folder = save(tmp_path)
    FORGED[name](folder)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError):
        checkpoint.load(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10


@pytest.mark.parametrize(
    ("placed", "words"),
    [([[0, 0], [3, 3]], "each once"), ([[2, 0], [2, 3]], "each once"), ([[1, 0], [4, 3]], "each once"), ([[0, 0], [1, 3]], "each once")],
    ids=["overlap", "gap", "beyond", "twice"],
)
def test_b4_pieces_that_do_not_make_up_a_tensor(tmp_path: Path, placed: list, words: str) -> None:
    folder = save_of_two(tmp_path)
    edit_json(folder, "state-00001.json", lambda document: document["shards"].update({"split/rows": placed}))
    with pytest.raises(CheckpointError, match=words):
        checkpoint.load(folder)
