"""int8: symmetric integers of 8 bits, one scale a row, on export only; the maths is in ``rowwise``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from titanlm.quantizers.rowwise import Rowwise
from titanlm.registry import register


@dataclass(frozen=True)
class Int8Config:
    """Settings of the quantizer ``int8``."""

    params: tuple[str, ...] = ("@matrix", "@embedding", "@head")
    """Globs of parameter names; "@role" stands for every parameter of that role. The first quantizer that matches takes the parameter."""
    scale_dtype: Literal["float16", "float32"] = "float16"
    """How a row's scale is stored; float32 for rows whose scale exceeds 65,504 or lies under 6e-8."""


@register("quantizer", "int8")
def int8(config: Int8Config) -> Rowwise:
    """Integers in [-128, 127] times a scale a row."""
    return Rowwise("int8", bits=8, scale_dtype=config.scale_dtype)
