"""Cases I1 to I4 through the whole trainer, on two ranks: signals at every moment, and ranks that die, stop, hang or fail."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from titanlm import checkpoint
from titanlm.distributed.watchdog import HUNG

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
STEPS = 10
PROVED = {
    "I1 a second signal": "tests/test_interrupts.py::test_i1_the_second_signal_ends_the_process_at_once",
    "I1 one process": "tests/test_train.py::test_interrupted_in_the_middle_of_accumulation",
    "I3 whoever it is": "tests/distributed/test_watchdog.py::test_i3_a_stopped_rank_is_named_and_the_waiting_one_ends",
}
"""Cases of the fault matrix that other files prove."""

_spec = importlib.util.spec_from_file_location("kill_trials", Path(__file__).with_name("kill_trials.py"))
assert _spec is not None
assert _spec.loader is not None
sys.modules["kill_trials"] = kill_trials = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(kill_trials)

AT_CALL = """
import os, signal, time

def at_call(n, owner, name, action):
    'Before the n-th call of a function.'
    function, calls = getattr(owner, name), []
    def call(*args, **kwargs):
        calls.append(None)
        if len(calls) == n:
            action()
        return function(*args, **kwargs)
    setattr(owner, name, call)

def send():
    os.kill(os.getpid(), NUMBER)

if rank in RANKS:
    from titanlm import checkpoint, data, evaluate, interrupts, train
    WHAT
"""
MOMENTS = {
    "at the end of a step": "at_call(4, train.Trainer, '_complete', send)",
    "accumulating": "at_call(8, interrupts.Interrupts, 'check', send)",  # two micro-batches a step
    "validating": "at_call(2, train, 'score', send)",
    "saving": "at_call(2, checkpoint, 'write_tensors', lambda: (send(), time.sleep(1)))",
    "starting the loader": "at_call(1, data.Loader, 'next', send)",
}


def before(what: str, number: int = signal.SIGTERM, ranks: tuple[int, ...] = (1,)) -> str:
    """Run first in every rank: something happens at a moment in some of them."""
    return AT_CALL.replace("RANKS", repr(ranks)).replace("WHAT", what).replace("NUMBER", str(int(number)))


class Two:
    """A run of two ranks, with accumulation, scoring and saving on the way, and what it gives undisturbed."""

    def __init__(self, zygote: Any, folder: Path) -> None:
        conftest = kill_trials.module(ROOT / "tests" / "conftest.py")
        self.zygote, self.runs = zygote, folder / "runs"
        self.config = inspect.unwrap(conftest.tiny)(folder, inspect.unwrap(conftest.corpus)(folder))
        settings = {"train.steps": STEPS, "train.micro_batch": 2, "train.validate_every": 3, "checkpoint.every": 2}
        settings |= {"parallel.strategy": "fsdp2", "parallel.timeout_s": 5, "validation": "[{max_tokens = 400}]"}
        self.overrides = [f"--{name}={value}" for name, value in settings.items()]
        self.start("straight").expect(0)

    def start(self, name: str, before: str = "", *overrides: str) -> Any:
        return self.zygote.train(self.config, f"--run.name={name}", *self.overrides, *overrides, ranks=2, before=before)

    def kept(self, name: str) -> int:
        """The step of the newest checkpoint, which is sound."""
        found = checkpoint.steps(self.runs / name / "checkpoints")
        assert checkpoint.verify(found[-1][1]) is None
        return found[-1][0]

    def require_same_end(self, name: str) -> None:
        """Start it again, undisturbed: it ends as the straight one does."""
        self.start(name).expect(0)
        straight = self.runs / "straight"
        assert kill_trials.losses(self.runs / name) == kill_trials.losses(straight)
        assert kill_trials.state_differences(self.runs / name, straight, STEPS) == []


@pytest.fixture(scope="module")
def two(zygote: Any, tmp_path_factory: pytest.TempPathFactory) -> Two:
    return Two(zygote, tmp_path_factory.mktemp("two"))


# ---------------------------------------------------------------- I1, I2
@pytest.mark.parametrize(
    ("moment", "number", "rank"),
    [
        pytest.param(moment, number, rank, id=f"{moment}-{number.name}-{rank}")
        for moment in MOMENTS
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
        for rank in range(2)
    ],
)
def test_i1_a_signal_to_one_rank_saves_and_ends_all(two: Two, moment: str, number: signal.Signals, rank: int) -> None:
    name = f"{moment}-{number.name}-{rank}".replace(" ", "-")
    launched = two.start(name, before(MOMENTS[moment], number, (rank,)))
    launched.expect(128 + number, timeout_s=30)
    assert two.kept(name) == kill_trials.last_step(two.runs / name) < STEPS  # nothing is lost
    assert f"saved step {two.kept(name)}; start again to go on from there" in launched.output()
    two.require_same_end(name)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_i2_a_signal_to_the_whole_group_reaches_data_workers_too(two: Two, number: signal.Signals) -> None:
    """As Ctrl-C in a terminal: every process gets it, and the launcher hands it on once more."""
    everywhere, name = "at_call(8, interrupts.Interrupts, 'check', lambda: [(os.killpg(0, NUMBER), time.sleep(0.2)) for _ in range(2)])", f"group-{number.name}"
    two.start(name, before(everywhere, number, (0, 1)), "--data.workers=2").expect(128 + number, timeout_s=30)
    assert two.kept(name) == 3
    two.require_same_end(name)


@pytest.mark.parametrize(("number", "group"), [(signal.SIGTERM, False), (signal.SIGINT, False), (signal.SIGINT, True)], ids=["TERM", "INT", "Ctrl-C"])
def test_i2_signals_to_torchrun(two: Two, number: signal.Signals, group: bool) -> None:
    name = f"torchrun-{number.name}-{group}"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "titanlm.train", two.config]
    command += [f"--run.name={name}", *two.overrides, "--train.steps=5000", "--scheduler=constant", "--checkpoint.every=1000", "--data.workers=2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launcher = subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        kill_trials.wait_until(lambda: kill_trials.last_step(two.runs / name) > 10, 120)
        begin = time.monotonic()
        (os.killpg if group else os.kill)(launcher.pid, number)
        output, _ = launcher.communicate(timeout=30)
    finally:
        launcher.kill()
        launcher.wait()
    assert time.monotonic() - begin < 30, output
    assert launcher.returncode != 0
    assert two.kept(name) == kill_trials.last_step(two.runs / name) < 1000, output


# ---------------------------------------------------------------- I3, I4
FAULTS = {
    "killed": "at_call(6, data.Loader, 'next', lambda: os.kill(os.getpid(), signal.SIGKILL))",
    "stopped": "at_call(6, data.Loader, 'next', lambda: os.kill(os.getpid(), signal.SIGSTOP))",
    "hanging": "at_call(6, data.Loader, 'next', lambda: time.sleep(1000))",
    "failing": "at_call(6, data.Loader, 'next', lambda: 1 / 0)",
}


@pytest.fixture(scope="module")
def faulty(two: Two) -> Iterator[dict[str, Any]]:
    """Rank 1 comes to grief in step 6. All at once, since most of their time they wait."""
    launched = {fault: two.start(fault, before(what)) for fault, what in FAULTS.items()}
    yield launched
    for ranks in launched.values():
        for rank in range(2):
            ranks.kill(rank)


def status_of_other(launched: Any) -> int:
    """Of rank 0, while rank 1 may still be there."""
    return dataclasses.replace(launched, pids=launched.pids[:1]).wait(40)[0]


def verdict(launched: Any) -> str:
    """What rank 0 says at its end, of rank 1 by its pid."""
    lines = [line for line in launched.output().splitlines() if f"pid {launched.pids[1]})" in line]
    assert len(lines) == 1, launched.output()
    return lines[0]


@pytest.mark.parametrize(("fault", "status"), [("killed", -signal.SIGKILL), ("failing", 1)])
def test_i3_a_rank_that_dies_is_named_and_ends_all(two: Two, faulty: dict[str, Any], fault: str, status: int) -> None:
    """By a kill or by a bug; the next start goes on from the last checkpoint."""
    launched = faulty[fault]
    assert status_of_other(launched) in (2, HUNG)
    assert launched.wait(0.5)[1] == status
    assert "rank 1 (" in verdict(launched)
    assert "gives no sign of life" in verdict(launched)
    assert ("ZeroDivisionError" in launched.output(1)) == (fault == "failing")
    assert two.kept(fault) in (2, 4)
    two.require_same_end(fault)


def test_i3_a_stopped_rank_is_named_and_ends_the_others(two: Two, faulty: dict[str, Any]) -> None:
    launched = faulty["stopped"]
    assert status_of_other(launched) == HUNG
    assert "rank 1 (" in verdict(launched)
    # What it told the others last; six steps may take less time than lies between two tellings.
    assert re.search("gives no sign of life, it is dead or stopped; last seen: (step |starting)", verdict(launched))
    stacks = (two.runs / "stopped" / "stacks-rank-00000.txt").read_text()
    assert "most recent call first" in stacks
    assert "train_step" in stacks
    launched.kill(1)
    launched.expect(HUNG, -signal.SIGKILL)
    two.require_same_end("stopped")


def test_i4_a_hanging_loader_is_named_with_its_place_and_ends_all(two: Two, faulty: dict[str, Any]) -> None:
    launched = faulty["hanging"]
    launched.expect(HUNG, timeout_s=40)
    assert "rank 1 (" in verdict(launched)
    assert "stands at" in verdict(launched)
    assert verdict(launched).partition("titanlm: ")[2] in launched.output(1)  # both name the same
    assert "in at_call" not in (two.runs / "hanging" / "stacks-rank-00000.txt").read_text()
    assert '"<zygote>"' in (two.runs / "hanging" / "stacks-rank-00001.txt").read_text()
    two.require_same_end("hanging")


@pytest.mark.parametrize("fault", ["killed", "stopped", "failing"])
def test_i3_rank_0_takes_the_store_with_it_and_is_named_all_the_same(two: Two, fault: str) -> None:
    name = f"first-{fault}"
    launched = two.start(name, before(FAULTS[fault], ranks=(0,)))
    assert dataclasses.replace(launched, pids=launched.pids[1:]).wait(60)[0] in (2, HUNG)
    assert "rank 0" in launched.output(1).replace("[rank 0]", "")
    launched.kill(0)
    launched.wait()
    two.require_same_end(name)
