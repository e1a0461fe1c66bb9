"""Named number ranges for settings; a config error names the range.

They are plain ``Annotated`` types, so a settings class that uses them needs no
validation library, and JSON Schema shows the range to an editor.
"""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge, Gt, Interval

PositiveInt = Annotated[int, Gt(0)]
NonNegativeInt = Annotated[int, Ge(0)]
Size = Annotated[int, Interval(gt=0, le=1 << 24)]
"""Of something held in memory in one piece; without a bound a slip of the finger would take all memory before anything could object."""
NonNegativeFew = Annotated[int, Interval(ge=0, le=10_000)]
"""A number of processes, threads or layers, which are made one by one; bounded likewise."""
PositiveFew = Annotated[int, Interval(gt=0, le=10_000)]
PositiveFloat = Annotated[float, Gt(0)]
NonNegativeFloat = Annotated[float, Ge(0)]
Fraction = Annotated[float, Interval(ge=0, le=1)]
"""A number from 0 to 1, both included."""
Decay = Annotated[float, Interval(ge=0, lt=1)]
"""A number from 0 up to, but not including, 1."""
