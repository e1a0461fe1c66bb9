"""One xz-compressed safetensors file: any language reads it with two common libraries."""

from __future__ import annotations

import json
import lzma
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from titanlm.errors import ArtifactError
from titanlm.exporters.encoding import Encoded, ExportReport, ExportRequest, decode_tensors
from titanlm.registry import register
from titanlm.runs import write_atomic


@dataclass(frozen=True)
class SafetensorsXzConfig:
    preset: int = 6
    """0 to 9: how hard xz tries."""

    def __post_init__(self) -> None:
        if not 0 <= self.preset <= 9:
            raise ValueError(f"preset: xz has 0 to 9, not {self.preset}")


@register("exporter", "safetensors_xz")
class SafetensorsXz:
    """A quantized tensor is stored as its parts, ``name/part``; how to decode it, the config and the tokenizer's
    fingerprint stand as JSON under ``titanlm`` in the metadata. The tokenizer's files lie beside, or are hex in that JSON."""

    def __init__(self, config: SafetensorsXzConfig) -> None:
        self.preset = config.preset

    def size_bytes(self, tensors: Mapping[str, Encoded | Tensor], request: ExportRequest) -> int:
        return _counted(self._pack(tensors, request), request)

    def write(self, tensors: Mapping[str, Encoded | Tensor], request: ExportRequest) -> ExportReport:
        """Raises ArtifactError when it is over the limit or cannot be written."""
        packed = self._pack(tensors, request)
        n_bytes = _counted(packed, request)
        stored = {name: sum(part.nbytes for part in _parts(tensor).values()) for name, tensor in tensors.items()}
        if request.max_bytes is not None and n_bytes > request.max_bytes:
            largest = ", ".join(sorted(stored, key=lambda name: -stored[name])[:5])
            raise ArtifactError(
                f"the file takes {n_bytes:,} bytes, {n_bytes - request.max_bytes:,} over export.max_bytes = {request.max_bytes:,}; "
                f"nothing was written. Use fewer bits, a smaller model or a fitter; the largest tensors: {largest}"
            )
        try:
            request.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(request.path, packed)
            for name, content in request.tokenizer_files.items() if request.tokenizer == "beside" else ():
                write_atomic(request.path.parent / name, content)
        except OSError as error:
            raise ArtifactError(f"cannot write {request.path}: {error.strerror or error}") from error
        return ExportReport(request.path, n_bytes, stored, "xz", "bytes")

    def read(self, path: Path) -> dict[str, Tensor]:
        """The decoded tensors. Raises ArtifactError for a file that is damaged or unfolds to more than a hundred times its size."""
        try:
            packed = path.read_bytes()
            limit = (64 << 20) + 100 * len(packed)
            reader = lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=256 << 20)
            raw = reader.decompress(packed, max_length=limit)
            if not reader.eof:
                raise ArtifactError(f"{path}: cut short, or unfolds to more than {limit:,} bytes")
            header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
            table = json.loads(header["__metadata__"]["titanlm"])["quantized"]
            stored = load(raw)
            tensors: dict[str, Encoded | Tensor] = {}
            for name, how in table.items():
                parts = {part: stored.pop(f"{name}/{part}") for part in how["bits"]}
                bits = {part: bits for part, bits in how["bits"].items() if bits}
                tensors[name] = Encoded(tuple(how["shape"]), how["dtype"], parts, bits, how["quantizer"], how["settings"])
        except OSError as error:
            raise ArtifactError(f"{path}: cannot be read: {error.strerror or error}") from error
        except (lzma.LZMAError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ArtifactError(f"{path}: damaged, or not written by the exporter 'safetensors_xz': {error}") from error
        return decode_tensors(tensors | stored)

    def _pack(self, tensors: Mapping[str, Encoded | Tensor], request: ExportRequest) -> bytes:
        quantized: dict[str, Any] = {}
        stored: dict[str, Tensor] = {}
        for name, tensor in sorted(tensors.items()):
            if isinstance(tensor, Encoded):
                bits = {part: tensor.bits.get(part, 0) for part in tensor.parts}
                how = {"shape": tensor.shape, "dtype": tensor.dtype, "bits": bits, "quantizer": tensor.quantizer, "settings": dict(tensor.settings)}
                quantized[name] = how
            stored |= {f"{name}/{part}" if part else name: value.contiguous() for part, value in _parts(tensor).items()}
        about: dict[str, Any] = {"config": request.config_toml, "tokenizer": request.tokenizer_fingerprint, "quantized": quantized}
        if request.tokenizer == "embed":
            about["files"] = {name: content.hex() for name, content in request.tokenizer_files.items()}
        return lzma.compress(save(stored, {"titanlm": json.dumps(about, sort_keys=True)}), format=lzma.FORMAT_XZ, preset=self.preset)


def _parts(tensor: Encoded | Tensor) -> Mapping[str, Tensor]:
    return tensor.parts if isinstance(tensor, Encoded) else {"": tensor}


def _counted(packed: bytes, request: ExportRequest) -> int:
    beside = sum(map(len, request.tokenizer_files.values())) if request.tokenizer == "beside" and request.count_tokenizer else 0
    return len(packed) + beside + request.code_bytes
