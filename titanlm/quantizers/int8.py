"""int8: symmetric integers of 8 bits, one scale a row, at export and, if asked for, in training; the maths is in ``rowwise``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from titanlm.quantizers.rowwise import Rowwise, TrainedRowwise
from titanlm.registry import register


@dataclass(frozen=True)
class Int8Config:
    """Settings of the quantizer ``int8``."""

    params: tuple[str, ...] = ("@matrix", "@embedding", "@head")
    """Globs of parameter names; "@role" stands for every parameter of that role. The first quantizer that matches takes the parameter."""
    scale_dtype: Literal["float16", "float32"] = "float16"
    """How a row's scale is stored; float32 for rows whose scale exceeds 65,504 or lies under 6e-8."""
    qat: bool = False
    """Train with weights rounded as at export, straight through, while the phase says so (`[qat]`)."""


@register("quantizer", "int8")
def int8(config: Int8Config) -> Rowwise:
    """Integers in [-128, 127] times a scale a row."""
    kind = TrainedRowwise if config.qat else Rowwise
    return kind("int8", bits=8, scale_dtype=config.scale_dtype)
