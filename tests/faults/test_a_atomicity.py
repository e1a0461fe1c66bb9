"""Cases A: kills, full disks and what else can befall a checkpoint while it is saved, replaced, rotated or chosen."""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from titanlm import checkpoint, tensor_file
from titanlm.errors import CheckpointError
from titanlm.saver import Saver

DISK_CALLS = ("open", "write", "fsync", "rename", "mkdir", "unlink", "rmdir")


def state(step: int, numel: int = 100) -> dict:
    return {"model": {"w": torch.full((numel,), float(step))}, "moments": {"w": torch.full((numel,), float(step))}, "at": step}


def save(root: Path, step: int, value: int | None = None, numel: int = 100) -> Path:
    return checkpoint.save(root, step, state(step if value is None else value, numel), {"rng": torch.arange(3)}, "x = 1\n")


def value_of(folder: Path) -> int:
    """What ``save`` was given; fails if the parts are not of one save."""
    found = checkpoint.load(folder).state
    assert found["model"]["w"].unique().tolist() == found["moments"]["w"].unique().tolist() == [found["at"]]
    return found["at"]


def in_child(action: Callable[[], None]) -> int:
    """Do it in a forked process, which has torch already; the status it ended with, −N by signal N."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
            os._exit(0)
        except BaseException as error:
            print(error, file=sys.stderr)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_at_call(n: int, names: tuple[str, ...] = DISK_CALLS) -> None:
    """This process ends by kill −9 at the n-th call that changes the disk."""
    calls, lock = 0, threading.Lock()

    def counted(function):
        def call(*args, **kwargs):
            nonlocal calls
            with lock:
                calls += 1
                if calls == n:
                    os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for name in names:
        setattr(os, name, counted(getattr(os, name)))


def test_a2_killed_at_any_moment_of_a_save(tmp_path: Path) -> None:
    """The one before survives, and the newest is whole."""
    rng = random.Random(0)
    save(tmp_path, 10, numel=1 << 20)
    for trial in range(12):

        def action(delay: float = rng.uniform(0.0, 0.06)) -> None:
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
            while True:
                save(tmp_path, 20, numel=1 << 20)
                checkpoint.set_aside(tmp_path, 10)

        assert in_child(action) == -signal.SIGKILL, trial
        newest = checkpoint.latest(tmp_path)
        assert newest is not None
        assert value_of(newest) == int(newest.name[5:])
        assert checkpoint.verify(tmp_path / "step-00000010") is None
        for aside in tmp_path.glob("after-*"):
            shutil.rmtree(aside)
        checkpoint.sweep(tmp_path)
        assert not list(tmp_path.glob(".*"))


def test_a3_killed_at_every_call_of_saving_a_step_again(tmp_path: Path) -> None:
    """Old or new after a sweep: never neither, never mixed."""
    seen = set()
    for n in range(1, 200):
        root = tmp_path / str(n)
        save(root, 10, value=1)

        def action(n: int = n, root: Path = root) -> None:
            kill_at_call(n)
            save(root, 10, value=2)

        status = in_child(action)
        checkpoint.sweep(root)
        assert [path.name for path in root.iterdir()] == ["step-00000010"]
        seen.add(value_of(root / "step-00000010"))
        shutil.rmtree(root)
        if status == 0:
            assert n > 20, "the calls were not counted"
            assert seen == {1, 2}
            return
        assert status == -signal.SIGKILL
    raise AssertionError("never finished")


def test_a3_a_sweep_puts_back_only_what_is_not_there(tmp_path: Path) -> None:
    save(tmp_path, 10, value=1).rename(tmp_path / ".old-step-00000010-77")
    checkpoint.sweep(tmp_path)
    assert value_of(tmp_path / "step-00000010") == 1
    shutil.copytree(tmp_path / "step-00000010", tmp_path / ".old-step-00000010-77")
    save(tmp_path, 10, value=2)
    (tmp_path / ".tmp-step-00000030-5").mkdir()
    (tmp_path / ".trash-step-00000001-5").mkdir()
    checkpoint.sweep(tmp_path)
    assert value_of(tmp_path / "step-00000010") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010"]


def test_a4_killed_inside_a_delete(tmp_path: Path) -> None:
    """A folder that is half deleted is not chosen, and is swept."""
    for n in range(1, 40):
        for step in (10, 20):
            save(tmp_path, step)

        def action(n: int = n) -> None:
            kill_at_call(n, ("rename", "unlink", "rmdir"))
            checkpoint.rotate(tmp_path, keep_last=1, newest=20)

        status = in_child(action)
        assert all(checkpoint.verify(folder) is None for _, folder in checkpoint.steps(tmp_path))
        assert checkpoint.latest(tmp_path) == tmp_path / "step-00000020"
        checkpoint.sweep(tmp_path)
        assert not list(tmp_path.glob(".*"))
        if status == 0:
            assert n > 5
            return
    raise AssertionError("never finished")


@pytest.mark.parametrize("every", [9, pytest.param(1, marks=pytest.mark.slow)])
def test_a5_killed_at_every_system_call(tmp_path: Path, every: int) -> None:
    """At the n-th call that changes the disk, for every n, of saves, a save again, rotation and the sweep of the start after.

    The newest checkpoint is whole, and there is one once there was one.
    """
    for n in range(1, 1000, every):
        root = tmp_path / str(n)

        def action(n: int = n, root: Path = root) -> None:
            kill_at_call(n)
            for step, value in ((10, 10), (20, 20), (20, 21), (10, 11)):
                save(root, step, value)
                checkpoint.rotate(root, 1, step)
            (root / "step-00000020").rename(root / ".old-step-00000020-77")
            (root / ".tmp-step-00000030-77").mkdir()
            checkpoint.sweep(root)

        status = in_child(action)
        existed = root.exists() and any(path.name.startswith(("step", ".old")) for path in root.iterdir())
        for _ in range(2):  # before the sweep of the next start, and after
            found = checkpoint.latest(root)
            if found is not None:
                assert value_of(found) // 10 * 10 == int(found.name[5:])
            checkpoint.sweep(root)
        assert not existed or checkpoint.latest(root) is not None
        assert not root.exists() or not list(root.glob(".*"))
        if status == 0:
            assert n > 100, "the calls were not counted"
            return
        assert status == -signal.SIGKILL
    raise AssertionError("never finished")


@pytest.mark.parametrize(("case", "step"), [("a6_new_folder", 20), ("a7_same_step", 10)], ids=lambda value: str(value))
def test_a6_a7_a_full_disk(tmp_path: Path, case: str, step: int) -> None:
    """Named with what is needed and free; nothing is left behind, and what was there is untouched."""
    save(tmp_path, 10)

    def action() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        with pytest.raises(CheckpointError) as caught:
            save(tmp_path, step, numel=1 << 20)
        words = str(caught.value)
        assert "model-00000.safetensors" in words, words
        assert "8,38" in words, words
        assert "bytes are needed" in words, words
        assert f"{shutil.disk_usage(tmp_path).free:,}"[:2] in words
        save(tmp_path, 30)  # there is room for a small one

    assert in_child(action) == 0
    assert value_of(tmp_path / "step-00000010") == 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000030"]


def failing_write(monkeypatch: pytest.MonkeyPatch, after_bytes: int, error: Exception) -> None:
    """Writing fails once so much is written."""
    real, written = os.write, 0

    def write(descriptor: int, piece) -> int:
        nonlocal written
        written += len(piece)
        if written > after_bytes:
            raise error
        return real(descriptor, piece)

    monkeypatch.setattr(tensor_file.os, "write", write)


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), OSError(errno.ENOSPC, "No space left on device"), ValueError("a bug")])
def test_a9_a_failing_asynchronous_save_is_heard_of_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """At the next poll, and the save after is not lost."""
    saver = Saver(tmp_path)
    saver.save(10, state(10), {}, "", wait=True)
    with monkeypatch.context() as patch:
        failing_write(patch, 600, error)
        saver.save(20, state(20), {}, "")
        while saver.busy:
            time.sleep(0.001)
    with pytest.raises(CheckpointError, match=r"step-00000020: cannot be saved: .*(Input/output|No space|ValueError: a bug)"):
        saver.poll()
    saver.poll()
    saver.save(30, state(30), {}, "", wait=True)
    with monkeypatch.context() as patch:
        failing_write(patch, 0, error)
        saver.save(40, state(40), {}, "")
        while saver.busy:
            time.sleep(0.001)
    with pytest.raises(CheckpointError, match="step-00000040"):
        saver.save(50, state(50), {}, "", wait=True)  # nobody polled: said now, and this one is saved
    saver.close()
    assert [value_of(folder) for _, folder in checkpoint.steps(tmp_path)] == [10, 30, 50]
    assert not list(tmp_path.glob(".*"))


def slow_write(seconds: float) -> None:
    real = os.write

    def write(descriptor: int, piece) -> int:
        time.sleep(seconds)
        return real(descriptor, piece)

    os.write = write


def test_a10_a_save_under_way_at_the_end_is_waited_for_or_left_unpublished(tmp_path: Path) -> None:
    def waited() -> None:
        slow_write(0.05)
        saver = Saver(tmp_path)
        saver.save(10, state(10), {}, "")
        assert saver.busy
        saver.close(30)

    def too_slow() -> None:
        slow_write(30)
        saver = Saver(tmp_path)
        saver.save(20, state(20), {}, "")
        with pytest.raises(CheckpointError, match=r"step-00000020: after 0.1 s still being written, and not published"):
            saver.close(0.1)

    started = time.monotonic()
    assert in_child(waited) == 0
    assert in_child(too_slow) == 0
    assert time.monotonic() - started < 10
    assert [value_of(folder) for _, folder in checkpoint.steps(tmp_path)] == [10]
    checkpoint.sweep(tmp_path)
    assert not list(tmp_path.glob(".*"))


def test_a11_what_is_changed_after_staging_is_not_saved(tmp_path: Path) -> None:
    """Byte for byte what a synchronous save writes."""
    model = {"w": torch.randn(1 << 18), "t": torch.randn(64, 32).t(), "b": torch.randn(7).bfloat16(), "n": torch.tensor(5)}
    tree = {"model": model, "list": [1, {"lr": 0.5}], "same": {"view": model["w"][:10]}}
    own = {"rng": torch.arange(8, dtype=torch.uint8), "at": [1, 2]}
    expected = checkpoint.save(tmp_path / "sync", 1, tree, own, "x = 1")
    saver = Saver(tmp_path / "async")
    for step in (1, 2, 1):
        before = {name: tensor.clone() for name, tensor in model.items()}
        saver.save(step, tree, own, "x = 1")
        for tensor in [*model.values(), own["rng"]]:
            tensor.zero_()
        tree["list"][1]["lr"] = 7.0
        own["at"].append(3)
        saver.wait()
        for name, tensor in before.items():
            model[name].copy_(tensor)
        tree["list"][1]["lr"] = 0.5
        own["at"].pop()
        own["rng"].copy_(torch.arange(8))
    found = tmp_path / "async" / expected.name
    assert sorted(file.name for file in found.iterdir()) == sorted(file.name for file in expected.iterdir())
    for file in expected.iterdir():
        assert (found / file.name).read_bytes() == file.read_bytes(), file.name
    saver.close()


def test_a12_half_written_folders_do_not_push_out_whole_ones(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        save(tmp_path, step)
    (tmp_path / "step-00000040" / "model-00000.safetensors").write_bytes(b"")
    (tmp_path / "step-00000050").mkdir()
    (tmp_path / "step-00000060").mkdir()
    (tmp_path / "step-00000060" / "MANIFEST.json").write_text("{}")
    checkpoint.rotate(tmp_path, keep_last=2, newest=60)
    assert [step for step, _ in checkpoint.steps(tmp_path)] == [20, 30, 40, 50, 60]


def test_a13_what_is_saved_after_winding_back_is_kept_and_chosen(tmp_path: Path) -> None:
    for step in (50, 900, 1000):
        save(tmp_path, step)
    checkpoint.set_aside(tmp_path, 50)
    save(tmp_path, 60)
    checkpoint.rotate(tmp_path, keep_last=1, newest=60)
    assert checkpoint.latest(tmp_path) == tmp_path / "step-00000060"
    assert [step for step, _ in checkpoint.steps(tmp_path)] == [60]
    for step in (900, 1000):  # not set aside: later ones do not count
        save(tmp_path, step)
    save(tmp_path, 70)
    checkpoint.rotate(tmp_path, keep_last=1, newest=70)
    assert [step for step, _ in checkpoint.steps(tmp_path)] == [70, 900, 1000]


def test_a14_look_alikes_are_ignored_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = save(tmp_path, 10)
    for name in ("step-20.bak", "step-00000099.bak", "step-1e3", "STEP-9", "step-100"):
        shutil.copytree(good, tmp_path / name)
    (tmp_path / "step-00000077").symlink_to(good)
    (tmp_path / "step-00000088").touch()
    (tmp_path / "notes").mkdir()
    assert checkpoint.latest(tmp_path) == good
    (line,) = capsys.readouterr().err.splitlines()
    for name in ("step-20.bak", "step-00000099.bak", "step-1e3", "STEP-9", "step-100", "step-00000077", "step-00000088"):
        assert f"'{name}'" in line
    assert "notes" not in line


def test_a15_a_damaged_newest_is_passed_over_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = save(tmp_path, 10)
    for step in (20, 30):
        save(tmp_path, step)
    file = tmp_path / "step-00000030" / "model-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    (tmp_path / "step-00000020" / "state-00000.json").write_text("{}")
    assert checkpoint.latest(tmp_path) == good
    told = capsys.readouterr().err
    assert "step-00000030: model-00000.safetensors (part of rank 0) is damaged" in told
    assert "step-00000020: state-00000.json (part of rank 0) is damaged" in told
    with pytest.raises(CheckpointError, match=r"model-00000\.safetensors \(part of rank 0\) is damaged"):
        checkpoint.load(tmp_path / "step-00000030")


@pytest.mark.parametrize("kind", ["a file", "below a file"])
def test_a17_a_place_that_cannot_be_written(tmp_path: Path, kind: str) -> None:
    (tmp_path / "file").touch()
    root = tmp_path / "file" if kind == "a file" else tmp_path / "file" / "root"
    with pytest.raises(CheckpointError, match="cannot be saved"):
        save(root, 10)


def test_a18_times_of_files_decide_nothing(tmp_path: Path) -> None:
    for step in (30, 10, 20):
        save(tmp_path, step)
    os.utime(tmp_path / "step-00000010", (4e9, 4e9))
    os.utime(tmp_path / "step-00000030", (0, 0))
    assert checkpoint.latest(tmp_path) == tmp_path / "step-00000030"
    checkpoint.rotate(tmp_path, keep_last=2, newest=30)
    assert [step for step, _ in checkpoint.steps(tmp_path)] == [20, 30]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64])
def test_e4_weights_that_are_not_finite_are_not_saved(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    good = save(tmp_path, 10)
    weights = torch.ones(1000, 7, dtype=dtype)
    weights[567, 3] = value
    tree = {"model": {"fine": torch.ones(2), "ids": torch.tensor([1]), "bad": weights}, "interval": {"loss": torch.tensor(value)}}
    saver = Saver(tmp_path)
    for step in (10, 20):
        with pytest.raises(CheckpointError, match="model/bad holds values that are not finite"):
            checkpoint.save(tmp_path, step, tree, {}, "")
        with pytest.raises(CheckpointError, match="model/bad holds values that are not finite"):
            saver.save(step, tree, {}, "", wait=True)
    assert checkpoint.latest(tmp_path) == good
    assert value_of(good) == 10
    assert [path.name for path in tmp_path.iterdir()] == [good.name]
    del tree["model"]["bad"]
    checkpoint.save(tmp_path, 20, tree, {}, "")  # what is counted beside the weights may be anything
