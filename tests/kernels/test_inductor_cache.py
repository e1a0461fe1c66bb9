"""The fastest form of a kernel, found below another folder than the one it was measured in."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch._inductor.runtime import triton_heuristics
from torch._inductor.runtime.autotune_cache import AutotuneCache

from titanlm.kernels.inductor_cache import look_here

NAME = Path("ab", "cabcdef.py")
SETTINGS: dict[str, Any] = {"autotune_local_cache": True}


def forms() -> list[Any]:
    """Two of them, compiled."""
    results = [triton_heuristics.StaticTritonCompileResult.__new__(triton_heuristics.StaticTritonCompileResult) for _ in range(2)]
    for result, size in zip(results, (64, 128)):
        result.config = SimpleNamespace(kwargs={"XBLOCK": size}, num_warps=4, num_stages=1, maxnreg=None, pre_hook=None)
    return results


def loaded(folder: Path) -> Any:
    """A kernel pickled where its source was below ``folder``."""
    kernel: Any = triton_heuristics.CachingAutotuner.__new__(triton_heuristics.CachingAutotuner)
    kernel.filename, kernel.inductor_meta, kernel.compile_results = str(folder / NAME), SETTINGS, forms()
    return kernel


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose file says that the second form is faster; this process has another, to which the file came."""
    first, second = tmp_path / "first", tmp_path / "second"
    configs = [form.config for form in forms()]
    cache = AutotuneCache.create(SETTINGS, str(first / NAME), triton_heuristics.hash_configs(configs))
    assert cache is not None
    cache.save(configs[1], time_taken_ns=1)
    shutil.move(first, second)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(second))
    monkeypatch.setattr(triton_heuristics.CachingAutotuner, "recheck_autotune_cache", triton_heuristics.CachingAutotuner.recheck_autotune_cache)
    return first


def test_it_is_found_here(measured: Path) -> None:
    look_here()
    look_here()
    kernel = loaded(measured)
    kernel.recheck_autotune_cache(reload_kernel_from_src=lambda: None)
    assert [form.config.kwargs for form in kernel.compile_results] == [{"XBLOCK": 128}]


def test_torch_alone_still_looks_where_it_was(measured: Path) -> None:
    """What the module is for; once this fails it can go."""
    kernel = loaded(measured)
    kernel.recheck_autotune_cache(reload_kernel_from_src=lambda: None)
    assert len(kernel.compile_results) == 2
