"""int8: symmetric integers of 8 bits, one scale a row, at export and, if asked for, in training; the maths is in ``rowwise``."""

from __future__ import annotations

from titanlm.quantizers.rowwise import IntConfig, Rowwise, integers
from titanlm.registry import register


@register("quantizer", "int8")
def int8(config: IntConfig) -> Rowwise:
    """Integers in [-128, 127] times a scale a row."""
    return integers("int8", config, bits=8)
