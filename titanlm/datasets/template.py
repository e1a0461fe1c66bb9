"""What the text of a row is: one of its columns, or several in a template.

Of Python's format strings a template has the braces alone. Attributes, indices,
conversions and formats are refused: a config is to name columns, not to reach
into objects, and strings need no more.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypeVar

_T = TypeVar("_T")

_BRACES = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_MORE_THAN_A_NAME = re.compile(r"[.\[\]!:]")


class RowText:
    """Which columns hold the text of a row, and how it is made of them.

    ``{{`` and ``}}`` of a template are literal braces. Raises ValueError that
    begins with ``template:``, for a settings class to pass on, when a template
    names no column or has in braces what is more than a name, and when
    ``column`` is set beside it.
    """

    def __init__(self, column: str, template: str = "") -> None:
        self.columns: tuple[str, ...] = (column,)
        """Each once, in order of the template."""
        self.setting = "dataset.template" if template else "dataset.column"
        """Which setting names the columns, for errors."""
        self.key: str | tuple[str, str] = ("template", template) if template else column
        """What of this a fingerprint holds; without a template what it held before there were any."""
        self._format: str | None = None
        if not template:
            return
        if column != "text":
            raise ValueError("template: excludes `column`; give one of them")
        numbers: dict[str, int] = {}
        self._format = _BRACES.sub(lambda found: _numbered(found, numbers), template)
        if not numbers:
            raise ValueError(f"template: {template!r} names no column; put the name of at least one in braces")
        self.columns = tuple(numbers)

    def of(self, values: Sequence[str | _T | None]) -> str | _T | None:
        """The text of a row by the values of ``columns``.

        None where one of them is None. A value of another type stands for a
        text that cannot be read, and is what comes back, before any None.
        """
        if self._format is None:
            return values[0]
        if all(isinstance(value, str) for value in values):
            return self._format.format(*values)
        return next((value for value in values if not (value is None or isinstance(value, str))), None)

    def of_columns(self, columns: Sequence[list[str | _T | None]]) -> list[str | _T | None]:
        """``of`` of all rows; without a template the column itself, which is not copied."""
        return columns[0] if self._format is None else [self.of(row) for row in zip(*columns, strict=True)]


def _numbered(found: re.Match[str], numbers: dict[str, int]) -> str:
    """A column's number in braces in place of its name; a name that is new gets the next."""
    written, name = found[0], found[1]
    if name is None and len(written) == 2:
        return written
    if name is None:
        raise ValueError(f"template: {written!r} at character {found.start()} has no counterpart; a literal brace is written {2 * written!r}")
    if not name:
        raise ValueError(f"template: '{{}}' at character {found.start()} names no column; literal braces are written '{{{{}}}}'")
    if _MORE_THAN_A_NAME.search(name):
        raise ValueError(f"template: {written!r} is more than the name of a column; attributes, indices, conversions and formats are not to be had")
    return f"{{{numbers.setdefault(name, len(numbers))}}}"
