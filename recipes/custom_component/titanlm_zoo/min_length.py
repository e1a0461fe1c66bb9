"""Keeps rows whose text is long enough."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from titanlm.constraints import PositiveInt
from titanlm.errors import DataError
from titanlm.registry import register


@dataclass(frozen=True)
class MinLengthConfig:
    min_bytes: PositiveInt
    """Shortest text kept, in bytes of UTF-8."""
    column: str = "text"
    """The column that is measured."""


@register("filter", "min_length")
class MinLength:
    """Raises DataError for a row without that column."""

    def __init__(self, config: MinLengthConfig) -> None:
        self.config = config

    def keep(self, row: Mapping[str, Any]) -> bool:
        column = self.config.column
        if column not in row:
            raise DataError(f"filter 'min_length': rows have no column {column!r} (columns: {', '.join(row)}); set its `column`")
        return len(str(row[column]).encode("utf-8", errors="replace")) >= self.config.min_bytes
