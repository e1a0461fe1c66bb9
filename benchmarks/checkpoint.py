"""Seconds that saving, verifying and loading a checkpoint take, beside torch's and safetensors' own ways.

    python benchmarks/checkpoint.py
    python benchmarks/checkpoint.py --mib 2048 --folder /scratch --device cuda

The state is parameters in fp32 and the two moments of Adam. Each way writes to
the same disk and flushes it, and is repeated, the ways in turn, since a disk has
its moods; the median is shown, and how many times titanlm's seconds it is. A
stall is what training waits for when the rest is done by a thread; the first one
gets its memory. Only titanlm's files are hashed, and verified when they are read.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from titanlm import checkpoint
from titanlm.saver import Saver

WIDTH = 1024


def make(mib: float, device: str) -> dict[str, Any]:
    """Matrices of 4 MiB, and a last one of what remains."""
    rows = max(1, int(mib * (1 << 20)) // 3 // 4 // WIDTH)
    sizes = [WIDTH] * (rows // WIDTH) + ([rows % WIDTH] if rows % WIDTH else [])
    model = {f"layer.{index}": torch.randn(size, WIDTH, device=device) for index, size in enumerate(sizes)}
    moments = {name: {"exp_avg": torch.randn_like(value), "exp_avg_sq": torch.rand_like(value)} for name, value in model.items()}
    return {"model": model, "optimizer": moments}


def flat(state: dict[str, Any]) -> dict[str, Tensor]:
    return dict(state["model"]) | {f"{name}.{key}": value for name, values in state["optimizer"].items() for key, value in values.items()}


def flush(path: Path) -> None:
    for file in [path, *path.iterdir()] if path.is_dir() else [path]:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def timed(action: Callable[[], Any]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def measure(root: Path, state: dict[str, Any], repeat: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of each try by what was done and how."""
    seconds: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    saver = Saver(root / "async")
    on_device = next(iter(state["model"].values())).is_cuda
    stager = DefaultStager(StagingOptions(on_device, False, False, on_device))  # pinned and not waited for on a GPU; its memory is kept, as ours is
    tensors = flat(state)
    folder = root / "sync" / checkpoint.folder_name(1)

    def synchronous() -> dict[str, Callable[[], Any]]:
        return {
            "titanlm": lambda: checkpoint.save(root / "sync", 1, state, {}, ""),
            "torch.save": lambda: (torch.save(state, root / "state.pt"), flush(root / "state.pt")),
            "safetensors": lambda: (save_file(tensors, root / "state.safetensors"), flush(root / "state.safetensors")),
            "dcp": lambda: dcp.save(state, checkpoint_id=root / "dcp", no_dist=True),
        }

    def loading() -> dict[str, Callable[[], Any]]:
        return {
            "titanlm": lambda: checkpoint.load(folder),
            "torch.load": lambda: torch.load(root / "state.pt", weights_only=True),
            "safetensors": lambda: {name: value.clone() for name, value in load_file(root / "state.safetensors").items()},
            "dcp": lambda: dcp.load(empty, checkpoint_id=root / "dcp", no_dist=True),
        }

    empty = {
        "model": {name: torch.empty_like(value) for name, value in state["model"].items()},
        "optimizer": {name: {key: torch.empty_like(value) for key, value in values.items()} for name, values in state["optimizer"].items()},
    }
    for number in range(repeat):
        for how, action in synchronous().items():
            shutil.rmtree(root / {"titanlm": "sync"}.get(how, how), ignore_errors=True)  # deleting the last one is not timed
            seconds["save"][how].append(timed(action))
        seconds["verify"]["titanlm"].append(timed(lambda: checkpoint.verify(folder)))
        for how, action in loading().items():
            seconds["load"][how].append(timed(action))
        stall = "async stall" if number else "async stall, first"
        shutil.rmtree(root / "async", ignore_errors=True)
        started = time.perf_counter()
        saver.save(1, state, {}, "")
        seconds[stall]["titanlm"].append(time.perf_counter() - started)
        saver.wait()
        seconds["async, all of it"]["titanlm"].append(time.perf_counter() - started)
        shutil.rmtree(root / "dcp-async", ignore_errors=True)
        started = time.perf_counter()
        future: Any = dcp.async_save(state, checkpoint_id=root / "dcp-async", no_dist=True, async_stager=stager)
        seconds[stall]["dcp"].append(time.perf_counter() - started)
        future.result()
        seconds["async, all of it"]["dcp"].append(time.perf_counter() - started)
    saver.close()
    return seconds


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=float, default=288.0, help="size of the state (default: %(default)s)")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--folder", help="where to write (default: the system's temporary folder)")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    state = make(options.mib, options.device)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        seconds = measure(Path(folder), state, options.repeat)
    print(f"{'what':<20} {'how':<12} {'seconds':>9} {'least':>9} {'ratio':>6}")
    for what in ("save", "async stall, first", "async stall", "async, all of it", "verify", "load"):
        for how, tries in seconds[what].items():
            median = statistics.median(tries)
            print(f"{what:<20} {how:<12} {median:>9.3f} {min(tries):>9.3f} {median / statistics.median(seconds[what]['titanlm']):>6.2f}")


if __name__ == "__main__":
    main()
