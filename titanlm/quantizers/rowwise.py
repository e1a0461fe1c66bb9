"""Symmetric integers with one scale a row: the engine of ``int8``, ``int6``, ``int5`` and ``sdclip``.

A row is a line along the last dimension: for a weight (out, in), everything
that makes one output. With c = 2^(bits-1) - 1 levels on each side and r, how
far the row's grid is to reach, max|row| unless the quantizer says otherwise,

    s = r / c,    q = clip(round(w / s), -c - 1, c),    w' = q s

where s is first rounded to the dtype in which it is stored and only then used,
so that encoder and decoder agree on the grid. Rounding is half to even. The
result obeys |w - w'| <= s / 2 for every element within reach, and for a smooth
density the root-mean-square error is s / √12.

The one delicate point is a small row. An fp16 scale ends at 2^-24, and below
2^-14 it gets coarse: rounded down there, it would push the row's largest
weights over the end of the grid. So a scale that would clip short of r is
stored as the next number up. That is the only floor. A floor of 1/c on the
scale, as some published int6 code has it, leaves weights of std 0.03 three
levels a side: 31 % relative error for 3 %. Rows of zeros get scale 0 and come
back exactly.

Arithmetic is float32, or float64 for float64 tensors.

Scales are settled before a number is rounded, so where the rounding is not to
the nearest level but to the one that suits the layer's inputs (``gptq``), what
is stored has the same form, and decoding does not know.

Training (``qat``) computes with :meth:`TrainedRowwise.round_trip`, the same
code without the checks that look at values, and compiled to the same bits, so
what is trained is what is exported. Left to itself the compiler keeps scales in
fp32, and nearly every weight lies a little beside the grid of the artifact.
Ready-made fake quantizers have other grids: torchao's symmetric one for 6 bits
divides by 31.5 where this divides by 31, and keeps scales in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from titanlm.constraints import Fraction, NonNegativeInt, PositiveFloat
from titanlm.errors import ArtifactError, NonFiniteError
from titanlm.exporters.encoding import Encoded
from titanlm.models.layers.rounding import round_in_training
from titanlm.quantizers.gptq import gptq

_FLOATS = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SCALES = {"float32": torch.float32, "float16": torch.float16}
_SAME_WIDTH_INT = {torch.float64: torch.int64, torch.float32: torch.int32, torch.float16: torch.int16}


@dataclass(frozen=True)
class RowwiseConfig:
    """Settings of every quantizer with a scale a row."""

    params: tuple[str, ...] = ("@matrix", "@embedding", "@head")
    """Globs of parameter names; "@role" stands for every parameter of that role. The first quantizer that matches takes the parameter."""
    above_elements: NonNegativeInt = 0
    """Tensors of no more elements than this are left to export.dtype."""
    scale_dtype: Literal["float16", "float32"] = "float16"
    """How a row's scale is stored; float32 for rows whose scale exceeds 65,504 or lies under 6e-8."""
    qat: bool = False
    """Train with weights rounded as at export, to the nearest level, straight through, while the phase says so (`[qat]`)."""
    rounding: Literal["nearest", "gptq"] = "nearest"
    """gptq: at export, so that the outputs of a layer on calibration data change least; what is no layer's matrix is rounded to nearest."""
    gptq_damp: PositiveFloat = 0.01
    """Added to the diagonal of the inputs' second moments, as a share of its mean."""

    def __post_init__(self) -> None:
        if self.qat and self.rounding == "gptq":
            raise ValueError("rounding: 'gptq' would leave the levels that qat trained; use 'nearest', or qat = false")


@dataclass(frozen=True)
class IntConfig(RowwiseConfig):
    """Settings of ``int5``, ``int6`` and ``int8``."""

    clip_quantile: Fraction | None = None
    """Rows are clipped at this quantile of their magnitudes; unset: at their largest, which clips nothing."""


Reach = Callable[[Tensor], Tensor]
"""Rows (R, n), n > 0, float32 or float64 → how far the grid of each is to reach, (R,), in their dtype and without looking at values on the host."""


class Rowwise:
    """``encode`` and ``decode`` with ``bits`` an element (2 to 8) and a scale a row.

    ``name`` is the registered name written into what it encodes.
    """

    def __init__(self, name: str, config: RowwiseConfig, *, bits: int, reach: Reach) -> None:
        self.name, self.config, self.bits, self.reach = name, config, bits, reach
        self.calibrated = config.rounding == "gptq"
        """Whether it has a use for ``encode_calibrated``."""

    def takes(self, tensor: Tensor) -> bool:
        """Whether it encodes a tensor of this size; looks at no values."""
        return tensor.numel() > self.config.above_elements

    def encode(self, tensor: Tensor) -> Encoded:
        """Floating tensor of any shape to ``values`` (its shape, int8) and ``scale`` (its shape without the last dimension), rounded to nearest.

        Raises NonFiniteError for nan and inf, ArtifactError for a tensor that is
        not floating or a row too large for the scale's dtype.
        """
        rows, scale = self._grid(tensor)
        return self._encoded(tensor, to_levels(rows, scale[:, None], self.bits, rows.dtype), scale)

    def encode_calibrated(self, tensor: Tensor, hessian: Tensor) -> Encoded:
        """As ``encode``, rounded by :func:`titanlm.quantizers.gptq.gptq` on the device of ``hessian``.

        ``tensor`` is (..., n), ``hessian`` (n, n) the sum of x xᵀ over inputs x
        of the products in which its rows stand, float32 or float64. Raises what
        ``encode`` and ``gptq`` raise.
        """
        rows, scale = self._grid(tensor)
        grid = scale.to(hessian.device)
        nearest = partial(to_levels, scale=grid, bits=self.bits, dtype=rows.dtype)
        return self._encoded(tensor, gptq(rows.to(hessian.device), grid, hessian, nearest, damp=self.config.gptq_damp).to(rows.device), scale)

    def _grid(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """Checked rows and their scales."""
        if (dtype := _name(tensor.dtype)) not in _FLOATS:
            raise ArtifactError(f"quantizer {self.name!r} takes {', '.join(_FLOATS)}, not {dtype}; leave this tensor out of its `params`")
        rows = _as_rows(tensor.detach())
        if not (finite := torch.isfinite(rows).all(1)).all():
            row = int((~finite).nonzero()[0, 0])
            raise NonFiniteError(f"a tensor of shape {tuple(tensor.shape)} holds nan or inf (first in row {row}) and cannot be quantized")
        scale = row_scales(rows, self.bits, _SCALES[self.config.scale_dtype], self.reach)
        if not torch.isfinite(scale).all():
            remedy = '; set scale_dtype = "float32"' if scale.dtype == torch.float16 else ""
            raise ArtifactError(f"a row reaches {float(rows.abs().max()):.3g}, too large for a scale in {self.config.scale_dtype}{remedy}")
        return rows, scale

    def _encoded(self, tensor: Tensor, values: Tensor, scale: Tensor) -> Encoded:
        return Encoded(
            shape=tuple(tensor.shape),
            dtype=_name(tensor.dtype),
            parts={"values": values.reshape(tensor.shape), "scale": scale.reshape(tensor.shape[:-1])},
            bits={"values": self.bits} if self.bits < 8 else {},
            quantizer=self.name,
            settings={"scale_dtype": self.config.scale_dtype},  # the rest is in the numbers
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
            ("scale", scale.dtype, scale.shape, _SCALES[self.config.scale_dtype], shape[:-1]),
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
        parameters = dict(model.named_parameters())
        round_in_training(model, [name for name in params if name not in parameters or self.takes(parameters[name])], self.round_trip)

    def round_trip(self, tensor: Tensor) -> Tensor:
        """``decode(encode(tensor))``, but rows with nan or inf, or too large for their scale, become nan: nothing waits for the device."""
        rows = _as_rows(tensor)
        scale = row_scales(rows, self.bits, _SCALES[self.config.scale_dtype], self.reach)
        values = to_levels(rows, scale[:, None], self.bits, rows.dtype)
        return dequantize_rows(values, scale, tensor.dtype).reshape(tensor.shape)


def rowwise(name: str, config: RowwiseConfig, *, bits: int, reach: Reach) -> Rowwise:
    """The quantizer that a settings class asks for: what has no part in training has no ``prepare``."""
    kind = TrainedRowwise if config.qat else Rowwise
    return kind(name, config, bits=bits, reach=reach)


def integers(name: str, config: IntConfig, *, bits: int) -> Rowwise:
    """The quantizers ``int5``, ``int6`` and ``int8``."""
    return rowwise(name, config, bits=bits, reach=largest if config.clip_quantile is None else partial(at_quantile, quantile=config.clip_quantile))


# ---------------------------------------------------------------- reaches
def largest(rows: Tensor) -> Tensor:
    return rows.abs().amax(1)


def at_quantile(rows: Tensor, quantile: float) -> Tensor:
    """Between the two nearest of a row's sorted magnitudes, linearly, as numpy's and torch's quantiles are; the largest where that is 0.

    Not by ``torch.quantile``: it rounds the place to the rows' dtype, sorts whole
    rows, and for long refused tensors of more than 2^24 elements.
    """
    place = quantile * (rows.shape[1] - 1)
    # 29 bits times 24 are exact in fp64: compiled code, which fuses product and sum, gets the same bits.
    share = round(math.modf(place)[0] * 2**29) / 2**29
    top = rows.abs().topk(rows.shape[1] - math.floor(place), 1).values
    below, above = top[:, -1], top[:, -min(2, top.shape[1])]
    between = ((1 - share) * below.double() + share * above.double()).to(rows.dtype)
    return torch.where(between > 0, between, top[:, 0])


# ---------------------------------------------------------------- rows
def row_scales(rows: Tensor, bits: int, scale_dtype: torch.dtype, reach: Reach) -> Tensor:
    """(R, n) → (R,) of ``scale_dtype``, not finite for rows that are not or that reach too far; the same numbers in compiled code."""
    clip = 2 ** (bits - 1) - 1
    # A row without elements reaches nowhere.
    far = _pinned(reach(rows) if rows.shape[1] else rows.new_zeros(rows.shape[0]))
    # In fp64 and then fp32 a quotient is rounded as at once; torch.compile divides fp32 less exactly on CUDA.
    scale = _pinned(_pinned((far.double() / clip).to(rows.dtype)).to(scale_dtype))
    # Bit patterns of non-negative floats are ordered like the numbers: plus one is the next number up.
    next_up = (scale.view(_SAME_WIDTH_INT[scale_dtype]) + 1).view(scale_dtype)
    return torch.where(scale.to(rows.dtype) * (clip + 0.5) < far, next_up, scale)


def to_levels(numbers: Tensor, scale: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Numbers over the scales they broadcast with, rounded to the nearest of the ``bits`` levels, int8; quotients are taken in ``dtype``."""
    clip = 2 ** (bits - 1) - 1
    grid = scale.double()
    quotient = (numbers.double() / torch.where(grid == 0, 1, grid)).to(dtype)
    return quotient.round_().clamp_(-clip - 1, clip).to(torch.int8)


def dequantize_rows(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """int8 ``(..., n)`` times scales ``(...)``, in ``dtype``."""
    work = _work(dtype)
    # The grid may reach past the largest finite number of the dtype by half a level; the tensor did not.
    limit = torch.finfo(dtype).max
    flat = values.reshape(scale.numel(), values.shape[-1] if values.ndim else 1)
    rows = (flat.to(work) * scale.reshape(-1, 1).to(work)).clamp_(-limit, limit)
    return rows.to(dtype).reshape(values.shape)


def _pinned(magnitude: Tensor) -> Tensor:
    """A non-negative tensor, rounded to its dtype: torch.compile leaves out a cast there and back unless the bits are worked on between."""
    pattern = magnitude.view(_SAME_WIDTH_INT[magnitude.dtype])
    return (pattern & torch.iinfo(pattern.dtype).max).view(magnitude.dtype)


def _as_rows(tensor: Tensor) -> Tensor:
    """(rows, last dimension) in the dtype of the arithmetic, also for a scalar and for tensors without elements."""
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1] if tensor.ndim else 1).to(_work(tensor.dtype))


def _work(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
