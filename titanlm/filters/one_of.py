"""Keeps rows of chosen sources, domains, languages ..."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from titanlm.filters.column import text_in
from titanlm.registry import register


@dataclass(frozen=True)
class OneOfConfig:
    values: tuple[str, ...]
    """What may stand in the column, to the letter."""
    column: str = "source"
    """Where a row says what it is."""

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError("values: empty, so no row would be kept; name at least one")


@register("filter", "one_of")
class OneOf:
    """A row with null in its column is refused.

    Raises DataError for a row without that column or with something else than
    text in it.
    """

    def __init__(self, config: OneOfConfig) -> None:
        self.config = config
        self.columns = (config.column,)
        self._values = frozenset(config.values)

    def keep(self, row: Mapping[str, Any]) -> bool:
        return text_in(row, self.config.column, "one_of") in self._values
