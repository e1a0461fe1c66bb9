"""Metrics as TensorBoard events."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titanlm.errors import TitanError
from titanlm.registry import register


@dataclass(frozen=True)
class TensorboardConfig:
    """No settings."""


@register("logger", "tensorboard")
class Tensorboard:
    """Scalars for ``tensorboard --logdir runs``; each start of a run adds one event file to RUN/tensorboard.

    A file begins with the step from which it replaces those before it, so that
    TensorBoard shows no step twice after a resume.

    Raises TitanError when the package is missing.
    """

    def __init__(self, config: TensorboardConfig, *, run_dir: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise TitanError("logger 'tensorboard' needs a package that is not installed; run: pip install tensorboard") from error
        self.folder = run_dir / "tensorboard"
        self._open = SummaryWriter
        self._writer: Any = None

    def start(self, step: int) -> None:
        """Raises TitanError when the folder cannot be written."""
        try:
            self._writer = self._open(str(self.folder), purge_step=step + 1)
            self._writer.flush()
        except OSError as error:
            raise TitanError(f"{self.folder}: cannot be written: {error.strerror}; make it writable or remove the logger 'tensorboard'") from error

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # a killed run keeps what it logged

    def message(self, text: str) -> None:
        """TensorBoard gets numbers only; the console logger keeps texts in log.txt."""

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
