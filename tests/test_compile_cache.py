"""Compiled code that travels with the run folder: what serves a machine that has nothing else, and what is passed over."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from titanlm.check import check
from titanlm.config import load
from titanlm.distributed import compile_cache
from titanlm.distributed.compile import compile_module
from titanlm.distributed.compile_cache import COMPILE_CACHE, CompileCache, cache_file, made_by
from titanlm.errors import TitanError
from titanlm.kernels import inductor_cache, products_quack, triton_cache
from titanlm.train import Trainer

CPU = torch.device("cpu")
CONTENT = b"compiled\ncode"


@pytest.fixture
def torch_cache(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """In place of torch's own functions: what was loaded. A test raises the counters as if something had been compiled."""
    loaded: list[bytes] = []
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: (CONTENT, None))
    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", lambda content: loaded.append(content) or True)  # type: ignore[func-returns-value]
    return loaded


def compile_something() -> None:
    counters["inductor"]["fxgraph_cache_miss"] += 1


def test_what_is_written_is_loaded_and_only_what_is_new_is_written(tmp_path: Path, torch_cache: list[bytes]) -> None:
    cache = CompileCache(tmp_path, CPU)
    assert cache.load() is None
    assert cache.write() == f"what was compiled is in {tmp_path / COMPILE_CACHE}, 0.0 MiB"
    compile_something()
    assert cache.write() is None  # torch would give what it cannot read again
    again = CompileCache(tmp_path, CPU)
    assert again.load() == f"compiled before: 0.0 MiB of {tmp_path / COMPILE_CACHE}"
    assert torch_cache == [CONTENT]
    assert again.write() is None
    compile_something()
    assert again.write() is not None
    # Another run may begin with it, and writes its own.
    (tmp_path / "b").mkdir()
    for source in (str(tmp_path), str(tmp_path / COMPILE_CACHE)):
        other = CompileCache(tmp_path / "b", CPU, source)
        assert other.load() == f"compiled before: 0.0 MiB of {tmp_path / COMPILE_CACHE}"
    assert other.write() is not None  # though nothing was new: its folder is to have all
    assert CompileCache(tmp_path / "b", CPU, str(tmp_path)).source == tmp_path / "b" / COMPILE_CACHE


def test_the_header_says_what_made_it(tmp_path: Path, torch_cache: list[bytes]) -> None:
    cache = CompileCache(tmp_path, CPU)
    compile_something()
    cache.write()
    head, _, content = (tmp_path / COMPILE_CACHE).read_bytes().partition(b"\n")
    assert content == CONTENT
    said = json.loads(head)
    assert said["made_by"] == made_by(CPU)
    assert said["made_by"]["torch"] == torch.__version__
    assert said["n_bytes"] == len(CONTENT)
    assert said["files"] == {}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda head, content: (head | {"made_by": head["made_by"] | {"torch": "2.0.0"}}, content), f"it is of torch 2.0.0 and this is {torch.__version__}"),
        (lambda head, content: (head | {"made_by": head["made_by"] | {"device": "NVIDIA H100"}}, content), "it is of device NVIDIA H100 and this is cpu"),
        (lambda head, content: (head | {"made_by": {}}, content), "it is of torch None"),
        (lambda head, content: (head | {"made_by": 3}, content), "it is no compile cache of titanlm"),
        (lambda head, content: (head, content[:-1]), "damaged, 12 of 13 bytes"),
        (lambda head, content: (head, b"C" + content[1:]), "damaged, its sha256 is another"),
        (lambda head, content: (head | {"files": {"/etc/a": 1}}, content), "it is no compile cache of titanlm"),
        (lambda head, content: (head | {"files": {"triton/../a": 1}}, content), "it is no compile cache of titanlm"),
        (lambda head, content: (head | {"files": {"triton": 1}}, content), "it is no compile cache of titanlm"),
        (lambda head, content: (head | {"files": {"elsewhere/a": 1}}, content), "it is no compile cache of titanlm"),
        (lambda head, content: (head | {"files": {"": 1}}, content), "it is no compile cache of titanlm"),
        (lambda head, content: (head | {"files": {"triton/a\0": 1}}, content), "it is no compile cache of titanlm"),
        (lambda head, content: (head | {"files": {"triton/a": -1}}, content), "it is no compile cache of titanlm"),
        (lambda head, content: (head | {"files": {"triton/a": 1.5}}, content), "it is no compile cache of titanlm"),
        (lambda head, content: (head | {"files": {"triton/a": 14}}, content), "it is no compile cache of titanlm"),
        (lambda head, content: ([], content), "it is no compile cache of titanlm"),
        (lambda head, content: ("x" * 5000, content), "it is no compile cache of titanlm"),
    ],
)
def test_others_and_damaged_ones_are_passed_over(tmp_path: Path, torch_cache: list[bytes], change: Any, said: str) -> None:
    cache = CompileCache(tmp_path, CPU)
    compile_something()
    cache.write()
    head, _, content = (tmp_path / COMPILE_CACHE).read_bytes().partition(b"\n")
    head, content = change(json.loads(head), content)
    (tmp_path / COMPILE_CACHE).write_bytes(json.dumps(head).encode() + b"\n" + content)
    told = CompileCache(tmp_path, CPU).load()
    assert told is not None
    assert "compile_cache.bin: not loaded: " in told
    assert said in told
    assert told.endswith("; what it holds is compiled anew")
    assert torch_cache == []


def test_a_file_that_torch_cannot_read_or_the_system(tmp_path: Path, torch_cache: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    cache = CompileCache(tmp_path, CPU)
    compile_something()
    cache.write()
    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", lambda content: None)
    assert "WARNING" in str(cache.load())
    (tmp_path / COMPILE_CACHE).unlink()
    (tmp_path / COMPILE_CACHE).mkdir()
    assert str(CompileCache(tmp_path, CPU).load()).endswith("not loaded: Is a directory; what it holds is compiled anew")
    gone = CompileCache(tmp_path / "gone", CPU)
    compile_something()
    assert str(gone.write()).endswith("not written: No such file or directory; the next start compiles again")


def test_kernels_of_flash_attention_4_come_along(tmp_path: Path, torch_cache: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """Those in use, out of the package's folder and into that of another machine, whose own stay."""
    one, other = tmp_path / "one", tmp_path / "other"
    monkeypatch.setenv("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", str(one))
    for name, code in {"v1/fwd/a.o": b"forward", "v1/bwd/b.o": b"backward", "v1/bwd/unused.o": b"of another run"}.items():
        (one / name).parent.mkdir(parents=True, exist_ok=True)
        (one / name).write_bytes(code)
    interface = ModuleType("flash_attn.cute.interface")
    for name, keys in (("fwd", ["a"]), ("bwd", ["b", "in memory alone"])):
        cache = SimpleNamespace(cache=dict.fromkeys(keys), cache_path=one / "v1" / name, _key_to_hash=str)
        setattr(interface, name, SimpleNamespace(compile_cache=cache))
    interface.uncached = SimpleNamespace(compile_cache={})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", interface)
    assert CompileCache(tmp_path, CPU).write() is not None

    monkeypatch.setenv("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", str(other))
    (other / "v1/bwd").mkdir(parents=True)
    (other / "v1/bwd/b.o").write_bytes(b"mine")
    assert str(CompileCache(tmp_path, CPU).load()).startswith("compiled before")
    assert torch_cache == [CONTENT]
    assert {path.name: path.read_bytes() for path in other.rglob("*.*")} == {"a.o": b"forward", "b.o": b"mine"}
    (other / "v1/fwd/a.o").unlink()
    (other / "v1/fwd").rmdir()
    (other / "v1/fwd").write_text("in the way")
    assert str(CompileCache(tmp_path, CPU).load()).endswith("fwd: File exists; what it holds is compiled anew")


def test_kernels_of_quack_come_along(tmp_path: Path, torch_cache: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the products that were used, by the package's own names for its files."""
    one, other = tmp_path / "one", tmp_path / "other"
    for name in ("print/compile-a.o", "print/compile-unused.o", "of another version/compile-a.o"):
        (one / name).parent.mkdir(parents=True, exist_ok=True)
        (one / name).write_text(name)
    host, cache, jit = (ModuleType(f"quack.{name}") for name in ("gemm_runtime.host", "cache", "cache.jit"))
    host._compile_gemm_epi = SimpleNamespace(cache={("a",): 0, ("in memory alone",): 0}, __qualname__="compile")  # type: ignore[attr-defined]
    jit._compute_source_fingerprint, jit._key_to_hash = lambda: "print", "-".join  # type: ignore[attr-defined]
    cache.jit = jit  # type: ignore[attr-defined]
    assert "quack" not in sys.modules
    assert products_quack.kernels_in_use() == []  # nothing is imported to find that out
    for module in (ModuleType("quack"), host, cache, jit):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setenv("QUACK_CACHE_DIR", str(one))
    assert CompileCache(tmp_path, CPU).write() is not None

    monkeypatch.setenv("QUACK_CACHE_DIR", str(other))
    assert str(CompileCache(tmp_path, CPU).load()).startswith("compiled before")
    assert {path.relative_to(other).as_posix(): path.read_text() for path in other.rglob("*.o")} == {"print/compile-a.o": "print/compile-a.o"}


def test_kernels_of_triton_come_along(tmp_path: Path, torch_cache: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """Those in use and what launches them, but for inductor's and for texts; where they are unpacked Triton is told of them."""
    one, other = tmp_path / "one", tmp_path / "other"
    names = [
        "A/mix.cubin",
        "A/mix.json",
        "A/mix.ptx",
        "A/__grp__mix.json",
        "B/triton_poi.cubin",
        "B/triton_poi.json",
        "C/__triton_launcher.x.so",
        "D/no_json.cubin",
    ]
    for name in (*names, "E/of_another_run.cubin", "E/of_another_run.json"):
        (one / name).parent.mkdir(parents=True, exist_ok=True)
        (one / name).write_text(name)
    used = {str(one / name) for name in (*names, "F/gone.so")} | {str(tmp_path / "elsewhere.so")}
    monkeypatch.setattr(triton_cache, "_used", used)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(one))
    assert CompileCache(tmp_path, CPU).write() is not None

    monkeypatch.setenv("TRITON_CACHE_DIR", str(other))
    (other / "A").mkdir(parents=True)
    (other / "A/mix.cubin").write_text("mine")
    again = CompileCache(tmp_path, CPU)
    assert str(again.load()).startswith("compiled before")
    assert torch_cache == [CONTENT]
    found = {path.relative_to(other).as_posix(): path.read_text() for path in other.rglob("*.*")}
    assert json.loads(found.pop("A/__grp__mix.json")) == {"child_paths": {name: str(other / "A" / name) for name in ("mix.cubin", "mix.json")}}
    assert found == {"A/mix.cubin": "mine", "A/mix.json": "A/mix.json", "C/__triton_launcher.x.so": "C/__triton_launcher.x.so"}

    # Of these nothing is new; another is written down though no graph was compiled.
    used.clear()
    used.add(str(other / "A/mix.cubin"))
    assert again.write() is None
    (other / "A/new.so").touch()
    used.add(str(other / "A/new.so"))
    assert again.write() is not None


def test_triton_is_watched_on_gpus_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched: list[int] = []
    monkeypatch.setattr(triton_cache, "record", watched.append)
    monkeypatch.setattr(compile_cache, "made_by", lambda device: {})
    for device in ("cpu", "cuda:1", "cuda"):
        CompileCache(tmp_path, torch.device(device))
    assert watched == [1, 0]


def test_what_inductor_measured_is_looked_for_here_on_gpus_alone(tmp_path: Path, torch_cache: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[bool] = []
    monkeypatch.setattr(inductor_cache, "look_here", lambda: looked.append(True))
    for cuda in ({}, {"cuda": "13.0"}):
        monkeypatch.setattr(compile_cache, "made_by", lambda device, cuda=cuda: cuda)
        (tmp_path / COMPILE_CACHE).unlink(missing_ok=True)
        cache = CompileCache(tmp_path, CPU)
        assert cache.load() is None
        assert cache.write() is not None
        assert looked == []
        assert str(CompileCache(tmp_path, CPU).load()).startswith("compiled before")
        assert looked == [True] * len(cuda)


def test_a_named_file_must_be_there(tiny: Path, tmp_path: Path) -> None:
    for source in ("nowhere", str(tmp_path), "a\0b", ""):
        with pytest.raises(TitanError, match=r"train\.compile_cache: .* is neither a compile cache nor a run folder with one"):
            cache_file(source)
    (problem,) = check(load(tiny, ["--train.compile=block", "--train.compile_cache=nowhere"])).problems
    assert problem.startswith("train.compile_cache: 'nowhere' is neither")
    assert check(load(tiny, ["--train.compile_cache=nowhere"])).problems == []  # nothing is compiled


def test_off_and_uncompiled_runs_have_none(tiny: Path) -> None:
    for settings in (["--train.compile_cache=off", "--train.compile=block"], ["--train.compile=none"]):
        with Trainer(load(tiny, settings)) as trainer:
            assert trainer.choices.compile_cache is None


@pytest.mark.parametrize(("n_layers", "mode"), [(4, "model"), (5, "block")])
def test_auto_compiles_shallow_models_whole(tiny: Path, n_layers: int, mode: str) -> None:
    with Trainer(load(tiny, ["--train.compile=auto", f"--model.n_layers={n_layers}"])) as trainer:
        assert trainer.choices.compiled == mode
    told = (trainer.folder.path / "log.txt").read_text()
    assert f"train.compile: {mode!r} for a model of {n_layers} blocks" in told


def test_auto_compiles_sharded_models_by_block() -> None:
    """FSDP2 gives its modules ``unshard``; what gathers a block would cut the graph of a whole model into pieces."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.ModuleList([torch.nn.Linear(2, 2)])

    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Model()

    assert compile_module(Module(), "auto") == "model"
    sharded: Any = Module()
    sharded.unshard = lambda: None
    assert compile_module(sharded, "auto") == "block"


SCRIPT = """
import json, sys
from torch._dynamo.utils import counters
from titanlm.config import load
from titanlm.train import Trainer
with Trainer(load(sys.argv[1], sys.argv[2:])) as trainer:
    trainer.train()
found = {name: dict(counters[name]) for name in ("inductor", "aot_autograd")}
print(json.dumps({name: value for each in found.values() for name, value in each.items() if "cache" in name or name.endswith("benchmark_gpu")}))
"""


def started(config: Path, machine: Path, *overrides: str) -> dict[str, int]:
    """What torch counted in a process whose caches are folders of ``machine``."""
    folders = {"TORCHINDUCTOR_CACHE_DIR": str(machine / "inductor"), "TRITON_CACHE_DIR": str(machine / "triton"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(config), *overrides]
    done = subprocess.run(command, env={**os.environ, **folders}, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_fresh_machine_compiles_no_graph_again(tiny: Path, tmp_path: Path, device: str) -> None:
    """The run folder is all that a second machine gets; training and validation are both in it."""
    common = ["--train.compile=block", "--scheduler=constant", "--train.validate_every=1", "--model.n_layers=1"]
    common += [f"--train.device={device}", "--train.deterministic=false", "--data.document_mask=false"]
    cold = started(tiny, tmp_path / "first", "--run.name=a", "--train.steps=2", *common)
    cache = tiny.parent / "runs" / "a" / COMPILE_CACHE
    assert cold["fxgraph_cache_miss"] > 0
    assert cache.stat().st_size > 10_000
    warm = started(tiny, tmp_path / "second", "--run.name=a", "--train.steps=4", *common)
    assert warm.get("fxgraph_cache_miss", 0) == warm.get("autograd_cache_miss", 0) == 0
    assert warm["autograd_cache_hit"] > 0
    timed = [any(name.endswith("benchmark_gpu") for name in counted) for counted in (cold, warm)]
    assert timed == [device == "cuda", False]  # nor is timed again which form of a kernel is fastest
    assert "compiled before" in (cache.parent / "log.txt").read_text()


FUNCTION = """
import json, sys
from pathlib import Path
import torch
from torch import nn
from torch._dynamo.utils import counters
from titanlm.distributed.compile import compile_module
from titanlm.distributed.compile_cache import CompileCache

class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * FORWARD

    @staticmethod
    def backward(ctx, g):
        return g * BACKWARD

class Block(nn.Module):
    def forward(self, x):
        return Scaled.apply(x).sin()

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.blocks = nn.Parameter(torch.ones(1)), nn.ModuleList([Block()])

class Module(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = Model()

module = Module()
cache = CompileCache(Path(sys.argv[1]), torch.device("cpu"))
cache.load()
compile_module(module, "block")
for FORWARD, BACKWARD in json.loads(sys.argv[2]):
    counters.clear()
    x = torch.ones(2, requires_grad=True)
    y = module.model.blocks[0](x)
    y.sum().backward()
    print(json.dumps({"y": y.tolist(), "g": x.grad.tolist()} | counters["aot_autograd"] | counters["inductor"]))
cache.write()
"""


@pytest.mark.slow
def test_functions_with_a_backward_pass_of_their_own_are_kept(tmp_path: Path) -> None:
    """Found again in another process; not for another constant, be it in the backward pass alone."""

    def found(machine: str, *constants: tuple[float, float]) -> list[dict[str, Any]]:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / machine), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", FUNCTION, str(tmp_path), json.dumps(constants)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    (cold,) = found("first", (2, 3))
    warm, *others = found("second", (2, 3), (2, 4), (5, 3))
    assert cold["autograd_cache_miss"] == 1
    assert warm["autograd_cache_hit"] == 1
    assert not [name for name in warm if "miss" in name or "bypass" in name]
    assert (warm["y"], warm["g"]) == (cold["y"], cold["g"])
    for other, (forward, backward) in zip(others, ((2, 4), (5, 3)), strict=True):
        assert other["autograd_cache_miss"] == 1
        assert other["y"] == pytest.approx([math.sin(forward)] * 2)
        assert other["g"] == pytest.approx([math.cos(forward) * backward] * 2)
