"""Keeps rows that are long enough, in tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from titanlm.constraints import PositiveInt
from titanlm.filters.column import number_in
from titanlm.registry import register


@dataclass(frozen=True)
class MinTokensConfig:
    tokens: PositiveInt
    """Fewest tokens kept."""
    column: str | None = None
    """Where a row has its length, by whatever tokenizer the data was made with; unset: the run's own counts, BOS and EOS left out."""


@register("filter", "min_tokens")
class MinTokens:
    """A row with null in its column is refused.

    Raises DataError for a row without that column or without a number in it.
    """

    def __init__(self, config: MinTokensConfig) -> None:
        self.config = config
        self.columns = () if config.column is None else (config.column,)

    def keep(self, row: Mapping[str, Any]) -> bool:
        n_tokens = number_in(row, self.config.column or "n_tokens", "min_tokens")
        return n_tokens is not None and n_tokens >= self.config.tokens
