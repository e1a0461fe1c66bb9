"""Symmetric integers with one scale a row: the engine of ``int8``, ``int6`` and ``int5``.

A row is a line along the last dimension: for a weight (out, in), everything
that makes one output. With c = 2^(bits-1) - 1 levels on each side,

    s = max|row| / c,    q = clip(round(w / s), -c - 1, c),    w' = q s

where s is first rounded to the dtype in which it is stored and only then used,
so that encoder and decoder agree on the grid. Rounding is half to even. The
result obeys |w - w'| <= s / 2 for every element, and for a smooth density the
root-mean-square error is s / √12.

The one delicate point is a small row. An fp16 scale ends at 2^-24, and below
2^-14 it gets coarse: rounded down there, it would push the row's largest
weights over the end of the grid. So a scale that would clip is stored as the
next number up. That is the only floor. A floor of 1/c on the scale, as some
published int6 code has it, leaves weights of std 0.03 three levels a side:
31 % relative error for 3 %. Rows of zeros get scale 0 and come back exactly.

Arithmetic is float32, or float64 for float64 tensors.

Training (``qat``) computes with :func:`round_rows`, the same code without the
checks that look at values, and compiled to the same bits, so what is trained is
what is exported. Left to itself the compiler keeps scales in fp32, and nearly
every weight lies a little beside the grid of the artifact. Ready-made fake
quantizers have other grids: torchao's symmetric one for 6 bits divides by 31.5
where this divides by 31, and keeps scales in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from titanlm.errors import ArtifactError, NonFiniteError
from titanlm.exporters.encoding import Encoded
from titanlm.models.layers.rounding import round_in_training

_FLOATS = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SCALES = {"float32": torch.float32, "float16": torch.float16}
_SAME_WIDTH_INT = {torch.float64: torch.int64, torch.float32: torch.int32, torch.float16: torch.int16}


class Rowwise:
    """``encode`` and ``decode`` with ``bits`` an element (2 to 8) and a scale a row in ``scale_dtype``.

    ``name`` is the registered name written into what it encodes.
    """

    def __init__(self, name: str, *, bits: int, scale_dtype: str) -> None:
        self.name, self.bits, self.scale_dtype = name, bits, scale_dtype

    def encode(self, tensor: Tensor) -> Encoded:
        """Floating tensor of any shape to ``values`` (its shape, int8) and ``scale`` (its shape without the last dimension).

        Raises NonFiniteError for nan and inf, ArtifactError for a tensor that is
        not floating or a row too large for the scale's dtype.
        """
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in _FLOATS:
            raise ArtifactError(f"quantizer {self.name!r} takes {', '.join(_FLOATS)}, not {dtype}; leave this tensor out of its `params`")
        values, scale = quantize_rows(tensor.detach(), self.bits, _SCALES[self.scale_dtype])
        return Encoded(
            shape=tuple(tensor.shape),
            dtype=dtype,
            parts={"values": values, "scale": scale},
            bits={"values": self.bits} if self.bits < 8 else {},
            quantizer=self.name,
            settings={"scale_dtype": self.scale_dtype},
        )

    def decode(self, encoded: Encoded) -> Tensor:
        """The tensor in the shape and dtype it had; ArtifactError when the parts do not fit together."""
        shape, parts = tuple(encoded.shape), encoded.parts
        if set(parts) != {"values", "scale"}:
            raise ArtifactError(f"quantizer {self.name!r} stores the parts 'scale' and 'values', not {sorted(parts)}")
        values, scale = parts["values"], parts["scale"]
        if encoded.dtype not in _FLOATS:
            raise ArtifactError(f"quantizer {self.name!r} decodes to one of {', '.join(_FLOATS)}, not to {encoded.dtype!r}")
        for part, is_dtype, is_shape, dtype, right in (
            ("values", values.dtype, values.shape, torch.int8, shape),
            ("scale", scale.dtype, scale.shape, _SCALES[self.scale_dtype], shape[:-1]),
        ):
            if is_dtype != dtype or tuple(is_shape) != right:
                found = f"{part} is {is_dtype} {tuple(is_shape)}"
                raise ArtifactError(f"quantizer {self.name!r}: {found}, but a tensor of shape {shape} needs {dtype} {right}")
        if not (torch.isfinite(scale) & (scale >= 0)).all():
            raise ArtifactError(f"quantizer {self.name!r}: a scale is negative or not finite")
        return dequantize_rows(values, scale, _FLOATS[encoded.dtype])


class TrainedRowwise(Rowwise):
    """The same, with a part in training."""

    def prepare(self, model: nn.Module, params: Sequence[str]) -> None:
        """Let the modules that hold these parameters round them while ``qat`` is on. Raises ValueError naming those that cannot."""
        round_in_training(model, params, self.round_trip)

    def round_trip(self, tensor: Tensor) -> Tensor:
        """``decode(encode(tensor))``, but rows with nan or inf, or too large for their scale, become nan: nothing waits for the device."""
        return round_rows(tensor, self.bits, _SCALES[self.scale_dtype])


def quantize_rows(tensor: Tensor, bits: int, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``(..., n)`` floating → int8 of the same shape within ±2^(bits-1), and scales ``(...)`` of ``scale_dtype``."""
    values, scale, largest = _quantized(tensor, bits, scale_dtype)
    finite = torch.isfinite(largest)
    if not finite.all():
        row = int((~finite).nonzero()[0, 0])
        raise NonFiniteError(f"a tensor of shape {tuple(tensor.shape)} holds nan or inf (first in row {row}) and cannot be quantized")
    if not torch.isfinite(scale).all():
        remedy = '; set scale_dtype = "float32"' if scale_dtype == torch.float16 else ""
        raise ArtifactError(f"a row reaches {float(largest.max()):.3g}, too large for a scale in {str(scale_dtype).removeprefix('torch.')}{remedy}")
    return values, scale


def round_rows(tensor: Tensor, bits: int, scale_dtype: torch.dtype) -> Tensor:
    """What :func:`quantize_rows` and :func:`dequantize_rows` make of a tensor, in its dtype; nan in rows that the first would refuse."""
    values, scale, _ = _quantized(tensor, bits, scale_dtype)
    return dequantize_rows(values, scale, tensor.dtype)


def _quantized(tensor: Tensor, bits: int, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Values, scales, and the largest magnitude of each row (flat, not stored); the same numbers in compiled code."""
    clip = 2 ** (bits - 1) - 1
    work = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    rows = _as_rows(tensor).to(work)
    # A row without elements has no maximum: reduce over an added zero instead of over nothing.
    largest = rows.abs().amax(1) if rows.shape[1] else rows.new_zeros(rows.shape[0])
    # In fp64 and then fp32 a quotient is rounded as at once; torch.compile divides fp32 less exactly on CUDA.
    scale = _pinned(_pinned((largest.double() / clip).to(work)).to(scale_dtype))
    # Bit patterns of non-negative floats are ordered like the numbers: plus one is the next number up.
    next_up = (scale.view(_SAME_WIDTH_INT[scale_dtype]) + 1).view(scale_dtype)
    scale = torch.where(scale.to(work) * (clip + 0.5) < largest, next_up, scale)
    grid = scale.to(work)[:, None]
    quotient = (rows.double() / torch.where(grid == 0, 1, grid)).to(work)
    values = quotient.round_().clamp_(-clip - 1, clip).to(torch.int8)
    return values.reshape(tensor.shape), scale.reshape(tensor.shape[:-1]), largest


def _pinned(magnitude: Tensor) -> Tensor:
    """A non-negative tensor, rounded to its dtype: torch.compile leaves out a cast there and back unless the bits are worked on between."""
    pattern = magnitude.view(_SAME_WIDTH_INT[magnitude.dtype])
    return (pattern & torch.iinfo(pattern.dtype).max).view(magnitude.dtype)


def dequantize_rows(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """int8 ``(..., n)`` times scales ``(...)``, in ``dtype``."""
    work = torch.float64 if dtype == torch.float64 else torch.float32
    # The grid may reach past the largest finite number of the dtype by half a level; the tensor did not.
    limit = torch.finfo(dtype).max
    rows = (_as_rows(values).to(work) * scale.reshape(-1, 1).to(work)).clamp_(-limit, limit)
    return rows.to(dtype).reshape(values.shape)


def _as_rows(tensor: Tensor) -> Tensor:
    """(rows, last dimension), also for a scalar and for tensors without elements."""
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1] if tensor.ndim else 1)
