"""Metrics as a table that spreadsheets open."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from titanlm.registry import register
from titanlm.runs import write_atomic


@dataclass(frozen=True)
class CsvConfig:
    only: tuple[str, ...] = ()
    """Metrics that are written; empty: all."""


@register("logger", "csv")
class Csv:
    """metrics.csv in the run folder: step, metric, value. A resumed run removes the lines after the step it goes on from."""

    def __init__(self, config: CsvConfig, *, run_dir: Path) -> None:
        self.only, self.path = config.only, run_dir / "metrics.csv"
        self._file: TextIO | None = None

    def start(self, step: int) -> None:
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True) if self.path.exists() else []
        kept = [line for line in lines[1:] if line.endswith("\n") and int(line.partition(",")[0]) <= step]
        write_atomic(self.path, "".join(["step,metric,value\n", *kept]))
        self._file = open(self.path, "a", encoding="utf-8", newline="")  # noqa: SIM115 - closed by close()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        assert self._file is not None
        rows = ((step, name, value) for name, value in metrics.items() if not self.only or name in self.only)
        csv.writer(self._file, lineterminator="\n").writerows(rows)
        self._file.flush()

    def message(self, text: str) -> None:
        """A table has no place for texts."""

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
