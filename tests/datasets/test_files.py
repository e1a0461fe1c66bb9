from __future__ import annotations

import os
import time
import uuid

import fsspec
import pytest

from titanlm.datasets.documents import TextDocuments
from titanlm.datasets.files import PROTOCOLS, Files, Listing, OfflineError, listed, offline, shown
from titanlm.errors import DataError
from titanlm.registry import Component

CANARY = "hunter2-canary"


def files(*entries, suffixes=(".jsonl",)) -> Files:
    return Files([str(entry) for entry in entries], "dataset.paths", suffixes)


def names(found: Files) -> list[str]:
    return [found.base(index) for index in range(len(found))]


def text_of(found: Files, index: int) -> str:
    with found.open(index) as file:
        return file.read().decode()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sub/deep").mkdir(parents=True)
    (tmp_path / ".hidden").mkdir()
    for name in ("b.jsonl", "a.jsonl", "notes.md", ".c.jsonl", "sub/d.jsonl", "sub/deep/e.jsonl", ".hidden/f.jsonl"):
        (tmp_path / name).write_text(name)
    return tmp_path


@pytest.fixture
def memory():
    """A folder of fsspec's memory file system, as a URL."""
    root = f"memory://{uuid.uuid4().hex}"
    yield root
    fsspec.filesystem("memory").rm(root, recursive=True)


def put(url: str, data: bytes) -> None:
    fsspec.filesystem("memory").pipe(url, data)


# ---------------------------------------------------------------- what entries mean
def test_directories_files_and_globs(folder, monkeypatch):
    assert names(files(folder)) == ["a.jsonl", "b.jsonl", "d.jsonl", "e.jsonl"]
    assert names(files(folder / "sub", folder / "notes.md")) == [
        "d.jsonl",
        "e.jsonl",
        "notes.md",
    ]  # in the order of the entries; a named file whatever its suffix
    assert names(files(folder / "**/*.jsonl")) == ["a.jsonl", "b.jsonl", "d.jsonl", "e.jsonl"]
    assert names(files(folder / "*.jsonl")) == ["a.jsonl", "b.jsonl"]
    monkeypatch.chdir(folder)
    assert names(files("sub")) == ["d.jsonl", "e.jsonl"]
    assert files("sub").sizes.tolist() == [len("sub/d.jsonl"), len("sub/deep/e.jsonl")]


def test_a_file_whose_name_looks_like_a_glob(folder):
    (folder / "x[1].jsonl").write_text("brackets")
    assert text_of(files(folder / "x[1].jsonl"), 0) == "brackets"


def test_directories_that_link_to_themselves_end(folder):
    (folder / "sub/loop").symlink_to(folder)
    (folder / "other").mkdir()
    (folder / "other/link").symlink_to(folder / "sub/deep")
    assert names(files(folder / "sub/deep")) == ["e.jsonl"]
    assert names(files(folder / "other")) == ["e.jsonl"]
    with pytest.raises(DataError, match="named twice"):  # through other/link too
        files(folder)


def test_d11_a_file_named_twice(folder):
    with pytest.raises(DataError, match=r"dataset\.paths: .*a\.jsonl is named twice, by '.*' and by '.*a\.jsonl'; every file may be read once only"):
        files(folder, folder / "a.jsonl")
    (folder / "link.jsonl").symlink_to(folder / "a.jsonl")
    with pytest.raises(DataError, match="named twice"):
        files(folder)


def test_every_file_and_another_order(folder):
    assert names(files(folder / "sub", folder / "notes.md", suffixes=("",))) == ["d.jsonl", "e.jsonl", "notes.md"]
    (folder / "empty").mkdir()
    with pytest.raises(DataError, match="no directory with files"):
        files(folder / "empty", suffixes=("",))
    backwards = Files([str(folder)], "dataset.paths", (".jsonl",), lambda found: [-ord(letter) for letter in os.path.basename(found[0])])
    assert names(backwards) == ["e.jsonl", "d.jsonl", "b.jsonl", "a.jsonl"]


def test_d11_what_matches_nothing(folder):
    for entry, message in (
        (folder / "none", "is no file, no directory with files and no glob that matches any"),
        (folder / "*.parquet", "is no file"),
        (folder / "su*", r"matches only directories; add /\*"),
        ("pipe:cat x", "is no file"),
        ("x" * 300, "cannot be listed"),
        ("a\0b", "is no path"),
    ):
        with pytest.raises(DataError, match=rf"^dataset\.paths: .*{message}"):
            files(entry)
    with pytest.raises(DataError, match=r"a directory without any \*\.parquet"):
        files(folder, suffixes=(".parquet",))


def test_d5_a_link_to_nothing_is_an_error(folder):
    (folder / "gone.jsonl").symlink_to(folder / "nowhere")
    with pytest.raises(DataError, match=r"cannot be listed: No such file .*gone\.jsonl"):
        files(folder)


# ---------------------------------------------------------------- train and validation apart
def test_d14_a_file_in_both(folder):
    with pytest.raises(DataError, match=r"a\.jsonl is in dataset\.paths and in dataset\.validation_paths"):
        Listing([str(folder)], [str(folder / "a.jsonl")], (".jsonl",))
    (folder / "link.txt").symlink_to(folder / "a.jsonl")
    with pytest.raises(DataError, match="a file can be in one only"):
        Listing([str(folder)], [str(folder / "link.txt")], (".jsonl",))


def test_d14_files_that_are_for_validation_alone(folder):
    both = [str(folder / "a.jsonl")]
    listing = listed(both, both, (".jsonl",), split="validation")
    assert (names(listing.validation), len(listing.train)) == (["a.jsonl"], 0)
    for paths, split in ((both, "train"), ([str(folder)], "validation")):
        with pytest.raises(DataError, match="a file can be in one only"):
            listed(paths, both, (".jsonl",), split=split)


def test_d14_equal_content_under_another_name(folder):
    (folder / "held_out.txt").write_text("a.jsonl")
    with pytest.raises(DataError, match=r"a\.jsonl and .*held_out\.txt have the same content"):
        Listing([str(folder)], [str(folder / "held_out.txt")], (".jsonl",))
    # Alike for longer than a head, but not equal.
    (folder / "a.jsonl").write_bytes(bytes(100_000) + b"1")
    (folder / "held_out.txt").write_bytes(bytes(100_000) + b"2")
    Listing([str(folder)], [str(folder / "held_out.txt")], (".jsonl",))
    # Two empty files are no overlap.
    (folder / "a.jsonl").write_bytes(b"")
    (folder / "held_out.txt").write_bytes(b"")
    Listing([str(folder)], [str(folder / "held_out.txt")], (".jsonl",))


def test_listed_once_for_all_who_use_it(folder):
    first = listed([str(folder)], (), (".jsonl",))
    assert listed([str(folder)], (), (".jsonl",)) is first
    del first
    (folder / "new.jsonl").write_text("new")
    assert "new.jsonl" in names(listed([str(folder)], (), (".jsonl",)).train)


def test_fingerprint(folder):
    before = files(folder).fingerprint()
    assert files(folder).fingerprint() == before
    os.utime(folder / "a.jsonl")
    assert files(folder).fingerprint() == before  # copied elsewhere it is the same data
    (folder / "a.jsonl").write_text("A.jsonl")
    other = files(folder).fingerprint()
    (folder / "a.jsonl").rename(folder / "aa.jsonl")
    assert len({before, other, files(folder).fingerprint(), files(folder / "sub").fingerprint()}) == 4


# ---------------------------------------------------------------- H3, H8, D10
def test_h3_pipes_and_devices_are_not_opened(folder):
    os.mkfifo(folder / "pipe.jsonl")
    assert "pipe.jsonl" not in names(files(folder))
    with pytest.raises(DataError, match=r"a pipe, a socket or a device"):
        files(folder / "pipe.jsonl")
    with pytest.raises(DataError, match=r"a pipe, a socket or a device"):
        files("/dev/zero")
    listing = files(folder / "a.jsonl")
    (folder / "a.jsonl").unlink()
    os.mkfifo(folder / "a.jsonl")
    with pytest.raises(DataError, match="changed while it was in use"):
        listing.open(0)


def test_h8_control_characters_in_names_are_escaped(folder):
    evil = folder / "x\x1b[31m\n\u202ey.jsonl"
    evil.write_text("x")
    listing = files(evil)
    assert listing.name(0).endswith(r"x\x1b[31m\n\u202ey.jsonl")
    evil.unlink()
    with pytest.raises(DataError) as error:
        listing.open(0)
    assert str(error.value).isprintable()
    with pytest.raises(DataError) as error:
        files(evil)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("how", ["gone", "longer", "replaced"])
def test_d10_a_file_that_changes(folder, how):
    path = folder / "a.jsonl"
    listing = files(path)
    if how == "gone":
        path.unlink()
    elif how == "longer":
        path.write_text("longer than before")
    else:
        time.sleep(0.02)
        (folder / "other").write_text("A.jsonl")
        os.replace(folder / "other", path)
    with pytest.raises(DataError, match=r"a\.jsonl (was listed and cannot be read any more|changed while it was in use)"):
        listing.open(0)


# ---------------------------------------------------------------- URLs
def test_urls_mean_what_paths_mean(folder, memory):
    for path in ("b.jsonl", "a.jsonl", "notes.md", ".c.jsonl", "sub/d.jsonl", "sub/deep/e.jsonl", ".hidden/f.jsonl"):
        put(f"{memory}/{path}", path.encode())
    for entry in ("", "/sub", "/a.jsonl", "/notes.md", "/**/*.jsonl", "/*.jsonl"):
        local, remote = files(f"{folder}{entry}"), files(f"{memory}{entry}")
        assert names(remote) == names(local)
        assert remote.sizes.tolist() == local.sizes.tolist()
        assert remote.fingerprint() == local.fingerprint()
        assert [text_of(remote, index) for index in range(len(remote))] == [text_of(local, index) for index in range(len(local))]
    assert files(f"{memory}/a.jsonl").name(0) == f"{memory}/a.jsonl"
    with pytest.raises(DataError, match="named twice"):
        files(memory, f"{memory}/a.jsonl")
    with pytest.raises(DataError, match=r"is no file, no directory"):
        files(f"{memory}/none")
    with pytest.raises(DataError, match="have the same content"):
        Listing([str(folder)], [f"{memory}/sub"], (".jsonl",))


def test_d10_a_remote_file_that_changes(memory):
    put(f"{memory}/a.jsonl", b"1")
    listing = files(memory)
    put(f"{memory}/a.jsonl", b"22")
    with pytest.raises(DataError, match="changed while it was in use: 2 bytes, 1 when it was listed"):
        listing.open(0)
    fsspec.filesystem("memory").rm(f"{memory}/a.jsonl")
    with pytest.raises(DataError, match=r"cannot be opened: FileNotFoundError"):
        listing.open(0)
    put(f"{memory}/a.jsonl", b"1")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nowhere://x/y", r"nowhere:// is not read; there are hf://, https://, s3://, .* downloaded first"),
        ("shell://rm -r x", "shell:// is not read"),
        ("simplecache::https://host/x", "chains protocols"),
        ("https//x://y", "has :// in it and is no URL"),
        ("file:///etc/passwd", "file:// is not read; give the path alone"),
        ("http://example.org/x", "http:// is not read; use https://"),
        ("zip://a.jsonl::memory://b.zip", "chains protocols"),
        ("s3://key:secret@bucket/x", "holds a user's name or password"),
        ("https://token@example.org/x", "put it in the environment"),
    ],
)
def test_h4_protocols_that_are_not_read(url, message):
    with pytest.raises(DataError, match=message):
        files(url)


def test_a_missing_package_is_named(monkeypatch):
    def missing(url, **options):
        raise ImportError(CANARY)

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(DataError, match=r"pip install 'titanlm\[hub\]'"):
        files("hf://datasets/a/b")
    with pytest.raises(DataError, match=r"s3:// that is not installed; pip install 's3fs'"):
        files("s3://bucket/x")


@pytest.mark.parametrize("token", [CANARY, None])
def test_the_hubs_token_is_the_environments_and_is_not_shown(monkeypatch, token):
    """Of a login that is kept on the machine nothing is taken; other protocols are told nothing."""
    asked = []

    def refused(url, **options):
        asked.append(options)
        raise PermissionError(f"401 with {CANARY}")

    monkeypatch.setattr(fsspec.core, "url_to_fs", refused)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    for url in ("hf://datasets/a/b", "s3://bucket/x"):
        with pytest.raises(DataError, match="cannot be opened: PermissionError") as caught:
            files(url)
        assert CANARY not in str(caught.value)
    assert asked == [{"token": token or False}, {}]


def test_offline(memory, folder):
    put(f"{memory}/a.jsonl", b"1")
    listing = files(memory)
    with offline():
        assert files(folder)
        for touch in (lambda: files(memory), lambda: listing.open(0), lambda: listing.fingerprint()):
            with pytest.raises(OfflineError, match=r"is a URL, and nothing is fetched now"):
                touch()
    assert text_of(listing, 0) == "1"


class Talkative(fsspec.AbstractFileSystem):
    """Repeats what it was given in every error, as libraries do."""

    protocol = "talkative"
    failing = "info"

    def info(self, path, **kwargs):
        if self.failing == "info":
            raise RuntimeError(f"{path}?sig={CANARY} {CANARY}")
        return {"name": path, "size": 3, "type": "file"}

    def _open(self, path, mode="rb", **kwargs):
        if self.failing == "open":
            raise PermissionError(13, f"{CANARY}", f"{path}?sig={CANARY}")
        return self

    size = 3
    closed = False

    def read(self, size=-1):
        raise OSError(f"GET {CANARY} failed")

    def close(self):
        pass


@pytest.mark.parametrize("failing", ["info", "open", "read"])
def test_h5_no_secret_in_errors_or_fingerprints(failing, monkeypatch, capsys):
    fsspec.register_implementation("talkative", Talkative, clobber=True)
    monkeypatch.setitem(PROTOCOLS, "talkative", "nothing")
    monkeypatch.setattr(Talkative, "failing", "")
    assert CANARY not in files(f"talkative://host/x.jsonl?sig={CANARY}").name(0)
    monkeypatch.setattr(Talkative, "failing", failing)
    monkeypatch.setenv("HF_TOKEN", CANARY)
    url = f"talkative://host/x.jsonl?sig={CANARY}#{CANARY}"
    with pytest.raises(DataError) as error:
        files(url).fingerprint()
    assert CANARY not in str(error.value)
    assert error.value.__cause__ is None
    assert error.value.__suppress_context__
    assert "talkative://host/x.jsonl" in str(error.value)
    for other in (
        f"simplecache::https://host/?{CANARY}",
        f"simplecache::https://me:{CANARY}@host/x",
        f"s3://me:{CANARY}@bucket/x",
        f"https://{CANARY}@host/x?sig={CANARY}",
        f"nowhere://h/x?sig={CANARY}",
        f"zip://x::https://{CANARY}@h/y",
    ):
        with pytest.raises(DataError) as error:
            files(other)
        assert CANARY not in str(error.value)
    assert CANARY not in "".join(capsys.readouterr())


def test_h5_shown():
    assert shown(f"https://me:{CANARY}@host/a/b@main.jsonl?sig={CANARY}#{CANARY}") == "https://host/a/b@main.jsonl"
    assert shown("hf://datasets/a/b@main/x") == "hf://datasets/a/b@main/x"
    assert shown(f"https://host?{CANARY}@x/y") == "https://host"
    assert shown("a/b?c#d") == "a/b?c#d"
    assert shown(f"simplecache::https://host/?{CANARY}") == "simplecache::https://host/"


def test_a_failing_network_is_no_damage_that_may_be_skipped(memory, monkeypatch):
    put(f"{memory}/a.jsonl", b'{"text": "x"}\n' * 10)
    dataset = Component.named("dataset", "jsonl", paths=(f"{memory}/a.jsonl",))
    tokenizer = Component.named("tokenizer", "byte").build()
    stream: TextDocuments = dataset.build(tokenizer=tokenizer, split="train", stream=0, n_streams=1, seed=0, on_error="skip")

    def fail(self, size=-1):
        raise ConnectionResetError(104, CANARY)

    from fsspec.implementations.memory import MemoryFile

    monkeypatch.setattr(MemoryFile, "read", fail)
    with pytest.raises(DataError, match=r"a\.jsonl cannot be read: ConnectionResetError Connection reset by peer; try again"):
        next(stream)
