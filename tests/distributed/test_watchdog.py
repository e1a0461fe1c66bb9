"""Dead, stopped and hanging processes: who is named, and that everybody ends."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from titanlm.distributed import watchdog
from titanlm.distributed.watchdog import HUNG, Watchdog

RANK = """
import os, signal, sys, time
from datetime import timedelta
from pathlib import Path
import torch
import torch.distributed as dist
from titanlm.distributed import watchdog
from titanlm.distributed.watchdog import Watchdog

watchdog.PERIOD_S, watchdog.STORE_S = 0.4, 1.0
fault, guilty, port, folder, rank = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), int(sys.argv[5])
store = dist.TCPStore("127.0.0.1", port, 2, rank == 0)
dist.init_process_group("gloo", store=dist.PrefixStore("group", store), rank=rank, world_size=2, timeout=timedelta(seconds=60))
dog = Watchdog(timeout_s=3, first_timeout_s=60, rank=rank, size=2, store=store, folder=folder)
dog.start()

def sleeping_loader():
    time.sleep(1000)

try:
    for step in range(10):
        dog.beat(f"step {step}, micro-batch 0")
        dog.started()
        if rank == guilty and step == 5:
            time.sleep(0.6)
            if fault == "hang":
                sleeping_loader()
            os.kill(os.getpid(), getattr(signal, fault))
        dist.all_reduce(torch.ones(1))
except RuntimeError as error:
    print(dog.culprits(), flush=True)
    os._exit(3)
"""


class Ranks:
    """Two gloo ranks of which one comes to grief in step 5. Rank 0 serves the store."""

    def __init__(self, fault: str, folder: Path, guilty: int) -> None:
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-c", RANK, fault, str(guilty), str(port), str(folder)]
        self.processes = [subprocess.Popen([*command, str(rank)], stdout=-1, stderr=-1, text=True) for rank in range(2)]
        self.pids = [process.pid for process in self.processes]

    def end(self, rank: int) -> tuple[int, str, str]:
        output, errors = self.processes[rank].communicate(timeout=60)
        return self.processes[rank].returncode, output, errors

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[tuple[str, int], Ranks]]:
    """By fault and guilty rank; all at once, since most of their time they wait."""
    faults = [("SIGKILL", 1), ("SIGSTOP", 1), ("SIGSTOP", 0), ("hang", 1)]
    pairs = {(fault, guilty): Ranks(fault, tmp_path_factory.mktemp(fault), guilty) for fault, guilty in faults}
    yield pairs
    for pair in pairs.values():
        pair.kill()


@pytest.mark.slow
@pytest.mark.distributed
def test_i3_a_killed_rank_is_named_by_the_one_whose_collective_fails(ranks: dict[tuple[str, int], Ranks]) -> None:
    pair = ranks["SIGKILL", 1]
    status, output, errors = pair.end(0)
    assert status == 3, errors
    assert output.startswith(
        f"rank 1 ({socket.gethostname()}, pid {pair.pids[1]}) gives no sign of life, it is dead or stopped; last seen: step 5, micro-batch 0"
    )


@pytest.mark.slow
@pytest.mark.distributed
def test_i3_a_stopped_rank_is_named_and_the_waiting_one_ends(ranks: dict[tuple[str, int], Ranks]) -> None:
    pair = ranks["SIGSTOP", 1]
    status, _, errors = pair.end(0)
    assert status == HUNG
    assert (
        f"rank 1 ({socket.gethostname()}, pid {pair.pids[1]}) gives no sign of life, it is dead or stopped; last seen: step 5, micro-batch 0. Rank 0 " in errors
    )
    assert "more than 3 s, raise parallel.timeout_s" in errors
    assert "in all_reduce" in (pair.folder / "stacks-rank-00000.txt").read_text()  # the main thread sits in C++
    # Once it runs again, the store is gone with rank 0, but it does not hang on.
    pair.processes[1].send_signal(signal.SIGCONT)
    assert pair.end(1)[0] != 0


@pytest.mark.slow
@pytest.mark.distributed
def test_i3_a_stopped_server_of_the_store_blocks_nobody(ranks: dict[tuple[str, int], Ranks]) -> None:
    status, _, errors = ranks["SIGSTOP", 0].end(1)
    assert status == HUNG
    assert "the process that serves it (the launcher, or rank 0) is gone, stopped or cut off. Rank 1 stood still for " in errors


@pytest.mark.slow
@pytest.mark.distributed
def test_i4_a_hanging_rank_is_named_by_both_and_both_end(ranks: dict[tuple[str, int], Ranks]) -> None:
    pair = ranks["hang", 1]
    for rank, where in ((0, "in all_reduce"), (1, "in sleeping_loader")):
        status, _, errors = pair.end(rank)
        assert status == HUNG
        verdict = errors[errors.index("titanlm: ") :].splitlines()[0]
        assert verdict.startswith(f"titanlm: rank 1 ({socket.gethostname()}, pid {pair.pids[1]}) stands at ")
        assert "sleeping_loader for" in verdict
        assert "last seen: step 5, micro-batch 0. Rank " in verdict
        for text in (errors, (pair.folder / f"stacks-rank-{rank:05d}.txt").read_text()):
            assert where in text
            assert verdict in text


def test_i4_a_single_process_that_hangs_ends_itself(tmp_path: Path) -> None:
    code = f"""
import threading
from pathlib import Path
from titanlm.distributed import watchdog
watchdog.PERIOD_S = 0.1
dog = watchdog.Watchdog(timeout_s=0.5, first_timeout_s=0, folder=Path({str(tmp_path)!r}))
dog.start()
dog.beat("step 3, micro-batch 1")
dog.started()
lock = threading.Lock()
def twice():
    with lock, lock: pass
twice()
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert process.returncode == HUNG, process.stderr
    for text in (process.stderr, (tmp_path / "stacks-rank-00000.txt").read_text()):
        assert "no sign of life for" in text
        assert "last seen: step 3, micro-batch 1. The run ends here" in text
        assert "in twice" in text


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "PERIOD_S", 0.02)


def waited(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


@pytest.mark.usefixtures("quick")
def test_beats_keep_it_quiet_and_the_first_step_has_a_limit_of_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    ended: list[int] = []
    dog = Watchdog(timeout_s=0.5, first_timeout_s=1000, exit=ended.append)
    dog.start()
    time.sleep(0.7)  # compiling
    for step in range(14):
        dog.beat(f"step {step}")
        dog.started()
        time.sleep(0.05)
    assert not ended
    assert waited(lambda: ended == [HUNG])
    assert (
        "last seen: step 13. The run ends here and can be started again. If that is meant to take more than 0.5 s, raise parallel.timeout_s"
        in capfd.readouterr().err
    )
    dog.stop()


@pytest.mark.usefixtures("quick")
def test_the_first_step_can_hang_too_and_0_waits_for_ever(capfd: pytest.CaptureFixture[str]) -> None:
    ended: list[str] = []
    patient, strict = (Watchdog(timeout_s=9, first_timeout_s=limit, exit=lambda status, limit=limit: ended.append(f"{limit} {status}")) for limit in (0, 0.1))
    for dog in (patient, strict):
        dog.start()
    assert waited(lambda: bool(ended))
    time.sleep(0.1)
    assert ended == [f"0.1 {HUNG}"]
    assert "last seen: starting" in capfd.readouterr().err
    for dog in (patient, strict):
        dog.stop()


@pytest.mark.usefixtures("quick")
def test_it_does_not_fire_after_stop() -> None:
    ended: list[int] = []
    dog = Watchdog(timeout_s=0.1, first_timeout_s=0.1, exit=ended.append)
    dog.start()
    dog.stop()
    time.sleep(0.3)
    assert not ended


def test_time_in_which_the_process_itself_was_stopped_does_not_count() -> None:
    code = """
import time
from titanlm.distributed import watchdog
watchdog.PERIOD_S = 0.1
dog = watchdog.Watchdog(timeout_s=1.5, first_timeout_s=1.5)
dog.start()
for _ in range(2):
    dog.beat("step")
    print("beat", flush=True)
    for _ in range(5):
        time.sleep(0.1)
dog.stop()
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.3)  # the beat has been seen, and the next is not due
    process.send_signal(signal.SIGSTOP)
    time.sleep(2)
    process.send_signal(signal.SIGCONT)
    process.communicate(timeout=60)
    assert process.returncode == 0


def test_a_beat_costs_no_more_than_a_microsecond() -> None:
    dog = Watchdog(timeout_s=1, first_timeout_s=1)
    costs = []
    for _ in range(20):
        began = time.perf_counter()
        for _ in range(1000):
            dog.beat("step 1, micro-batch 1")
        costs.append((time.perf_counter() - began) / 1000)
    assert min(costs) < 1e-6


def test_alone_nobody_else_is_to_blame() -> None:
    assert Watchdog(timeout_s=1, first_timeout_s=1).culprits() == "there is no other rank"


def test_long_lists_are_cut_short() -> None:
    assert watchdog._listed([str(rank) for rank in range(10)]) == "0; 1; 2; 3; 4; 5; 6; 7; and 2 more"
