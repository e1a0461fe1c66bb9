"""int5: symmetric integers of 5 bits, one scale a row, at export and, if asked for, in training; the maths is in ``rowwise``."""

from __future__ import annotations

from titanlm.quantizers.rowwise import IntConfig, Rowwise, integers
from titanlm.registry import register


@register("quantizer", "int5")
def int5(config: IntConfig) -> Rowwise:
    """Integers in [-16, 15] times a scale a row."""
    return integers("int5", config, bits=5)
