"""benchmarks/products.py runs; what it times is not looked at."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_it_prints_a_line_for_each_product() -> None:
    command = [sys.executable, "benchmarks/products.py", "--positions", "16", "--rounds", "1", "--each", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    first, *lines = done.stdout.splitlines()
    assert first.startswith("16 × 32 and 96, bf16, torch ")
    assert [line[:11].strip() for line in lines] == ["up", "back", "plain up", "plain down", "sum down", "sum out"]
    assert all(" torch " in line for line in lines)
