"""Damaged and forged artifacts: one ArtifactError each, bounded memory, nothing read outside."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import lzma
import os
import random
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from titanlm.errors import ArtifactError
from titanlm.exporters import compression, storage
from titanlm.exporters.artifact import inspect, read_artifact
from titanlm.exporters.encoding import ExportRequest, decode_tensors
from titanlm.exporters.header import PREFIX
from titanlm.registry import Component

CODECS = ["zstd", "lzma", "zlib", "none"] + ["brotli"] * (importlib.util.find_spec("brotli") is not None)
Tables = dict[str, Any]


def make(path: Path, codec: str = "zlib", tokenizer: str = "embed") -> bytes:
    quantizer = Component.named("quantizer", "int6").build()
    tensors = {"w": quantizer.encode(torch.arange(12.0).reshape(3, 4)), "norm": torch.ones(3).bfloat16(), "flag": torch.tensor([True, False])}
    exporter = Component.named("exporter", "artifact", codec=codec).build()
    exporter.write(tensors, ExportRequest(path, "x = 1\n", None, tokenizer, {"tok": b"abc"}, "fp"))
    return path.read_bytes()


def split(data: bytes) -> tuple[Tables, bytes]:
    _, _, length, _ = PREFIX.unpack(data[: PREFIX.size])
    end = PREFIX.size + length
    return json.loads(zlib.decompress(data[PREFIX.size : end])), data[end:]


def join(header: Tables | bytes, payload: bytes) -> bytes:
    """A file whose checksums are right, as a forger would make it; of version 1, whose header is not compressed."""
    text = header if isinstance(header, bytes) else json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    return PREFIX.pack(b"\x93titanlm", 1, len(text), hashlib.sha256(text).digest()) + text + payload


def forged(data: bytes, change: Callable[[Tables], Any], raw: bytes | None = None) -> bytes:
    """``change`` applied to the header; with ``raw``, another payload (codec zlib) that it describes."""
    header, payload = split(data)
    change(header)
    if raw is not None:
        payload = zlib.compress(raw)
        header |= {"payload_bytes": len(payload), "payload_sha256": hashlib.sha256(payload).hexdigest()}
    return join(header, payload)


def refused(path: Path, data: bytes, message: str | None = None) -> None:
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=message) as caught:
        decode_tensors(read_artifact(path).tensors)
    assert path.name in str(caught.value) or "tensor " in str(caught.value)


# ---------------------------------------------------------------- damage
@pytest.mark.parametrize("codec", CODECS)
def test_200_bit_flips_are_200_errors(tmp_path: Path, codec: str) -> None:
    data = make(tmp_path / "a", codec)
    generator = random.Random(0)
    for bit in generator.sample(range(len(data) * 8), 200):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        refused(tmp_path / "a", bytes(damaged))


def test_truncation_at_every_byte(tmp_path: Path) -> None:
    data = make(tmp_path / "a")
    for length in range(len(data)):
        refused(tmp_path / "a", data[:length])


def test_trailing_bytes(tmp_path: Path) -> None:
    data = make(tmp_path / "a")
    for tail in (b"\0", b"\n", data, b"x" * 1000):
        refused(tmp_path / "a", data + tail, "should have")


@pytest.mark.parametrize("codec", CODECS)
def test_trailing_bytes_inside_the_payload(tmp_path: Path, codec: str) -> None:
    """The forger counts and hashes them; still they are no part of the stream."""
    header, payload = split(make(tmp_path / "a", codec))
    for tail in (b"\0", payload, b"x" * 200_000):
        longer = payload + tail
        header |= {"payload_bytes": len(longer), "payload_sha256": hashlib.sha256(longer).hexdigest()}
        refused(tmp_path / "a", join(header, longer), "follow the end|more bytes|damaged")
    shorter = payload[:-2]
    header |= {"payload_bytes": len(shorter), "payload_sha256": hashlib.sha256(shorter).hexdigest()}
    refused(tmp_path / "a", join(header, shorter), "early|fewer|damaged")


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").write_bytes(b"")
    for name, message in (("none", "no such"), ("pipe", "no such"), (".", "no such"), ("empty", "not a titanlm artifact")):
        for read in (read_artifact, inspect):
            with pytest.raises(ArtifactError, match=message):
                read(tmp_path / name)


def test_other_versions_are_named(tmp_path: Path) -> None:
    data = bytearray(make(tmp_path / "a"))
    for version in (0, 3):
        data[8] = version
        refused(tmp_path / "a", bytes(data), f"format version {version}; this titanlm reads versions up to 2")


def test_a_header_that_is_not_one_zlib_stream(tmp_path: Path) -> None:
    data = make(tmp_path / "a")
    header, payload = split(data)
    text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    whole = zlib.compress(text, 9)
    assert len(whole) == PREFIX.unpack(data[: PREFIX.size])[2]

    def file(stream: bytes) -> bytes:
        return PREFIX.pack(b"\x93titanlm", 2, len(stream), hashlib.sha256(stream).digest()) + stream + payload

    (tmp_path / "a").write_bytes(file(whole))
    assert inspect(tmp_path / "a").config == "x = 1\n"
    for stream, message in (
        (text, "not a zlib stream"), (b"", "not one whole"), (whole[:-1], "not one whole"), (whole + b"\0", "not one whole"),
        (whole + whole, "not one whole"), (zlib.compress(whole), "not valid JSON"),
    ):  # fmt: skip
        refused(tmp_path / "a", file(stream), message)


def test_a_header_that_unfolds_without_end_is_cut_off(tmp_path: Path) -> None:
    """A gigabyte of blanks in a megabyte."""
    data = make(tmp_path / "a")
    encoder = zlib.compressobj(9)
    stream = b"".join(encoder.compress(b" " * (1 << 20)) for _ in range(1024)) + encoder.flush()
    assert len(stream) < 2 << 20
    tracemalloc.start()
    try:
        refused(tmp_path / "a", PREFIX.pack(b"\x93titanlm", 2, len(stream), hashlib.sha256(stream).digest()) + stream + split(data)[1], "at most 16,777,216")
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


def test_header_length_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for length in (2**32 - 1, (16 << 20) + 1, 5000):
        refused(path, PREFIX.pack(b"\x93titanlm", 1, length, bytes(32)) + b"x" * 100, "says that its header has")


# ---------------------------------------------------------------- forged headers
def set_part(index: int, field: int, value: Any) -> Callable[[Tables], Any]:
    return lambda header: header["parts"][index].__setitem__(field, value)


def set_tensor(index: int, field: int, value: Any) -> Callable[[Tables], Any]:
    return lambda header: header["tensors"][index].__setitem__(field, value)


# parts: 0 scale of w, 1 flag, 2 norm, 3 values of w; tensors: 0 flag, 1 norm, 2 w
FORGERIES: dict[str, tuple[Callable[[Tables], Any], str]] = {
    "negative size": (set_part(3, 3, [-3, -4]), "whole number from 0"),
    "2^62 elements": (set_part(3, 3, [2**31, 2**31]), r"at most 2\^50 elements"),
    "2^63 in one size": (set_part(3, 3, [2**63]), "whole number from 0"),
    "overflow hidden by a zero": (set_part(3, 3, [0, 2**40, 2**40]), r"at most 2\^50"),
    "size true": (set_part(3, 3, [True, 12]), "whole number"),
    "size float": (set_part(3, 3, [3.0, 4]), "whole number"),
    "size text": (set_part(3, 3, ["3", 4]), "whole number"),
    "shape a number": (set_part(3, 3, 12), "a shape is a list"),
    "17 dimensions": (set_part(3, 3, [1] * 17), "up to 16 sizes"),
    "unknown dtype": (set_part(0, 2, "int4"), "a dtype is one of"),
    "dtype of an attribute": (set_tensor(2, 1, "load"), "a dtype is one of"),
    "dtype a list": (set_part(0, 2, []), "a dtype is one of"),
    "bits of a float": (set_part(0, 4, 6), "1 to 7 of int8"),
    "no bits": (set_part(3, 4, 0), "1 to 7 of int8"),
    "bits true": (set_part(3, 4, True), "1 to 7 of int8"),
    "part of no tensor": (set_part(3, 0, 3), "tensor is one of 3"),
    "part of tensor -1": (set_part(3, 0, -1), "whole number from 0"),
    "wrong size": (set_part(3, 3, [3, 5]), "add up to raw_bytes"),
    "larger part, raw_bytes adapted": (lambda h: (set_part(3, 3, [3, 5])(h), h.update(raw_bytes=h["raw_bytes"] + 3)), "fewer|unused bits"),
    "smaller part, raw_bytes adapted": (lambda h: (set_part(3, 3, [3, 3])(h), h.update(raw_bytes=h["raw_bytes"] - 2)), "more|unused bits"),
    "raw_bytes": (lambda h: h.update(raw_bytes=h["raw_bytes"] + 1), "add up to raw_bytes"),
    "raw_bytes huge": (lambda h: h.update(raw_bytes=2**63), "whole number"),
    "payload_bytes": (lambda h: h.update(payload_bytes=1), "should have 1"),
    "the same part twice": (lambda h: h["parts"].append(h["parts"][-1]), "in order, each there once"),
    "parts reordered": (lambda h: h["parts"].reverse(), "in order"),
    "tensors reordered": (lambda h: h["tensors"].reverse(), "in order|whole number|tensor"),
    "the same name twice": (set_tensor(1, 0, "flag"), "in order, each there once"),
    "name empty": (set_tensor(0, 0, ""), "printable"),
    "name with an escape": (set_tensor(0, 0, "a\x1b[31m"), "printable"),
    "name a number": (set_tensor(0, 0, 3), "printable"),
    "name long": (set_tensor(0, 0, "a" * 1001), "printable"),
    "tensor without parts": (lambda h: h["tensors"].append(["z", "float32", [2], 0]), "'z' has parts"),
    "plain tensor of another shape": (set_tensor(1, 2, [4]), "its one part is itself"),
    "plain tensor of another dtype": (set_tensor(1, 1, "float16"), "its one part is itself"),
    "quantizer out of range": (set_tensor(2, 3, 1), "its quantizer is one of 1"),
    "quantizer -1": (set_tensor(2, 3, -1), "whole number"),
    "no quantizer for parts": (set_tensor(2, 3, None), "its one part is itself"),
    "encoded shape": (set_tensor(2, 2, [4, 3]), "'w': quantizer 'int6'"),
    "encoded shape huge": (set_tensor(2, 2, [2**25, 2**25]), "unfolds to"),
    "encoded dtype": (set_tensor(2, 1, "int64"), "'w': quantizer 'int6' decodes to"),
    "unknown quantizer": (lambda h: h.update(quantizers=[["os", {}]]), "no quantizer named 'os'"),
    "unknown setting": (lambda h: h.update(quantizers=[["int6", {"path": "/"}]]), "path: Unexpected"),
    "settings a list": (lambda h: h.update(quantizers=[["int6", []]]), "settings are a table"),
    "quantizer of one entry": (lambda h: h.update(quantizers=[["int6"]]), "a list of 2"),
    "unknown codec": (lambda h: h.update(codec="pickle"), "codec is one of"),
    "another codec": (lambda h: h.update(codec="lzma"), "lzma payload is damaged"),
    "codec a list": (lambda h: h.update(codec=["zlib"]), "codec is one of"),
    "unknown layout": (lambda h: h.update(layout="tight"), "layout is one of"),
    "unknown key": (lambda h: h.update(extra=1), "its keys are"),
    "missing key": (lambda h: h.pop("codec"), "its keys are"),
    "a codec to be chosen": (lambda h: h.update(codec="auto"), "codec is one of"),
    "config a number": (lambda h: h.update(config=3), "config is text"),
    "checksum short": (lambda h: h.update(payload_sha256="ab"), "64 hexadecimal digits"),
    "checksum with a newline": (lambda h: h.update(payload_sha256="0" * 64 + "\n"), "64 hexadecimal digits"),
    "checksum of another": (lambda h: h.update(payload_sha256="0" * 64), "payload does not match its checksum"),
    "file outside": (lambda h: h["files"][0].__setitem__(0, "../x"), "plain file name"),
    "file absolute": (lambda h: h["files"][0].__setitem__(0, "/etc/passwd"), "plain file name"),
    "file size": (lambda h: h["files"][0].__setitem__(1, -1), "whole number"),
    "file checksum": (lambda h: h["files"][0].__setitem__(2, "0" * 64), "'tok' does not match its checksum"),
    "file twice": (lambda h: h["files"].append(h["files"][0]), "in order, each there once"),
    "embedded file said to lie beside": (lambda h: h.update(tokenizer="beside"), "add up to raw_bytes"),
    "file beside that is not there": (lambda h: h.update(tokenizer="beside", raw_bytes=h["raw_bytes"] - 3), "more bytes|should lie beside"),
    "parts a table": (lambda h: h.update(parts={}), "parts is a list"),
    "a row a number": (lambda h: h["parts"].append(3), "a list of 5"),
    "all gone": (lambda h: h.update(tensors=[], parts=[], files=[], quantizers=[], raw_bytes=0), "more bytes"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_forged_headers(tmp_path: Path, name: str) -> None:
    change, message = FORGERIES[name]
    refused(tmp_path / "a", forged(make(tmp_path / "a"), change), message)


@pytest.mark.parametrize(
    "text",
    [
        b"", b"{", b"null", b"[]", b"3", b"\xff\xfe", b"{}", b'{"a": NaN}', b'{"codec": Infinity}', b"[" * 100_000, b'{"a":' * 100_000,
        b"9" * 10_000, b'{"codec":"zlib","codec":"zlib"}',
    ],
)  # fmt: skip
def test_headers_that_are_no_table(tmp_path: Path, text: bytes) -> None:
    refused(tmp_path / "a", join(text, b""), "header")


def test_half_a_character(tmp_path: Path) -> None:
    header, payload = split(make(tmp_path / "a"))
    header["config"] = "\ud800"
    refused(tmp_path / "a", join(json.dumps(header).encode(), payload), "config is text")


def test_deep_settings_do_not_overflow_the_stack(tmp_path: Path) -> None:
    for depth in (100, 300, 900, 5000):
        settings: Any = 1
        for _ in range(depth):
            settings = [settings]
        header, payload = split(make(tmp_path / "a"))
        header["quantizers"] = [["int6", {"scale_dtype": "DEEP"}]]
        text = json.dumps(header).replace('"DEEP"', "[" * depth + "]" * depth).encode()
        refused(tmp_path / "a", join(text, payload))


def test_a_million_rows_are_refused_soon(tmp_path: Path) -> None:
    header, payload = split(make(tmp_path / "a"))
    text = json.dumps({**header, "parts": "MANY"}).replace('"MANY"', "[" + "[]," * 1_000_000 + "[]]").encode()
    refused(tmp_path / "a", join(text, payload), "a list of 5")


def test_forged_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "LAYOUTS", ("bytes",))
    data = make(tmp_path / "a")
    header, payload = split(data)
    raw = bytearray(zlib.decompress(payload))
    # Scales of 3 rows in two planes, 2 flags, 3 bf16 in two planes, 12 integers, the tokenizer.
    assert len(raw) == 6 + 2 + 6 + 12 + 3
    decode_tensors(read_artifact(tmp_path / "a").tensors)
    cases = ((3, 0x7E, "not finite"), (3, 0xBC, "negative"), (6, 2, "0 or 1"), (14, 32, "do not fit in 6 bits"), (26, 0, "'tok'"))
    for offset, byte, message in cases:
        bad = bytearray(raw)
        bad[offset] = byte
        refused(tmp_path / "a", forged(data, lambda header: None, bytes(bad)), message)


# ---------------------------------------------------------------- bombs
BOMB_BYTES = 1 << 28


@functools.cache
def bomb(codec: str) -> bytes:
    """256 MiB of zeros, or what unfolds to it, made without holding it."""
    block = bytes(1 << 24)
    n = BOMB_BYTES // len(block)
    if codec == "zstd":
        import zstandard

        # Blocks of one repeated byte, 128 KiB each from 4 bytes, in a frame that does not tell its size: window 8 MiB.
        body = b"".join(((1 << 17) << 3 | 1 << 1 | (index == n * 128 - 1)).to_bytes(3, "little") + b"\0" for index in range(n * 128))
        frame = zstandard.FRAME_HEADER + bytes([0x00, 13 << 3]) + body
        assert len(frame) < 10_000
        return frame
    if codec == "brotli":
        import brotli

        encoder = brotli.Compressor(quality=1, lgwin=22)
        return b"".join([encoder.process(block) for _ in range(n)] + [encoder.finish()])
    encoder = zlib.compressobj(9) if codec == "zlib" else lzma.LZMACompressor(preset=0)
    return b"".join([encoder.compress(block) for _ in range(n)] + [encoder.flush()])


CHILD = """
import resource, sys
from titanlm.errors import ArtifactError
from titanlm.exporters.artifact import read_artifact
import titanlm.quantizers.int6
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    try:
        read_artifact(path)
    except ArtifactError as error:
        print(str(error).splitlines()[0])
    else:
        sys.exit(f"{path} was read")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_bombs_are_refused_in_bounded_memory(tmp_path: Path) -> None:
    """Bombs of every codec: more output than declared, and output as declared but out of proportion."""
    header, _ = split(make(tmp_path / "a"))
    paths = []
    for codec in (codec for codec in CODECS if codec != "none"):
        payload = bomb(codec)
        header |= {"codec": codec, "payload_bytes": len(payload), "payload_sha256": hashlib.sha256(payload).hexdigest()}
        honest = json.loads(json.dumps(header))
        honest |= {"tensors": [["w", "uint8", [BOMB_BYTES], None]], "parts": [[0, "tensor", "uint8", [BOMB_BYTES], None]]}
        honest |= {"files": [], "quantizers": [], "raw_bytes": BOMB_BYTES}
        for kind, table in (("lying", header), ("honest", honest)):
            paths.append(tmp_path / f"{codec}-{kind}")
            paths[-1].write_bytes(join(table, payload))
    root = str(Path(__file__).parents[2])
    child = subprocess.run([sys.executable, "-c", CHILD, *map(str, paths)], capture_output=True, text=True, cwd=root, check=False)
    assert child.returncode == 0, child.stderr
    *lines, kibibytes = child.stdout.splitlines()
    assert len(lines) == len(paths)
    for path, line in zip(paths, lines, strict=True):
        assert path.name in line
        # zlib, the weakest, makes 1,028 of 1; a hundredfold is what is read unasked.
        assert ("unfolds to 268,435,456 bytes" if "honest" in path.name else "more bytes than its header says") in line
    assert int(kibibytes) < 200 << 10, f"{kibibytes} KiB"


@pytest.mark.parametrize("codec", [codec for codec in CODECS if codec != "none"])
def test_a_bomb_comes_out_in_bounded_pieces(codec: str) -> None:
    payload = bomb(codec)
    pieces = compression.decompress(codec, iter([payload[start : start + (1 << 16)] for start in range(0, len(payload), 1 << 16)]))
    seen = 0
    for piece in pieces:
        assert len(piece) <= 33 << 20
        seen += len(piece)
        if seen > 64 << 20:
            break
    assert seen > 64 << 20


def test_windows_of_gigabytes_are_refused(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    huge = zstandard.FRAME_HEADER + bytes([0x00, (30 - 10) << 3]) + (1 << 3 | 1 << 1 | 1).to_bytes(3, "little") + b"\0"  # 1 GiB
    with pytest.raises(ArtifactError, match="zstd payload is damaged"):
        list(compression.decompress("zstd", [huge]))
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 1 << 30}]
    huge = lzma.compress(b"abc", filters=filters)
    with pytest.raises(ArtifactError, match="lzma payload is damaged: Memory"):
        list(compression.decompress("lzma", [huge]))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("size", [0, 1, 1000, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 2_500_000])
@pytest.mark.parametrize("content", ["zeros", "noise"])
def test_streams_come_back_whatever_the_pieces(codec: str, size: int, content: str) -> None:
    data = bytes(size) if content == "zeros" else random.Random(size).randbytes(size)
    stream = bytes(compression.compress(codec, min(compression.DEFAULT_LEVELS[codec][0], 5), [data[:7], data[7:]], size))
    for width in (37 if len(stream) < 50_000 else 50_000, 1 << 16, 1 << 30):
        pieces = [stream[start : start + width] for start in range(0, len(stream), width)]
        assert b"".join(compression.decompress(codec, iter(pieces))) == data


# ---------------------------------------------------------------- nothing is run
def test_nothing_is_unpickled_or_imported_by_name(tmp_path: Path) -> None:
    """No pickle in the reading path, and a quantizer's name never becomes a module."""
    package = Path(__file__).parents[2] / "titanlm"
    for file in (*(package / "exporters").glob("*.py"), *(package / "quantizers").glob("*.py")):
        text = file.read_text(encoding="utf-8")
        assert "import pickle" not in text
        assert "torch.load(" not in text
    for name in ("os", "titanlm.errors", "rowwise", "../../evil", "int6\n"):
        data = forged(make(tmp_path / "a"), lambda header, name=name: header.update(quantizers=[[name, {}]]))
        refused(tmp_path / "a", data, "no quantizer named|printable")


# ---------------------------------------------------------------- fuzz
def mutate(value: Any, generator: random.Random) -> Any:
    """One random change somewhere in a JSON value."""
    odd = [None, True, -1, 0, 1, 2**31, 2**53, 2**62, 2**64, 1.5, "", "x", "../x", "int8", [], {}, [1], [[0]], "\ud800", "tensor", "a" * 5000]
    if isinstance(value, dict) and value and generator.random() < 0.9:
        key = generator.choice(sorted(value))
        return {**value, key: mutate(value[key], generator)} if generator.random() < 0.95 else {k: v for k, v in value.items() if k != key}
    if isinstance(value, list) and value and generator.random() < 0.9:
        index = generator.randrange(len(value))
        choice = generator.random()
        if choice < 0.05:
            return value[:index] + value[index + 1 :]
        if choice < 0.1:
            return [*value, value[index]]
        return [*value[:index], mutate(value[index], generator), *value[index + 1 :]]
    if type(value) is int and generator.random() < 0.5:
        return value + generator.choice([-1, 1, 8, -8])
    return generator.choice(odd)


def test_fuzz_only_artifact_errors_escape(tmp_path: Path) -> None:
    """Thousands of mutations of header and payload, with right checksums so that they get past the first door."""
    generator = random.Random(7)
    path, counts = tmp_path / "a", {"refused": 0, "read": 0}
    originals = [split(make(path, codec)) for codec in CODECS]
    for _ in range(2500):
        header, payload = generator.choice(originals)
        kind = generator.random()
        if kind < 0.7:
            for _ in range(generator.choice([1, 1, 2, 3])):
                header = mutate(header, generator)
        else:
            damaged = bytearray(payload)
            for _ in range(generator.choice([1, 2, 5])):
                damaged[generator.randrange(len(damaged))] = generator.randrange(256)
            payload = bytes(damaged[: generator.randrange(len(damaged) + 1)] if kind > 0.95 else damaged)
        if isinstance(header, dict) and generator.random() < 0.95:
            header = {**header, "payload_bytes": len(payload), "payload_sha256": hashlib.sha256(payload).hexdigest()}
        path.write_bytes(join(json.dumps(header).encode(), payload))
        try:
            decode_tensors(read_artifact(path).tensors)
            counts["read"] += 1  # a changed weight or fingerprint is no damage to be found once the checksums agree
        except ArtifactError:
            counts["refused"] += 1
    assert counts["read"] < counts["refused"]
