"""The artifact: round trips, the byte limit, determinism, and what a write leaves behind."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import threading
import time
import weakref
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from titanlm.errors import ArtifactError
from titanlm.exporters import artifact as artifact_module
from titanlm.exporters import compression
from titanlm.exporters.artifact import ArtifactConfig, inspect, read_artifact
from titanlm.exporters.encoding import Encoded, ExportRequest, decode_tensors
from titanlm.registry import Component

CODECS = ["zstd", "lzma", "zlib", "none"] + ["brotli"] * (importlib.util.find_spec("brotli") is not None)
FILES = {"tokenizer.model": b"\x00\x01pieces\xff" * 20, "added.json": b'{"a": 1}'}
CONFIG = 'imports = []\n[model]\nname = "decoder" # ü\n'


def exporter(codec: str = "zlib", level: int | None = None):
    return Component.named("exporter", "artifact", codec=codec, level=level).build(model=None, tokenizer=None, run_dir=None)


def request(path: Path, *, max_bytes: int | None = None, tokenizer: str = "embed", code_bytes: int = 0, files=FILES) -> ExportRequest:
    return ExportRequest(path, CONFIG, max_bytes, tokenizer, files, "spm:1234", code_bytes)


def tensors(rows: int = 24) -> dict[str, Encoded | torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    quantizers = {name: Component.named("quantizer", name).build() for name in ("int6", "int8")}
    wide = Component.named("quantizer", "int6", scale_dtype="float32").build()
    return {
        "blocks.1.w": quantizers["int6"].encode(torch.randn(rows, 33, generator=generator)),
        "blocks.0.w": quantizers["int6"].encode(torch.randn(rows, 33, generator=generator).bfloat16()),
        "embedding": quantizers["int8"].encode(torch.randn(rows, 16, generator=generator)),
        "wide": wide.encode(torch.randn(3, 5, generator=generator)),
        "norm.gain": torch.randn(64, generator=generator).bfloat16(),
        "fp32": torch.randn(5, 4, generator=generator),
        "fp16": torch.randn(7, generator=generator).half(),
        "scalar": torch.tensor(3.25, dtype=torch.float64),
        "empty": torch.empty(0, 4),
        "counts": torch.arange(5),
        "flags": torch.tensor([True, False, True]),
    }


def assert_same(read, written) -> None:
    assert list(read) == sorted(written)
    for name, right in written.items():
        found = read[name]
        if isinstance(right, Encoded):
            assert (found.shape, found.dtype, dict(found.bits), found.quantizer, dict(found.settings)) == (
                tuple(right.shape), right.dtype, dict(right.bits), right.quantizer, dict(right.settings),
            )  # fmt: skip
            assert set(found.parts) == set(right.parts)
            pairs = [(found.parts[part], right.parts[part]) for part in right.parts]
        else:
            pairs = [(found, right)]
        for one, other in pairs:
            assert one.dtype == other.dtype
            assert torch.equal(one, other), name


# ---------------------------------------------------------------- round trips
@pytest.mark.parametrize("tokenizer", ["embed", "beside"])
@pytest.mark.parametrize("codec", CODECS)
def test_round_trip(tmp_path: Path, codec: str, tokenizer: str) -> None:
    written, path = tensors(), tmp_path / "out" / "model.titan"
    order = request(path, tokenizer=tokenizer)
    report = exporter(codec).write(written, order)
    artifact = read_artifact(path)
    assert_same(artifact.tensors, written)
    assert artifact.config_toml == CONFIG
    assert artifact.tokenizer_files == FILES
    assert artifact.tokenizer_fingerprint == "spm:1234"
    beside = {} if tokenizer == "embed" else FILES
    assert {file.name for file in path.parent.iterdir()} == {"model.titan", *beside}
    assert report.n_bytes == sum(file.stat().st_size for file in path.parent.iterdir()) == exporter(codec).size_bytes(written, order)
    assert report.codec == codec
    assert report.layout == ("packed" if codec == "none" else artifact.header.layout)
    assert inspect(path) == artifact.header
    assert report.by_tensor == artifact.header.by_tensor()
    assert sum(report.by_tensor.values()) + sum(map(len, FILES.values())) * (tokenizer == "embed") == artifact.header.raw_bytes
    decoded, direct = decode_tensors(artifact.tensors), decode_tensors(written)
    assert all(torch.equal(decoded[name], direct[name]) for name in written)


BOTH = [(codec, layout) for codec in CODECS for layout in ("bytes", "packed") if (codec, layout) != ("none", "bytes")]


@pytest.mark.parametrize(("codec", "layout"), BOTH)
def test_both_layouts_with_every_codec(tmp_path: Path, codec: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifact_module.storage, "LAYOUTS", (layout,))
    report = exporter(codec).write(tensors(), request(tmp_path / "a"))
    assert report.layout == layout
    assert report.by_tensor["blocks.0.w"] == 24 * 2 + (24 * 33 if layout == "bytes" else 24 * 33 * 6 // 8)
    monkeypatch.undo()
    assert_same(read_artifact(tmp_path / "a").tensors, tensors())


def test_no_tensors_no_tokenizer(tmp_path: Path) -> None:
    for codec in CODECS:
        exporter(codec).write({}, request(tmp_path / "a", files={}))
        assert read_artifact(tmp_path / "a").tensors == {}


def test_the_smaller_layout_and_level_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gaussian int6 wants bytes under an entropy coder; uniform int6 cannot be coded and wants packing."""
    generator = torch.Generator().manual_seed(0)
    gaussian = Component.named("quantizer", "int6").build().encode(torch.randn(64, 512, generator=generator))
    values = torch.randint(-32, 32, (64, 512), generator=generator, dtype=torch.int8)
    uniform = Encoded((64, 512), "float32", {"values": values}, {"values": 6}, "uniform")
    sizes = {}
    for name, tensor in (("gaussian", gaussian), ("uniform", uniform)):
        report = exporter("zstd").write({"w": tensor}, request(tmp_path / name))
        alone = []
        for layout in ("bytes", "packed"):
            monkeypatch.setattr(artifact_module.storage, "LAYOUTS", (layout,))
            alone += [exporter("zstd", level).size_bytes({"w": tensor}, request(tmp_path / name)) for level in (1, 22)]
            monkeypatch.undo()
        assert report.n_bytes == min(alone)
        sizes[name] = report.layout
    assert sizes == {"gaussian": "bytes", "uniform": "packed"}


def test_auto_keeps_the_smallest_of_all_codecs(tmp_path: Path) -> None:
    order = request(tmp_path / "a")
    report = exporter("auto").write(tensors(), order)
    alone = {codec: exporter(codec).size_bytes(tensors(), order) for codec in CODECS}
    # The codec's name stands in the header too.
    assert min(alone.values()) == report.n_bytes == alone[report.codec] == exporter("auto").size_bytes(tensors(), order)
    assert inspect(tmp_path / "a").codec == report.codec
    assert_same(read_artifact(tmp_path / "a").tensors, tensors())
    assert {trial.codec for trial in report.trials} == set(CODECS)
    assert [trial.n_bytes for trial in report.trials] == sorted(trial.n_bytes for trial in report.trials)
    kept = report.trials[0]
    assert (kept.codec, kept.layout, kept.n_bytes) == (report.codec, report.layout, inspect(tmp_path / "a").payload_bytes)
    assert all(trial.seconds >= 0 for trial in report.trials)
    exporter("auto").write(tensors(), request(tmp_path / "b"))
    assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()


def test_auto_passes_over_what_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("zstandard", "brotli"):
        monkeypatch.setitem(sys.modules, package, None)
    report = exporter("auto").write(tensors(), request(tmp_path / "a"))
    assert {trial.codec for trial in report.trials} == {"lzma", "zlib", "none"}


def test_auto_of_noise_and_of_nothing(tmp_path: Path) -> None:
    """Bytes without structure are stored as they are."""
    noise = torch.randint(0, 256, (5000,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert exporter("auto").write({"w": noise}, request(tmp_path / "a", files={})).codec == "none"
    exporter("auto").write({}, request(tmp_path / "b", files={}))
    assert read_artifact(tmp_path / "b").tensors == {}


def test_what_was_measured_last_is_written_without_compressing_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = compression.compress, []

    def counted(codec: str, level: int, pieces, n_bytes: int) -> bytearray:
        calls.append((codec, level))
        return real(codec, level, pieces, n_bytes)

    monkeypatch.setattr(compression, "compress", counted)
    built = exporter("zlib", 9)
    fresh = exporter("zlib", 9).write(tensors(), request(tmp_path / "fresh"))
    calls.clear()
    n_bytes = built.size_bytes(tensors(), request(tmp_path / "a"))
    assert len(calls) == 2  # both layouts
    built.size_bytes(tensors(rows=48), request(tmp_path / "a", max_bytes=n_bytes))  # too large: not what is written next
    calls.clear()
    report = built.write(tensors(), request(tmp_path / "a"))
    assert not calls
    assert (tmp_path / "a").read_bytes() == (tmp_path / "fresh").read_bytes()
    assert [trial.n_bytes for trial in report.trials] == [trial.n_bytes for trial in fresh.trials]
    other = tensors()
    other["gain"] = torch.ones(3)
    for changed, asked in ((other, request(tmp_path / "b")), (tensors(), replace(request(tmp_path / "b"), config_toml="seed = 2"))):
        calls.clear()
        built.write(changed, asked)
        assert len(calls) == 2


class Payload(bytearray):
    """One whose life can be watched."""

    __eq__ = object.__eq__
    __hash__ = object.__hash__


def test_outcomes_that_are_not_kept_take_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakSet[Payload] = weakref.WeakSet()
    sizes, most = iter([9, 7, 8, 7, 9, 6, 9]), 0

    def compressed(codec: str, level: int, pieces, n_bytes: int) -> Payload:
        nonlocal most
        payload = Payload(next(sizes))
        alive.add(payload)
        most = max(most, len(alive))
        return payload

    monkeypatch.setattr(artifact_module, "_LARGE_BYTES", 0)  # one at a time
    monkeypatch.setattr(compression, "installed", lambda: ("zstd", "lzma", "none"))
    monkeypatch.setattr(compression, "compress", compressed)
    report = exporter("auto").write(tensors(), request(tmp_path / "a"))
    assert most <= 3  # the smallest, one that is compared with it, one under way
    assert [trial.n_bytes for trial in report.trials] == [6, 7, 7, 8, 9, 9, 9]
    assert (report.codec, report.layout) == ("lzma", "packed")


def test_of_equals_the_first_in_order_is_kept_whichever_is_ready_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ready = {level: threading.Event() for level in (1, 22)}
    monkeypatch.setattr(artifact_module.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(artifact_module.storage, "LAYOUTS", ("bytes",))

    def compressed(codec: str, level: int, pieces, n_bytes: int) -> bytearray:
        if level == 1:
            assert ready[22].wait(30)
            time.sleep(0.05)  # until the other was compared
        ready[level].set()
        return bytearray(f"{level:02}".encode())

    monkeypatch.setattr(compression, "compress", compressed)
    exporter("zstd").write(tensors(), request(tmp_path / "a"))
    assert (tmp_path / "a").read_bytes().endswith(b"01")


def test_a_codec_that_fails_ends_the_others_within_a_slice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So does Ctrl-C, which comes to the same ``finally``."""
    begun, taken = threading.Event(), []
    monkeypatch.setattr(artifact_module.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(artifact_module.storage, "LAYOUTS", ("bytes",))

    def compressed(codec: str, level: int, pieces, n_bytes: int) -> bytearray:
        if level == 1:
            assert begun.wait(30)
            raise MemoryError("no room")
        for piece in pieces:
            taken.append(len(piece))
            begun.set()
            time.sleep(0.02)
        return bytearray()

    monkeypatch.setattr(compression, "compress", compressed)
    with pytest.raises(MemoryError, match="no room"):
        exporter("zstd").write({"w": torch.zeros(100 << 20, dtype=torch.uint8)}, request(tmp_path / "a", files={}))
    assert max(taken) <= 1 << 20
    assert len(taken) < 50
    assert not list(tmp_path.iterdir())


def test_a_tensor_that_shares_memory_or_needs_gradients(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.randn(6, 4))
    exporter().write({"w": weight, "t": weight.T, "row": weight[2]}, request(tmp_path / "a"))
    read = read_artifact(tmp_path / "a").tensors
    assert torch.equal(read["t"], weight.T)
    assert torch.equal(read["row"], weight[2])
    assert not read["w"].requires_grad


# ---------------------------------------------------------------- determinism
@pytest.mark.parametrize("codec", CODECS)
def test_same_bytes_twice_in_any_order(tmp_path: Path, codec: str) -> None:
    exporter(codec).write(tensors(), request(tmp_path / "a"))
    backwards = dict(reversed(tensors().items()))
    exporter(codec).write(backwards, request(tmp_path / "b", files=dict(reversed(FILES.items()))))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_same_bytes_in_another_process(tmp_path: Path) -> None:
    """Another hash seed, folder, time zone and locale."""
    script = tmp_path / "write.py"
    here = Path(__file__)
    script.write_text(
        f"import importlib.util, pathlib, sys\n"
        f"spec = importlib.util.spec_from_file_location('t', {str(here)!r})\n"
        f"t = importlib.util.module_from_spec(spec); spec.loader.exec_module(t)\n"
        f"t.exporter('zstd').write(t.tensors(), t.request(pathlib.Path(sys.argv[1])))\n"
    )
    exporter("zstd").write(tensors(), request(tmp_path / "here"))
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    environment = {**os.environ, "PYTHONHASHSEED": seed, "TZ": "Asia/Tokyo", "LC_ALL": "C", "PYTHONPATH": str(here.parents[2])}
    subprocess.run([sys.executable, str(script), str(tmp_path / "there")], check=True, env=environment, cwd=tmp_path)
    assert (tmp_path / "there").read_bytes() == (tmp_path / "here").read_bytes()


# ---------------------------------------------------------------- limit
@pytest.mark.parametrize("tokenizer", ["embed", "beside"])
def test_the_limit_is_exact(tmp_path: Path, tokenizer: str) -> None:
    path = tmp_path / "model.titan"
    exact = exporter().size_bytes(tensors(), request(path, tokenizer=tokenizer, code_bytes=1000))
    report = exporter().write(tensors(), request(path, tokenizer=tokenizer, code_bytes=1000, max_bytes=exact))
    assert report.n_bytes == exact == 1000 + sum(file.stat().st_size for file in tmp_path.iterdir())
    exporter().write(tensors(), request(path, tokenizer=tokenizer, code_bytes=1000, max_bytes=exact + 1))

    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    other = {**tensors(), "scalar": torch.tensor(9.0).double()}
    with pytest.raises(ArtifactError) as caught:
        exporter().write(other, request(path, tokenizer=tokenizer, code_bytes=1000, max_bytes=exact - 9))
    text = str(caught.value)
    assert f"export.max_bytes = {exact - 9:,}" in text
    assert "over" in text
    assert "nothing was written" in text
    assert text.index("blocks.0.w") < text.index("embedding") < text.index("norm.gain")
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before

    with pytest.raises(ArtifactError, match=f"takes {exact:,} bytes, 1 over"):
        exporter().write(tensors(), request(tmp_path / "new" / "model.titan", tokenizer=tokenizer, code_bytes=1000, max_bytes=exact - 1))
    assert not (tmp_path / "new").exists()


def test_a_tokenizer_beside_that_does_not_count(tmp_path: Path) -> None:
    counted = request(tmp_path / "model.titan", tokenizer="beside", code_bytes=1000)
    free = replace(counted, count_tokenizer=False)
    beside = sum(map(len, FILES.values()))
    n_bytes = exporter().size_bytes(tensors(), free)
    assert n_bytes == exporter().size_bytes(tensors(), counted) - beside
    report = exporter().write(tensors(), replace(free, max_bytes=n_bytes))
    assert report.n_bytes == n_bytes == 1000 + (tmp_path / "model.titan").stat().st_size
    with pytest.raises(ArtifactError, match=r"1 over .*\n.* \+ tokenizer beside it 0 \+ code 1,000"):
        exporter().write(tensors(), replace(free, max_bytes=n_bytes - 1))
    with pytest.raises(ArtifactError, match=rf"{beside:,} over .*\n.* \+ tokenizer beside it {beside:,} \+ code 1,000"):
        exporter().write(tensors(), replace(counted, max_bytes=n_bytes))


# ---------------------------------------------------------------- atomicity
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_artifact(tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.titan"
    exporter().write(tensors(), request(path))
    before = path.read_bytes()

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(ArtifactError, match=r"cannot write .*No space left.*unchanged"):
        exporter().write(tensors(rows=30), request(path))
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    exporter().write(tensors(rows=30), request(path))
    assert path.read_bytes() != before


def test_a_write_that_is_interrupted_leaves_the_old_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.titan"
    exporter().write(tensors(), request(path))
    before = path.read_bytes()

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        exporter().write(tensors(rows=30), request(path))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "model.titan").mkdir()
    with pytest.raises(ArtifactError, match="cannot write"):
        exporter().write(tensors(), request(tmp_path / "model.titan"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot write"):
        exporter().write(tensors(), request(tmp_path / "file" / "model.titan"))
    assert {entry.name for entry in tmp_path.iterdir()} == {"model.titan", "file"}


# ---------------------------------------------------------------- tokenizer beside
def test_the_tokenizer_beside_is_shared_but_never_replaced(tmp_path: Path) -> None:
    exporter().write(tensors(), request(tmp_path / "a", tokenizer="beside"))
    exporter().write(tensors(rows=30), request(tmp_path / "b", tokenizer="beside"))
    other = {**FILES, "tokenizer.model": b"another"}
    with pytest.raises(ArtifactError, match=r"tokenizer.model exists and is not the tokenizer of c"):
        exporter().write(tensors(), request(tmp_path / "c", tokenizer="beside", files=other))
    assert read_artifact(tmp_path / "a").tokenizer_files == FILES
    assert not (tmp_path / "c").exists()
    with pytest.raises(ArtifactError, match="cannot be named"):
        exporter().write(tensors(), request(tmp_path / "added.json", tokenizer="beside"))


def test_the_tokenizer_beside_is_verified(tmp_path: Path) -> None:
    path, model = tmp_path / "a", tmp_path / "tokenizer.model"
    exporter().write(tensors(), request(path, tokenizer="beside"))
    model.write_bytes(bytes([FILES["tokenizer.model"][0] ^ 1]) + FILES["tokenizer.model"][1:])
    with pytest.raises(ArtifactError, match="does not match its checksum"):
        read_artifact(path)
    model.write_bytes(b"short")
    with pytest.raises(ArtifactError, match="another size"):
        read_artifact(path)
    model.unlink()
    with pytest.raises(ArtifactError, match="'tokenizer.model' should lie beside it"):
        read_artifact(path)
    os.mkfifo(model)
    with pytest.raises(ArtifactError, match="should lie beside it"):
        read_artifact(path)


# ---------------------------------------------------------------- mistakes of the caller
def test_levels_are_checked() -> None:
    for codec, level in (("zstd", 23), ("zstd", 0), ("lzma", 10), ("zlib", 0), ("brotli", 12), ("none", 1), ("auto", 3)):
        with pytest.raises(ValueError, match=f"level = {level} does not exist for codec '{codec}'"):
            ArtifactConfig(codec=codec, level=level)
    assert ArtifactConfig(codec="brotli", level=0).level == 0


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for codec, package in (("zstd", "zstandard"), ("brotli", "brotli")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ArtifactError, match=f'pip install "{package}'):
            exporter(codec)


def test_a_brotli_that_cannot_bound_its_output_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    old = type(sys)("brotli")
    old.Decompressor = type("Decompressor", (), {})
    monkeypatch.setitem(sys.modules, "brotli", old)
    with pytest.raises(ArtifactError, match='pip install "brotli>=1.2"'):
        compression.require("brotli")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"w": torch.zeros(2, dtype=torch.complex64)}, "'w': complex64 cannot be stored"),
        ({"bad\nname": torch.zeros(2)}, "printable"),
        ({"w": Encoded((2,), "float32", {}, quantizer="int8")}, "has parts"),
        ({"w": Encoded((2,), "floaty", {"values": torch.zeros(2)}, quantizer="q")}, "a dtype is one of"),
        ({"w": Encoded((2,), "float32", {"values": torch.zeros(2)}, {"values": 6}, "q")}, "1 to 7 of int8"),
        ({"w": Encoded((2,), "float32", {"values": torch.zeros(2)}, {"value": 6}, "q")}, "not among its parts"),
        ({"w": Encoded((2,), "float32", {"values": torch.full((2,), 40, dtype=torch.int8)}, {"values": 6}, "q")}, "do not fit in 6 bits"),
        ({"w": Encoded((2,), "float32", {"values": torch.zeros(2)}, {}, "q", {"x": float("nan")})}, "cannot be written as JSON"),
        ({"w": Encoded((2,), "float32", {"values": torch.zeros(2)}, {}, "q", {"x": object()})}, "cannot be written as JSON"),
    ],
)
def test_tensors_that_cannot_be_stored(tmp_path: Path, bad: dict, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        exporter().write(bad, request(tmp_path / "a"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../x", "a/b", "/etc/passwd", "..", ".hidden", "", "a\\b", "c:d", "x\0", "n\nl"])
def test_tokenizer_file_names_stay_in_their_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(ArtifactError, match="plain file name"):
        exporter().write({}, request(tmp_path / "a", files={name: b""}, tokenizer="beside"))
    assert list(tmp_path.iterdir()) == []


def test_the_published_layout_does_not_drift(tmp_path: Path) -> None:
    """The header and the payload of a small artifact, byte for byte: format version 2, and version 1 is read."""
    values = torch.tensor([[1, -1, -32, 31]], dtype=torch.int8)
    encoded = Encoded((1, 4), "float32", {"values": values, "scale": torch.tensor([0.5]).half()}, {"values": 6}, "int6", {"scale_dtype": "float16"})
    path = tmp_path / "a"
    exporter("none").write({"w": encoded, "b": torch.tensor([1.0])}, ExportRequest(path, "x = 1\n", None, "embed", {"t": b"tok"}, "fp"))
    data = path.read_bytes()
    payload = bytes([0x00, 0x38]) + bytes([0, 0, 0x80, 0x3F]) + bytes([0b11000001, 0b00001111, 0b01111110]) + b"tok"
    header = (
        '{"codec":"none","config":"x = 1\\n","files":[["t",3,"' + hashlib.sha256(b"tok").hexdigest() + '"]],"fingerprint":"fp","layout":"packed",'
        '"parts":[[1,"scale","float16",[1],null],[0,"tensor","float32",[1],null],[1,"values","int8",[1,4],6]],"payload_bytes":12,'
        '"payload_sha256":"' + hashlib.sha256(payload).hexdigest() + '","quantizers":[["int6",{"scale_dtype":"float16"}]],"raw_bytes":12,'
        '"tensors":[["b","float32",[1],null],["w","float32",[1,4],0]],"tokenizer":"embed"}'
    ).encode()

    def file(version: int, header: bytes) -> bytes:
        sizes = version.to_bytes(4, "little") + len(header).to_bytes(4, "little")
        return b"\x93titanlm" + sizes + hashlib.sha256(header).digest() + header + payload

    assert data == file(2, zlib.compress(header, 9))
    (tmp_path / "old").write_bytes(file(1, header))
    assert inspect(tmp_path / "old") == inspect(path)
    assert torch.equal(decode_tensors(read_artifact(tmp_path / "old").tensors)["w"], decode_tensors(read_artifact(path).tensors)["w"])
