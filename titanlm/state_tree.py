"""A state as JSON and tensors: taken apart by the ranks that save it, put together by those that load it.

A state is a tree of dicts and lists with numbers, strings, None, tensors and
numpy arrays at its leaves. In the JSON a tensor leaves its dtype and shape; its
bytes go into a file of tensors under its path in the tree. Of a DTensor each
rank writes the part that it holds and notes where that part lies, so nothing is
gathered, and a rank of another world size reads only what overlaps its own part.
Whatever a file says is checked before memory is taken for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from titanlm.errors import CheckpointError
from titanlm.tensor_file import DTYPES, code

_TENSOR, _ARRAY, _ITEMS = "$tensor", "$array", "$items"
_KEYS = (str, int, float, bool, type(None))
MAX_BYTES = 1 << 62
Shape = tuple[int, ...]
DAMAGE = (OSError, ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, MemoryError, SafetensorError)
"""What reading a damaged or forged file can raise."""


# ---------------------------------------------------------------- taken apart
@dataclass
class Part:
    """What one rank writes: a tree, and of the tensors those that are its own to write."""

    state: Any = None
    own: Any = None
    shards: dict[str, list[list[int]]] = field(default_factory=dict)
    """Where in the whole tensor the one of ``tensors`` lies, and its shape, by path."""
    tensors: dict[str, Tensor | np.ndarray] = field(default_factory=dict)


def split(state: dict[str, Any], own: dict[str, Any], rank: int) -> Part:
    """Numbers and containers are copied, tensors and arrays only named.

    Raises TypeError for a leaf that cannot be saved.
    """
    part = Part()
    tree = {key: _split(value, key, part, plain=rank == 0) for key, value in state.items()}
    part.state = tree if rank == 0 else None
    part.own = _split(own, "own", part, plain=True)
    return part


def _split(value: Any, path: str, part: Part, plain: bool) -> Any:
    """The JSON of a value. ``plain``: whether this rank writes what is the same on all of them."""
    if isinstance(value, Tensor | np.ndarray):
        return _leaf(value, path, part, plain)
    if isinstance(value, dict):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: _split(item, _under(path, key), part, plain) for key, item in value.items()}
        if not all(isinstance(key, _KEYS) for key in value):
            raise TypeError(f"{path}: keys other than numbers and strings cannot be saved in a checkpoint")
        return {_ITEMS: [[key, _split(item, f"{path}/{index}", part, plain)] for index, (key, item) in enumerate(value.items())]}
    if isinstance(value, list | tuple):
        return [_split(item, f"{path}/{index}", part, plain) for index, item in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{path}: a {type(value).__name__} cannot be saved in a checkpoint")


def _leaf(value: Tensor | np.ndarray, path: str, part: Part, plain: bool) -> dict[str, Any]:
    try:
        described = [code(value), list(value.shape)]
        placed = (value, [0] * value.ndim) if plain else None
        if isinstance(value, Tensor):
            placed = _local(value) if is_distributed(value) else placed and (value.detach(), placed[1])
    except TypeError as error:
        raise TypeError(f"{path}: {error}") from error
    if placed is not None and placed[0].nbytes:  # nothing is kept of an empty one but its shape
        part.tensors[path] = placed[0]
        part.shards[path] = [placed[1], list(placed[0].shape)]
    return {_TENSOR if isinstance(value, Tensor) else _ARRAY: described}


def _under(path: str, key: str) -> str:
    return f"{path}/{key.replace('~', '~0').replace('/', '~1')}"


def is_distributed(tensor: Tensor) -> bool:
    """Whether it is a DTensor, asked without the seconds that importing one takes."""
    return hasattr(tensor, "to_local")


def _place(tensor: Any) -> tuple[Shape, Shape]:
    """(shape, offset) of this rank's part of a DTensor."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(shape), tuple(offset)


def _local(tensor: Any) -> tuple[Tensor, list[int]] | None:
    """This rank's part of a DTensor and where it lies; None if another rank has the same part and writes it."""
    if any(placement.is_partial() for placement in tensor.placements):
        raise TypeError("a tensor whose parts are still to be summed cannot be saved")
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None or any(placement.is_replicate() and at for placement, at in zip(tensor.placements, coordinate, strict=True)):
        return None
    return tensor.detach().to_local(), list(_place(tensor)[1])


# ---------------------------------------------------------------- put together
class Box(NamedTuple):
    """A piece of a tensor: what lies from ``low`` to before ``high``, in this file."""

    low: Shape
    high: Shape
    file: str


class TensorFiles:
    """The files of tensors in a folder, each mapped once, when it is first read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file = cache(lambda name: safe_open(folder / name, framework="pt"))

    def piece(self, box: Box, path: str, dtype: torch.dtype) -> Callable[[Shape, Shape], Tensor]:
        """What gives the part of a piece between two corners. Raises if the file holds something else than is said."""
        file = self._file(box.file)
        view = file.get_slice(path)
        shape = [high - low for low, high in zip(box.low, box.high, strict=True)]
        if view.get_shape() != shape or DTYPES.get(view.get_dtype()) != dtype:
            raise ValueError(f"{box.file} holds {view.get_dtype()} {view.get_shape()} where {dtype} {shape} is announced")

        def read(low: Shape, high: Shape) -> Tensor:
            if (low, high) == (box.low, box.high):
                return file.get_tensor(path)
            return view[tuple(slice(a - start, b - start) for a, b, start in zip(low, high, box.low, strict=True))]

        return read


@dataclass(frozen=True)
class Stored:
    """A tensor on disk, in one piece or as the ranks held it; read when it is asked for."""

    path: str
    dtype: torch.dtype
    shape: torch.Size
    boxes: Sequence[Box]
    files: TensorFiles = field(repr=False)

    def whole(self) -> Tensor:
        """All of it, on the CPU."""
        return self._read((0,) * len(self.shape), tuple(self.shape))

    def like(self, tensor: Tensor) -> Tensor:
        """Laid out as a tensor is: for a DTensor of this shape one that holds this rank's part, and no more is read; else the whole."""
        if not is_distributed(tensor) or tensor.shape != self.shape:
            return self.whole()
        from torch.distributed.tensor import DTensor

        shape, low = _place(tensor)
        local = self._read(low, tuple(a + n for a, n in zip(low, shape, strict=True)))
        stride = torch.empty(self.shape, device="meta").stride()
        like: Any = tensor
        return DTensor.from_local(local, like.device_mesh, like.placements, run_check=False, shape=self.shape, stride=stride)

    def _read(self, low: Shape, high: Shape) -> Tensor:
        try:
            parts = []
            for box in self.boxes:
                begin, end = tuple(map(max, low, box.low)), tuple(map(min, high, box.high))
                if all(a < b for a, b in zip(begin, end, strict=True)):
                    parts.append((self.files.piece(box, self.path, self.dtype), begin, end))
            # Only now: the pieces are as large as was said, so this is no more than the files hold.
            result = torch.empty([b - a for a, b in zip(low, high, strict=True)], dtype=self.dtype)
            for read, begin, end in parts:
                result[tuple(slice(a - start, b - start) for a, b, start in zip(begin, end, low, strict=True))].copy_(read(begin, end))
            return result
        except DAMAGE as error:
            raise CheckpointError(f"{self.files.folder}: {self.path} cannot be read: {error}") from error


def fit(stored: Any, like: Any = None) -> Any:
    """A tree with its tensors read: each laid out as the one in the same place of ``like``, whole where there is none."""
    if isinstance(stored, Stored):
        return stored.like(like) if isinstance(like, Tensor) else stored.whole()
    if isinstance(stored, dict):
        named = like if isinstance(like, dict) else {}
        return {key: fit(value, named.get(key)) for key, value in stored.items()}
    if isinstance(stored, list):
        listed = like if isinstance(like, list | tuple) and len(like) == len(stored) else [None] * len(stored)
        return [fit(value, other) for value, other in zip(stored, listed, strict=True)]
    return stored


def copied(tree: Any) -> Any:
    """The same tree with every tensor copied where it is; arrays are shared, since states never change theirs."""
    if isinstance(tree, Tensor):
        return tree.detach().clone()
    if isinstance(tree, dict):
        return {key: copied(value) for key, value in tree.items()}
    return [copied(value) for value in tree] if isinstance(tree, list | tuple) else tree


def join(tree: Any, path: str, boxes: Mapping[str, Sequence[Box]], files: TensorFiles) -> Any:
    """The value whose JSON this is. Tensors are Stored, arrays are read.

    Raises ValueError when it is no such JSON, or when the pieces of a tensor are
    not all of it, each once.
    """
    if isinstance(tree, list):
        return [join(item, f"{path}/{index}", boxes, files) for index, item in enumerate(tree)]
    if not isinstance(tree, dict):
        return tree
    if tree.keys() == {_ITEMS}:
        return {key: join(item, f"{path}/{index}", boxes, files) for index, (key, item) in enumerate(tree[_ITEMS])}
    if tree.keys() == {_TENSOR} or tree.keys() == {_ARRAY}:
        ((kind, described),) = tree.items()
        stored = _stored(described, path, boxes.get(path, ()), files)
        return stored if kind == _TENSOR else stored.whole().numpy()
    return {key: join(item, _under(path, key), boxes, files) for key, item in tree.items()}


def _stored(described: Any, path: str, boxes: Sequence[Box], files: TensorFiles) -> Stored:
    try:
        name, shape = described
        dtype = DTYPES[name]
        sound = isinstance(shape, list) and len(shape) <= 64 and all(type(n) is int and n >= 0 for n in shape)
    except (ValueError, TypeError, KeyError):
        sound = False
    if not sound or math.prod(n or 1 for n in shape) * dtype.itemsize > MAX_BYTES:
        raise ValueError(f"{path}: no tensor is described by {str(described)[:100]}")
    if math.prod(shape) and not fills(tuple(shape), [(box.low, box.high) for box in boxes]):
        raise ValueError(f"{path}: the pieces in {', '.join(box.file for box in boxes) or 'no file'} are not all of it, each once")
    return Stored(path, dtype, torch.Size(shape), boxes if math.prod(shape) else (), files)


def fills(shape: Shape, boxes: Sequence[tuple[Shape, Shape]]) -> bool:
    """Whether boxes fill a shape, and none is empty or overlaps another.

    Found by cutting along planes that no box crosses until each box is alone.
    Everything that meshes of ranks make can be cut so.
    """
    if any(a >= b for low, high in boxes for a, b in zip(low, high, strict=True)):
        return False
    todo = [((0,) * len(shape), shape, list(boxes))]
    while todo:
        low, high, inside = todo.pop()
        if len(inside) == 1:
            if inside[0] != (low, high):
                return False
            continue
        for dim in range(len(shape)):
            groups = _cut(inside, dim)
            if len(groups) > 1:
                ends = [low[dim], *(max(box[1][dim] for box in group) for group in groups)]
                if ends[-1] != high[dim] or any(min(box[0][dim] for box in group) != end for group, end in zip(groups, ends, strict=False)):
                    return False
                for group, (begin, end) in zip(groups, pairwise(ends), strict=True):
                    todo.append(((*low[:dim], begin, *low[dim + 1 :]), (*high[:dim], end, *high[dim + 1 :]), group))
                break
        else:
            return False
    return True


def _cut(boxes: list[tuple[Shape, Shape]], dim: int) -> list[list[tuple[Shape, Shape]]]:
    """Boxes in groups that do not reach into one another along a dimension, in order."""
    groups: list[list[tuple[Shape, Shape]]] = []
    reach = 0
    for box in sorted(boxes, key=lambda box: box[0][dim]):
        if groups and box[0][dim] < reach:
            groups[-1].append(box)
        else:
            groups.append([box])
        reach = max(reach, box[1][dim])
    return groups
