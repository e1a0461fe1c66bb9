"""`titanlm data download` from folders that the tests make: local ones and fsspec's memory."""

from __future__ import annotations

import io
import socket
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest
import tomli

from titanlm import cli
from titanlm.datasets import remote
from titanlm.datasets.download import place
from titanlm.datasets.remote import Folder
from titanlm.errors import DataError

CANARY = "hf_canary0123456789"
HUB = {
    "README.md": b"# card",
    "data/train-00000-of-00002.parquet": b"a" * 3_000_000,
    "data/train-00001-of-00002.parquet": b"b" * 10,
    "data/test-00000-of-00001.parquet": b"c",
    "german/train-00000-of-00001.parquet": b"d" * 7,
    "german/validation/0000.parquet": b"e",
}
GOLF = {f"datasets/datasets/fineweb10B_sp1024/fineweb_train_{i:06}.bin": bytes([i]) * 20 for i in range(12)} | {
    "datasets/datasets/fineweb10B_sp1024/fineweb_val_000000.bin": b"v",
    "datasets/datasets/fineweb10B_sp1024/fineweb_val_bytes_000000.bin": b"sidecar",
    "datasets/datasets/fineweb10B_sp4096/fineweb_val_000000.bin": b"another variant",
    "datasets/tokenizers/fineweb_1024_bpe.model": b"model",
    "datasets/tokenizers/fineweb_1024_bpe.vocab": b"vocab",
    "datasets/manifest.json": b"{}",
}


@pytest.fixture
def source(tmp_path):
    def make(files: dict[str, bytes]) -> str:
        for name, content in files.items():
            path = tmp_path / "source" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return str(tmp_path / "source")

    return make


@pytest.fixture
def memory():
    files = fsspec.filesystem("memory")
    files.store.clear()
    yield files
    files.store.clear()


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run(*words: object, status: int = 0) -> str:
        found = cli.main(["data", "download", *map(str, words)])
        out, err = capsys.readouterr()
        assert found == status, out + err
        return err if status else out

    return run


def there(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def toml(printed: str) -> dict:
    return tomli.loads(printed[printed.index("[") :])


# ---------------------------------------------------------------- the Hub's layouts
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("data/train-00000-of-00002.parquet", ("", "train")),
        ("wikitext-2/test-00000-of-00001-0123456789abcdef.parquet", ("wikitext-2", "test")),
        ("data/de/train.jsonl", ("de", "train")),
        ("data/de/train_0001.jsonl.gz", ("de", "train")),
        ("default/validation/0000.parquet", ("default", "validation")),
        ("data/train_sft-00000-of-00003.parquet", ("", "train_sft")),
        ("en/c4-validation.00000-of-00008.jsonl.gz", ("en", "validation")),
        ("sample/10BT/000_00000.parquet", ("sample/10BT", "train")),
        ("data/CC-MAIN-2024-10/000_00012.parquet", ("CC-MAIN-2024-10", "train")),
        ("corpus.jsonl", ("", "train")),
        ("train/part-0.parquet", ("", "train")),
    ],
)
def test_config_and_split_of_a_name(name, expected):
    assert place(name) == expected


def test_a_split_is_fetched_and_can_be_pasted(tmp_path, source, run):
    printed = run("owner/name", "--source", source(HUB))
    wanted = {name: HUB[name] for name in ("data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet")}
    assert there(tmp_path / "data" / "name") == wanted
    assert "2 files, 3.0 MB" in printed
    assert toml(printed) == {"dataset": {"name": "parquet", "paths": [f"data/name/{name}" for name in wanted]}}


def test_compressed_files_that_nothing_reads_are_not_fetched(tmp_path, source, run):
    address = source({"train-0.jsonl.zst": b"x", "README.md": b"x"})
    said = run("owner/name", "--source", address, status=2)
    assert "there is no file of .parquet, .jsonl, .jsonl.gz in it; train-0.jsonl.zst and the like are not read: fetch them by other means" in said
    assert not there(tmp_path / "data")


def test_config_split_glob_and_number(tmp_path, source, run):
    url = source(HUB)
    run("owner/name", "--source", url, "--config", "german", "--output", "a")
    assert list(there(tmp_path / "a")) == ["german/train-00000-of-00001.parquet"]
    run("owner/name", "--source", url, "--config", "german", "--split", "validation", "--output", "b")
    assert list(there(tmp_path / "b")) == ["german/validation/0000.parquet"]
    run("owner/name", "--source", url, "--include", "*/test-*", "--output", "c")
    assert list(there(tmp_path / "c")) == ["data/test-00000-of-00001.parquet"]
    printed = run("owner/name", "--source", url, "--max-files", 1, "--output", "d")
    assert list(there(tmp_path / "d")) == ["data/train-00000-of-00002.parquet"]
    assert "1 of 2 files were left out (--max-files)" in printed


def test_what_is_not_there_lists_what_is(source, run):
    url = source(HUB)
    for words in (("--split", "dev"), ("--config", "french"), ("--include", "*.zip")):
        error = run("owner/name", "--source", url, *words, status=2)
        assert "(none): test, train" in error
        assert "german: train, validation" in error
        assert "--include" in error


def test_several_configs_need_a_name(source, run):
    url = source({f"{name}/train-00000-of-00001.parquet": b"x" for name in ("de", "fr")})
    assert "several configs, so name one with --config" in run("owner/name", "--source", url, status=2)


def test_many_files_are_a_glob_of_their_own(tmp_path, source, run):
    url = source({f"data/{split}-{i:05}-of-00012.jsonl": b"x" for split in ("test", "train") for i in range(12)})
    for split in ("test", "train"):
        assert toml(run("o/n", "--source", url, "--split", split))["dataset"]["paths"] == [f"data/n/data/{split}-*.jsonl"]
    (tmp_path / "data/n/data/train-more.jsonl").write_bytes(b"")
    assert len(toml(run("o/n", "--source", url))["dataset"]["paths"]) == 12


# ---------------------------------------------------------------- Parameter Golf
def test_golf(tmp_path, source, run):
    printed = run("golf", "--source", source(GOLF), "--train-shards", 11)
    shards = [f"datasets/fineweb10B_sp1024/fineweb_train_{i:06}.bin" for i in range(11)]
    others = ["datasets/fineweb10B_sp1024/fineweb_val_000000.bin", "tokenizers/fineweb_1024_bpe.model", "tokenizers/fineweb_1024_bpe.vocab"]
    assert there(tmp_path / "data/parameter-golf") == {name: GOLF[f"datasets/{name}"] for name in (*shards, *others)}
    lines = toml(printed)
    assert lines["tokenizer"] == {"name": "sentencepiece", "path": f"data/parameter-golf/{others[1]}", "add_eos": False}
    assert lines["dataset"]["name"] == "token_shards"
    assert lines["dataset"]["paths"] == ["data/parameter-golf/datasets/fineweb10B_sp1024/fineweb_train_*.bin"]
    assert lines["dataset"]["validation_paths"] == [f"data/parameter-golf/{others[0]}"]
    printed = run("golf", "--source", source(GOLF))
    assert "1 files, 0.0 MB" in printed
    assert "14 were there already" in printed
    assert "only 12 training shards are there, 80 were asked for" in printed
    assert "no training shard of sp8192" in run("golf", "--source", source(GOLF), "--variant", "sp8192", status=2)
    assert "did you mean" in run("golf", "--variant", "sp1025", status=2)


# ---------------------------------------------------------------- whole or not at all
def test_what_is_there_is_not_fetched_again(tmp_path, memory, run):
    for name, content in HUB.items():
        memory.pipe(f"/hub/{name}", content)
    whole, cut = (tmp_path / "data/name/data" / f"train-0000{i}-of-00002.parquet" for i in range(2))
    whole.parent.mkdir(parents=True)
    whole.write_bytes(b"z" * 3_000_000)  # size is all that is compared
    cut.write_bytes(b"b" * 9)
    assert "1 were there already" in run("owner/name", "--source", "memory://hub")
    assert whole.read_bytes() == b"z" * 3_000_000
    assert cut.read_bytes() == b"b" * 10


class _Broken(io.BytesIO):
    """Ends early, or as an interrupt does."""

    def __init__(self, content: bytes, error: BaseException | None) -> None:
        super().__init__(content)
        self._error = error

    def read(self, size: int | None = -1) -> bytes:
        chunk = super().read(size)
        if not chunk and self._error is not None:
            raise self._error
        return chunk


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("connection reset"), RuntimeError("of the library's own"), None], ids=repr)
def test_nothing_half_written_is_left(tmp_path, memory, monkeypatch, run, error):
    memory.pipe("/hub/train.jsonl", b"x" * 100)
    memory.pipe("/hub/train-1.jsonl", b"y" * 100)
    opened = type(memory).open

    def breaking(self, path, *args, **kwargs):
        return _Broken(b"x" * 60, error) if path.endswith("train.jsonl") else opened(self, path, *args, **kwargs)

    monkeypatch.setattr(type(memory), "open", breaking)
    said = run("owner/name", "--source", "memory://hub", status=130 if isinstance(error, KeyboardInterrupt) else 2)
    assert there(tmp_path / "data/name") == {"train-1.jsonl": b"y" * 100}
    if error is None:
        assert "train.jsonl has 100 bytes by the listing and 60 came" in said
    elif not isinstance(error, KeyboardInterrupt):
        assert f"train.jsonl was not copied; the same command goes on with what is missing ({type(error).__name__})" in said
    monkeypatch.setattr(type(memory), "open", opened)
    run("owner/name", "--source", "memory://hub")
    assert there(tmp_path / "data/name") == {"train-1.jsonl": b"y" * 100, "train.jsonl": b"x" * 100}


def test_a_file_that_is_longer_than_listed_is_not_read_to_its_end(memory, monkeypatch, tmp_path):
    memory.pipe("/hub/train.jsonl", b"x" * 100)
    monkeypatch.setattr(type(memory), "open", lambda *args, **kwargs: open("/dev/zero", "rb"))  # noqa: SIM115
    folder = Folder("memory://hub")
    with pytest.raises(DataError, match="100 bytes by the listing and more came"):
        folder.fetch(folder.list(), tmp_path)
    assert not there(tmp_path)


def test_a_full_disk_is_told_before(memory, monkeypatch, tmp_path):
    memory.pipe("/hub/train.jsonl", b"x" * 100)
    monkeypatch.setattr(remote.shutil, "disk_usage", lambda path: remote.shutil._ntuple_diskusage(100, 50, 50))
    folder = Folder("memory://hub")
    with pytest.raises(DataError, match="GB are free"):
        folder.fetch(folder.list(), tmp_path)


# ---------------------------------------------------------------- strangers and secrets
@pytest.mark.parametrize("name", ["../evil.jsonl", "a/../../evil.jsonl", "/etc/evil.jsonl", "a\\..\\evil.jsonl", "~/evil.jsonl", "\x1b[2Jevil.jsonl"])
def test_names_that_lead_out_are_refused(tmp_path, memory, monkeypatch, run, name):
    memory.pipe("/hub/train.jsonl", b"x")
    found = {"/hub/train.jsonl": {"size": 1}, f"/hub/{name}" if not name.startswith("/") else name: {"size": 1}}
    monkeypatch.setattr(type(memory), "find", lambda self, root, detail: found)
    said = run("owner/name", "--source", "memory://hub", status=2)
    assert "leads out of its folder" in said
    assert "\x1b" not in said
    assert not (tmp_path / "data").exists()


def test_repo_is_a_name(run):
    assert "is no name of a data set" in run("../../etc", status=2)
    assert "is no name of a data set" in run("a/b/c", status=2)


def test_secrets_are_not_printed(monkeypatch, run):
    """Neither the token of the environment nor a signature in an address, whatever a library says of them; passwords in addresses are refused."""
    monkeypatch.setenv("HF_TOKEN", CANARY)

    class Listing:
        def find(self, *args, **kwargs):
            raise RuntimeError(f"401 with {CANARY} at https://cdn.example/file?X-Amz-Signature={CANARY}") from PermissionError(13, "Permission denied")

    def opened(url, **options):
        assert options == ({"token": CANARY} if url.startswith("hf://") else {})
        return Listing(), ""

    monkeypatch.setattr("fsspec.core.url_to_fs", opened)
    for words in ((), ("--source", f"https://mirror.example/hub?sig={CANARY}")):
        said = run("owner/name", *words, status=2)
        assert "cannot be listed (RuntimeError, Permission denied)" in said
        assert CANARY not in said
    said = run("owner/name", "--source", f"https://me:{CANARY}@mirror.example/hub", status=2)
    assert "password" in said
    assert CANARY not in said


def test_addresses_that_run_commands_are_refused(run):
    for url in ("ssh://host/folder", "simplecache::memory://hub", "local::x://y"):
        assert "no address that is read" in run("owner/name", "--source", url, status=2)


def test_without_a_token_none_is_looked_for(monkeypatch, run):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    asked = {}

    def failing(url, **options):
        asked.update(options)
        raise OSError("no")

    monkeypatch.setattr("fsspec.core.url_to_fs", failing)
    run("owner/name", status=2)
    assert asked == {"token": False}  # not what a login left on the machine


def test_no_network_is_one_clear_error(monkeypatch, run):
    pytest.importorskip("huggingface_hub")

    def unreachable(*args, **kwargs):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    said = run("owner/name", status=2)
    assert said.startswith("hf://datasets/owner/name@main: cannot be listed (")
    assert "is the network there? --source names a mirror" in said
    assert said.count("\n") == 1


def test_without_the_hub_package_the_extra_is_named(monkeypatch, run):
    def missing(url, **options):
        raise ImportError("Install huggingface_hub to access HfFileSystem")

    monkeypatch.setattr("fsspec.core.url_to_fs", missing)
    assert "pip install 'titanlm[hub]'" in run("owner/name", status=2)


def test_a_copy_opens_no_connection(source, tmp_path):
    """By the interpreter's own audit of sockets."""
    program = (
        "import sys\n"
        "def hook(event, args):\n"
        "    if event.startswith('socket.connect') or event == 'socket.getaddrinfo': raise SystemExit(f'network: {event} {args}')\n"
        "sys.addaudithook(hook)\n"
        "from titanlm import cli\n"
        f"sys.exit(cli.main(['data', 'download', 'owner/name', '--source', {source(HUB)!r}, '--output', {str(tmp_path / 'out')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert len(there(tmp_path / "out")) == 2
