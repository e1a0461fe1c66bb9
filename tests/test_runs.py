"""The run folder: one trainer at a time, nothing half written, clear refusals."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import titanlm
from titanlm import environment, runs
from titanlm.errors import TitanError
from titanlm.runs import Lock, RunFolder, write_atomic

HOLD = """
import os, sys
from pathlib import Path
from titanlm.runs import Lock
lock = Lock(Path(sys.argv[1]))
if len(sys.argv) == 2 or os.fork() == 0:
    print("held", flush=True)
sys.stdin.readline()
"""


@pytest.fixture(autouse=True)
def light_report(monkeypatch: pytest.MonkeyPatch) -> dict:
    values = {"torch": "2.13.0"}
    monkeypatch.setattr(environment, "report", lambda: values)
    return values


def hold(lock: Path, *options: str) -> subprocess.Popen[str]:
    """Another process that holds a lock; with an option, one that has forked a worker."""
    variables = {**os.environ, "PYTHONPATH": str(Path(titanlm.__file__).parent.parent)}
    command = [sys.executable, "-c", HOLD, str(lock), *options]
    process = subprocess.Popen(command, env=variables, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_open_records_config_and_environment(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path / "runs", "first.run-1", 'a = "é"\n') as folder:
        assert folder.path == tmp_path / "runs" / "first.run-1"
        assert folder.checkpoints.is_dir()
        assert (folder.path / "config.toml").read_text(encoding="utf-8") == 'a = "é"\n'
        assert json.loads((folder.path / "environment.json").read_text()) == {"torch": "2.13.0"}


def test_earlier_configs_are_kept_where_they_differ(tmp_path: Path, light_report: dict) -> None:
    for text in ("one", "one", "two", "two", "three"):
        RunFolder.open(tmp_path, "run", text).close()
    light_report["torch"] = "2.11.0"
    RunFolder.open(tmp_path, "run", "three").close()
    path = tmp_path / "run"
    assert [(path / name).read_text() for name in ("config-1.toml", "config-2.toml", "config.toml")] == ["one", "two", "three"]
    assert not (path / "config-3.toml").exists()
    assert [json.loads((path / name).read_text())["torch"] for name in ("environment-1.json", "environment.json")] == ["2.13.0", "2.11.0"]


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a", "a\\b", "a b", "a\n", "a\x1b[2J", "é", "-a", ".hidden", "a" * 129, "a\0"])
def test_bad_names_are_refused_before_anything_is_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(TitanError, match=r"run\.name") as refused:
        RunFolder.open(tmp_path / "runs", name, "")
    assert str(refused.value).isprintable()
    assert not (tmp_path / "runs").exists()


def test_second_trainer_is_refused_with_the_pid(tmp_path: Path) -> None:
    RunFolder.open(tmp_path, "run", "").close()
    other = hold(tmp_path / "run" / ".lock")
    with pytest.raises(TitanError, match=rf"process {other.pid} is training in it"):
        RunFolder.open(tmp_path, "run", "changed")
    assert (tmp_path / "run" / "config.toml").read_text() == ""  # the refused one changed nothing
    other.communicate("\n", timeout=30)
    RunFolder.open(tmp_path, "run", "").close()


def test_second_trainer_in_the_same_process_is_refused(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path, "run", ""), pytest.raises(TitanError, match=f"process {os.getpid()} "):
        RunFolder.open(tmp_path, "run", "")
    RunFolder.open(tmp_path, "run", "").close()


def test_lock_of_a_killed_process_is_reclaimed(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    other = hold(tmp_path / "run" / ".lock")
    other.send_signal(signal.SIGKILL)
    other.communicate(timeout=30)
    assert json.loads((tmp_path / "run" / ".lock").read_text())["pid"] == other.pid
    RunFolder.open(tmp_path, "run", "").close()


def test_a_worker_that_outlives_a_killed_trainer_does_not_keep_the_lock(tmp_path: Path) -> None:
    other = hold(tmp_path / ".lock", "fork")
    with pytest.raises(TitanError, match=f"process {other.pid} "):
        Lock(tmp_path / ".lock")
    other.send_signal(signal.SIGKILL)
    other.wait(timeout=30)
    Lock(tmp_path / ".lock").release()  # the worker still waits for its input
    other.communicate("\n", timeout=30)


def test_lock_of_another_machine_is_respected(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").write_text('{"pid": 17, "host": "elsewhere"}')
    with pytest.raises(TitanError, match=r"process 17 on elsewhere.*delete .*\.lock"):
        RunFolder.open(tmp_path, "run", "")
    (tmp_path / "run" / ".lock").unlink()
    RunFolder.open(tmp_path, "run", "").close()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": "x", "host": 1}', "\0" * 10])
def test_damaged_lock_file_is_reclaimed(tmp_path: Path, text: str) -> None:
    (tmp_path / ".lock").write_text(text)
    Lock(tmp_path / ".lock").release()
    assert (tmp_path / ".lock").read_text() == ""


def test_file_system_without_locks_goes_by_the_pid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(runs.fcntl, "flock", unsupported)
    path, host = tmp_path / ".lock", socket.gethostname()
    path.write_text(json.dumps({"pid": os.getppid(), "host": host}))
    with pytest.raises(TitanError, match=f"process {os.getppid()} "):
        Lock(path)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait(timeout=30)
    path.write_text(json.dumps({"pid": gone.pid, "host": host}))
    Lock(path).release()


def test_lock_is_released_when_recording_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> dict:
        raise RuntimeError("no driver")

    monkeypatch.setattr(environment, "report", broken)
    with pytest.raises(RuntimeError, match="no driver"):
        RunFolder.open(tmp_path, "run", "")
    Lock(tmp_path / "run" / ".lock").release()


@pytest.mark.parametrize("blocked", ["runs", "runs/run", "runs/run/checkpoints", "runs/run/config.toml/x", "runs/run/.lock/x"])
def test_something_in_the_way_is_a_clear_error(tmp_path: Path, blocked: str) -> None:
    (tmp_path / blocked).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / blocked).write_text("")
    with pytest.raises(TitanError, match=r"in the way.*choose another run\.dir or run\.name"):
        RunFolder.open(tmp_path / "runs", "run", "")


@pytest.mark.parametrize(("number", "text"), [(errno.EACCES, "not writable"), (errno.EROFS, "not writable"), (errno.ENOSPC, "cannot be written")])
def test_unwritable_place_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, text: str) -> None:
    def refuse(self: Path, *args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number), str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)  # file modes do not stop root, who may run these tests
    with pytest.raises(TitanError, match=f"{text}.*{os.strerror(number)}"):
        RunFolder.open(tmp_path, "run", "")


def test_write_atomic_replaces_whole_files(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomic(path, "é")
    write_atomic(path, b"\0\1", sync=False)
    assert path.read_bytes() == b"\0\1"
    assert os.listdir(tmp_path) == ["file"]


def test_write_atomic_leaves_the_old_content_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomic(path, "old")

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="space"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_litter_of_a_killed_write_is_swept(tmp_path: Path) -> None:
    RunFolder.open(tmp_path, "run", "").close()
    (tmp_path / "run" / ".write-config.toml-99").write_text("half")
    RunFolder.open(tmp_path, "run", "").close()
    assert not list((tmp_path / "run").glob(".write-*"))
