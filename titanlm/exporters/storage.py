"""Numbers to bytes and back, as an artifact stores them.

Three rules. Everything is little-endian. Numbers wider than a byte are stored
as byte planes (the first byte of every number, then the second of every
number, ...): signs and exponents, which repeat, come to lie beside each other,
and zstd makes bf16 weights 0.67 of their size instead of 0.77. Signed integers
of which fewer than 8 bits are in use are stored either one a byte, which an
entropy coder likes better, or packed: two's complement, value i in the bits
i·b to i·b + b - 1 of the stream, the low bit of a byte first, the last byte
filled up with zeros.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from titanlm.errors import ArtifactError

DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
    )
}  # fmt: skip
LAYOUTS = ("bytes", "packed")

_CHUNK = 1 << 20
"""Values unfolded to single bits at a time; a multiple of 8, so that every chunk begins on a byte."""


def stored_bytes(shape: tuple[int, ...], dtype: str, bits: int | None, layout: str) -> int:
    """Bytes that a tensor takes before compression."""
    numel = math.prod(shape)
    if bits is not None and layout == "packed":
        return (numel * bits + 7) // 8
    return numel * DTYPES[dtype].itemsize


def to_bytes(tensor: Tensor, bits: int | None, layout: str) -> np.ndarray:
    """The tensor as uint8 ``(stored_bytes,)``; ``bits`` are in use of each int8, None means all."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    raw = flat.view(torch.uint8).numpy()
    if bits is None:
        return np.ascontiguousarray(raw.reshape(-1, flat.itemsize).T).reshape(-1) if flat.itemsize > 1 else raw
    _check_range(flat, bits)
    return pack_bits(raw, bits) if layout == "packed" else raw


def from_bytes(raw: np.ndarray, shape: tuple[int, ...], dtype: str, bits: int | None, layout: str) -> Tensor:
    """The inverse of ``to_bytes``; ArtifactError for bytes that no tensor is stored as."""
    kind = DTYPES[dtype]
    if bits is not None and layout == "packed":
        raw = unpack_bits(raw, bits, math.prod(shape))
    elif kind.itemsize > 1:
        raw = np.ascontiguousarray(raw.reshape(kind.itemsize, -1).T).reshape(-1)
    if kind == torch.bool and (raw > 1).any():
        raise ArtifactError("a bool is stored as 0 or 1, and other bytes are there")
    flat = torch.from_numpy(raw).view(kind)
    if bits is not None:
        _check_range(flat, bits)
    return flat.reshape(shape)


def pack_bits(values: np.ndarray, bits: int) -> np.ndarray:
    """uint8 ``(n,)``, of which the low ``bits`` count → uint8 ``(⌈n·bits/8⌉,)``."""
    packed = [
        np.packbits(np.unpackbits(values[start : start + _CHUNK, None], axis=1, count=bits, bitorder="little"), bitorder="little")
        for start in range(0, len(values), _CHUNK)
    ]
    return np.concatenate(packed) if packed else np.empty(0, np.uint8)


def unpack_bits(packed: np.ndarray, bits: int, n: int) -> np.ndarray:
    """uint8 ``(⌈n·bits/8⌉,)`` → ``n`` values of ``bits`` bits, sign-extended, as uint8 ``(n,)``."""
    spare = len(packed) * 8 - n * bits
    if spare and int(packed[-1]) >> (8 - spare):
        raise ArtifactError("the unused bits after packed integers are not zero")
    out = np.empty(n, np.uint8)
    sign = np.uint8(1 << (bits - 1))
    for start in range(0, n, _CHUNK):
        count = min(_CHUNK, n - start)
        chunk = packed[start * bits // 8 : ((start + count) * bits + 7) // 8]
        low = np.packbits(np.unpackbits(chunk, count=count * bits, bitorder="little").reshape(count, bits), axis=1, bitorder="little")
        out[start : start + count] = (low[:, 0] ^ sign) - sign
    return out


def _check_range(values: Tensor, bits: int) -> None:
    edge = 1 << (bits - 1)
    if values.numel() and not (-edge <= int(values.min()) and int(values.max()) < edge):
        raise ArtifactError(f"values from {int(values.min())} to {int(values.max())} do not fit in {bits} bits")
