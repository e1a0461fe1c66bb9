"""Fuzzing of everything that reads files of strangers: seconds in the tests, minutes by hand.

    python tests/faults/fuzz.py config --minutes 20

What a reader is given is either good, changed in one to three places, or noise.
It may read it or raise the error that it declares. Anything else is a find:
another exception, more than two seconds, half a gigabyte, a file opened for
writing elsewhere, a shell, a socket, an unpickled object. Hypothesis shrinks a
find and prints what was drawn.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import functools
import hashlib
import json
import os
import resource
import shutil
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import tomli_w
import torch
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st

from titanlm import checkpoint
from titanlm.config import RunConfig, dump, load, loads
from titanlm.datasets.shard_file import HEADER_WORDS, VARIANTS, open_shard, read_manifest
from titanlm.errors import ArtifactError, CheckpointError, ConfigError, DataError
from titanlm.exporters.artifact import read_artifact
from titanlm.exporters.encoding import ExportRequest, decode_tensors
from titanlm.exporters.header import MAGIC, PREFIX, VERSION
from titanlm.registry import Component, Slot, known, lookup

SECONDS = 2.0
BYTES = 500 << 20
FORBIDDEN = ("pickle.find_class", "os.system", "subprocess.Popen", "socket.connect", "socket.getaddrinfo", "exec.shell")

# ---------------------------------------------------------------- the oracle
_watched: list[tuple[str, Path]] = []
"""What happened, and the folder that may be written to; filled only inside ``bounded``."""


def _hook(name: str, arguments: tuple[Any, ...]) -> None:
    if not _inside:
        return
    if name in FORBIDDEN:
        _watched.append((name, Path()))
    elif name == "open" and isinstance(arguments[0], str) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        path = Path(os.path.realpath(arguments[0]))
        if _inside[-1] not in path.parents and "__pycache__" not in path.parts:
            _watched.append((name, path))


_inside: list[Path] = []
_hooked = functools.cache(lambda: sys.addaudithook(_hook))


@contextlib.contextmanager
def bounded(folder: Path) -> Iterator[None]:
    """Raises AssertionError for whatever no reader may do, however it ends."""
    _hooked()
    _watched.clear()
    _inside.append(folder.resolve())
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        yield
    finally:
        _inside.pop()
        assert not _watched, _watched
        assert time.process_time() - start < SECONDS
        assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10 < BYTES


# ---------------------------------------------------------------- what is drawn
ODD: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**31, 2**53, 2**62, 2**63 - 1, 2**64, -(2**63), 0.5, 1e308, float("nan"), float("inf"), "", "x", "../x", "/etc/passwd",
    "int8", "a\0b", "\ud800", "é" * 3000, "*", "nope://host/x", [], {}, [1], [[0]], {"name": "x"}, {"": 1}, {"$tensor": "x"}, [None] * 40,
)  # fmt: skip
"""Values that readers trip over."""


@st.composite
def changed(draw: st.DrawFn, good: Any) -> Any:
    """A JSON value with one to three changes anywhere in it."""
    value = copy.deepcopy(good)
    for _ in range(draw(st.integers(1, 3))):
        value = _change(draw, value)
    return value


def _change(draw: st.DrawFn, value: Any) -> Any:
    down = isinstance(value, dict | list) and len(value) and draw(st.integers(0, 9))
    if not down:
        if type(value) is int and draw(st.booleans()):
            return value + draw(st.sampled_from([-1, 1, 8, -8, 2**31]))
        return copy.deepcopy(draw(st.sampled_from(ODD)))
    where = draw(st.sampled_from(sorted(value) if isinstance(value, dict) else range(len(value))))
    how = draw(st.integers(0, 19))
    if how == 0:
        del value[where]
    elif how == 1 and isinstance(value, dict):
        value[draw(st.sampled_from(["x", "", "../y", f"{where}s"]))] = value.pop(where)
    elif how == 2 and isinstance(value, list):
        value.append(copy.deepcopy(value[where]))
    else:
        value[where] = _change(draw, value[where])
    return value


@st.composite
def damaged(draw: st.DrawFn, good: bytes) -> bytes:
    """Bytes with flips, cuts and additions, or others altogether."""
    how = draw(st.integers(0, 9))
    if how == 0:
        return draw(st.binary(max_size=300))
    data = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        if how == 1:
            data = data[:at]
        elif how == 2:
            data[at:at] = draw(st.binary(max_size=20))
        elif data:
            data[at] = draw(st.integers(0, 255))
    return bytes(data)


# ---------------------------------------------------------------- configs over the schema
TEXT = st.text(st.characters(codec="utf-8"), max_size=8)


@functools.cache
def values(hint: Any) -> st.SearchStrategy[Any]:
    """Tables, as TOML has them, of a settings class or of a type in one."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        slots = [item for item in args[1:] if isinstance(item, Slot)]
        if slots:
            names = sorted(known(slots[0].kind))
            return st.sampled_from(names).flatmap(functools.partial(component, slots[0].kind)) if names else st.nothing()
        return values(args[0])
    if origin is Literal:
        return st.sampled_from(args)
    if origin is Union or str(origin) == "<class 'types.UnionType'>":
        return st.one_of([values(one) for one in args if one is not type(None)])
    if origin is tuple:
        return st.lists(values(args[0]), max_size=2) if args[-1] is Ellipsis else st.tuples(*map(values, args)).map(list)
    if origin is dict or origin is not None:
        return st.dictionaries(TEXT, values(args[-1]), max_size=2)
    if dataclasses.is_dataclass(hint):
        return section(hint)
    simple: dict[Any, st.SearchStrategy[Any]] = {bool: st.booleans(), int: st.integers(0, 64), float: st.floats(0, 1), str: TEXT}
    return simple[hint]


@st.composite
def section(draw: st.DrawFn, cls: type, **fixed: Any) -> dict[str, Any]:
    hints = get_type_hints(cls, include_extras=True)
    tables = dict(fixed)
    for item in dataclasses.fields(cls):
        needed = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        strategy = values(hints[item.name])
        if needed or (not strategy.is_empty and draw(st.integers(0, 3)) == 0):
            tables[item.name] = draw(strategy)
    return tables


def component(kind: str, name: str) -> st.SearchStrategy[dict[str, Any]]:
    return section(lookup(kind, name).settings, name=name)


def as_toml(tables: Any) -> str:
    """What a file of these tables holds, although TOML has neither null nor half characters."""
    if isinstance(tables, dict):
        tables = {key: value for key, value in tables.items() if value is not None}
    try:
        return tomli_w.dumps(tables)
    except (TypeError, ValueError, AttributeError):
        return f"x = {tables!r}"


def try_config(data: st.DataObject, folder: Path) -> None:
    """Z1: a config drawn over the schema, as it is or changed; what loads comes back from its own dump."""
    tables = data.draw(values(RunConfig))
    tables.pop("imports", None)
    if data.draw(st.booleans()):
        tables = data.draw(changed(tables))
        if isinstance(tables, dict):
            tables.pop("imports", None)
    try:
        with bounded(folder):
            config = loads(as_toml(tables))
    except ConfigError:
        event("refused")
        return
    event("loaded")
    assert loads(dump(config)) == config


TOML = st.lists(
    st.sampled_from([*"[]{}=.,\n#\"' \\\t0aé", '"""', "'''", "[[", "]]", "name", "model", "nan", "-1", "0x", "1979-05-27", "true", "extends", "\r\n", "\\u12"]),
    max_size=60,
).map("".join)
GOOD_TOML = (
    'model = {name = "decoder", d_model = 64}\noptimizer = "adamw"\n[train]\nsteps = 3\nclip = 1.5\n'
    '[[validation]]\nname = "a"\n[validation.dataset]\nname = "text"\npaths = ["x"]\n'
)


def try_toml(data: st.DataObject, folder: Path) -> None:
    """Z2: a file of bytes."""
    file = folder / "run.toml"
    file.write_bytes(data.draw(damaged(GOOD_TOML.encode()) | TOML.map(str.encode) | st.binary(max_size=200)))
    with contextlib.suppress(ConfigError), bounded(folder):
        load(file)


# ---------------------------------------------------------------- artifacts
@functools.cache
def artifacts() -> list[bytes]:
    made = []
    with tempfile.TemporaryDirectory() as folder:
        tensors = {"w": Component.named("quantizer", "int6").build().encode(torch.arange(12.0).reshape(3, 4)), "norm": torch.ones(3).bfloat16()}
        for codec in ("zstd", "lzma", "zlib", "none"):
            path = Path(folder) / codec
            request = ExportRequest(path, "x = 1\n", None, "embed", {"tok": b"abc"}, "fp")
            Component.named("exporter", "artifact", codec=codec).build().write(tensors, request)
            made.append(path.read_bytes())
    return made


def try_artifact(data: st.DataObject, folder: Path) -> None:
    """Z3: header or payload changed and signed anew, or bytes changed."""
    good = data.draw(st.sampled_from(artifacts()))
    end = PREFIX.size + PREFIX.unpack(good[: PREFIX.size])[2]
    how = data.draw(st.integers(0, 3))
    if how == 0:
        made = data.draw(damaged(good))
    else:
        header, payload = json.loads(zlib.decompress(good[PREFIX.size : end])), good[end:]
        if how == 1:
            payload = data.draw(damaged(payload))
        elif how == 2:
            payload = zlib.compress(data.draw(damaged(b"\0" * 40)))
            header["codec"] = "zlib"
        if how != 2 or data.draw(st.booleans()):
            header = data.draw(changed(header))
        if isinstance(header, dict):
            header |= {"payload_bytes": len(payload), "payload_sha256": hashlib.sha256(payload).hexdigest()}
        version = data.draw(st.integers(1, VERSION))
        text = json.dumps(header).encode()
        text = text if version == 1 else zlib.compress(text)
        made = PREFIX.pack(MAGIC, version, len(text), hashlib.sha256(text).digest()) + text + payload
    file = folder / "artifact"
    file.write_bytes(made)
    with contextlib.suppress(ArtifactError), bounded(folder):
        decode_tensors(read_artifact(file).tensors)
        event("read")


# ---------------------------------------------------------------- token shards
def try_shard(data: st.DataObject, folder: Path) -> None:
    """Z4: a header of any words before any number of bytes, and the manifest beside it."""
    magic, (version, dtype) = data.draw(st.sampled_from(sorted(VARIANTS.items(), key=lambda item: item[0])))
    n_tokens = data.draw(st.integers(0, 20))
    header = np.zeros(HEADER_WORDS, "<i4")
    header[:3] = magic, version, n_tokens
    for _ in range(data.draw(st.integers(0, 2))):
        header[data.draw(st.integers(0, 20))] = data.draw(st.integers(-(2**31), 2**31 - 1))
    content = header.tobytes() + bytes(n_tokens * dtype.itemsize)
    if data.draw(st.booleans()):
        content = data.draw(damaged(content))
    file = folder / "a.bin"
    file.write_bytes(content)
    with contextlib.suppress(DataError), bounded(folder):
        ids = open_shard(file).tokens()
        assert ids.sum() >= 0  # every byte of it can be read
        event("read")
    (folder / "shards.json").write_text(json.dumps(data.draw(changed({"format": 1, "sets": {"train": {"tokenizer": "t", "files": [{"name": "a.bin"}]}}}))))
    with contextlib.suppress(DataError), bounded(folder):
        read_manifest(folder)


# ---------------------------------------------------------------- checkpoints
@functools.cache
def saved() -> dict[str, bytes]:
    """The files of a checkpoint of step 3."""
    state = {
        "model": {"w": torch.arange(12.0).reshape(3, 4), "b": torch.ones(3).bfloat16()},
        "data": {"streams": {0: {"ids": np.arange(7, dtype=np.int32), "at": 5}}},
        "progress": {"step": 3, "none": None},
    }
    with tempfile.TemporaryDirectory() as folder:
        made = checkpoint.save(Path(folder), 3, state, {"rng": torch.zeros(4, dtype=torch.uint8), "at": 1}, "x = 1\n")
        return {file.name: file.read_bytes() for file in made.iterdir()}


def try_checkpoint(data: st.DataObject, folder: Path) -> None:
    """Z5: manifest, JSON or the header of a file of tensors changed, with checksums that are right again, or bytes of any file."""
    files = dict(saved())
    name = data.draw(st.sampled_from(sorted(files)))
    how = data.draw(st.integers(0, 3))
    if how == 0 or name == "config.toml":
        files[name] = data.draw(damaged(files[name]))
    elif name.endswith(".json"):
        files[name] = json.dumps(data.draw(changed(json.loads(files[name])))).encode()
    else:
        length = int.from_bytes(files[name][:8], "little")
        header = json.dumps(data.draw(changed(json.loads(files[name][8 : 8 + length])))).encode()
        files[name] = len(header).to_bytes(8, "little") + header + files[name][8 + length :]
    if name != "MANIFEST.json" and data.draw(st.integers(0, 4)):
        manifest = json.loads(files["MANIFEST.json"])
        manifest["files"][name] = {"bytes": len(files[name]), "sha256": hashlib.sha256(files[name]).hexdigest()}
        files["MANIFEST.json"] = json.dumps(manifest).encode()
    target = folder / "step-00000003"
    target.mkdir()
    for each, content in files.items():
        (target / each).write_bytes(content)
    with contextlib.suppress(CheckpointError), bounded(folder):
        checkpoint.load(target)
        event("read")


TARGETS: dict[str, Callable[[st.DataObject, Path], None]] = {
    "config": try_config,
    "toml": try_toml,
    "artifact": try_artifact,
    "shard": try_shard,
    "checkpoint": try_checkpoint,
}


def fuzz(name: str, n_examples: int, *, derandomize: bool = False) -> None:
    """Try a target with so many inputs; raises with the smallest find."""
    one = TARGETS[name]
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))

    @settings(
        max_examples=n_examples, deadline=None, derandomize=derandomize, database=None, suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink], print_blob=True,
    )  # fmt: skip
    @given(st.data())
    def attempt(data: st.DataObject) -> None:
        inner = folder / "in"
        inner.mkdir()
        try:
            one(data, inner)
        finally:
            shutil.rmtree(inner)

    try:
        attempt()
        assert list(folder.iterdir()) == [], "something was written outside"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=sorted(TARGETS))
    parser.add_argument("--minutes", type=float, default=20.0)
    args = parser.parse_args()
    end, rounds = time.monotonic() + 60 * args.minutes, 0
    while time.monotonic() < end:
        fuzz(args.target, 1000)
        rounds += 1
        print(f"{args.target}: {rounds * 1000:,} inputs, nothing found", flush=True)


if __name__ == "__main__":
    main()
