"""A stranger's submission folder: what is in it, and what was found."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from titanlm.errors import TitanError
from titanlm.loggers.text import printable

ARTIFACT = "model.titanlm"
SCRIPT = "train_gpt.py"
MAX_TEXT_BYTES = 1 << 20
"""Of a README, a submission.json and a script that are read."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    state: Literal["ok", "FAIL", "not checked"]
    what: str
    said: str

    def __str__(self) -> str:
        text = printable(f"{self.what}: {self.said}"[:600].replace("\n", "\\n"))  # names and texts are strangers'
        return f"{self.state:<11}  {text}"


@dataclass(frozen=True)
class Folder:
    """A stranger's folder; only regular files directly in it are read."""

    path: Path
    sizes: dict[str, int]
    """Bytes by name."""

    @contextlib.contextmanager
    def open(self, name: str, limit: int) -> Iterator[BinaryIO]:
        """Raises TitanError when it cannot be read or is larger than ``limit`` bytes."""
        try:
            file = open(self.path / name, "rb", opener=lambda path, _: os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK))  # noqa: SIM115
        except OSError as error:
            raise TitanError(f"cannot be read: {error.strerror}") from error
        with file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise TitanError("no regular file")
            if status.st_size > limit:
                raise TitanError(f"{status.st_size:,} bytes, of which at most {limit:,} are read")
            yield file

    def read(self, name: str, limit: int = MAX_TEXT_BYTES) -> bytes:
        with self.open(name, limit) as file:
            return file.read(limit)

    @property
    def is_ours(self) -> bool:
        return ARTIFACT in self.sizes
