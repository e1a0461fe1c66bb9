"""Copies of checkpoints elsewhere: whole by their manifest, checked when they come back, whatever breaks in between."""

from __future__ import annotations

import itertools
import json
import threading
import uuid
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from titanlm import checkpoint, checkpoint_copy
from titanlm.checkpoint_copy import RemoteCopies
from titanlm.errors import CheckpointError


@pytest.fixture(params=["memory", "folder"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "elsewhere" / "run") if request.param == "folder" else f"memory://{uuid.uuid4().hex}/run"


def save(root: Path, step: int, seed: str = "", n_files: int = 2) -> Path:
    """A checkpoint of ``n_files`` of tensors and two others."""
    state = {f"part{n}": {"weight": torch.full((1000,), step + 0.1 * n + len(seed))} for n in range(n_files)}
    return checkpoint.save(root, step, state, {"rank": 0}, seed)


def there(url: str) -> dict[str, dict[str, bytes]]:
    """Step folder → file → content of a place."""
    files, root = fsspec.url_to_fs(url)
    found: dict[str, dict[str, bytes]] = {}
    for path in files.find(root):
        folder, name = path.split("/")[-2:]
        found.setdefault(folder, {})[name] = files.cat_file(path)
    return found


def here(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def write(url: str, path: str, content: bytes) -> None:
    files, root = fsspec.url_to_fs(url)
    files.makedirs(f"{root}/{path}".rpartition("/")[0], exist_ok=True)
    files.pipe_file(f"{root}/{path}", content)


def remove(url: str, path: str) -> None:
    files, root = fsspec.url_to_fs(url)
    files.rm(f"{root}/{path}", recursive=True)


# ---------------------------------------------------------------- there and back
def test_there_and_back(tmp_path: Path, url: str) -> None:
    copies = RemoteCopies(url)
    assert copies.newest() is None
    assert copies.fetch(5, tmp_path / "new") is None
    folders = [save(tmp_path / "run", step) for step in (1, 2)]
    for folder in folders:
        copies.upload(folder, keep_last=2)
    assert there(url) == {folder.name: here(folder) for folder in folders}
    assert (copies.newest(), copies.newest(1), copies.newest(2)) == (2, 2, None)
    again = RemoteCopies(url)  # as on another machine
    fetched = again.fetch(2, tmp_path / "new" / "checkpoints")
    assert fetched == tmp_path / "new" / "checkpoints" / "step-00000002"
    assert here(fetched) == here(folders[1])
    assert [path.name for path in fetched.parent.iterdir()] == [fetched.name]


def test_a_folder_of_the_same_name_is_replaced(tmp_path: Path, url: str) -> None:
    copies = RemoteCopies(url)
    folder = save(tmp_path / "run", 1)
    copies.upload(folder, keep_last=1)
    before = here(folder)
    (folder / "config.toml").write_bytes(b"damage")
    assert copies.fetch(1, folder.parent) == folder
    assert here(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_copy_that_is_there_is_not_made_again(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    copies = RemoteCopies(url)
    folder = save(tmp_path / "run", 1)
    copies.upload(folder, keep_last=1)
    monkeypatch.setattr(RemoteCopies, "_put", lambda *_: pytest.fail("copied again"))
    copies.upload(folder, keep_last=1)


def test_another_checkpoint_of_the_step_replaces_the_copy(tmp_path: Path, url: str) -> None:
    copies = RemoteCopies(url)
    copies.upload(save(tmp_path / "run", 1, n_files=4), keep_last=1)
    folder = save(tmp_path / "run", 1, "other", n_files=1)
    copies.upload(folder, keep_last=1)
    assert there(url) == {folder.name: here(folder)}


# ---------------------------------------------------------------- what is cut off
@pytest.mark.parametrize("first", [True, False])
def test_a_failure_at_each_put_leaves_no_half_copy_that_counts(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch, first: bool) -> None:
    kind = type(RemoteCopies(url)._files)
    opened, pipe = kind.open, kind.pipe_file
    n_puts = 5  # two files of tensors, state and config, the manifest
    old = save(tmp_path / "run", 1)
    for broken in range(n_puts):
        copies = RemoteCopies(url)
        copies.upload(old, keep_last=3)
        if not first:
            copies.upload(save(tmp_path / "run", 2, "before"), keep_last=3)
        folder = save(tmp_path / "run", 2)
        count = itertools.count()

        def failing(put: Any) -> Any:
            def wrapped(self: Any, path: str, *args: Any, **kwargs: Any) -> Any:
                if "rb" not in args and next(count) == broken:  # noqa: B023
                    raise OSError(5, "secret words of a library")
                return put(self, path, *args, **kwargs)

            return wrapped

        monkeypatch.setattr(kind, "open", failing(opened))
        monkeypatch.setattr(kind, "pipe_file", lambda self, path, value: failing(lambda self, path: pipe(self, path, value))(self, path))
        monkeypatch.setattr(checkpoint_copy, "_AT_ONCE", 1)
        with pytest.raises(CheckpointError, match="step-00000002 was not copied") as caught:
            copies.upload(folder, keep_last=3)
        assert "secret" not in str(caught.value)
        monkeypatch.setattr(kind, "open", opened)
        monkeypatch.setattr(kind, "pipe_file", pipe)
        assert RemoteCopies(url).newest() == 1
        assert RemoteCopies(url).fetch(9, tmp_path / f"new-{broken}") == tmp_path / f"new-{broken}" / old.name
        RemoteCopies(url).upload(folder, keep_last=3)
        assert there(url) == {old.name: here(old), folder.name: here(folder)}
        remove(url, folder.name)


def test_one_failure_stops_the_other_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They notice at their next chunk, however much is left."""
    chunks: list[str] = []
    monkeypatch.setattr(checkpoint_copy, "_CHUNK_BYTES", 1)
    ready = threading.Barrier(5, timeout=60)  # all that are not empty are under way before one of them fails

    class Broken(checkpoint_copy._Progress):
        def add(self, n_bytes: int) -> None:
            chunks.append(name := threading.current_thread().name)
            if chunks.count(name) == 1 and ready.wait() == 0:
                raise OSError(28, "full")

    monkeypatch.setattr(checkpoint_copy, "_Progress", Broken)
    folder = save(tmp_path / "run", 1, n_files=4)
    (folder / "config.toml").write_bytes(b"")
    with pytest.raises(CheckpointError, match="No space left on device"):
        RemoteCopies(f"memory://{uuid.uuid4().hex}").upload(folder, keep_last=1)
    assert len(chunks) < sum(file.stat().st_size for file in folder.iterdir())


def test_damage_here_is_not_spread(tmp_path: Path, url: str) -> None:
    folder = save(tmp_path / "run", 1)
    file = folder / "part1-00000.safetensors"
    good = file.read_bytes()
    copies = RemoteCopies(url)
    for bad in (good[:-1], good[:-1] + b"!", good + b"!"):
        file.write_bytes(bad)
        with pytest.raises(CheckpointError, match=r"part1-00000\.safetensors is damaged"):
            copies.upload(folder, keep_last=1)
        assert copies.newest() is None
    file.unlink()
    with pytest.raises(CheckpointError, match=r"part1-00000\.safetensors cannot be read: No such file"):
        copies.upload(folder, keep_last=1)
    (folder / "MANIFEST.json").unlink()
    with pytest.raises(CheckpointError, match=r"MANIFEST\.json cannot be read"):
        copies.upload(folder, keep_last=1)


# ---------------------------------------------------------------- what comes back
def test_a_damaged_copy_is_named_and_the_next_older_is_taken(tmp_path: Path, url: str) -> None:
    told: list[str] = []
    copies = RemoteCopies(url, told.append)
    folders = {step: save(tmp_path / "run", step) for step in (1, 2, 3)}
    for folder in folders.values():
        copies.upload(folder, keep_last=3)
    name, whole = folders[3].name, here(folders[3])
    file = "part1-00000.safetensors"
    outside = json.dumps({"files": {"../escape": {"bytes": 1, "sha256": "0"}}}).encode()
    damages: list[tuple[str, bytes | None]] = [
        (file, whole[file][:-1]), (file, whole[file][:-1] + b"!"), (file, whole[file] + b"!"), (file, b""), (file, None),
        ("MANIFEST.json", whole["MANIFEST.json"][:-1]), ("MANIFEST.json", b""), ("MANIFEST.json", b"[]"), ("MANIFEST.json", outside),
        ("MANIFEST.json", b"[" * 100_000),
    ]  # fmt: skip
    for number, (damaged, content) in enumerate(damages):
        write(url, f"{name}/{damaged}", content) if content is not None else remove(url, f"{name}/{damaged}")
        told.clear()
        root = tmp_path / f"new-{number}" / "checkpoints"
        assert copies.newest() == 3
        assert copies.fetch(3, root) == root / "step-00000002"
        assert here(root / "step-00000002") == here(folders[2])
        assert len(told) == 1
        assert told[0].startswith("WARNING: ")
        assert f"{name}: {damaged}" in told[0]
        assert copies.fetch(3, root, than_step=2) is None
        assert [path.name for path in root.iterdir()] == ["step-00000002"]
        write(url, f"{name}/{damaged}", whole[damaged])
    assert not (tmp_path / "escape").exists()
    assert copies.fetch(3, tmp_path / "last") == tmp_path / "last" / name


def test_a_network_that_fails_is_no_damage(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    copies = RemoteCopies(url)
    for step in (1, 2):
        copies.upload(save(tmp_path / "run", step), keep_last=2)

    def fail(*_: Any, **__: Any) -> Any:
        raise ConnectionError("https://user:secret@host")

    for method, call in (("ls", copies.newest), ("ls", lambda: copies.fetch(2, tmp_path / "new")), ("open", lambda: copies.fetch(2, tmp_path / "new"))):
        with monkeypatch.context() as patch:
            patch.setattr(type(copies._files), method, fail)
            with pytest.raises(CheckpointError, match="ConnectionError; are the network") as caught:
                call()
        assert "secret" not in str(caught.value)
        assert caught.value.__suppress_context__
    assert not list((tmp_path / "new").iterdir())


def test_a_full_disk_is_told_before_anything_comes(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    copies = RemoteCopies(url)
    copies.upload(save(tmp_path / "run", 1), keep_last=1)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(CheckpointError, match="are free; make room"):
        copies.fetch(1, tmp_path / "new")
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        RemoteCopies(url).fetch(1, tmp_path / "file" / "new")


# ---------------------------------------------------------------- rotation
def test_rotation_follows_the_rule_of_the_run(tmp_path: Path, url: str) -> None:
    copies = RemoteCopies(url)
    for step in range(1, 9):
        copies.upload(save(tmp_path / "run", step), keep_last=2, best=3, keep_every=5)
    assert sorted(there(url)) == [f"step-{step:08d}" for step in (3, 5, 7, 8)]
    copies.upload(save(tmp_path / "run", 6), keep_last=1)  # wound back: later ones are not its business
    assert sorted(there(url)) == [f"step-{step:08d}" for step in (6, 7, 8)]


def test_half_copies_do_not_push_out_whole_ones_and_go(tmp_path: Path, url: str) -> None:
    copies = RemoteCopies(url)
    for step in (1, 2, 3, 4):
        copies.upload(save(tmp_path / "run", step), keep_last=9)
    for step in (2, 3):
        remove(url, f"step-{step:08d}/MANIFEST.json")
    write(url, "notes.txt", b"not ours")
    write(url, "step-00000001.bak/file", b"not ours")
    copies.upload(save(tmp_path / "run", 5), keep_last=3)
    assert sorted(name for name in there(url) if name.startswith("step-")) == [
        "step-00000001", "step-00000001.bak", "step-00000004", "step-00000005"
    ]  # fmt: skip


def test_the_manifest_goes_first(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    copies = RemoteCopies(url)
    copies.upload(save(tmp_path / "run", 1), keep_last=1)
    copies.upload(save(tmp_path / "run", 2), keep_last=2)

    def fail(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "no")

    monkeypatch.setattr(type(copies._files), "rm", fail)
    with pytest.raises(CheckpointError, match="older copies were not deleted: PermissionError Permission denied"):
        copies.upload(save(tmp_path / "run", 3), keep_last=1)
    assert "MANIFEST.json" not in there(url)["step-00000001"]
    assert "part0-00000.safetensors" in there(url)["step-00000001"]
    assert copies.newest() == 3


def test_a_run_that_was_wound_back_does_not_go_on_from_later_copies(tmp_path: Path, url: str) -> None:
    copies = RemoteCopies(url)
    for step in (1, 2, 5, 6):
        copies.upload(save(tmp_path / "run", step), keep_last=9)
    copies.wind_back(2)
    assert copies.newest() == 2
    copies.upload(save(tmp_path / "run", 5, "another"), keep_last=9)
    assert copies.newest() == 5
    copies.upload(save(tmp_path / "run", 7), keep_last=9)
    assert sorted(there(url)) == [f"step-{step:08d}" for step in (1, 2, 5, 7)]


# ---------------------------------------------------------------- words
def test_long_transfers_say_how_far_they_are(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    copies = RemoteCopies(url, told.append)
    folder = save(tmp_path / "run", 1)
    copies.upload(folder, keep_last=1)
    assert not told
    monkeypatch.setattr(checkpoint_copy, "_REPORT_S", 0.0)
    copies.fetch(1, tmp_path / "new")
    assert len(told) == 3  # the config is empty
    assert told[0].startswith("fetching step-00000001 from ")
    assert " of 0.00 GB, " in told[0]


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("s3://bucket/run", "pip install 's3fs'"),
        ("gs://bucket/run", "pip install 'gcsfs'"),
        ("s3://key:secret@bucket/run", "holds a user's name or password"),
        ("https://host/run?token=secret", "nothing can be copied there; name a bucket"),
        ("ftp://host/run", "ftp:// is not read"),
        ("file:///tmp/run", "give the path alone"),
        ("simplecache::s3://bucket", "chains protocols"),
    ],
)
def test_places_that_cannot_be(url: str, said: str) -> None:
    with pytest.raises(CheckpointError, match="checkpoint.copy_to") as caught:
        RemoteCopies(url)
    assert said in str(caught.value)
    assert "secret" not in str(caught.value)
