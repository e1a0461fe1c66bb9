"""int6: symmetric integers of 6 bits, one scale a row, at export and, if asked for, in training; the maths is in ``rowwise``."""

from __future__ import annotations

from titanlm.quantizers.rowwise import IntConfig, Rowwise, integers
from titanlm.registry import register


@register("quantizer", "int6")
def int6(config: IntConfig) -> Rowwise:
    """Integers in [-32, 31] times a scale a row."""
    return integers("int6", config, bits=6)
