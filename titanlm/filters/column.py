"""What the filters share: a number or a text out of a row."""

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
    value = _value_in(row, column, filter_name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Real):
        raise _no(value, "a number", row, column, filter_name)
    return float(value)


def text_in(row: Mapping[str, Any], column: str, filter_name: str) -> str | None:
    """The text in a column of a row, likewise."""
    value = _value_in(row, column, filter_name)
    if value is not None and not isinstance(value, str):
        raise _no(value, "text", row, column, filter_name)
    return value


def _value_in(row: Mapping[str, Any], column: str, filter_name: str) -> Any:
    try:
        return row[column]  # not `in`: a column may be computed when it is asked for
    except KeyError as error:
        there = ", ".join(row)
        raise DataError(f"{_place(row, filter_name)} no column {column!r}{did_you_mean(column, row)} (there: {there}); set the filter's `column`") from error


def _no(value: Any, wanted: str, row: Mapping[str, Any], column: str, filter_name: str) -> DataError:
    return DataError(f"{_place(row, filter_name)} {type(value).__name__} {_shown(value)} in column {column!r}, where it needs {wanted}")


def _place(row: Mapping[str, Any], filter_name: str) -> str:
    place = row.get("place")
    return f"{'' if place is None else f'{place}: '}filter {filter_name!r} finds"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"
