"""The environment report holds what matters and nothing private; requirements name what is missing and the remedy."""

from __future__ import annotations

import getpass
import json
import os
import shutil
import socket
import stat
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import titanlm
from titanlm import environment
from titanlm.environment import c_compiler, cxx_compiler, format_report, git_state, report, requirements
from titanlm.registry import Component


def test_report_holds_what_a_run_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    values = report()
    assert values["titanlm"] == titanlm.__version__
    assert values["torch"] == torch.__version__
    assert values["variables"]["OMP_NUM_THREADS"] == "1"
    assert len(values["gpus"]) == torch.cuda.device_count()
    assert {"triton", "torchao", "torchdata"} <= values["packages"].keys()
    assert json.loads(json.dumps(values)) == values == report()
    text = format_report(values)
    for expected in (torch.__version__, "cuDNN", "FP8", "bf16", "torchao", "C compiler"):
        assert expected in text


def test_report_holds_nothing_private(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "environment_canary")
    monkeypatch.setenv("SOMETHING", "environment_canary")
    monkeypatch.setattr(socket, "gethostname", lambda: "host_canary")
    values = report()
    assert values["variables"].keys() <= set(environment.VARIABLES)
    assert "canary" not in json.dumps(values) + format_report(values)
    user = getpass.getuser()
    if len(user) > 4:
        assert user not in json.dumps(values)


def test_report_says_what_a_gpu_supports(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [("NVIDIA H200", 9, 0), ("NVIDIA A100", 8, 0), ("Tesla T4", 7, 5)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda index: SimpleNamespace(name=gpus[index][0], major=gpus[index][1], minor=gpus[index][2], total_memory=139 << 30),
    )
    values = report()
    assert [(gpu["bf16"], gpu["fp8"]) for gpu in values["gpus"]] == [(True, True), (True, False), (False, False)]
    assert "GPU 1" in format_report(values)
    assert "NVIDIA H200, 139.0 GiB, capability 9.0, bf16 yes, FP8 yes" in format_report(values)


# ---------------------------------------------------------------- compilers
def program(folder: Path, name: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("#!/bin/sh\n")
    (folder / name).chmod(stat.S_IRWXU)
    return folder / name


def test_compilers_follow_the_variable_then_the_usual_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    assert c_compiler() is None
    assert cxx_compiler() is None
    clang = program(folder, "clang")
    assert c_compiler() == str(clang)
    gcc = program(folder, "gcc")
    assert c_compiler() == str(gcc)
    assert cxx_compiler() is None  # gcc alone compiles no C++
    assert cxx_compiler() or program(folder, "g++").samefile(cxx_compiler() or "")
    other = program(tmp_path / "other folder", "mycc")
    monkeypatch.setenv("CC", f"'{other}' -O2")
    assert c_compiler() == str(other)
    for wrong in ("/nowhere/cc", "'unbalanced"):
        monkeypatch.setenv("CC", wrong)
        assert c_compiler() is None


# ---------------------------------------------------------------- commit
@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_git_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        settings = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        command = ["git", "-C", str(tmp_path), *settings, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=clean).stdout.strip()

    assert git_state(tmp_path) == (None, None)
    git("init")
    assert git_state(tmp_path) == (None, None)  # no commit yet
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "one")
    (tmp_path / "untracked").write_text("")
    monkeypatch.setenv("GIT_DIR", "/nowhere")  # as in a hook of another repository
    commit = git("rev-parse", "HEAD")
    assert git_state(tmp_path) == (commit, False)
    (tmp_path / "file").write_text("2")
    assert git_state(tmp_path) == (commit, True)
    (tmp_path / "installed").mkdir()
    assert git_state(tmp_path / "installed") == (None, None)
    monkeypatch.setenv("PATH", "")
    assert git_state(tmp_path) == (None, None)


# ---------------------------------------------------------------- requirements
def config(
    device: str = "auto",
    precision: str = "fp32",
    compiled: str = "none",
    loggers: tuple[str, ...] = (),
    at_end: bool = False,
    codec: str = "zstd",
) -> Any:
    return SimpleNamespace(
        train=SimpleNamespace(device=device, precision=precision, compile=compiled),
        logger=tuple(Component("logger", name, None) for name in loggers),
        tokenizer=Component("tokenizer", "byte", None),
        export=SimpleNamespace(at_end=at_end, exporter=Component("exporter", "artifact", SimpleNamespace(codec=codec))),
    )


def without(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    find = environment.importlib.util.find_spec
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: None if name in packages else find(name))


def test_nothing_is_missing_for_an_ordinary_config() -> None:
    assert requirements(config(device="cpu", precision="bf16", compiled="block", loggers=("console", "jsonl"), at_end=True, codec="lzma")) == []
    assert requirements(object()) == []


def test_cuda_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (problem,) = requirements(config(device="cuda"))
    assert problem.startswith("train.device: 'cuda'")
    assert "use 'cpu' or 'auto'" in problem
    assert requirements(config(device="auto", precision="bf16", compiled="model")) == []


def test_an_old_gpu_lacks_bf16_and_compile_needs_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    without(monkeypatch, "triton")
    problems = requirements(config(precision="bf16", compiled="block"))
    assert [problem.split(":")[0] for problem in problems] == ["train.precision", "train.compile"]
    assert requirements(config(device="cpu", precision="bf16", compiled="block")) == []


@pytest.mark.parametrize(
    ("recipe", "capability", "remedy"),
    [
        ("rowwise", (8, 0), "needs a GPU of compute capability 9.0, and A GPU has 8.0; leave the quantizer out (--quantizer=[])"),
        ("rowwise", (8, 9), "needs a GPU of compute capability 9.0, and A GPU has 8.9; use 'tensorwise'"),
        ("tensorwise", (8, 6), "needs a GPU of compute capability 8.9, and A GPU has 8.6; leave the quantizer out (--quantizer=[])"),
        ("tensorwise", (8, 9), None),
        ("rowwise", (9, 0), None),
    ],
)
def test_fp8_needs_a_gpu_that_has_it(recipe: str, capability: tuple[int, int], remedy: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    settings = config(device="cuda", precision="bf16")
    settings.quantizer = (Component.named("quantizer", "int8"), Component.named("quantizer", "float8", recipe=recipe))
    assert requirements(settings) == ([f"quantizer.1.recipe: {recipe!r} {remedy}"] if remedy else [])


def test_packages_of_components_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "wandb", "tensorboard", "zstandard", "brotli")
    loggers = ("console", "wandb", "tensorboard")
    assert requirements(config(loggers=loggers)) == [
        "logger.1: 'wandb' needs a package that is not installed; run: pip install wandb",
        "logger.2: 'tensorboard' needs a package that is not installed; run: pip install tensorboard",
    ]
    for codec, package in (("zstd", "zstandard"), ("brotli", "brotli")):
        (problem,) = requirements(config(at_end=True, codec=codec))
        assert problem.startswith("export.exporter.codec: ")
        assert f"pip install {package}" in problem
        assert requirements(config(codec=codec)) == []  # may be exported on another machine
