"""Logs that fail (I5) and the loop that starts a crashed trainer again (I6)."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from titanlm import checkpoint, supervisor
from titanlm.cli import main
from titanlm.errors import TitanError
from titanlm.loggers.console import Console, ConsoleConfig
from titanlm.loggers.group import LoggerGroup
from titanlm.loggers.jsonl import Jsonl, JsonlConfig

ROOT = Path(__file__).parents[2]
PROVED = {
    "I5 a logger raises": "tests/loggers/test_group.py::test_a_failing_logger_is_dropped_with_one_warning",
    "I5 log.txt cannot be written": "tests/loggers/test_console.py::test_unwritable_log_txt_is_said_once",
    "I5 the reader of stdout is gone": "tests/loggers/test_console.py::test_closed_pipe_does_not_stop_training",
}
"""Cases of the fault matrix that other files prove."""


def titanlm(*words: str | Path, cwd: Path, **settings: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "titanlm", *map(str, words)]
    return subprocess.Popen(command, cwd=cwd, env=environment, text=True, **settings)  # type: ignore[call-overload, no-any-return]


def outside(folder: Path, config: Path, code: str) -> Path:
    """``config`` with one more logger, ``saboteur``, whose ``log(self, step, metrics)`` has this body."""
    (folder / "saboteur.py").write_text(
        "import os, pathlib, signal\nfrom dataclasses import dataclass\nfrom titanlm.registry import register\n"
        "@dataclass(frozen=True)\nclass SaboteurConfig:\n    pass\n"
        "@register('logger', 'saboteur')\nclass Saboteur:\n    'Fails.'\n"
        "    def __init__(self, config: SaboteurConfig, *, run_dir):\n        self.mark = pathlib.Path(run_dir) / 'mark'\n"
        "    def start(self, step): pass\n    def message(self, text): pass\n    def close(self): pass\n"
        f"    def log(self, step, metrics):\n        {code}\n"
    )
    path = folder / "sabotaged.toml"
    path.write_text(f'imports = ["saboteur"]\nlogger = ["console", "jsonl", "saboteur"]\n{config.read_text()}')
    return path


# ---------------------------------------------------------------- I5
def test_i5_a_full_disk_for_the_logs_is_one_warning_each(tmp_path: Path) -> None:
    """A real limit on the size of files, in a child: both logs fail in the middle, metrics go on to whoever is left."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(write, 2)
        sys.stderr = os.fdopen(2, "w")
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - open until the child ends
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write then fails as on a full disk
        seen: list[int] = []
        group = LoggerGroup([Jsonl(JsonlConfig(), run_dir=tmp_path), Console(ConsoleConfig(), run_dir=tmp_path), Listener(seen)])
        group.start(0)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
        for step in range(100):
            group.log(step, {"loss": 1.0})
        group.close()
        sys.stderr.flush()
        os._exit(seen != list(range(100)))
    os.close(write)
    with os.fdopen(read) as pipe:
        errors = pipe.read()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, errors
    assert errors.count("WARNING") == 2, errors
    assert "logger Jsonl failed and is dropped; training goes on" in errors
    assert "log.txt: File too large" in errors
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_bytes().split(b"\n")[:-1]]
    assert steps == list(range(len(steps)))


class Listener:
    def __init__(self, seen: list[int]) -> None:
        self.seen = seen

    def start(self, step: int) -> None: ...

    def log(self, step: int, metrics: object) -> None:
        self.seen.append(step)

    def message(self, text: str) -> None: ...

    def close(self) -> None: ...


@pytest.mark.parametrize("errors_too", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["train | head -1", "train 2>&1 | head -1"])
def test_i5_training_outlives_the_reader_of_its_output_and_a_logger(tiny: Path, errors_too: bool) -> None:
    config = outside(tiny.parent, tiny, "raise OSError(28, 'No space left on device')")
    process = titanlm(
        "train", config, "--train.steps=6", "--run.name=piped", cwd=tiny.parent,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT if errors_too else subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read() if process.stderr is not None else ""
    assert process.wait(timeout=120) == 0, errors
    assert [step for step, _ in checkpoint.steps(tiny.parent / "runs" / "piped" / "checkpoints")] == [6]
    if not errors_too:
        assert errors.count("WARNING") == 2
        assert errors.count("standard output is gone; training goes on") == errors.count("logger Saboteur failed and is dropped") == 1


# ---------------------------------------------------------------- I6
CHILD = """
import json, os, pathlib, signal, sys, time
run, plan = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
count = run / "starts"
start = int(count.read_text()) if count.exists() else 0
count.write_text(str(start + 1))
saved, logged, end = plan[min(start, len(plan) - 1)]
if saved:
    (run / "checkpoints" / f"step-{saved:08d}").mkdir(parents=True, exist_ok=True)
with open(run / "metrics.jsonl", "a") as file:
    file.write('\\n' + json.dumps({"step": logged}) + '\\n{"step": 9')
if end == "wait":
    got = []
    signal.signal(signal.SIGTERM, lambda *_: got.append(1))
    (run / "session").write_text(str(os.getsid(0)))
    (run / "ready").touch()
    while not got:
        time.sleep(0.01)
    time.sleep(0.5)
    end = 6 + len(got)
if end < 0:
    os.kill(os.getpid(), -end)
sys.exit(end)
"""
"""A trainer of a few milliseconds: saves, logs and ends as its plan says, start by start."""


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "PAUSE_S", 0.01)
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def supervised(run: Path, plan: list[tuple[int, int, object]], restarts: int = 9) -> tuple[int, int]:
    """(status, number of starts)."""
    status = supervisor.supervise(run, [sys.executable, "-c", CHILD, str(run), json.dumps(plan)], restarts)
    return status, int((run / "starts").read_text())


@pytest.mark.parametrize("status", [0, 2, 130, 138, 143, -signal.SIGTERM])
def test_i6_an_end_that_another_start_would_not_mend_is_final(tmp_path: Path, status: int) -> None:
    assert supervised(tmp_path, [(5, 5, status)]) == (status if status >= 0 else 128 - status, 1)


def test_i6_crashes_with_progress_use_up_the_restarts(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert supervised(tmp_path, [(step, step + 3, -signal.SIGKILL) for step in range(10, 90, 10)], restarts=3) == (137, 4)
    lines = capfd.readouterr().err.splitlines()
    assert "training ended with status 137 at step 13; starting again in 0.01 s from step 10, restarts left after that: 2" in lines[0]
    assert lines[-1].endswith("no restarts are left")


def test_i6_it_ends_well_after_a_crash(tmp_path: Path) -> None:
    assert supervised(tmp_path, [(7, 9, 1), (7, 8, -signal.SIGSEGV), (20, 20, 0)]) == (0, 3)


@pytest.mark.parametrize(
    ("plan", "starts", "step"),
    [
        ([(100, 120, 1)], 3, 120),
        ([(0, 0, 1)], 3, 0),
        ([(100, 120, 1), (100, 119, 1), (100, 120, -signal.SIGKILL)], 3, 120),
        ([(100, 120, 1), (130, 140, 1), (130, 140, 1), (130, 150, 1), (130, 150, 1)], 6, 150),
    ],
    ids=["the same step", "before the first step", "about the same step", "after progress"],
)
def test_i6_three_ends_at_one_step_are_no_progress(tmp_path: Path, plan, starts: int, step: int, capfd: pytest.CaptureFixture[str]) -> None:
    status, n_starts = supervised(tmp_path, plan)
    assert (status % 136, n_starts) == (1, starts)
    last = capfd.readouterr().err.splitlines()[-1]
    assert f"no progress: three starts ended at step {step}. `titanlm data state {tmp_path}`" in last


def test_i6_a_signal_is_passed_on_once_and_ends_the_loop(tmp_path: Path) -> None:
    """Even if the child fails at it: who asked for an end gets one."""

    def ask() -> None:
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=ask, daemon=True).start()
    assert supervised(tmp_path, [(5, 5, "wait")]) == (7, 1)
    # Ctrl-C reaches every process of a session's foreground: the child must not get it twice.
    assert int((tmp_path / "session").read_text()) != os.getsid(0)


def test_i6_a_signal_during_the_pause_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "PAUSE_S", 60.0)
    monkeypatch.setattr(supervisor, "_say", lambda text: os.kill(os.getpid(), signal.SIGINT))
    before = signal.getsignal(signal.SIGINT)
    assert supervised(tmp_path, [(5, 5, 1)]) == (130, 1)
    assert signal.getsignal(signal.SIGINT) is before


def test_i6_torchrun_starts_ranks_again_itself(tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert main(["train", str(tiny), "--restarts", "4"]) == 2
    assert "torchrun --max-restarts=4" in capsys.readouterr().err
    with pytest.raises(TitanError):
        supervisor.supervise(tiny, [], 1)


def test_i6_a_wrong_config_starts_nothing(tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(supervisor, "supervise", lambda *_: pytest.fail("started"))
    assert main(["train", str(tiny), "--restarts=4", "--train.stps=3"]) == 2
    assert "train.stps: unknown key" in capsys.readouterr().err


def test_i6_the_command_is_started_with_its_overrides(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple] = []
    monkeypatch.setattr(supervisor, "supervise", lambda *call: calls.append(call) or 7)
    assert main(["train", str(tiny), "--restarts", "4", "--train.steps=9", "--run.name=other"]) == 7
    command = [sys.executable, "-m", "titanlm", "train", str(tiny), "--train.steps=9", "--run.name=other"]
    assert calls == [(tiny.parent / "runs" / "other", command, 4)]


@pytest.mark.slow
def test_i6_a_trainer_killed_in_the_middle_comes_to_its_end(tiny: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """The real one: killed with -9 at step 5, once; the second start goes on from step 4."""
    code = "if step == 5 and not self.mark.exists():\n            self.mark.touch(); os.kill(os.getpid(), signal.SIGKILL)"
    config = outside(tiny.parent, tiny, code)
    words = ["--train.steps=8", "--checkpoint.every=4", "--checkpoint.asynchronous=false", "--run.name=killed"]
    run = tiny.parent / "runs" / "killed"
    monkeypatch.chdir(tiny.parent)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    status = supervisor.supervise(run, [sys.executable, "-m", "titanlm", "train", str(config), *words], 2)
    out, errors = capfd.readouterr()
    assert status == 0, errors
    assert "training ended with status 137 at step 5; starting again in 0.01 s from step 4" in errors
    assert out.count("resumed from") == 1
    assert checkpoint.steps(run / "checkpoints")[-1][0] == 8
    steps = [row["step"] for line in (run / "metrics.jsonl").read_text().splitlines() if "loss" in (row := json.loads(line))]
    assert steps == list(range(1, 9))


@pytest.mark.slow
def test_i6_a_trainer_that_dies_thrice_at_one_step_is_left_alone(tiny: Path) -> None:
    config = outside(tiny.parent, tiny, "if step == 5:\n            os.kill(os.getpid(), signal.SIGKILL)")
    process = titanlm("train", config, "--restarts", "9", "--checkpoint.every=4", "--run.name=stuck", cwd=tiny.parent, stderr=subprocess.PIPE)
    _, errors = process.communicate(timeout=280)
    assert process.returncode == 137
    assert errors.splitlines()[-1].startswith("titanlm: training ended with status 137 at step 5; no progress: three starts ended at step 5")
