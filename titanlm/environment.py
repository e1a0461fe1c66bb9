"""What a run stands on: versions, devices, compilers; and whether that is enough for a config.

Packages are looked up by their metadata, not imported: torchao alone takes
four seconds and prints warnings. Reports are stored with runs and pasted into
issues, so they hold no host name, no user name and no environment variable
beyond the few that change how torch runs.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import titanlm

PACKAGES = (
    "triton", "torchao", "torchdata", "numpy", "safetensors", "sentencepiece", "tiktoken", "tokenizers", "pyarrow", "fsspec", "zstandard", "brotli",
    "wandb", "tensorboard", "flash-attn-4",
)  # fmt: skip
"""Reported with their versions."""

VARIABLES = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "PYTORCH_CUDA_ALLOC_CONF")
"""The only environment variables that are ever reported."""

_NEEDED_BY = {
    ("logger", "wandb"): "wandb",
    ("logger", "tensorboard"): "tensorboard",
    ("tokenizer", "sentencepiece"): "sentencepiece",
    ("tokenizer", "tiktoken"): "tiktoken",
    ("tokenizer", "huggingface"): "tokenizers",
    ("tokenizer", "superbpe"): "tokenizers",
    ("dataset", "parquet"): "pyarrow",
    ("quantizer", "float8"): "torchao",
}
"""Component → the package it imports."""
_FP8 = (8, 9)
"""Compute capability of the first GPUs that have it."""
_CODECS = {"zstd": "zstandard", "brotli": "brotli"}


def c_compiler() -> str | None:
    """Path of the C compiler that torch.compile would call on a GPU: $CC if it is set, else cc, gcc or clang."""
    return _compiler("CC", "cc", "gcc", "clang")


def cxx_compiler() -> str | None:
    """Path of the C++ compiler that torch.compile would call on a CPU: $CXX if it is set, else g++ or clang++."""
    return _compiler("CXX", "g++", "clang++")


def _compiler(variable: str, *names: str) -> str | None:
    command = os.environ.get(variable, "").strip()
    if command:
        # Whoever compiles takes the variable at its word, even when it is wrong.
        try:
            return shutil.which(shlex.split(command)[0])
        except ValueError:
            return None
    return next((path for path in map(shutil.which, names) if path), None)


def report() -> dict[str, Any]:
    """Everything that may change what a run computes or how fast, as JSON-ready values; the same at every call."""
    import torch

    gpus = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            capability = (properties.major, properties.minor)
            gpus.append(
                {
                    "name": properties.name,
                    "memory_gib": round(properties.total_memory / 2**30, 1),
                    "capability": f"{properties.major}.{properties.minor}",
                    "bf16": capability >= (8, 0),
                    "fp8": capability >= _FP8,
                }
            )
    commit, dirty = git_state(Path(titanlm.__file__).parent.parent)
    return {
        "titanlm": titanlm.__version__,
        "commit": commit,
        "dirty": dirty,
        "python": platform.python_version(),
        "os": platform.platform(),
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if gpus else None,
        "gpus": gpus,
        "c_compiler": c_compiler(),
        "cxx_compiler": cxx_compiler(),
        "packages": {name: _version(name) for name in PACKAGES},
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def format_report(values: dict[str, Any]) -> str:
    """A report as aligned lines."""
    commit = f" (commit {values['commit'][:12]}{', with changes' if values['dirty'] else ''})" if values["commit"] else ""
    rows = [
        ("titanlm", f"{values['titanlm']}{commit}"),
        ("Python", f"{values['python']} on {values['os']}, {values['cpus']} CPUs"),
        ("torch", values["torch"]),
        ("CUDA", values["cuda"] or "none (a CPU build of torch)"),
        ("cuDNN", values["cudnn"] or "none"),
    ]
    for index, gpu in enumerate(values["gpus"]):
        supports = ", ".join(f"{label} {'yes' if gpu[key] else 'no'}" for key, label in (("bf16", "bf16"), ("fp8", "FP8")))
        rows.append((f"GPU {index}", f"{gpu['name']}, {gpu['memory_gib']} GiB, capability {gpu['capability']}, {supports}"))
    if not values["gpus"]:
        rows.append(("GPU", "none; bf16 works on the CPU, FP8 matrix products need a GPU"))
    rows.append(("C compiler", values["c_compiler"] or "none: train.compile falls back to uncompiled"))
    rows.append(("C++ compiler", values["cxx_compiler"] or "none: train.compile cannot compile for the CPU"))
    rows += [(name, version or "not installed") for name, version in values["packages"].items()]
    rows += [(f"${name}", value) for name, value in values["variables"].items()]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def requirements(run_config: Any) -> list[str]:
    """What a config needs and this machine lacks, each with dotted path first and the remedy; empty when all is there.

    A missing compiler is not among them: ``train.compile`` then falls back,
    loudly. Codecs count only when the run itself exports.
    """
    return [*_device_problems(run_config), *_package_problems(run_config)]


def _device_problems(run_config: Any) -> Iterator[str]:
    train = getattr(run_config, "train", None)
    device, precision, compiled = (getattr(train, name, "") for name in ("device", "precision", "compile"))
    if device == "cpu" or (device != "cuda" and precision != "bf16" and compiled in ("", "none")):
        return  # torch is not needed to tell
    import torch

    if not torch.cuda.is_available():
        if device == "cuda":
            why = f"torch {torch.__version__} is a CPU build" if torch.version.cuda is None else "torch finds no usable GPU or driver"
            yield f"train.device: 'cuda' is not available here, {why}; use 'cpu' or 'auto'"
        return
    if precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        yield f"train.precision: {torch.cuda.get_device_name()} has no bf16; use 'fp32'"
    if compiled not in ("", "none"):
        yield from _moments_problems(run_config)
    yield from _float8_problems(run_config)
    if compiled not in ("", "none") and not _installed("triton"):
        yield f"train.compile: {compiled!r} needs triton on a GPU; run: pip install triton, or use 'none'"


def _moments_problems(run_config: Any) -> Iterator[str]:
    import torch

    for index, entry in enumerate(getattr(run_config, "optimizer", ())):
        if getattr(entry.config, "moments", "") == "fp8" and torch.cuda.get_device_capability() < _FP8:
            yield f"optimizer.{index}.moments: 'fp8' needs a GPU of compute capability 8.9 or newer where a run is compiled; use 'int8'"


def _float8_problems(run_config: Any) -> Iterator[str]:
    import torch

    for index, entry in enumerate(getattr(run_config, "quantizer", ())):
        if entry.name != "float8" or (found := torch.cuda.get_device_capability()) >= (needed := entry.config.capability):
            continue
        remedy = "use 'tensorwise'" if found >= _FP8 else "leave the quantizer out (--quantizer=[])"
        what = f"{entry.config.recipe!r} needs a GPU of compute capability {needed[0]}.{needed[1]}"
        yield f"quantizer.{index}.recipe: {what}, and {torch.cuda.get_device_name()} has {found[0]}.{found[1]}; {remedy}"


def _package_problems(run_config: Any) -> Iterator[str]:
    slots = [(f"{kind}.{index}", component) for kind in ("logger", "quantizer") for index, component in enumerate(getattr(run_config, kind, ()))]
    slots.append(("tokenizer", getattr(run_config, "tokenizer", None)))
    for path, component in slots:
        name = getattr(component, "name", "")
        package = _NEEDED_BY.get((getattr(component, "kind", path.split(".")[0]), name))
        if package is not None and not _installed(package):
            yield f"{path}: {name!r} needs a package that is not installed; run: pip install {package}"
    backend = getattr(getattr(getattr(run_config, "model", None), "config", None), "attention_backend", "")
    if backend in ("flash3", "flash4"):
        from titanlm.kernels.refusals import missing_package  # torch is not needed to tell of other backends

        if remedy := missing_package(backend):
            yield f"model.attention_backend: {backend!r} needs a package that is not installed: {remedy}; or use 'auto'"
    export = getattr(run_config, "export", None)
    if getattr(export, "at_end", False):
        codec = getattr(getattr(getattr(export, "exporter", None), "config", None), "codec", None)
        package = _CODECS.get(codec) if isinstance(codec, str) else None
        if package is not None and not _installed(package):
            yield f"export.exporter.codec: {codec!r} needs a package that is not installed; run: pip install {package}, or use 'lzma'"


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # in sys.modules without a spec
        return True


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_state(root: Path) -> tuple[str | None, bool | None]:
    """(commit, whether tracked files differ from it) of the checkout at ``root``; None where it is none."""
    if not (root / ".git").exists():
        return None, None  # installed; a repository further up is not ours

    def git(*arguments: str) -> str | None:
        # Inside a git hook, variables point git at the repository of the hook.
        variables = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        try:
            done = subprocess.run(
                ["git", "-C", str(root), *arguments],
                capture_output=True, text=True, timeout=10, check=True, env={**variables, "GIT_OPTIONAL_LOCKS": "0"},
            )  # fmt: skip
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    commit = git("rev-parse", "--verify", "HEAD")
    changes = git("status", "--porcelain", "--untracked-files=no") if commit else None
    return commit or None, None if changes is None else bool(changes)
