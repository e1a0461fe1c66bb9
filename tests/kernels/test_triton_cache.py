"""What Triton itself does with the files that are kept of it: one kernel compiled here is found in another folder. No GPU is needed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from titanlm.distributed.compile_cache import CompileCache
from titanlm.kernels import triton_cache

triton = pytest.importorskip("triton")
compiler, backends, cache, build = (pytest.importorskip(f"triton.{name}") for name in ("compiler", "backends.compiler", "runtime.cache", "runtime.build"))
tl = triton.language
CPU = torch.device("cpu")


@triton.jit
def doubled(x):
    tl.store(x, 2 * tl.load(x))


@triton.jit
def triton_poi_doubled(x):
    tl.store(x, 2 * tl.load(x))


@pytest.fixture
def hits(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each compilation, whether it was found. Triton's settings, and what was recorded, are afterwards as before."""
    found: list[bool] = []
    monkeypatch.setattr(triton.knobs.compilation, "listener", lambda *, cache_hit, **_: found.append(cache_hit))
    monkeypatch.setattr(triton.knobs.cache, "manager_class", None)
    monkeypatch.setattr(triton_cache, "_used", set())
    return found


def compiled(kernel: Any) -> Any:
    source = compiler.ASTSource(fn=kernel, signature={"x": "*fp32"}, constexprs={})
    return compiler.compile(source, target=backends.GPUTarget("cuda", 90, 32))


def test_another_machine_finds_what_was_compiled(tmp_path: Path, hits: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: (b"torch", None))
    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", lambda content: content == b"torch" or None)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "one"))
    compiled(triton_poi_doubled)  # by another process, as it were
    triton_cache.record(0)
    triton_cache.record(0)  # which is once
    assert triton.knobs.cache.manager_class.mro()[1] is cache.FileCacheManager
    cubin = compiled(doubled).asm["cubin"]
    compiled(triton_poi_doubled)
    monkeypatch.setattr(build, "_build", lambda name, source, folder, *_: source)  # its own text in place of what a C compiler makes of it
    monkeypatch.setattr(build, "_load_module_from_path", lambda name, path: Path(path).read_text())
    assert build.compile_module_from_src("int launch;", "__triton_launcher") == "int launch;"
    assert hits == [False, False, True]
    kept = triton_cache.kernels_in_use()
    assert sorted(path.name.partition(".")[0] for path in kept) == ["__triton_launcher", "doubled", "doubled"]
    assert CompileCache(tmp_path, CPU).write() is not None

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "other"))
    triton_cache._used.clear()
    assert str(CompileCache(tmp_path, CPU).load()).startswith("compiled before")
    monkeypatch.setattr(build, "_build", lambda *_: pytest.fail("built again"))
    assert compiled(doubled).asm["cubin"] == cubin
    assert build.compile_module_from_src("int launch;", "__triton_launcher") == "int launch;"
    assert hits == [False, False, True, True]
    # What was found is in use as well.
    again = [path.relative_to(tmp_path / "other") for path in triton_cache.kernels_in_use()]
    assert again == [path.relative_to(tmp_path / "one") for path in kept]


def test_the_folder_is_that_of_inductor(tmp_path: Path, hits: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", "")
    del os.environ["TRITON_CACHE_DIR"]
    triton_cache.record(1)
    assert triton_cache.disk_cache() == tmp_path / "triton" / "1" == Path(triton.knobs.cache.dir)
