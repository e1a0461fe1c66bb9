"""What Triton compiled and keeps in files: kernels that no torch graph contains, and launchers in C.

Kernels that inductor wrote are in torch's own bytes and are passed over here;
they are called ``triton_…``. What custom operators launch is in Triton's folder
alone, a folder for each kernel by the hash of its source, compiler and options:

    KEY/NAME.cubin, KEY/NAME.json      all that a launch needs; beside them lie texts of what came between
    KEY/__grp__NAME.json               absolute paths of these, by which Triton finds them
    KEY/__triton_launcher.….so         or cuda_utils, compiled by the C compiler

Which of them a process used is seen by standing between Triton and its files,
which is what ``triton.knobs.cache.manager_class`` is for.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from titanlm.runs import write_atomic

_used: set[str] = set()
"""Paths of all that Triton read or wrote since ``record``."""


def disk_cache() -> Path:
    """Where Triton keeps what it compiled, once ``record`` has said so."""
    from torch._inductor.runtime.cache_dir_utils import triton_cache_dir  # which brings the compiler along

    return Path(triton_cache_dir(0)).absolute()


def record(index: int) -> None:
    """Note from now on what Triton reads and writes, in the folder for the GPU ``index``. Nothing where it is not installed.

    Inductor sets that folder at its first kernel, and it has to be the same before.
    """
    if importlib.util.find_spec("triton") is None:
        return
    from torch._inductor.runtime.cache_dir_utils import triton_cache_dir
    from triton import knobs
    from triton.runtime.cache import FileCacheManager

    os.environ.setdefault("TRITON_CACHE_DIR", triton_cache_dir(index))
    base: Any = knobs.cache.manager_class or FileCacheManager
    if not hasattr(base, "noted_by_titanlm"):
        knobs.cache.manager_class = _noting(base)


def _noting(base: Any) -> Any:
    class Noting(base):
        noted_by_titanlm = True

        def get_file(self, filename: str) -> str | None:
            path: str | None = super().get_file(filename)
            _used.update([path] if path else [])
            return path

        def put(self, *args: Any, **kwargs: Any) -> str:
            path: str = super().put(*args, **kwargs)
            _used.add(path)
            return path

        def get_group(self, filename: str) -> dict[str, str] | None:
            group: dict[str, str] | None = super().get_group(filename)
            _used.update((group or {}).values())
            return group

    return Noting


def kernels_in_use() -> list[Path]:
    """The files in ``disk_cache`` of what this process compiled or loaded, without inductor's kernels and the texts."""
    folder = disk_cache()
    used = {path for each in _used if (path := Path(each).absolute()).is_relative_to(folder) and not path.name.startswith("triton_")}
    kernels = [path for path in used if path.suffix == ".cubin" and path.with_suffix(".json").exists()]
    launchers = [path for path in used if path.suffix == ".so"]
    return sorted(path for path in (*kernels, *(kernel.with_suffix(".json") for kernel in kernels), *launchers) if path.exists())


def write_groups(paths: Iterable[Path]) -> None:
    """Let Triton find kernels whose files were put here from elsewhere. Raises OSError."""
    for path in paths:
        group = path.with_name(f"__grp__{path.name}")
        if path.suffix == ".json" and not group.exists():
            write_atomic(group, json.dumps({"child_paths": {each.name: str(each) for each in (path.with_suffix(".cubin"), path)}}), sync=False)
