"""benchmarks/gather.py runs, alone and with torchrun; what it times is not looked at."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONFIG = ["train_configs/debug.toml", '--quantizer=[{name="float8",select="all",params=["*gate_proj*"]}]', "--train.precision=bf16"]
D, INNER = 128, 384
"""Of debug.toml."""


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)


def megabytes(printed: str) -> list[float]:
    return [float(each) for each in re.findall(r"([\d.]+) MB come", printed)]


def test_what_comes_and_what_coding_costs() -> None:
    done = run("benchmarks/gather.py", *CONFIG, "--ranks", "4", "--rounds", "2")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("a block on 4 ranks, of which one is here, torch ")
    assert [line.split()[0] for line in lines[-4:]] == ["compute", "float8", "ratio", "codes"]
    whole, coded = megabytes(done.stdout)
    assert whole - coded == pytest.approx(3 / 4 * D * INNER / 1e6, abs=0.006)


@pytest.mark.distributed
def test_weights_travel_under_torchrun() -> None:
    done = run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "benchmarks/gather.py", *CONFIG, "--rounds", "2")
    assert done.returncode == 0, done.stderr
    assert "a block on 2 ranks, torch " in done.stdout
    assert "codes cost" not in done.stdout
    whole, coded = megabytes(done.stdout)
    assert whole - coded == pytest.approx(1 / 2 * D * INNER / 1e6, abs=0.006)


def test_what_is_no_override_is_named() -> None:
    done = run("benchmarks/gather.py", "train_configs/debug.toml", "--bogus")
    assert done.returncode == 2
    assert "'--bogus' is no override" in done.stderr


def test_a_config_without_codes_is_refused() -> None:
    done = run("benchmarks/gather.py", "train_configs/debug.toml")
    assert done.returncode == 2
    assert "it needs quantizer 'float8'" in done.stderr
