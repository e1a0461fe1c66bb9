"""benchmarks/adamw.py runs; what it times is not looked at."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_it_prints_a_line_for_each_form() -> None:
    command = [sys.executable, "benchmarks/adamw.py", "--layers", "0", "--width", "64", "--vocab", "128", "--repeats", "3"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    first, _, *lines = done.stdout.splitlines()
    assert first.startswith("8,192 parameters, ")
    forms = [tuple(line.split()[:2]) for line in lines]
    assert forms == [("fp32", "no"), *((form, compiled) for form in ("bf16", "int8", "fp8") for compiled in ("no", "yes"))]
    sizes = [float(line.split()[-1]) for line in lines]
    assert [round(size, 1) for size in sizes[:3]] == [8.0, 4.0, 4.0]
    assert all(2 < size < 4 for size in sizes[3:])
