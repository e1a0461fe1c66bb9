"""benchmarks/loader.py runs; what it times is not looked at."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_it_prints_a_line_for_each_way_to_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some words to read\n" * 2000, encoding="utf-8")
    options = ["--tokens", "200000", "--document-tokens", "50", "--seq-len", "64", "--workers", "0", "1", "--seconds", "0.2"]
    command = [sys.executable, "benchmarks/loader.py", *options, "--input", str(tmp_path / "a.txt")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    _, *lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == ["token_shards", "token_shards", "byte", "text,", "text,"]
    assert all(int(line[-1].replace(",", "")) > 0 for line in lines)
