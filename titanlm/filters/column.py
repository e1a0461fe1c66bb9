"""What the filters share: a number out of a row."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any

from titanlm.errors import DataError
from titanlm.registry import did_you_mean


def number_in(row: Mapping[str, Any], column: str, filter_name: str) -> float | None:
    """The number in a column of a row; None where the row has null there.

    Raises DataError when the row has no such column or something else in it.
    """
    try:
        value = row[column]  # not `in`: a column may be computed when it is asked for
    except KeyError as error:
        there = ", ".join(row)
        raise DataError(f"{_place(row, filter_name)} no column {column!r}{did_you_mean(column, row)} (there: {there}); set the filter's `column`") from error
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Real):
        raise DataError(f"{_place(row, filter_name)} {type(value).__name__} {_shown(value)} in column {column!r}, where it needs a number")
    return float(value)


def _place(row: Mapping[str, Any], filter_name: str) -> str:
    source = row.get("source")
    return f"{'' if source is None else f'{source}: '}filter {filter_name!r} finds"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"
