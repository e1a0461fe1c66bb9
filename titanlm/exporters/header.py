"""The header of an artifact: what it holds, in what order, how large, with which checksum.

    offset  size  content
         0     8  b"\\x93titanlm"
         8     4  format version, uint32 little-endian
        12     4  length of the header, uint32 little-endian, at most 16 MiB
        16    32  SHA-256 of the header
        48     …  header: compact JSON with sorted keys, UTF-8, as a zlib stream (in version 1 as it is)
         …     …  payload: one stream of the codec, to the end of the file

The header's tables are lists, since their keys would outweigh their values:

    quantizers  [name, settings]
    tensors     [name, dtype, shape, index of its quantizer or null], by name
    parts       [index of its tensor, part, dtype, shape, bits in use or null], by (part, tensor)
    files       [name, n_bytes, sha256] of the tokenizer, by name

The payload unfolds to the parts in the order of their table and then, if they
are embedded, to the tokenizer's files. Nothing lies between them and nothing
states an offset: lengths follow from shape, dtype, bits and layout, and their
sum is checked against ``raw_bytes``. So no header can make parts overlap or
point outside. A tensor without a quantizer has one part, named "tensor".

A header is read as if an enemy had written it: strict types, strict order
(which also excludes duplicates), bounded numbers, no unknown keys.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from titanlm.errors import ArtifactError
from titanlm.exporters.compression import CODECS
from titanlm.exporters.storage import DTYPES, LAYOUTS, stored_bytes

MAGIC = b"\x93titanlm"
VERSION = 2
"""Of what is written. The tables of a model of 16 MB are 18 kB of JSON, and 3 kB once compressed. Version 1 is read too."""
PREFIX = struct.Struct("<8sII32s")
MAX_HEADER_BYTES = 16 << 20

_MAX_DIMS = 16
_MAX_ELEMENTS = 1 << 50
"""Below it, no size of ours or of torch leaves 64 bits."""
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SURROGATE = re.compile("[\ud800-\udfff]")
"""JSON can spell half a character, which no UTF-8 file can hold."""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor as it was before quantization."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    quantizer: int | None
    """Index into ``Header.quantizers``; None: stored as it is."""

    @property
    def n_bytes(self) -> int:
        """Once decoded."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class PartSpec:
    """One stored tensor."""

    tensor: int
    """Index into ``Header.tensors``."""
    part: str
    dtype: str
    shape: tuple[int, ...]
    bits: int | None
    """In use of each int8; None: all."""


@dataclass(frozen=True)
class FileSpec:
    """One file of the tokenizer."""

    name: str
    n_bytes: int
    sha256: str


@dataclass(frozen=True)
class Header:
    """Everything an artifact says about itself before its payload is touched."""

    codec: str
    layout: str
    """"bytes" | "packed"."""
    config: str
    """TOML of the run."""
    raw_bytes: int
    """Of the payload, once decompressed."""
    payload_bytes: int
    payload_sha256: str
    """Of the payload as it is in the file."""
    quantizers: tuple[tuple[str, dict[str, Any]], ...]
    tensors: tuple[TensorSpec, ...]
    parts: tuple[PartSpec, ...]
    tokenizer: str
    """"embed" | "beside"."""
    fingerprint: str
    """Of the tokenizer."""
    files: tuple[FileSpec, ...]

    @property
    def expected_raw_bytes(self) -> int:
        """What the tables add up to."""
        embedded = sum(file.n_bytes for file in self.files) if self.tokenizer == "embed" else 0
        return sum(self.part_bytes(part) for part in self.parts) + embedded

    @property
    def decoded_bytes(self) -> int:
        """Of all tensors once decoded."""
        return sum(tensor.n_bytes for tensor in self.tensors)

    def part_bytes(self, part: PartSpec) -> int:
        """Before compression."""
        return stored_bytes(part.shape, part.dtype, part.bits, self.layout)

    def by_tensor(self) -> dict[str, int]:
        """Bytes of each tensor before compression."""
        sizes = dict.fromkeys((tensor.name for tensor in self.tensors), 0)
        for part in self.parts:
            sizes[self.tensors[part.tensor].name] += self.part_bytes(part)
        return sizes

    def encode(self) -> bytes:
        """The JSON text, compressed, as it is in a file; ArtifactError for what ``parse`` would not take."""
        tables = {
            "codec": self.codec,
            "config": self.config,
            "files": [[file.name, file.n_bytes, file.sha256] for file in self.files],
            "fingerprint": self.fingerprint,
            "layout": self.layout,
            "parts": [[part.tensor, part.part, part.dtype, part.shape, part.bits] for part in self.parts],
            "payload_bytes": self.payload_bytes,
            "payload_sha256": self.payload_sha256,
            "quantizers": self.quantizers,
            "raw_bytes": self.raw_bytes,
            "tensors": [[tensor.name, tensor.dtype, tensor.shape, tensor.quantizer] for tensor in self.tensors],
            "tokenizer": self.tokenizer,
        }
        try:
            data = json.dumps(tables, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise ArtifactError(f"a quantizer's settings or the config cannot be written as JSON: {error}") from error
        parse(data)
        return zlib.compress(data, 9)


def unfold(data: bytes, version: int) -> bytes:
    """The JSON text of a header as it is in a file of one of the versions; ArtifactError for a damaged stream. More than ``parse`` takes is cut off."""
    if version == 1:
        return data
    decoder = zlib.decompressobj()
    try:
        text = decoder.decompress(data, MAX_HEADER_BYTES + 1)
    except zlib.error as error:
        raise ArtifactError(f"header is not a zlib stream: {error}") from error
    if len(text) <= MAX_HEADER_BYTES and (not decoder.eof or decoder.unused_data):
        raise ArtifactError("header is not one whole zlib stream")
    return text


def parse(data: bytes) -> Header:
    """Header from its JSON text; ArtifactError names what is wrong with it."""
    if len(data) > MAX_HEADER_BYTES:
        raise ArtifactError(f"header of {len(data):,} bytes; at most {MAX_HEADER_BYTES:,} are read")
    try:
        tables = json.loads(data.decode(), object_pairs_hook=_object, parse_constant=_constant)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"header is not valid JSON: {error}") from error
    _check(type(tables) is dict, "it is a table", tables)
    fields = set(Header.__dataclass_fields__)
    _check(set(tables) == fields, f"its keys are {', '.join(sorted(fields))}", sorted(tables))
    for key in ("config", "fingerprint"):
        _check(type(tables[key]) is str and not _SURROGATE.search(tables[key]), f"{key} is text", tables[key])
    for key, right in (("codec", CODECS), ("layout", LAYOUTS), ("tokenizer", ("embed", "beside"))):
        _check(tables[key] in right, f"{key} is one of {', '.join(right)}", tables[key])
    raw_bytes, payload_bytes = (_count(tables[key], key) for key in ("raw_bytes", "payload_bytes"))

    quantizers = []
    for name, settings in _rows(tables, "quantizers", 2):
        where = f"quantizer {_name(name, 'quantizer')!r}"
        _check(type(settings) is dict, f"{where}: settings are a table", settings)
        quantizers.append((name, settings))
    tensors = []
    for name, dtype, shape, quantizer in _rows(tables, "tensors", 4):
        where = f"tensor {_name(name, 'tensor')!r}"
        if quantizer is not None:
            _check(_count(quantizer, f"{where}: quantizer") < len(quantizers), f"{where}: its quantizer is one of {len(quantizers)}", quantizer)
        tensors.append(TensorSpec(name, _dtype(dtype, where), _shape(shape, where), quantizer))
    parts = []
    for index, part, dtype, shape, bits in _rows(tables, "parts", 5):
        _check(_count(index, "parts: tensor") < len(tensors), f"parts: tensor is one of {len(tensors)}", index)
        where = f"part {_name(part, 'part')!r} of tensor {tensors[index].name!r}"
        if bits is not None:
            _check(type(bits) is int and 1 <= bits <= 7 and dtype == "int8", f"{where}: bits in use are 1 to 7 of int8", [bits, dtype])
        parts.append(PartSpec(index, part, _dtype(dtype, where), _shape(shape, where), bits))
    files = []
    for name, n_bytes, sha256 in _rows(tables, "files", 3):
        _check(is_plain_file_name(name), "a tokenizer file has a plain file name", name)
        files.append(FileSpec(name, _count(n_bytes, f"tokenizer file {name!r}: size"), _sha256(sha256, f"tokenizer file {name!r}")))

    _increasing([tensor.name for tensor in tensors], "tensors")
    _increasing([(part.part, part.tensor) for part in parts], "parts")
    _increasing([file.name for file in files], "files")
    _check_parts(tensors, parts)
    header = Header(
        codec=tables["codec"], layout=tables["layout"], config=tables["config"], raw_bytes=raw_bytes, payload_bytes=payload_bytes,
        payload_sha256=_sha256(tables["payload_sha256"], "payload"), quantizers=tuple(quantizers), tensors=tuple(tensors), parts=tuple(parts),
        tokenizer=tables["tokenizer"], fingerprint=tables["fingerprint"], files=tuple(files),
    )  # fmt: skip
    _check(raw_bytes == header.expected_raw_bytes, f"its tables add up to raw_bytes = {header.expected_raw_bytes}", raw_bytes)
    return header


def is_plain_file_name(name: Any) -> bool:
    """Whether it names a file in the folder where it is looked for, on any system."""
    return _printable(name) and len(name.encode()) <= 200 and not set(name) & set("/\\:") and not name.startswith(".")


def _check_parts(tensors: list[TensorSpec], parts: list[PartSpec]) -> None:
    """Every tensor has parts; one without a quantizer has itself as the only one."""
    parts_of: list[list[PartSpec]] = [[] for _ in tensors]
    for part in parts:
        parts_of[part.tensor].append(part)
    for index, (tensor, own) in enumerate(zip(tensors, parts_of, strict=True)):
        if tensor.quantizer is None:
            right = own == [PartSpec(index, "tensor", tensor.dtype, tensor.shape, None)]
            _check(right, f"tensor {tensor.name!r} has no quantizer, so its one part is itself", own)
        else:
            _check(bool(own), f"tensor {tensor.name!r} has parts", own)


def _check(right: bool, rule: str, value: Any) -> None:
    """``rule`` says how it should be; ``value``, shown shortened, is what it is."""
    if not right:
        raise ArtifactError(f"header: {rule}; found {reprlib.repr(value)}")


def _constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key is there twice")
    return table


def _rows(tables: dict[str, Any], key: str, width: int) -> Iterable[list[Any]]:
    _check(type(tables[key]) is list, f"{key} is a list", tables[key])
    for row in tables[key]:
        _check(type(row) is list and len(row) == width, f"a row of {key} is a list of {width}", row)
    return tables[key]


def _count(value: Any, what: str) -> int:
    _check(type(value) is int and 0 <= value < 1 << 62, f"{what} is a whole number from 0 to 2^62", value)
    return value


def _printable(value: Any) -> bool:
    return type(value) is str and value != "" and value.isprintable()


def _name(value: Any, what: str) -> str:
    _check(_printable(value) and len(value) <= 1000, f"the name of a {what} is 1 to 1,000 printable characters", value)
    return value


def _dtype(value: Any, where: str) -> str:
    _check(type(value) is str and value in DTYPES, f"{where}: a dtype is one of {', '.join(DTYPES)}", value)
    return value


def _shape(value: Any, where: str) -> tuple[int, ...]:
    _check(type(value) is list and len(value) <= _MAX_DIMS, f"{where}: a shape is a list of up to {_MAX_DIMS} sizes", value)
    elements = 1
    for size in value:
        elements *= max(_count(size, f"{where}: a size"), 1)
        _check(elements <= _MAX_ELEMENTS, f"{where}: a shape has at most 2^50 elements", value)
    return tuple(value)


def _sha256(value: Any, where: str) -> str:
    _check(type(value) is str and _SHA256.fullmatch(value) is not None, f"{where}: a SHA-256 is 64 hexadecimal digits", value)
    return value


def _increasing(keys: list[Any], what: str) -> None:
    for earlier, later in zip(keys, keys[1:], strict=False):
        _check(earlier < later, f"{what} are in order, each there once", [earlier, later])
