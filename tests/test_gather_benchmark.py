"""benchmarks/gather.py runs, alone and with torchrun; what it times is not looked at, what it makes of times is."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
CONFIG = ["train_configs/debug.toml", "--train.precision=bf16", "--train.compile=none"]
GATE = '--quantizer=[{name="float8",select="all",params=["*gate_proj*"]}]'
D, INNER = 128, 384
"""Of debug.toml."""


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)


@pytest.fixture
def gather(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("gather")


def megabytes(printed: str) -> list[float]:
    return [float(each) for each in re.findall(r"([\d.]+) MB come", printed)]


def test_what_comes() -> None:
    done = run("benchmarks/gather.py", *CONFIG, GATE, "--ranks", "4", "--rounds", "4")
    assert done.returncode == 0, done.stderr
    first, *lines = done.stdout.splitlines()
    assert first.startswith("a block on 4 ranks, of which one is here, torch ")
    assert [line.split()[0] for line in lines] == ["compute", "float8", "ratio", "codes"]
    whole, coded = megabytes(done.stdout)
    assert whole - coded == pytest.approx(3 / 4 * D * INNER / 1e6, abs=0.0011)


ON_TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "benchmarks/gather.py", *CONFIG, "--rounds", "4"]


@pytest.mark.slow
@pytest.mark.distributed
def test_ranks_go_by_one_measurement() -> None:
    done = run(*ON_TWO, GATE.replace("all", "measured"))
    # Emulated products are slower, so that nothing travels as codes, and why is said.
    assert done.returncode == 1
    assert "nothing of its first block travels as codes" in done.stderr
    assert "ms against" in done.stderr
    assert done.stderr.count("measuring") == 1


@pytest.mark.slow
@pytest.mark.distributed
def test_it_runs_under_torchrun() -> None:
    done = run(*ON_TWO, GATE)
    assert done.returncode == 0, done.stderr
    assert "a block on 2 ranks, torch " in done.stdout
    assert "codes cost" not in done.stdout
    whole, coded = megabytes(done.stdout)
    assert whole - coded == pytest.approx(1 / 2 * D * INNER / 1e6, abs=0.0011)


def test_what_is_made_of_times(gather: Any) -> None:
    lines = gather.lines
    plain, coded = [0.001, 0.002, 0.003, 0.004], [0.002, 0.003, 0.004, 0.005]
    assert list(lines(plain, coded, 8_000_000, 5_000_000, False)) == [
        "compute     2.500 ms, quartiles 2.500 ms apart; 8.000 MB come",
        "float8      3.500 ms, quartiles 2.500 ms apart; 5.000 MB come",
        "ratio    1.400",
        "codes cost 1.000 ms and a message, and spare 3.000 MB: they gain where a rank receives less than 3 GB/s",
    ]
    assert list(lines(coded, plain, 8_000_000, 5_000_000, False))[-1].endswith("they gain at any bandwidth")
    assert len(list(lines(plain, coded, 8_000_000, 5_000_000, True))) == 3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--bogus"], "'--bogus' is no override"),
        (["--rounds", "3"], "--rounds 4 or more"),
        (["--model.n_heads=3"], "model.n_heads: 3 heads do not divide"),
        ([], "parallel.gather_dtype: 'float8' sends what quantizer 'float8' with recipe 'tensorwise' multiplies by, and there is none"),
        ([GATE.replace("all", "policy")], "too small to gain"),
    ],
)
def test_what_cannot_be_timed_is_said(words: list[str], said: str, gather: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["gather.py", *CONFIG, *words])
    try:
        status = gather.main()
    except SystemExit as error:
        status = error.code
    assert status == 2
    assert said in capsys.readouterr().err
