"""Moments of Adam in two bytes an element, or in one and a scale for each block.

``int8``: the codes of Dettmers et al. (2021, arXiv:2110.02861). A block is
divided by its largest magnitude, and each element becomes the nearest of 256
levels that lie denser towards 0: 7 decades, each with twice the levels of the
one below. ``fp8``: a block is scaled so that its largest magnitude is 448, and
rounded to float8_e4m3fn, which has fewer levels and reaches less far down.

Blocks lie within rows (the last dimension), so scales are cut with the rows when
a parameter is sharded, and read by any number of ranks. torchao's blocks are
cut from the flattened tensor; for rows of a multiple of 256 both are the same.

In one respect this differs from torchao on purpose: no second moment is rounded
to 0, but at least to the lowest level above it. An element whose gradients are
tiny beside those of its block would else be divided by little more than eps, and
a single update could throw it far away.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from titanlm.state_tree import is_distributed

Format = Literal["fp32", "bf16", "int8", "fp8"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.uint8, "fp8": torch.float8_e4m3fn}
BLOCK, MIN_BLOCK = 256, 32
MIN_ELEMENTS = 4096
"""Smaller parameters, norms for the most part, keep fp32: they cost nothing, and count."""
E4M3_MAX, E4M3_MIN = 448.0, 2.0**-9
MIN_SCALE = 1e-12


class Grid(NamedTuple):
    """Levels of ``int8`` codes: (256,) fp32 ascending, and the (255,) edges from which the next level is nearer."""

    levels: Tensor
    edges: Tensor


def levels(signed: bool) -> list[float]:
    """The 256 levels from −1 (or 0) to 1, ascending."""
    found = [0.0, 1.0]
    for decade in range(7):
        n = 2**decade if signed else 2 ** (decade + 1)
        middles = [10.0 ** (decade - 6) * (0.1 + 0.9 * (k + 0.5) / n) for k in range(n)]
        found += [*middles, *(-level for level in middles)] if signed else middles
    return sorted(found)


@functools.cache
def grid(signed: bool, device: torch.device) -> Grid:
    """``unsigned`` is for second moments: 0 is nearest to none."""
    table = torch.tensor(levels(signed), dtype=torch.float64)
    edges = (table[:-1] + table[1:]) / 2
    if not signed:
        edges[0] = 0.0
    return Grid(table.float().to(device), edges.float().to(device))


def block_of(shape: torch.Size) -> int | None:
    """Elements of a row that share a scale; None where a parameter is too small, or its rows cannot be cut into blocks."""
    block = math.gcd(shape[-1], BLOCK) if len(shape) > 1 else 0
    return block if block >= MIN_BLOCK and shape.numel() >= MIN_ELEMENTS else None


def zeros(parameter: Any, form: Format, name: str) -> dict[str, Tensor]:
    """A moment of 0 for a parameter, ``name``, and where it has them the scales of its blocks, ``name_scale``; laid out as the parameter is."""
    block = block_of(parameter.shape) if form in ("int8", "fp8") else None
    if block is None:
        return {name: torch.zeros_like(parameter, dtype=DTYPES["bf16" if form == "bf16" else "fp32"], requires_grad=False)}
    codes = torch.zeros_like(parameter, dtype=DTYPES[form], requires_grad=False)
    return {name: codes, f"{name}_scale": _scales(parameter, parameter.size(-1) // block)}


def _scales(parameter: Any, n: int) -> Tensor:
    shape = torch.Size([*parameter.shape[:-1], n])
    if not is_distributed(parameter):
        return torch.zeros(shape, device=parameter.device)
    from torch.distributed.tensor import DTensor

    own = parameter.to_local()
    stride = torch.empty(shape, device="meta").stride()
    local = torch.zeros([*own.shape[:-1], n], device=own.device)
    return DTensor.from_local(local, parameter.device_mesh, parameter.placements, run_check=False, shape=shape, stride=stride)


def stored(state: Mapping[str, Tensor], name: str) -> list[Tensor]:
    """What there is of a moment in a parameter's state: its elements, and their scales if it has them."""
    return [state[key] for key in (name, f"{name}_scale") if key in state]


def decode(moment: Sequence[Tensor], grid: Grid) -> Tensor:
    """A stored moment in fp32."""
    codes, *scales = moment
    values = grid.levels[codes.int()] if codes.dtype == torch.uint8 else codes.float()
    return (values.unflatten(-1, (scales[0].size(-1), -1)) * scales[0].unsqueeze(-1)).flatten(-2) if scales else values


def encode(values: Tensor, moment: Sequence[Tensor], grid: Grid, signed: bool) -> list[Tensor]:
    """What is to be stored of an fp32 moment, in the form of what is stored now. Not ``signed``: a second moment."""
    codes, *scales = moment
    if not scales:
        return [values.to(codes.dtype)]
    blocks = values.unflatten(-1, (scales[0].size(-1), -1))
    scale = blocks.abs().amax(-1, keepdim=True).clamp_min(MIN_SCALE)
    if codes.dtype == torch.uint8:
        new = torch.bucketize(blocks / scale, grid.edges, right=True, out_int32=True)
    else:
        scale = scale / E4M3_MAX
        new = (blocks / scale).clamp(-E4M3_MAX if signed else E4M3_MIN, E4M3_MAX)
    return [new.to(codes.dtype).flatten(-2), scale.squeeze(-1)]
