"""Keeps rows that were given a score high enough."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from titanlm.filters.column import number_in
from titanlm.registry import register


@dataclass(frozen=True)
class MinScoreConfig:
    score: float
    """Lowest score kept."""
    column: str = "score"
    """Where a row has its score."""


@register("filter", "min_score")
class MinScore:
    """Null and nan are no score: such a row is refused.

    Made for data with a classifier's judgement beside the text, such as the
    educational score of FineWeb-Edu (Penedo et al. 2024, arXiv:2406.17557).
    Raises DataError for a row without that column or without a number in it.
    """

    def __init__(self, config: MinScoreConfig) -> None:
        self.config = config
        self.columns = (config.column,)

    def keep(self, row: Mapping[str, Any]) -> bool:
        score = number_in(row, self.config.column, "min_score")
        return score is not None and score >= self.config.score
