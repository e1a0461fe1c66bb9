"""int6: symmetric integers of 6 bits, one scale a row, at export and, if asked for, in training; the maths is in ``rowwise``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from titanlm.quantizers.rowwise import Rowwise, TrainedRowwise
from titanlm.registry import register


@dataclass(frozen=True)
class Int6Config:
    """Settings of the quantizer ``int6``."""

    params: tuple[str, ...] = ("@matrix", "@embedding", "@head")
    """Globs of parameter names; "@role" stands for every parameter of that role. The first quantizer that matches takes the parameter."""
    scale_dtype: Literal["float16", "float32"] = "float16"
    """How a row's scale is stored; float32 for rows whose scale exceeds 65,504 or lies under 6e-8."""
    qat: bool = False
    """Train with weights rounded as at export, straight through, while the phase says so (`[qat]`)."""


@register("quantizer", "int6")
def int6(config: Int6Config) -> Rowwise:
    """Integers in [-32, 31] times a scale a row."""
    kind = TrainedRowwise if config.qat else Rowwise
    return kind("int6", bits=6, scale_dtype=config.scale_dtype)
