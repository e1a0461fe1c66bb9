"""benchmarks/packing.py runs, on text of its own and of others, and its table adds up."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def table(*options: str) -> tuple[str, dict[str, list[str]]]:
    """The line about the documents, and the columns after the packer's name by packer."""
    command = [sys.executable, "benchmarks/packing.py", *options, "--seq-len", "128", "--buffer-rows", "2", "8", "--repeats", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, encoding="utf-8", timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    first, _, *lines = done.stdout.splitlines()
    assert all(line.split()[0] == "128" for line in lines)
    return first, {line[9:23].strip(): line[23:].split() for line in lines}


def test_on_the_standard_library() -> None:
    first, rows = table("--max-documents", "10")
    assert first.startswith("10 documents, ")
    assert list(rows) == ["concat", "best_fit 2", "best_fit 8", "none"]


def test_on_files(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    # With the byte tokenizer's separators 60 and 150 ids.
    parquet.write_table(pyarrow.table({"body": ["x" * 58, "y" * 148, None] * 20}), tmp_path / "a.parquet")
    (tmp_path / "b.txt").write_text("z" * 58, encoding="utf-8")
    first, rows = table("--input", str(tmp_path / "a.parquet"), str(tmp_path / "b.txt"), "--column", "body")
    assert first.startswith("41 documents, 4,260 ids;")
    assert rows["none"][:3] == ["54.56%", "48.8%", "0.0%"]  # 4,260 of 61 · 128, and 20 of 41 documents go on in a second row
    assert rows["best_fit 8"][1:3] == ["48.8%", "0.0%"]
    assert rows["concat"][2] != "0.0%"
    efficiencies = {name: float(columns[0].rstrip("%")) for name, columns in rows.items()}
    assert efficiencies["none"] < efficiencies["best_fit 2"] <= efficiencies["best_fit 8"] <= efficiencies["concat"]
