"""Signals: the first asks, the second ends, an echo does nothing, and all ranks agree."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from titanlm.distributed.world import Peers
from titanlm.interrupts import Interrupted, Interrupts

SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 138}


class Others(Peers):
    """Ranks of which another got this signal."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def max(self, value: int) -> int:
        return max(value, self.number)


@pytest.mark.parametrize("number", SIGNALS)
def test_i1_the_first_signal_waits_for_check(number: signal.Signals) -> None:
    before = [signal.getsignal(each) for each in Interrupts.SIGNALS]
    with Interrupts() as interrupts:
        interrupts.check()
        os.kill(os.getpid(), number)
        with pytest.raises(Interrupted, match=f"^{number.name}$") as raised:
            interrupts.check()
    assert (raised.value.signal, raised.value.status) == (number, SIGNALS[number])
    assert [signal.getsignal(each) for each in Interrupts.SIGNALS] == before


def test_what_was_received_is_forgotten_at_the_next_start() -> None:
    interrupts = Interrupts()
    with interrupts:
        signal.raise_signal(signal.SIGTERM)
    with interrupts:
        interrupts.check()


def test_in_another_thread_nothing_is_handled() -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []

    def run() -> None:
        with Interrupts() as interrupts:
            seen.append(signal.getsignal(signal.SIGTERM))
            interrupts.check()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [before]


@pytest.mark.parametrize(
    ("own", "other", "message", "status"),
    [
        (None, signal.SIGTERM, "SIGTERM on another rank", 143),
        (signal.SIGTERM, 0, "SIGTERM", 143),
        (signal.SIGTERM, signal.SIGTERM, "SIGTERM", 143),
        (signal.SIGINT, signal.SIGTERM, "SIGTERM on another rank", 143),
        (signal.SIGUSR1, signal.SIGINT, "SIGUSR1", 138),
    ],
)
def test_i1_all_ranks_raise_the_same(own: signal.Signals | None, other: int, message: str, status: int) -> None:
    with Interrupts(echo_s=60) as interrupts:
        if own is not None:
            signal.raise_signal(own)
        with pytest.raises(Interrupted, match=f"^{message}$") as raised:
            interrupts.check(Others(other))
    assert raised.value.status == status


def test_without_a_signal_anywhere_training_goes_on() -> None:
    with Interrupts() as interrupts:
        interrupts.check(Others(0))


def run(echo_s: float, pause_s: float) -> subprocess.CompletedProcess[str]:
    """A process that gets SIGTERM twice and would then save."""
    code = f"""
import signal, time
from titanlm.interrupts import Interrupted, Interrupts
with Interrupts(echo_s={echo_s}) as interrupts:
    signal.raise_signal(signal.SIGTERM)
    time.sleep({pause_s})
    signal.raise_signal(signal.SIGTERM)
    try:
        interrupts.check()
    except Interrupted as error:
        print("saved", error)
"""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def test_i1_the_second_signal_ends_the_process_at_once() -> None:
    result = run(echo_s=0, pause_s=0)
    assert (result.returncode, result.stdout) == (-signal.SIGTERM, "")


def test_i2_an_echo_does_not_end_the_save() -> None:
    result = run(echo_s=60, pause_s=0)
    assert (result.returncode, result.stdout) == (0, "saved SIGTERM\n")


def test_i2_after_the_time_of_echoes_the_second_signal_ends_the_process() -> None:
    result = run(echo_s=0.2, pause_s=0.3)
    assert (result.returncode, result.stdout) == (-signal.SIGTERM, "")
