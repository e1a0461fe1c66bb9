"""Files of tensors in the safetensors layout, streamed to disk and hashed on the way.

A file is the length of a header, the header (JSON: name, dtype, shape and place
of each tensor) and the tensors' little-endian bytes one after the other. The
safetensors library writes the same, but wants all of them contiguous on the CPU
at once, and gives no checksum without reading them again. Here a tensor that is
contiguous there is written from its own memory, in pieces, and another thread
hashes a piece while it is written.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

CODES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
    "complex64": "C64", "bool": "BOOL", "uint8": "U8", "int8": "I8", "uint16": "U16", "int16": "I16", "uint32": "U32", "int32": "I32",
    "uint64": "U64", "int64": "I64",
}  # fmt: skip
"""What safetensors calls a dtype of torch or numpy."""
DTYPES = {code: getattr(torch, name) for name, code in CODES.items()}
MAX_HEADER_BYTES = 100_000_000
"""The safetensors library reads no longer one."""
PIECE_BYTES = 8 << 20


def code(value: Tensor | np.ndarray) -> str:
    """Raises TypeError for a dtype that the format does not know."""
    name = str(value.dtype).removeprefix("torch.") if isinstance(value, Tensor) else value.dtype.name
    if name not in CODES:
        raise TypeError(f"dtype {name} cannot be saved")
    return CODES[name]


def write_tensors(file: Path, tensors: Mapping[str, Tensor | np.ndarray]) -> dict[str, Any]:
    """Write a new file and flush it to disk; its size and sha256. Raises OSError naming the file."""
    # Wide dtypes first, as the library does: every tensor is then aligned in a mapped file.
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {}
    end = 0
    for name in names:
        begin, end = end, end + tensors[name].nbytes
        header[name] = {"dtype": code(tensors[name]), "shape": list(tensors[name].shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(f"{file}: {len(names):,} tensors are too many for one file")
    return write(file, _pieces(text, (tensors[name] for name in names)))


def _pieces(header: bytes, tensors: Iterable[Tensor | np.ndarray]) -> Iterator[memoryview | bytes]:
    yield len(header).to_bytes(8, "little") + header
    for tensor in tensors:
        content = _bytes(tensor)
        for begin in range(0, len(content), PIECE_BYTES):
            yield content[begin : begin + PIECE_BYTES]


def _bytes(value: Tensor | np.ndarray) -> memoryview:
    """Its memory if it is contiguous on the CPU, else that of a copy."""
    array: Any
    if isinstance(value, Tensor):
        array = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    else:
        array = np.ascontiguousarray(value, value.dtype.newbyteorder("<")).reshape(-1).view(np.uint8)
    return memoryview(array)


def write(file: Path, pieces: Iterable[memoryview | bytes]) -> dict[str, Any]:
    """Write a new file and flush it to disk; its size and sha256. Raises OSError naming the file."""
    sha256, size = hashlib.sha256(), 0
    hashed: Future[None] | None = None
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            with ThreadPoolExecutor(1) as hasher:
                for piece in pieces:
                    if hashed is not None:
                        hashed.result()  # no more than two pieces are held
                    hashed = hasher.submit(sha256.update, piece)
                    size += len(piece)
                    while piece:
                        piece = piece[os.write(descriptor, piece) :]
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        error.filename = str(file)  # a failed write knows only its descriptor
        raise
    return {"bytes": size, "sha256": sha256.hexdigest()}
