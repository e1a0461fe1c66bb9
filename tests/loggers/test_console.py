"""The console logger: what its line says, and that no terminal, pipe or text can disturb a run."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

import titanlm
from titanlm.loggers.console import Console, ConsoleConfig
from titanlm.loggers.text import count, duration, printable

TRAINING = {
    "loss": 3.25, "bits_per_byte": 1.5, "grad_norm": 0.875, "lr": 3e-4, "lr/adamw": 3e-4, "tokens": 40960.0, "total_steps": 200.0,
    "tokens_per_s": 12345.0, "step_s": 0.5, "memory_gib": 1.5, "stall": 0.031, "eta_s": 4000.0, "elapsed_s": 5.0,
}  # fmt: skip
LINE = "step  10/200  loss 3.2500  bpb 1.5000  grad 0.875  lr 3.00e-04  12.3k tok/s  MFU n/a  mem 1.50 GiB  stall 3.1%  ETA 1:06:40"


def test_plain_lines_and_log_txt_say_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(ConsoleConfig(), run_dir=tmp_path)
    console.message("before the start")
    console.start(0)
    console.log(10, TRAINING)
    console.log(20, {**TRAINING, "mfu": 0.4321, "lr/muon": 0.02, "balance": 0.125})
    console.log(
        20,
        {
            "validation/validation/loss": 3.0, "validation/validation/averaged_loss": 2.5, "validation/validation/averaged_bits_per_byte": 1.25,
            "validation/wiki/en/perplexity": 20.0,
        },
    )  # fmt: skip
    console.close()
    out = capsys.readouterr().out
    assert out == (tmp_path / "log.txt").read_text()
    lines = out.splitlines()
    assert lines[:2] == ["before the start", LINE]
    assert "lr adamw 3.00e-04 muon 2.00e-02" in lines[2]
    assert "MFU 43.2%" in lines[2]
    assert lines[2].endswith("balance 0.125")
    assert lines[3:] == [
        "step  20/200  validation: loss 3.0000",
        "step  20/200  validation (averaged weights): loss 2.5000  bits per byte 1.2500",
        "step  20/200  validation wiki/en: perplexity 20.0000",
    ]


def test_missing_metrics_are_not_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(ConsoleConfig(), run_dir=tmp_path)
    console.log(1, {"loss": float("nan")})
    assert capsys.readouterr().out == "step 1  loss nan\n"


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """sys.stdout is a pseudo terminal of 60 columns; yields the end that a screen would read."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
    monkeypatch.setenv("TERM", "xterm")
    with os.fdopen(slave, "w", encoding="utf-8") as stream:
        # pytest puts its own sys.stdout back before the test begins.
        monkeypatch.setattr("titanlm.loggers.console.sys", SimpleNamespace(stdout=stream, stderr=sys.stderr))
        yield master
    os.close(master)


def screen(master: int) -> list[str]:
    """What a terminal of 60 columns shows: \\r, \\n, "erase to the end of the line", and wrapping."""
    written = b""
    while select.select([master], [], [], 0.2)[0]:
        written += os.read(master, 1 << 16)
    rows, row, column = [""], 0, 0
    for token in re.findall(r"\x1b\[K|.", written.decode(), re.DOTALL):
        if token == "\x1b[K":
            rows[row] = rows[row][:column]
        elif token == "\r":
            column = 0
        elif token == "\n":
            row += 1
        else:
            if column == 60:
                row, column = row + 1, 0
            rows += [""] * (row + 1 - len(rows))
            rows[row] = rows[row].ljust(column)[:column] + token + rows[row][column + 1 :]
            column += 1
        rows += [""] * (row + 1 - len(rows))
    return rows


def test_terminal_shows_one_live_line(tmp_path: Path, terminal: int) -> None:
    console = Console(ConsoleConfig(), run_dir=tmp_path)
    console.log(10, TRAINING)
    console.log(110, {**TRAINING, "loss": 2.0, "eta_s": 3.0})
    assert screen(terminal) == ["step 110/200  loss 2.0000  bpb 1.5000  grad 0.875  lr 3.00e"]  # the newest only, 59 columns
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 2


def test_terminal_keeps_the_last_line_in_full_before_others(tmp_path: Path, terminal: int) -> None:
    console = Console(ConsoleConfig(), run_dir=tmp_path)
    console.log(10, TRAINING)
    console.log(20, {**TRAINING, "loss": 2.0})
    console.log(20, {"validation/validation/loss": 3.0})
    console.message("saved")
    console.log(30, {"loss": 1.0})
    console.close()
    full = LINE.replace("step  10", "step  20").replace("loss 3.2500", "loss 2.0000")
    rows = [full[at : at + 60].rstrip() for at in range(0, len(full), 60)]
    expected = [*rows, "step  20/200  validation: loss 3.0000", "saved", "step  30/200  loss 1.0000", ""]
    assert [row.rstrip() for row in screen(terminal)] == expected


def test_terminal_prints_every_line_when_not_live(tmp_path: Path, terminal: int) -> None:
    console = Console(ConsoleConfig(live=False), run_dir=tmp_path)
    console.log(1, {"loss": 2.0})
    console.log(2, {"loss": 1.0})
    assert screen(terminal) == ["step 1  loss 2.0000", "step 2  loss 1.0000", ""]


def test_control_characters_never_reach_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(ConsoleConfig(), run_dir=tmp_path)
    console.message("a\x1b[2J\rb\x07\x9b\u202e\ud800\n\tc é 가 🙂")
    console.log(1, {"validation/e\x1bv\nil/loss": 1.0, "x\x1b": 2.0})
    for text in (capsys.readouterr().out, (tmp_path / "log.txt").read_text()):
        assert text.startswith("a\\x1b[2J\\rb\\x07\\x9b\\u202e\\ud800\n        c é 가 🙂\n")
        assert len(text.splitlines()) == 4
        assert all(character.isprintable() or character == "\n" for character in text)


def run(code: str, **options: object) -> subprocess.Popen[str]:
    variables = {**os.environ, "PYTHONPATH": str(Path(titanlm.__file__).parent.parent), **options.pop("env", {})}  # type: ignore[dict-item]
    return subprocess.Popen([sys.executable, "-c", code], env=variables, text=True, stderr=subprocess.PIPE, **options)  # type: ignore[call-overload, no-any-return]


LOGS = """
import sys
from pathlib import Path
from titanlm.loggers.console import Console, ConsoleConfig
console = Console(ConsoleConfig(), run_dir=Path({folder!r}))
console.message("größe 가")
sys.stdin.readline()
for step in range(1, 4):
    console.log(step, {{"loss": 1.0}})
console.close()
"""


def test_closed_pipe_does_not_stop_training(tmp_path: Path) -> None:
    process = run(LOGS.format(folder=str(tmp_path)), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    _, errors = process.communicate("go\n", timeout=60)
    assert process.returncode == 0
    assert errors == f"WARNING: standard output is gone; training goes on and {tmp_path}/log.txt has its lines\n"
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 4


def test_ascii_terminal_gets_escapes(tmp_path: Path) -> None:
    process = run(LOGS.format(folder=str(tmp_path)), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env={"PYTHONIOENCODING": "ascii"})
    out, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    assert out.splitlines()[0] == "gr\\xf6\\xdfe \\uac00"
    assert (tmp_path / "log.txt").read_text(encoding="utf-8").splitlines()[0] == "größe 가"


def test_unwritable_log_txt_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "log.txt").mkdir()
    console = Console(ConsoleConfig(), run_dir=tmp_path)
    console.message("one")
    console.message("two")
    out, errors = capsys.readouterr()
    assert out == "one\ntwo\n"
    assert errors.count("WARNING") == 1
    assert "log.txt" in errors


@pytest.mark.parametrize(("value", "text"), [(0, "0"), (7.25, "7.25"), (999, "999"), (999.7, "1k"), (12345, "12.3k"), (2.5e6, "2.5M"), (3e13, "30T")])
def test_count(value: float, text: str) -> None:
    assert count(value) == text


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (4000, "1:06:40"), (93784, "1d 02:03:04"), (-5, "0:00")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_printable_keeps_ordinary_text() -> None:
    text = "naïve 日本 🙂\nsecond line"
    assert printable(text) == text
    assert printable("a\r\nb") == "a\nb"
