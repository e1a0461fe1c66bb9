"""What torch.compile made, in one file of the run folder, for the next start of the run or of one like it.

torch keeps compiled code below ``$TORCHINDUCTOR_CACHE_DIR``, by default in the
machine's temporary folder, which a fresh machine has not got and a shared one
loses. ``torch.compiler.save_cache_artifacts`` gives all that this process
compiled or found there as one string of bytes; loaded before the first
compilation it fills that folder again. Code for GPUs is in it ready to run; for
CPUs the graphs are, and their C++ is compiled anew where the folder lacks it.
Others compile kernels themselves, into files of their own (``KERNELS``), and
those that this process used follow torch's bytes.

The file begins with a line of JSON: versions, device, length and sha256 of what
follows, names and lengths of the others' files. Another torch or device has
no use for the rest, and a damaged file is told by its hash; either is passed
over with a note, because all that it costs is time. The hash is no protection:
torch unpickles what follows and runs it.

Rank 0 writes. The code of a GPU is keyed by its number too, so other ranks on
the same host find only what does not depend on it.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from titanlm.errors import TitanError
from titanlm.kernels import flash4, inductor_cache, products_quack, triton_cache
from titanlm.runs import write_atomic

COMPILE_CACHE = "compile_cache.bin"
MAX_HEADER_BYTES = 1 << 20
MIB = 1 << 20

KERNELS = {
    "flash4": (flash4.disk_cache, flash4.kernels_in_use),
    "quack": (products_quack.disk_cache, products_quack.kernels_in_use),
    "triton": (triton_cache.disk_cache, triton_cache.kernels_in_use),
}
"""First part of the names in the file → where such files belong on this machine, and which of those there this process used."""


class CompileCache:
    """The file of a run, and ``source``: a run folder or file to load where the run has none of its own, "run" for none."""

    def __init__(self, folder: Path, device: torch.device, source: str = "run") -> None:
        self.path = folder / COMPILE_CACHE
        self.source = self.path if source == "run" or self.path.exists() else cache_file(source)
        self.made_by = made_by(device)
        self._misses: int | None = misses()
        """As they were at the start; None once the file is written."""
        self._loaded: set[str] = set()
        """Names of the files of kernels in what was loaded."""
        if device.type == "cuda":
            triton_cache.record(device.index or 0)

    def load(self) -> str | None:
        """Make torch find what the file holds; what to tell of it, None when there is no file.

        Every rank, before anything is compiled.
        """
        try:
            with self.source.open("rb") as file:
                head, content = file.readline(MAX_HEADER_BYTES), file.read()
        except FileNotFoundError:
            return None
        except OSError as error:
            return f"WARNING: {self.source}: not loaded: {error.strerror}; what it holds is compiled anew"
        if why := self._foreign(head, content):
            return f"{self.source}: not loaded: {why}; what it holds is compiled anew"
        files = json.loads(head)["files"]
        n_torch = len(content) - sum(files.values())
        try:
            _unpack(files, content[n_torch:])
        except OSError as error:
            return f"WARNING: {self.source}: not loaded: {error.filename}: {error.strerror}; what it holds is compiled anew"
        if torch.compiler.load_cache_artifacts(content[:n_torch]) is None:
            return f"WARNING: {self.source}: not loaded: torch cannot read it; what it holds is compiled anew"
        self._loaded = set(files)
        if "cuda" in self.made_by:
            inductor_cache.look_here()
        return f"compiled before: {len(content) / MIB:.1f} MiB of {self.source}"

    def _foreign(self, head: bytes, content: bytes) -> str:
        try:
            said = json.loads(head)
            made, n_bytes, sha256, files = said["made_by"], said["n_bytes"], said["sha256"], said["files"]
            changed = [f"it is of {name} {made.get(name)} and this is {value}" for name, value in self.made_by.items() if made.get(name) != value]
            sound = all(_is_name(name) and type(length) is int and length >= 0 for name, length in files.items()) and sum(files.values()) <= n_bytes
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            sound = False
        if not sound:
            return "it is no compile cache of titanlm"
        if changed:
            return ", ".join(changed)
        if n_bytes != len(content) or sha256 != hashlib.sha256(content).hexdigest():
            return f"damaged, {len(content):,} of {n_bytes:,} bytes" if n_bytes != len(content) else "damaged, its sha256 is another"
        return ""

    def write(self) -> str | None:
        """Write all that was compiled or loaded up to now, if any of it, graph or kernel, is not in the file; what to tell of it. Rank 0.

        Once in a process: what torch gives at a second time holds all, but only
        what came after the first is found again in it (seen with 2.13). What is
        compiled later is written by the next start, which compiles it too.
        """
        if self._misses is None:
            return None
        found = {f"{kind}/{path.relative_to(folder()).as_posix()}": path for kind, (folder, in_use) in KERNELS.items() for path in in_use()}
        if misses() == self._misses and found.keys() <= self._loaded and self.path.exists():
            return None
        self._misses = None
        saved = torch.compiler.save_cache_artifacts()
        if saved is None:
            return None
        try:
            files = {name: path.read_bytes() for name, path in found.items()}
            content = b"".join((saved[0], *files.values()))
            header = {"made_by": self.made_by, "n_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            header["files"] = {name: len(code) for name, code in files.items()}
            write_atomic(self.path, json.dumps(header).encode() + b"\n" + content)
        except OSError as error:
            return f"WARNING: {self.path}: not written: {error.strerror}; the next start compiles again"
        return f"what was compiled is in {self.path}, {len(content) / MIB:.1f} MiB"


def _is_name(name: str) -> bool:
    """Of a file below one of the folders in ``KERNELS``, and of nothing outside it."""
    kind, *rest = PurePosixPath(name).parts or [""]
    return kind in KERNELS and rest != [] and ".." not in rest and name.isprintable()


def _unpack(files: dict[str, int], content: bytes) -> None:
    """Put the named parts of ``content``, which follow one another, where their users look for them; what is there is left. Raises OSError."""
    placed: dict[str, list[Path]] = {kind: [] for kind in KERNELS}
    start = 0
    for name, n_bytes in files.items():
        kind, *rest = PurePosixPath(name).parts
        path = KERNELS[kind][0]().joinpath(*rest)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, content[start : start + n_bytes], sync=False)
        placed[kind].append(path)
        start += n_bytes
    triton_cache.write_groups(placed["triton"])


def misses() -> int:
    """How many graphs torch has compiled in this process because no cache had them."""
    from torch._dynamo.utils import counters

    return counters["inductor"]["fxgraph_cache_miss"] + counters["aot_autograd"]["autograd_cache_miss"]


def cache_file(source: str) -> Path:
    """The file that a setting names, by itself or by its run folder. Raises TitanError when there is none."""
    path = Path(source).expanduser()
    file = path / COMPILE_CACHE if path.is_dir() else path
    if "\0" in source or not file.is_file():
        raise TitanError(f"train.compile_cache: {source!r} is neither a compile cache nor a run folder with one; use 'run', 'off', or one of these")
    return file


def made_by(device: torch.device) -> dict[str, Any]:
    """What compiled code depends on beside its graph."""
    found = {"torch": torch.__version__, "python": f"{sys.version_info.major}.{sys.version_info.minor}"}
    if device.type != "cuda":
        return found | {"device": f"cpu {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"}
    return found | {"device": torch.cuda.get_device_name(device), "cuda": str(torch.version.cuda)}
