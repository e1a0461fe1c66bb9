"""benchmarks/checkpoint.py runs; what it times is not looked at."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_it_prints_a_line_for_each_way(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/checkpoint.py", "--mib", "1", "--repeat", "2", "--folder", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    _, *lines = [line.rsplit(maxsplit=4) for line in done.stdout.splitlines()]
    expected = [f"save/{how}" for how in ("titanlm", "torch.save", "safetensors", "dcp")] + ["verify/titanlm"]
    expected += [f"{what}/{how}" for what in ("async stall, first", "async stall", "async, all of it") for how in ("titanlm", "dcp")]
    expected += [f"load/{how}" for how in ("titanlm", "torch.load", "safetensors", "dcp")]
    assert sorted(f"{what}/{how}" for what, how, *_ in lines) == sorted(expected)
    assert not list(tmp_path.iterdir())
