"""Asynchronous saves: what a training loop sees of them. What faults do is in tests/faults/test_a_atomicity.py."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from titanlm import checkpoint
from titanlm.errors import CheckpointError
from titanlm.saver import Saver


def test_what_follows_a_save_is_done_in_its_thread_once_it_is_published(tmp_path: Path) -> None:
    saver, seen = Saver(tmp_path), []
    saver.save(1, {"x": 1}, {}, "", after=lambda folder: seen.append((folder, checkpoint.verify(folder), threading.current_thread().name)))
    saver.wait()
    assert seen == [(tmp_path / "step-00000001", None, "checkpoint")]


def test_the_failure_of_what_follows_is_said_and_the_checkpoint_stays(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        raise RuntimeError("no route to host")

    saver = Saver(tmp_path)
    with pytest.raises(CheckpointError, match="step-00000001: is saved, but what was to follow failed: RuntimeError: no route to host"):
        saver.save(1, {"x": 1}, {}, "", after=fail, wait=True)
    saver.close()
    assert checkpoint.latest(tmp_path) == tmp_path / "step-00000001"


def test_what_cannot_be_saved_is_said_as_any_failure_is(tmp_path: Path) -> None:
    saver = Saver(tmp_path)
    with pytest.raises(CheckpointError, match="TypeError: x: a set cannot be saved"):
        saver.save(1, {"x": {1}}, {}, "", wait=True)


def test_memory_is_kept_from_save_to_save(tmp_path: Path) -> None:
    saver = Saver(tmp_path)
    places = set()
    for step, n in ((1, 1000), (2, 1000), (3, 10), (4, 1001 * 100)):
        tree = {"model": {"w": torch.full((n,), float(step)), "b": torch.full((3,), True), "x": torch.ones(2, 2).double()[:, 0]}}
        saver.save(step, tree, {}, "", wait=True)
        places.add(saver._memory.bytes.data_ptr())
        assert torch.equal(checkpoint.load(tmp_path / f"step-{step:08d}").state["model"]["w"], tree["model"]["w"])
        if step == 3:
            assert len(places) == 1
    saver.close()
    assert saver._memory is None


def test_the_interpreter_ends_with_a_save_under_way(tmp_path: Path) -> None:
    script = textwrap.dedent(f"""
        import os, time, torch
        from pathlib import Path
        from titanlm.saver import Saver
        real = os.write
        os.write = lambda descriptor, piece: (time.sleep(1), real(descriptor, piece))[1]
        Saver(Path({str(tmp_path)!r})).save(1, {{"model": {{"w": torch.ones(20 << 20)}}}}, {{}}, "")
        time.sleep(0.3)
    """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert checkpoint.latest(tmp_path) is None


@pytest.mark.distributed
def test_every_rank_hears_of_a_failure_of_one(tmp_path: Path, zygote: Any) -> None:
    script = textwrap.dedent(f"""
        import torch, torch.distributed as dist
        from pathlib import Path
        from titanlm import checkpoint
        from titanlm.distributed.world import Peers, World
        from titanlm.errors import CheckpointError
        from titanlm.saver import Saver
        world = World.from_environment()
        dist.init_process_group("gloo")
        peers = Peers(world)
        saver, seen = Saver(Path({str(tmp_path)!r}), peers=peers.apart()), []
        for step in range(1, 5):
            own = {{"rank": world.rank, "x": {{1}} if step == 3 and world.rank == 1 else 0}}
            saver.save(step, {{"model": {{"w": torch.ones(4)}}}}, own, "", after=seen.append)
            peers.sum([step])  # the main thread talks meanwhile
            try:
                saver.wait()
            except CheckpointError as error:
                assert step == 3 and "rank 1: TypeError: own/x: a set" in str(error), error
            else:
                assert step != 3
        assert len(seen) == 3
        saver.close(10)
        assert [own["rank"] for own in checkpoint.load(checkpoint.latest(saver.root, peers), peers).ranks] == [0, 1]
    """)
    zygote.run(script, ranks=2).expect(0)
    assert [step for step, _ in checkpoint.steps(tmp_path)] == [1, 2, 4]
