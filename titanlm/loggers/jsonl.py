"""Metrics as lines of JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from titanlm.errors import TitanError
from titanlm.registry import register
from titanlm.runs import write_atomic


@dataclass(frozen=True)
class JsonlConfig:
    """No settings."""


@register("logger", "jsonl")
class Jsonl:
    """metrics.jsonl in the run folder, one object a line: ``step`` and the metrics in full precision; NaN and infinities are null.

    A step that was also validated has two lines. Whoever reads the file sees
    every step once: at the start of a resumed run the lines after the restored
    step are removed, as is a last line that a kill has torn.
    """

    def __init__(self, config: JsonlConfig, *, run_dir: Path) -> None:
        self.path = run_dir / "metrics.jsonl"
        self._file: TextIO | None = None

    def start(self, step: int) -> None:
        """Raises TitanError when the file cannot be written."""
        try:
            if self.path.exists():
                lines = self.path.read_bytes()
                kept = b"".join(line + b"\n" for line in lines.split(b"\n") if _step(line) <= step)
                if kept != lines:
                    write_atomic(self.path, kept)
            self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
        except OSError as error:
            raise TitanError(f"{self.path}: cannot be written: {error.strerror}; make it writable or remove the logger 'jsonl'") from error

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._file is None:
            raise RuntimeError("log before start")
        values = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
        self._file.flush()

    def message(self, text: str) -> None:
        """Texts are not metrics; the console logger keeps them in log.txt."""

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _step(line: bytes) -> float:
    """The step of a line; infinite for what is none of ours."""
    try:
        value: Any = json.loads(line)
        return value["step"] if isinstance(value["step"], int) else math.inf
    except (ValueError, TypeError, KeyError):
        return math.inf
