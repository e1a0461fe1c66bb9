"""Checkpoints: whole or absent, damage found, nothing executed on load."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from titanlm import checkpoint
from titanlm.errors import CheckpointError


def state(seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    return {
        "progress": {"step": 3, "elapsed_s": 0.1 + 0.2, "none": None, "flag": True},
        "model": {"a": torch.randn(4, 5, generator=generator), "b": torch.randn(3, generator=generator).bfloat16(), "empty": torch.zeros(0)},
        "data": {"streams": {0: {"ids": np.arange(7, dtype=np.int32), "at": 2**53 + 1}, 1: {"ids": np.zeros((0,), np.int32), "at": 0}}},
        "list": [1, "zwei", [torch.tensor(3.0)]],
    }


def equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and a == b


def test_round_trip(tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, 3, state(), "x = 1\n")
    assert folder.name == "step-00000003"
    loaded, config = checkpoint.load(folder)
    assert equal(loaded, state())
    assert config == "x = 1\n"
    assert not list(tmp_path.glob(".*"))


def test_views_into_one_storage_are_saved_apart(tmp_path: Path) -> None:
    base = torch.arange(10.0)
    folder = checkpoint.save(tmp_path, 1, {"model": {"a": base[:4], "b": base[2:6], "t": base.view(2, 5).t()}}, "")
    loaded, _ = checkpoint.load(folder)
    assert torch.equal(loaded["model"]["b"], base[2:6])
    assert torch.equal(loaded["model"]["t"], base.view(2, 5).t())


def test_every_bit_flip_is_found(tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, 3, state(), "x = 1\n")
    files = sorted(folder.iterdir())
    rng = random.Random(0)
    for _ in range(200):
        file = rng.choice(files)
        before = file.read_bytes()
        position, bit = rng.randrange(len(before)), rng.randrange(8)
        damaged = bytearray(before)
        damaged[position] ^= 1 << bit
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError):
            checkpoint.load(folder)
        file.write_bytes(before)
    checkpoint.load(folder)


def test_missing_extra_truncated_and_linked_files_are_named(tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, 3, state(), "x = 1\n")
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    assert "model.safetensors is damaged" in checkpoint.verify(folder)
    file.unlink()
    assert checkpoint.verify(folder) == "model.safetensors is missing"
    outside = tmp_path / "outside"
    outside.write_bytes(content)
    file.symlink_to(outside)
    assert "not a file" in checkpoint.verify(folder)
    file.unlink()
    file.write_bytes(content)
    (folder / "extra").touch()
    assert checkpoint.verify(folder) == "extra is not in the manifest"


def test_latest_passes_over_the_damaged_and_ignores_look_alikes(tmp_path: Path, capsys) -> None:
    good = checkpoint.save(tmp_path, 10, state(), "")
    bad = checkpoint.save(tmp_path, 20, state(), "")
    (bad / "state.json").write_text("{}")
    for name in ("step-00000099.bak", "step-1e3", "STEP-00000009", "step-100"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000077").symlink_to(good)
    assert checkpoint.latest(tmp_path) == good
    assert "step-00000020: state.json is damaged" in capsys.readouterr().err


def test_swapped_between_steps_is_found(tmp_path: Path) -> None:
    first = checkpoint.save(tmp_path, 10, state(0), "")
    second = checkpoint.save(tmp_path, 20, state(1), "")
    shutil.copy(first / "model.safetensors", second / "model.safetensors")
    assert "model.safetensors is damaged" in checkpoint.verify(second)
    shutil.rmtree(second)
    first.rename(second)
    assert "is of step 10" in checkpoint.verify(second)


def test_rotation_keeps_the_valid_ones(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        checkpoint.save(tmp_path, step, state(), "")
    for step in (40, 50):  # half-written by something else
        (tmp_path / f"step-{step:08d}").mkdir()
    checkpoint.rotate(tmp_path, keep_last=2, newest=60)
    assert [step for step, _ in checkpoint.steps(tmp_path)] == [20, 30, 40, 50]


def test_rotation_after_winding_back_keeps_what_was_just_saved(tmp_path: Path) -> None:
    for step in (900, 1000, 50, 60):
        checkpoint.save(tmp_path, step, state(), "")
    checkpoint.rotate(tmp_path, keep_last=1, newest=60)
    assert [step for step, _ in checkpoint.steps(tmp_path)] == [60, 900, 1000]


def test_failed_save_names_the_path_and_leaves_the_old(tmp_path: Path, monkeypatch) -> None:
    good = checkpoint.save(tmp_path, 10, state(), "")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    for step in (10, 20):
        with pytest.raises(CheckpointError, match="No space left"):
            checkpoint.save(tmp_path, step, state(), "")
    assert checkpoint.latest(tmp_path) == good
    assert not list(tmp_path.glob(".tmp*"))


def test_pickle_is_never_read(tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, 3, state(), "")
    script = textwrap.dedent(f"""
        import sys
        from pathlib import Path
        from titanlm import checkpoint
        def hook(event, arguments):
            if event.startswith("pickle."):
                raise SystemExit("pickle!")
        sys.addaudithook(hook)
        checkpoint.load(Path({str(folder)!r}))
    """)
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from titanlm import checkpoint
root, at = Path(sys.argv[1]), int(sys.argv[2])
calls = 0
def counted(function):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call
for name in ("fsync", "rename", "mkdir", "replace", "unlink", "rmdir"):
    setattr(os, name, counted(getattr(os, name)))
for step in (10, 20, 10):
    checkpoint.save(root, step, {"model": {"w": torch.full((100,), float(step))}, "at": step}, "")
    checkpoint.rotate(root, 1, step)
print("done")
"""


@pytest.mark.slow
def test_killed_at_every_system_call(tmp_path: Path) -> None:
    """Kill −9 at the n-th call that changes the disk, for every n: the newest valid checkpoint is whole, and one exists once one existed."""
    for at in range(1, 200):
        root = tmp_path / str(at)
        result = subprocess.run([sys.executable, "-c", KILLED, str(root), str(at)], capture_output=True, text=True, timeout=120)
        found = checkpoint.latest(root)
        if found is not None:
            loaded, _ = checkpoint.load(found)
            assert torch.equal(loaded["model"]["w"], torch.full((100,), float(loaded["at"])))
        checkpoint.sweep(root)
        assert not list(root.glob(".*")) if root.exists() else True
        if "done" in result.stdout:
            assert at > 20, "the calls were not counted"
            return
        assert result.returncode == -signal.SIGKILL
    raise AssertionError("never finished")


def test_optimizer_state_survives_another_grouping() -> None:
    torch.manual_seed(0)
    a, b = torch.nn.Parameter(torch.randn(3)), torch.nn.Parameter(torch.randn(2))
    names = {a: "a", b: "b"}
    first = torch.optim.AdamW([{"params": [a]}, {"params": [b]}], fused=True)
    a.grad, b.grad = torch.ones(3), torch.ones(2)
    first.step()
    saved = checkpoint.optimizer_state(first, names)
    second = torch.optim.AdamW([{"params": [b]}, {"params": [a]}], fused=True)
    checkpoint.restore_optimizer(second, names, saved)
    assert torch.equal(second.state[a]["exp_avg"], first.state[a]["exp_avg"])
    assert torch.equal(second.state[b]["exp_avg_sq"], first.state[b]["exp_avg_sq"])
    with pytest.raises(CheckpointError, match="did `params` patterns change"):
        checkpoint.restore_optimizer(torch.optim.AdamW([a]), names, saved)


def test_state_that_optimizers_keep_in_groups_and_integer_moments_survive() -> None:
    class Counting(torch.optim.SGD):
        """Keeps a count in its group, as schedule-free methods do, and 8-bit and integer state."""

        def step(self, closure=None):
            for group in self.param_groups:
                group["k"] = group.get("k", 0) + 1
                for parameter in group["params"]:
                    self.state[parameter] |= {"code": torch.full((2,), 200, dtype=torch.uint8), "count": torch.tensor(2**30 + 1)}

    parameter = torch.nn.Parameter(torch.zeros(2))
    names = {parameter: "w"}
    first, second = Counting([parameter], lr=0.1), Counting([parameter], lr=0.1)
    first.step()
    first.step()
    checkpoint.restore_optimizer(second, names, checkpoint.optimizer_state(first, names))
    assert second.param_groups[0]["k"] == 2
    assert second.state[parameter]["code"].dtype == torch.uint8
    assert second.state[parameter]["count"].item() == 2**30 + 1
    first.state["global"] = {"d": 1.0}
    with pytest.raises(CheckpointError, match="keeps state under"):
        checkpoint.optimizer_state(first, names)
