"""benchmarks/muon.py runs; what it times is not looked at."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_it_prints_a_line_for_each_number_of_steps() -> None:
    options = ["--layers", "2", "--width", "16", "--steps", "1", "5", "--repeats", "3"]
    command = [sys.executable, "benchmarks/muon.py", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    first, _, *lines = done.stdout.splitlines()
    assert first.startswith("12 matrices, 4,608 parameters, width 16, ns_dtype bf16, ")  # 2 · (2 + 1 + 6) · 16²
    assert [line.split()[0] for line in lines] == ["1", "5"]
    for line in lines:
        _, ours, _, _, _, torchs, _, ratio, _ = line.split()
        assert abs(float(ours) / float(torchs) - float(ratio)) < 0.05 * float(ratio) + 0.01
