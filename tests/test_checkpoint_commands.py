"""``titanlm checkpoint list | verify | prune``."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import fsspec
import pytest
import torch

from titanlm import checkpoint
from titanlm.checkpoint_copy import RemoteCopies
from titanlm.cli import main
from titanlm.runs import Lock

Command = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with checkpoints of steps 10 to 50, of which 20 is the best."""
    for step in (10, 20, 30, 40, 50):
        state = {"model": {"weight": torch.arange(1000.0) + step}, "progress": {"step": step, "tokens": step * 1000, "elapsed_s": 1.0}}
        checkpoint.save(tmp_path / "run" / "checkpoints", step, state, {}, "x = 1\n")
    (tmp_path / "run" / "best.json").write_text('{"metric": "m", "value": 1.0, "step": 20}')
    return tmp_path / "run"


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """What a verb prints on both outputs, for an exit status."""

    def command(*words: str | Path, status: int = 0) -> str:
        capsys.readouterr()
        assert main(["checkpoint", *map(str, words)]) == status
        printed = capsys.readouterr()
        return printed.out + printed.err

    return command


def folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def steps(run: Path) -> Sequence[int]:
    return [step for step, _ in checkpoint.steps(run / "checkpoints")]


def tree(run: Path) -> list[str]:
    return sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.name != ".lock")


# ---------------------------------------------------------------- list
def test_list(run: Path, command: Command) -> None:
    os.utime(folder(run, 10) / "MANIFEST.json", (0, 0))
    head, *lines = command("list", run).splitlines()
    assert head.split() == ["step", "size", "saved", "at", "ranks", "tokens"]
    assert [line.split()[0] for line in lines] == ["10", "20", "30", "40", "50"]
    assert lines[0].split()[1:] == [*lines[1].split()[1:3], "1970-01-01T00:00:00Z", "1", "10,000"]
    assert [line.split()[6:] for line in lines] == [[], ["best"], [], [], ["newest"]]
    rows = json.loads(command("list", run, "--json"))
    size = sum(file.stat().st_size for file in folder(run, 20).iterdir())
    assert rows[1] == {
        "step": 20, "n_bytes": size, "saved_at": rows[1]["saved_at"], "ranks": 1, "tokens": 20_000, "problem": None, "best": True, "newest": False
    }  # fmt: skip


def test_list_says_what_is_damaged(run: Path, command: Command) -> None:
    flip(folder(run, 50) / "model-00000.safetensors")  # the size tells nothing
    (folder(run, 40) / "MANIFEST.json").unlink()
    (folder(run, 30) / "model-00000.safetensors").write_bytes(b"")
    (folder(run, 20) / "config.toml").unlink()
    (folder(run, 10) / "more").write_text("")
    lines = command("list", run).splitlines()[1:]
    for line, said in zip(
        lines,
        ["more is not in the manifest", "best; config.toml is missing", "model-00000.safetensors has 0 bytes, ", "MANIFEST.json is missing", "newest"],
        strict=True,
    ):
        assert said in line
    rows = json.loads(command("list", run, "--json", "--verify"))
    assert rows[4]["problem"].startswith("model-00000.safetensors (part of rank 0) is damaged: its sha256 ")
    assert not any(row["newest"] for row in rows)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"files": 1, "step": 1}', '{"files": {"a": 1}, "step": 50}', "[" * 100_000, '{"files": {}, "step": 7}'])
def test_list_bears_any_manifest(run: Path, command: Command, content: str) -> None:
    (folder(run, 50) / "MANIFEST.json").write_text(content)
    assert "MANIFEST.json" in command("list", run).splitlines()[-1]
    assert "MANIFEST.json" in command("verify", folder(run, 50), status=1)


def test_list_of_copies(run: Path, command: Command) -> None:
    url = f"memory://{uuid.uuid4().hex}/run"
    copies = RemoteCopies(url)
    assert f"{url}: no copy of a checkpoint in it" in command("list", url, status=2)
    for step in (10, 20, 30):
        copies.upload(folder(run, step), keep_last=3)
    files, root = fsspec.url_to_fs(url)
    files.rm(f"{root}/step-00000030/MANIFEST.json")
    files.pipe_file(f"{root}/step-00000010/config.toml", b"")
    lines = command("list", url).splitlines()[1:]
    assert [line.split()[0] for line in lines] == ["10", "20", "30"]
    for line, said in zip(lines, ["config.toml has 0 bytes, 6 by the manifest", "newest", "MANIFEST.json is missing"], strict=True):
        assert said in line
    assert "--verify would fetch every byte" in command("list", url, "--verify", status=2)


def test_where_there_is_nothing(tmp_path: Path, command: Command) -> None:
    for verb in (["list"], ["verify"], ["prune", "--keep-last", "1"]):
        assert "no checkpoints in it" in command(*verb, tmp_path, status=2)
    (tmp_path / "checkpoints").mkdir()
    for verb in (["list"], ["verify"], ["prune", "--keep-last", "1"]):
        assert "no checkpoint in it yet" in command(*verb, tmp_path, status=2)
    assert not (tmp_path / ".lock").exists()


# ---------------------------------------------------------------- verify
def test_verify(run: Path, command: Command) -> None:
    lines = command("verify", run).splitlines()
    assert len(lines) == 5
    assert all(": ok, manifest sha256 " in line for line in lines)
    flip(folder(run, 30) / "state-00000.json")
    lines = command("verify", run, folder(run, 50), status=1).splitlines()
    assert len(lines) == 6
    assert [": ok, " in line for line in lines] == [True, True, False, True, True, True]
    assert "state-00000.json (part of rank 0) is damaged" in lines[2]
    assert "neither a run folder" in command("verify", run / "checkpoints", status=2)
    assert "neither a run folder" in command("verify", folder(run, 99), status=2)


def test_a_hash_kept_elsewhere_finds_tampering(run: Path, command: Command) -> None:
    one = folder(run, 50)
    sha256 = command("verify", one).split()[-1]
    assert sha256 == hashlib.sha256((one / "MANIFEST.json").read_bytes()).hexdigest()
    assert ": ok" in command("verify", one, "--expect-sha256", sha256.upper())
    weights = one / "model-00000.safetensors"
    flip(weights)
    manifest = json.loads((one / "MANIFEST.json").read_text())
    manifest["files"][weights.name]["sha256"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    (one / "MANIFEST.json").write_text(json.dumps(manifest, indent=1))
    assert ": ok" in command("verify", one)
    assert f"expected {sha256}: it is another checkpoint or was tampered with" in command("verify", one, "--expect-sha256", sha256, status=1)
    assert "5 are meant; name one checkpoint folder" in command("verify", run, "--expect-sha256", sha256, status=2)
    assert "'12' is no sha256" in command("verify", one, "--expect-sha256", "12", status=2)


# ---------------------------------------------------------------- prune
def test_prune(run: Path, command: Command) -> None:
    before = tree(run)
    said = command("prune", run, "--keep-last", "1", "--keep-every", "40", "--dry-run").splitlines()
    assert tree(run) == before
    size = sum(file.stat().st_size for file in folder(run, 10).iterdir())
    assert said[0] == f"{folder(run, 10)}: {size / 1000:,.1f} kB"
    assert said[-1] == f"2 checkpoints, {2 * size / 1000:,.1f} kB would be freed; 3 stay"
    said = command("prune", run, "--keep-last", "1", "--keep-every", "40").splitlines()
    assert said[0].endswith("kB, deleted")
    assert said[-1].endswith("freed; 3 stay")
    assert steps(run) == [20, 40, 50]
    assert not list((run / "checkpoints").glob(".*"))
    assert command("prune", run, "--keep-last", "9").startswith("0 checkpoints, 0 B freed; 3 stay")


def test_the_newest_sound_one_stays_and_damaged_ones_do_not_count(run: Path, command: Command) -> None:
    flip(folder(run, 50) / "model-00000.safetensors")
    flip(folder(run, 40) / "model-00000.safetensors")
    (folder(run, 10) / "MANIFEST.json").unlink()
    said = command("prune", run, "--keep-last", "1")
    assert steps(run) == [10, 20, 30, 50]
    assert f"{folder(run, 10)}: MANIFEST.json is missing: the save was not finished; left alone" in said
    assert "step-00000050: model-00000.safetensors (part of rank 0) is damaged" in said
    for step in (20, 30):
        flip(folder(run, step) / "model-00000.safetensors")
    assert "no checkpoint is sound, so nothing is deleted" in command("prune", run, "--keep-last", "1", status=2)
    assert steps(run) == [10, 20, 30, 50]


def test_prune_refuses_while_a_trainer_is_in_the_run(run: Path, command: Command) -> None:
    lock = Lock(run / ".lock")
    assert f"process {os.getpid()} is training in it" in command("prune", run, "--keep-last", "1", status=2)
    assert len(steps(run)) == 5
    assert "would be freed" in command("prune", run, "--keep-last", "1", "--dry-run")
    lock.release()
    command("prune", run, "--keep-last", "1")
    Lock(run / ".lock").release()  # prune left it free


def test_prune_wants_whole_numbers(run: Path, command: Command) -> None:
    for words in (["--keep-last", "0"], ["--keep-last", "-1"], [], ["--keep-last", "1", "--keep-every", "0"]):
        assert "keep" in command("prune", run, *words, status=2)
    assert len(steps(run)) == 5


@pytest.mark.parametrize("seed", range(5))
def test_a_kill_at_any_moment_leaves_whole_checkpoints(run: Path, seed: int) -> None:
    """Killed before a system call of deletion, drawn at random: what is there under its name is sound."""
    program = """
import os, shutil, signal, sys
from titanlm.cli import main
left = int(sys.argv[2])
def dying(call):
    def wrapped(*args, **kwargs):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)
    return wrapped
os.unlink, os.rmdir, os.rename = dying(os.unlink), dying(os.rmdir), dying(os.rename)
sys.exit(main(["checkpoint", "prune", sys.argv[1], "--keep-last", "1"]))
"""
    after = random.Random(seed).randrange(18)
    done = subprocess.run([sys.executable, "-c", program, str(run), str(after)], capture_output=True, timeout=120, check=False)
    assert done.returncode == -9, done.stderr
    there = steps(run)
    assert {20, 50} <= set(there)
    assert all(checkpoint.verify(folder(run, step)) is None for step in there)
    checkpoint.sweep(run / "checkpoints")
    assert not list((run / "checkpoints").glob(".*"))


def test_a_disk_that_refuses(run: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(shutil, "rmtree", refuse)
    assert "step-00000010 cannot be deleted: Permission denied" in command("prune", run, "--keep-last", "1", status=2)
    Lock(run / ".lock").release()


def test_a_rewound_run_does_not_fetch_the_later_copy(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from titanlm.cli import main

    train = ["train", str(tiny), "--scheduler=constant", "--checkpoint.every=2", "--validation=[]", f"--checkpoint.copy_to={tmp_path / 'copies'}"]
    assert main([*train, "--train.steps=6"]) == 0
    run = tmp_path / "runs" / "tiny"
    assert main(["checkpoint", "rewind", str(run), "--step", "2"]) == 0
    assert "goes on from step 2" in capsys.readouterr().out
    assert main([*train, "--train.steps=4"]) == 0
    assert "(step 2," in capsys.readouterr().out
    shutil.rmtree(run / "checkpoints")
    assert main([*train, "--train.steps=5"]) == 0
    assert "(step 4," in capsys.readouterr().out
