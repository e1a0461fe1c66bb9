"""artifact: model, config and tokenizer in one compressed file under a byte limit.

The format is in ``header``, the codecs in ``compression``, the bytes of numbers
in ``storage``. The same input gives the same bytes: tensors go by name, nothing
records a time, and of the ways to store them (values of fewer than 8 bits one
a byte or packed; several levels of the codec if none was asked for) the
smallest outcome is kept, the first of equals; with ``codec = "auto"`` of every
codec that is installed. Measured on 27 M parameters at 5 to 8 bits, zstd 22:
15.86 MB one a byte, 17.81 MB packed.

``max_bytes`` counts the file, the tokenizer's files beside it unless the
request says otherwise, and the code that a submission needs. Over it, nothing is published; an artifact that is
already there stays whole until the new one is complete on disk.

Reading trusts nothing: the header and then the payload are checked against
their SHA-256 before they are used, sizes are bounded before memory is taken,
and decompression stops at the declared size. Checksums find damage, not
forgery: whoever can write the file can write its checksums.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from threading import Event, Lock
from time import perf_counter
from typing import Any, BinaryIO, Literal

import numpy as np
from torch import Tensor

from titanlm.errors import ArtifactError
from titanlm.exporters import compression, storage
from titanlm.exporters.compression import Codec
from titanlm.exporters.encoding import CodecTrial, Encoded, ExportReport, ExportRequest, decode_tensors
from titanlm.exporters.header import MAGIC, MAX_HEADER_BYTES, PREFIX, VERSION, FileSpec, Header, PartSpec, TensorSpec, is_plain_file_name, parse, unfold
from titanlm.registry import register

__all__ = ["Artifact", "ArtifactConfig", "ArtifactExporter", "inspect", "read_artifact"]

_READ_BYTES = 1 << 16
_LARGE_BYTES = 1 << 30


@dataclass(frozen=True)
class ArtifactConfig:
    """Settings of the exporter ``artifact``."""

    codec: Literal[Codec, "auto"] = "zstd"
    """Compression of the payload; brotli is usually the smallest and the slowest, lzma and zlib need no package. "auto" tries all that are installed,
    keeps the smallest and tells size and time of each; a fitter multiplies that time."""
    level: int | None = None
    """zstd 1 to 22, lzma 0 to 9, zlib 1 to 9, brotli 0 to 11. None tries 1 and 22 of zstd and keeps the smaller, and takes the highest of the others.
    A million int6 parameters take about 1 s at None with zstd or lzma, 6 s with brotli, 0.02 s with zstd at level 1."""

    def __post_init__(self) -> None:
        levels = compression.LEVELS.get(self.codec, range(0))
        if self.level is not None and self.level not in levels:
            right = f"{levels[0]} to {levels[-1]}" if levels else "none: leave it out"
            raise ValueError(f"level = {self.level} does not exist for codec {self.codec!r} ({right})")


@dataclass(frozen=True)
class Artifact:
    """What a file holds, checked; quantized tensors still encoded (``encoding.decode_tensors`` decodes them)."""

    header: Header
    config_toml: str
    tensors: Mapping[str, Encoded | Tensor]
    tokenizer_files: Mapping[str, bytes]
    tokenizer_fingerprint: str


@dataclass(frozen=True)
class _Packed:
    """A file in memory."""

    header: Header
    header_bytes: bytes
    """As they are in the file."""
    payload: bytearray
    trials: tuple[CodecTrial, ...]
    """The smallest first."""

    @property
    def file_bytes(self) -> int:
        return PREFIX.size + len(self.header_bytes) + len(self.payload)

    @property
    def beside_bytes(self) -> int:
        return sum(file.n_bytes for file in self.header.files) if self.header.tokenizer == "beside" else 0


@register("exporter", "artifact")
class ArtifactExporter:
    """Tensors to one file. Raises ArtifactError when built if the codec's package is missing."""

    def __init__(self, config: ArtifactConfig) -> None:
        if config.codec != "auto":
            compression.require(config.codec)
        self.config = config
        self._fitting: tuple[bytes, _Packed] | None = None
        """What was last measured and is within its limit, by a digest of all that goes into it: most likely it is written next."""

    def size_bytes(self, tensors: Mapping[str, Encoded | Tensor], request: ExportRequest) -> int:
        """Exactly what ``write`` would count against the limit; takes as long, writes nothing. Writing the last that fitted takes no time again."""
        digest, packed = self._pack(tensors, request)
        n_bytes = _counted(packed, request)
        if request.max_bytes is None or n_bytes <= request.max_bytes:
            self._fitting = digest, packed
        return n_bytes

    def write(self, tensors: Mapping[str, Encoded | Tensor], request: ExportRequest) -> ExportReport:
        """Write ``request.path`` (and the tokenizer beside it) in one step: whole, or not at all.

        Raises ArtifactError when it is over the limit, when a file beside it
        holds another tokenizer, or when the disk refuses.
        """
        _, packed = self._pack(tensors, request)
        n_bytes = _counted(packed, request)
        if request.max_bytes is not None and n_bytes > request.max_bytes:
            raise ArtifactError(_overshoot(packed, request, n_bytes))
        prefix = PREFIX.pack(MAGIC, VERSION, len(packed.header_bytes), hashlib.sha256(packed.header_bytes).digest())
        try:
            request.path.parent.mkdir(parents=True, exist_ok=True)
            if request.tokenizer == "beside":
                for name, content in sorted(request.tokenizer_files.items()):
                    _publish_once(request.path.parent / name, content, request.path)
            _publish(request.path, prefix, packed.header_bytes, packed.payload)
        except OSError as error:
            raise ArtifactError(f"cannot write {request.path}: {error.strerror or error}; what was there before is unchanged") from error
        return ExportReport(request.path, n_bytes, packed.header.by_tensor(), packed.header.codec, packed.header.layout, packed.trials)

    def read(self, path: Path) -> dict[str, Tensor]:
        """The decoded tensors of a written artifact, checked as ``read_artifact`` checks them."""
        return decode_tensors(read_artifact(path).tensors)

    def _pack(self, tensors: Mapping[str, Encoded | Tensor], request: ExportRequest) -> tuple[bytes, _Packed]:
        """A digest of what goes into the file, and the file."""
        header, stored = _tables(tensors, request)
        embedded = [content for _, content in sorted(request.tokenizer_files.items())] if request.tokenizer == "embed" else []
        content = hashlib.sha256(repr(header).encode())
        for piece in _raw(header, stored, embedded):
            content.update(piece)
        digest = content.digest()
        if self._fitting is not None and self._fitting[0] == digest:
            return self._fitting
        stopped, lock = Event(), Lock()
        best: tuple[tuple[int, int], Header, bytearray] | None = None

        def tried(place: int, way: tuple[str, str, int]) -> CodecTrial:
            nonlocal best
            codec, layout, level = way
            candidate = replace(header, codec=codec, layout=layout)
            candidate = replace(candidate, raw_bytes=candidate.expected_raw_bytes)
            start = perf_counter()
            # After Ctrl-C threads go on by themselves; without input they end.
            pieces = takewhile(lambda _: not stopped.is_set(), compression.sliced(_raw(candidate, stored, embedded)))
            payload = compression.compress(codec, level, pieces, candidate.raw_bytes)
            with lock:  # of equals the first in order, whichever was ready first; what is larger is let go
                if best is None or (len(payload), place) < best[0]:
                    best = (len(payload), place), candidate, payload
            return CodecTrial(codec, level, layout, len(payload), perf_counter() - start)

        ways = list(self._ways(any(part.bits is not None for part in header.parts)))
        # Codecs work outside Python's lock. What is large goes one by one, since every outcome under way takes memory.
        at_once = min(len(ways), os.cpu_count() or 1) if sum(tensor.nbytes for parts in stored.values() for tensor in parts.values()) < _LARGE_BYTES else 1
        with ThreadPoolExecutor(at_once) as pool:
            try:
                trials = sorted(pool.map(tried, range(len(ways)), ways), key=lambda trial: trial.n_bytes)
            finally:
                stopped.set()
                pool.shutdown(cancel_futures=True)
        assert best is not None
        _, header, payload = best
        header = replace(header, payload_bytes=len(payload), payload_sha256=hashlib.sha256(payload).hexdigest())
        return digest, _Packed(header, header.encode(), payload, tuple(trials))

    def _ways(self, narrow: bool) -> Iterator[tuple[str, str, int]]:
        """Codec, layout and level of all that is tried; ``narrow``: some integers have fewer than 8 bits."""
        for codec in compression.installed() if self.config.codec == "auto" else (self.config.codec,):
            # Packing only pays where no entropy coder follows; with one, both are tried.
            layouts = ("bytes",) if not narrow else storage.LAYOUTS if codec != "none" else ("packed",)
            levels = compression.DEFAULT_LEVELS[codec] if self.config.level is None else (self.config.level,)
            yield from ((codec, layout, level) for layout in layouts for level in levels)


def inspect(path: Path) -> Header:
    """The header alone: sizes, tensors, codec, config. The payload's length is checked, its content is not read."""
    with _opened(path) as file:
        return _read_header(file, path)


def read_artifact(path: Path, *, max_expanded_bytes: int | None = None) -> Artifact:
    """Read and check a whole artifact.

    ``max_expanded_bytes`` bounds the payload once decompressed and the tensors
    once decoded; by default 64 MiB plus a hundred times the file's size.
    Raises ArtifactError naming the file and what is wrong with it.
    """
    path = Path(path)
    with _opened(path) as file:
        header = _read_header(file, path)
        limit = (64 << 20) + 100 * path.stat().st_size if max_expanded_bytes is None else max_expanded_bytes
        expanded = max(header.raw_bytes, header.decoded_bytes)
        if expanded > limit:
            raise ArtifactError(f"{path}: unfolds to {expanded:,} bytes, over the bound of {limit:,}; pass max_expanded_bytes if you trust it")
        try:
            start, digest = file.tell(), hashlib.sha256()
            for piece in _pieces(file):
                digest.update(piece)
            if digest.hexdigest() != header.payload_sha256:
                raise ArtifactError("the payload does not match its checksum, so the file is damaged; copy or export it again")
            file.seek(start)
            stream = _Stream(compression.decompress(header.codec, _pieces(file)))
            tensors = _read_tensors(header, stream)
            embedded = {spec.name: stream.read(spec.n_bytes).tobytes() for spec in header.files} if header.tokenizer == "embed" else {}
            stream.end()
            files = embedded or {spec.name: _read_beside(path.parent / spec.name, spec) for spec in header.files}
            for spec in header.files:
                if hashlib.sha256(files[spec.name]).hexdigest() != spec.sha256:
                    raise ArtifactError(f"tokenizer file {spec.name!r} does not match its checksum: it is damaged or another tokenizer's")
        except ArtifactError as error:
            raise ArtifactError(f"{path}: {error}") from error
    return Artifact(header, header.config, tensors, files, header.fingerprint)


# ---------------------------------------------------------------- writing
def _tables(tensors: Mapping[str, Encoded | Tensor], request: ExportRequest) -> tuple[Header, dict[str, Mapping[str, Tensor]]]:
    """The header but for codec, layout and payload, and the parts of each tensor."""
    quantizers: dict[str, tuple[int, str, dict[str, object]]] = {}
    specs: list[TensorSpec] = []
    parts: list[PartSpec] = []
    stored: dict[str, Mapping[str, Tensor]] = {}
    for index, name in enumerate(sorted(tensors)):
        tensor = tensors[name]
        if isinstance(tensor, Encoded):
            settings = dict(tensor.settings)
            key = json.dumps([tensor.quantizer, settings], sort_keys=True, default=repr)
            number, _, _ = quantizers.setdefault(key, (len(quantizers), tensor.quantizer, settings))
            specs.append(TensorSpec(name, tensor.dtype, tuple(tensor.shape), number))
            stored[name], bits = tensor.parts, tensor.bits
        else:
            specs.append(TensorSpec(name, _dtype_name(tensor), tuple(tensor.shape), None))
            stored[name], bits = {"tensor": tensor}, {}
        if unknown := sorted(set(bits) - set(stored[name])):
            raise ArtifactError(f"tensor {name!r}: bits are given for {unknown}, which are not among its parts {sorted(stored[name])}")
        for part, content in stored[name].items():
            dtype, used = _dtype_name(content), bits.get(part)
            if dtype not in storage.DTYPES:
                raise ArtifactError(f"tensor {name!r}: {dtype} cannot be stored (known: {', '.join(storage.DTYPES)})")
            parts.append(PartSpec(index, part, dtype, tuple(content.shape), None if used == content.itemsize * 8 else used))
    if request.tokenizer == "beside" and request.path.name in request.tokenizer_files:
        raise ArtifactError(f"the artifact cannot be named {request.path.name!r}: the tokenizer's file beside it is; choose another name")
    header = Header(
        codec="none",
        layout="bytes",
        config=request.config_toml,
        raw_bytes=0,
        payload_bytes=0,
        payload_sha256="",
        quantizers=tuple((name, settings) for _, name, settings in quantizers.values()),
        tensors=tuple(specs),
        parts=tuple(sorted(parts, key=lambda part: (part.part, part.tensor))),
        tokenizer=request.tokenizer,
        fingerprint=request.tokenizer_fingerprint,
        files=tuple(FileSpec(name, len(content), hashlib.sha256(content).hexdigest()) for name, content in sorted(request.tokenizer_files.items())),
    )
    return header, stored


def _raw(header: Header, stored: Mapping[str, Mapping[str, Tensor]], embedded: list[bytes]) -> Iterator[Any]:
    """The payload before compression, a buffer for each part."""
    for part in header.parts:
        name = header.tensors[part.tensor].name
        try:
            yield storage.to_bytes(stored[name][part.part], part.bits, header.layout)
        except ArtifactError as error:
            raise ArtifactError(f"tensor {name!r}, part {part.part!r}: {error}") from error
    yield from embedded


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _counted(packed: _Packed, request: ExportRequest) -> int:
    return packed.file_bytes + packed.beside_bytes * request.count_tokenizer + request.code_bytes


def _overshoot(packed: _Packed, request: ExportRequest, n_bytes: int) -> str:
    limit = request.max_bytes or 0
    sizes = sorted(packed.header.by_tensor().items(), key=lambda item: (-item[1], item[0]))
    largest = "".join(f"\n  {size:>14,}  {name}" for name, size in sizes[:8])
    return (
        f"the artifact takes {n_bytes:,} bytes, {n_bytes - limit:,} over export.max_bytes = {limit:,}; nothing was written\n"
        f"  payload {len(packed.payload):,} + header {PREFIX.size + len(packed.header_bytes):,}"
        f" + tokenizer beside it {packed.beside_bytes * request.count_tokenizer:,} + code {request.code_bytes:,}\n"
        f"use fewer bits ([[quantizer]]), a smaller model, a fitter, or a stronger codec; the largest tensors, in bytes before compression:{largest}"
    )


def _publish(path: Path, *contents: bytes | bytearray) -> None:
    """Write, flush to the disk, rename; a reader sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            for content in contents:
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):  # gone already when it was renamed
            temporary.unlink()
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _publish_once(path: Path, content: bytes, artifact: Path) -> None:
    """Write a file that artifacts may share; never replace another one, which an older artifact may need."""
    if not path.exists():
        _publish(path, content)
    elif not (path.is_file() and path.read_bytes() == content):
        raise ArtifactError(f'{path} exists and is not the tokenizer of {artifact.name}; move it, use export.tokenizer = "embed", or another folder')


# ---------------------------------------------------------------- reading
@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    if not Path(path).is_file():  # a pipe would make open() wait for ever
        raise ArtifactError(f"{path}: no such artifact file")
    try:
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read: {error.strerror or error}") from error


def _read_header(file: BinaryIO, path: Path) -> Header:
    """The header, checked against its checksum and the size of the file; leaves the file at the payload."""
    size = os.fstat(file.fileno()).st_size
    prefix = file.read(PREFIX.size)
    if len(prefix) < PREFIX.size or prefix[: len(MAGIC)] != MAGIC:
        raise ArtifactError(f"{path}: not a titanlm artifact, or cut off within its first {PREFIX.size} bytes")
    _, version, length, digest = PREFIX.unpack(prefix)
    if not 1 <= version <= VERSION:
        raise ArtifactError(f"{path}: format version {version}; this titanlm reads versions up to {VERSION} (a newer one may read more)")
    if length > min(MAX_HEADER_BYTES, size - PREFIX.size):
        raise ArtifactError(f"{path}: says that its header has {length:,} bytes; the file has {size:,}, and at most {MAX_HEADER_BYTES:,} are read")
    data = file.read(length)
    if hashlib.sha256(data).digest() != digest:
        raise ArtifactError(f"{path}: the header does not match its checksum, so the file is damaged; copy or export it again")
    try:
        header = parse(unfold(data, version))
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from error
    if (payload := size - PREFIX.size - length) != header.payload_bytes:
        raise ArtifactError(f"{path}: its payload has {payload:,} bytes and should have {header.payload_bytes:,}; copy or export it again")
    return header


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    return iter(lambda: file.read(_READ_BYTES), b"")


class _Stream:
    """Exact reads from pieces of any size; memory is touched only as bytes arrive."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self.pieces = pieces
        self.rest = np.empty(0, np.uint8)

    def read(self, n: int) -> np.ndarray:
        out = np.empty(n, np.uint8)
        filled = 0
        while filled < n:
            if not len(self.rest):
                piece = next(self.pieces, None)
                if piece is None:
                    raise ArtifactError("the payload unfolds to fewer bytes than its header says")
                self.rest = np.frombuffer(piece, np.uint8)
            taken = min(len(self.rest), n - filled)
            out[filled : filled + taken] = self.rest[:taken]
            self.rest = self.rest[taken:]
            filled += taken
        return out

    def end(self) -> None:
        if len(self.rest) or any(self.pieces):
            raise ArtifactError("the payload unfolds to more bytes than its header says")


def _read_tensors(header: Header, stream: _Stream) -> dict[str, Encoded | Tensor]:
    parts: list[dict[str, Tensor]] = [{} for _ in header.tensors]
    bits: list[dict[str, int]] = [{} for _ in header.tensors]
    for part in header.parts:
        raw = stream.read(header.part_bytes(part))
        try:
            parts[part.tensor][part.part] = storage.from_bytes(raw, part.shape, part.dtype, part.bits, header.layout)
        except ArtifactError as error:
            raise ArtifactError(f"tensor {header.tensors[part.tensor].name!r}, part {part.part!r}: {error}") from error
        if part.bits is not None:
            bits[part.tensor][part.part] = part.bits
    tensors: dict[str, Encoded | Tensor] = {}
    for index, spec in enumerate(header.tensors):
        if spec.quantizer is None:
            tensors[spec.name] = parts[index]["tensor"]
        else:
            name, settings = header.quantizers[spec.quantizer]
            tensors[spec.name] = Encoded(spec.shape, spec.dtype, parts[index], bits[index], name, settings)
    return tensors


def _read_beside(path: Path, spec: FileSpec) -> bytes:
    if not is_plain_file_name(path.name) or not path.is_file():
        raise ArtifactError(f"the tokenizer's file {spec.name!r} should lie beside it and does not; copy both")
    if path.stat().st_size != spec.n_bytes:
        raise ArtifactError(f"tokenizer file {spec.name!r} beside it has another size than it had; it is damaged or another tokenizer's")
    return path.read_bytes()
