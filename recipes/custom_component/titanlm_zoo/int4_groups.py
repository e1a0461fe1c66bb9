"""Four bits a weight, one scale for each group of neighbours in a row, in training too if wanted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titanlm.constraints import PositiveInt
from titanlm.errors import ArtifactError, NonFiniteError
from titanlm.exporters.encoding import Encoded
from titanlm.models.layers.linear import Linear
from titanlm.registry import register

LEVELS = 7
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Int4GroupsConfig:
    params: tuple[str, ...] = ("@matrix",)
    """Name globs and @roles of the parameters it takes."""
    group: PositiveInt = 32
    """Weights that share a scale; the last group of a row may be shorter."""
    training: Literal["none", "round"] = "none"
    """round: linear layers compute with rounded weights while they train, and gradients pass straight through (Bengio et al. 2013)."""


@register("quantizer", "int4_groups")
class Int4Groups:
    """scale = max|w| / 7 in fp16, value = round(w / scale) in [−7, 7]; |w − w'| ≤ scale / 2 but for the rounding of the scale."""

    def __init__(self, config: Int4GroupsConfig) -> None:
        self.config = config

    def prepare(self, model: Any, params: Sequence[str]) -> None:
        """Exchange plain linear layers; a layer that an adapter has made its own is left as it is."""
        if self.config.training == "round":
            for path, module in list(model.named_modules()):
                if type(module) is Linear and f"{path}.weight" in params:
                    model.set_submodule(path, RoundedLinear(module, self.config.group))

    def encode(self, tensor: Tensor) -> Encoded:
        """Floating tensor of any shape → ``values`` int8 of its shape and ``scale`` fp16 (rows, groups).

        Raises NonFiniteError for nan, inf and weights too large for an fp16 scale.
        """
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in DTYPES:
            raise ArtifactError(f"quantizer 'int4_groups' takes {', '.join(DTYPES)}, not {dtype}; leave this tensor out of its `params`")
        values, scale = quantize(tensor.detach(), self.config.group)
        if not torch.isfinite(scale).all():
            raise NonFiniteError(f"a tensor of shape {tuple(tensor.shape)} holds nan, inf or weights above 458,000 and cannot be quantized")
        settings = asdict(self.config)
        return Encoded(tuple(tensor.shape), dtype, {"values": values, "scale": scale}, {"values": 4}, "int4_groups", settings)

    def decode(self, encoded: Encoded) -> Tensor:
        """Raises ArtifactError when the parts do not fit the shape: they may come from a stranger's file."""
        values, scale = encoded.parts.get("values"), encoded.parts.get("scale")
        rows, width = _matrix_shape(encoded.shape)
        right = (rows, -(-width // self.config.group))
        if values is None or values.dtype != torch.int8 or tuple(values.shape) != tuple(encoded.shape):
            raise ArtifactError(f"quantizer 'int4_groups': 'values' is not int8 {tuple(encoded.shape)}")
        if scale is None or scale.dtype != torch.float16 or tuple(scale.shape) != right or not torch.isfinite(scale).all():
            raise ArtifactError(f"quantizer 'int4_groups': 'scale' is not finite float16 {right}")
        if encoded.dtype not in DTYPES:
            raise ArtifactError(f"quantizer 'int4_groups' decodes to {', '.join(DTYPES)}, not to {encoded.dtype!r}")
        return dequantize(values, scale, self.config.group).to(DTYPES[encoded.dtype])


class RoundedLinear(Linear):
    """Computes with the weights that a decoder would see; the gradient of the rounding is taken as 1."""

    def __init__(self, plain: Linear, group: int) -> None:
        nn.Module.__init__(self)
        self.weight, self.group = plain.weight, group

    def forward(self, x: Tensor) -> Tensor:
        rounded = dequantize(*quantize(self.weight.detach(), self.group), self.group)
        return F.linear(x, (self.weight + (rounded - self.weight.detach())).to(x.dtype))


def quantize(tensor: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """int8 values of the tensor's shape, fp16 scales (rows, groups)."""
    groups = _groups(tensor.float(), group)
    scale = (groups.abs().amax(-1) / LEVELS).half()
    grid = scale.float()[..., None]
    values = (groups / torch.where(grid == 0, 1, grid)).round().clamp(-LEVELS, LEVELS).to(torch.int8)
    return _ungrouped(values, tensor.shape), scale


def dequantize(values: Tensor, scale: Tensor, group: int) -> Tensor:
    """fp32, in the shape of ``values``."""
    return _ungrouped(_groups(values, group) * scale.float()[..., None], values.shape)


def _matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    return math.prod(shape[:-1]), shape[-1] if shape else 1


def _groups(tensor: Tensor, group: int) -> Tensor:
    """(rows, groups, group), the last one filled up with zeros."""
    rows, width = _matrix_shape(tuple(tensor.shape))
    return F.pad(tensor.reshape(rows, width), (0, -width % group)).view(rows, -(-width // group), group)


def _ungrouped(groups: Tensor, shape: tuple[int, ...]) -> Tensor:
    rows, width = _matrix_shape(tuple(shape))
    return groups.flatten(1)[:, :width].reshape(shape)
