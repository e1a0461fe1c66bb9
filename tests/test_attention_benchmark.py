"""benchmarks/attention.py runs; what it times is not looked at."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("options", [[], ["--documents", "--dtype", "fp32"]])
def test_it_prints_a_line_for_each_backend(options: list[str]) -> None:
    command = [sys.executable, "benchmarks/attention.py", "--rows", "1", "--seq-len", "64", "--repeats", "1", "--each", "1", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    first, _, *lines = done.stdout.splitlines()
    assert first.startswith("1 × 64, 4/2 heads × 32, " + ("inside documents, float32" if options else "causal, bfloat16"))
    found = {line.split()[0]: line for line in lines}
    assert list(found) == ["cudnn", "flash4", "flash3", "sdpa", "flex", "varlen", "math"]
    both = {}
    for name in ("sdpa", "math"):
        _, forward, _, backward, _, ratio = found.pop(name).split()
        both[name] = float(forward) + float(backward), float(ratio)
    assert both["sdpa"][1] == 1
    assert abs(both["math"][0] / both["sdpa"][0] - both["math"][1]) < 0.05 * both["math"][1] + 0.01
    for name, line in found.items():
        assert f'"{name}" ' in line
        assert "use" in line
