"""Copies of checkpoints at another place: a bucket, or a folder that outlives the machine.

A copy is the checkpoint folder as it is, under its own name. Object stores
have no rename, so here the manifest is what makes a copy whole: it is put last
and deleted first, and a folder without one does not count. An upload that was
cut off is simply there without a manifest; the next one of the step begins
anew. What comes back is checked against the manifest, byte for byte, before it
is given its name.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from titanlm import checkpoint
from titanlm.datasets.files import filesystem_of, is_url, one_line, reason_of, shown
from titanlm.errors import CheckpointError, DataError
from titanlm.runs import sync_folder

KEY = "checkpoint.copy_to"
_MANIFEST = "MANIFEST.json"
_NAME = re.compile(r"step-(\d{8})")
_CHUNK_BYTES = 4 << 20
_AT_ONCE = 8
"""Files under way at the same time: one stream rarely fills a network."""
_REPORT_S = 30.0
"""Between two words of progress."""


class RemoteCopies:
    """The copies of one run under a URL of fsspec or a local path. Used by one process at a time; ``say`` is told of long transfers.

    Every method raises CheckpointError naming the place and the remedy; user,
    password and query of a URL are never shown, nor what libraries say.
    """

    def __init__(self, url: str, say: Callable[[str], Any] = lambda line: print(line, file=sys.stderr)) -> None:
        self.shown = one_line(shown(url))
        self._say = say
        if not is_url(url):
            from fsspec.implementations.local import LocalFileSystem

            self._files: Any = LocalFileSystem(auto_mkdir=True)
            self._root = os.path.abspath(os.path.expanduser(url))
            return
        if url.lower().startswith(("https://", "hf://")):
            raise CheckpointError(f"{KEY}: {self.shown!r}: nothing can be copied there; name a bucket (s3://, gs://, az://) or a folder")
        try:
            self._files, root = filesystem_of(url, KEY)
        except DataError as error:
            raise CheckpointError(str(error)) from None
        self._root = root.rstrip("/")

    # ------------------------------------------------------------ there
    def upload(self, folder: Path, *, keep_last: int, best: int | None = None, keep_every: int = 0) -> None:
        """Copy a checkpoint folder, then delete copies that it makes superfluous.

        Of those up to its step the last ``keep_last`` stay, the ``best``, and
        each whose step is a multiple of ``keep_every``; later ones, of a run
        that was wound back, are left alone. A copy that is there whole, with the
        same manifest, is not made again. The folder must stay until this returns.
        """
        with _here(folder / _MANIFEST, "read"):
            manifest = (folder / _MANIFEST).read_bytes()
        step, listed = int(folder.name[-8:]), _listed(manifest, str(folder / _MANIFEST))
        with self._told(f"{folder.name} was not copied"):
            self._files.invalidate_cache()
            there = self._contents(folder.name)
            sizes = {name: size for name, (size, _) in listed.items()}
            if there != {**sizes, _MANIFEST: len(manifest)} or self._files.cat_file(self._at(folder.name, _MANIFEST)) != manifest:
                self._delete(folder.name)
                progress = _Progress(f"copying {folder.name} to {self.shown}", sum(sizes.values()), self._say)
                _side_by_side([partial(self._put, folder / name, size, sha256, progress) for name, (size, sha256) in listed.items()])
                self._files.pipe_file(self._at(folder.name, _MANIFEST), manifest)
        with self._told("older copies were not deleted"):
            self._rotate(step, keep_last, best, keep_every)

    def _rotate(self, newest: int, keep_last: int, best: int | None, keep_every: int) -> None:
        names = {step: name for step, name in self._folders() if step <= newest}
        complete = [step for step in names if _MANIFEST in self._contents(names[step])]
        kept = {*complete[-keep_last:], best, *(step for step in complete if keep_every and step % keep_every == 0)}
        for step, name in names.items():
            if step not in kept:  # those that were cut off included
                self._delete(name)

    def _delete(self, name: str) -> None:
        there = self._contents(name)
        if _MANIFEST in there:
            self._files.rm_file(self._at(name, _MANIFEST))
        if there:
            self._files.rm(self._at(name), recursive=True)

    def wind_back(self, step: int) -> None:
        """Discount copies of later steps, since the run goes on from this one: without a manifest none is taken up, and a later upload deletes it."""
        with self._told("later copies are still there"):
            for later, name in self._folders():
                if later > step and _MANIFEST in self._contents(name):
                    self._files.rm_file(self._at(name, _MANIFEST))

    # ------------------------------------------------------------ back
    def newest(self, than_step: int = -1) -> int | None:
        """The newest step above ``than_step`` of which there is a copy with a manifest."""
        with self._told("cannot be listed"):
            return next((step for step, name in reversed(self._folders()) if step > than_step and _MANIFEST in self._contents(name)), None)

    def contents(self) -> list[tuple[int, bytes | None, dict[str, int]]]:
        """(step, manifest, size of every file) of each copy, oldest first; one that was cut off has no manifest."""
        with self._told("cannot be listed"):
            found = [(step, name, self._contents(name)) for step, name in self._folders()]
            return [(step, self._manifest(name, sizes) if _MANIFEST in sizes else None, sizes) for step, name, sizes in found]

    def fetch(self, step: int, root: Path, *, than_step: int = -1) -> Path | None:
        """Bring the copy of a step into ``root`` and return its folder; None when no sound one is above ``than_step``.

        A damaged copy is named and the next older one is taken. A folder of the
        same name in ``root`` is replaced. A network that fails is an error, not damage.
        """
        with self._told("cannot be listed"):
            names = [name for one, name in reversed(self._folders()) if than_step < one <= step and _MANIFEST in self._contents(name)]
        for name in names:
            with _here(root / name, "written"):
                root.mkdir(parents=True, exist_ok=True)
                # Named as unfinished saves are, so that the next start sweeps away what a kill leaves.
                with TemporaryDirectory(prefix=f".tmp-{name}-", dir=root) as temporary:
                    problem = self._download(name, Path(temporary, name))
                    if problem is None:
                        return _publish(Path(temporary, name), root / name)
            self._say(f"WARNING: {self.shown}/{name}: {problem}; passed over")
        return None

    def _download(self, name: str, target: Path) -> str | None:
        """Copy a whole folder; what is wrong with it, or None."""
        target.mkdir()
        with self._told(f"{name} was not fetched"):
            there = self._contents(name)
            manifest = self._manifest(name, there)
        try:
            listed = _listed(manifest, _MANIFEST)
        except CheckpointError as error:
            return str(error)
        total = sum(size for size, _ in listed.values())
        if total > (free := shutil.disk_usage(target).free):
            raise CheckpointError(
                f"{target.parent.parent}: {total / 1e9:.1f} GB of {self.shown}/{name} are to come and {free / 1e9:.1f} GB are free; make room"
            )
        progress = _Progress(f"fetching {name} from {self.shown}", total, self._say)
        # What is missing or too short is for the check below to say.
        with self._told(f"{name} was not fetched"):
            _side_by_side([partial(self._get, target / file, size, progress) for file, (size, _) in listed.items() if file in there])
        (target / _MANIFEST).write_bytes(manifest)
        return checkpoint.verify(target)

    # ------------------------------------------------------------ one file
    def _put(self, source: Path, size: int, sha256: str, progress: _Progress, stopped: threading.Event) -> None:
        """Out, checked against the manifest as it is read."""
        digest, n_bytes = hashlib.sha256(), 0
        with _here(source, "read"):
            file = source.open("rb")
        with file, self._files.open(self._at(source.parent.name, source.name), "wb") as target:
            while not stopped.is_set():
                with _here(source, "read"):
                    chunk = file.read(_CHUNK_BYTES)
                if not chunk:
                    break
                target.write(chunk)
                digest.update(chunk)
                n_bytes += len(chunk)
                progress.add(len(chunk))
        if not stopped.is_set() and (n_bytes, digest.hexdigest()) != (size, sha256):
            raise CheckpointError(f"{source} is damaged: its size or sha256 differs from the manifest; the checkpoint was not copied to {self.shown}")

    def _get(self, target: Path, size: int, progress: _Progress, stopped: threading.Event) -> None:
        """In, never more of it than the manifest says."""
        left = size + 1  # one more shows that the file is too long
        with self._files.open(self._at(target.parent.name, target.name), "rb") as source, open(target, "xb") as file:
            while not stopped.is_set() and (chunk := source.read(min(left, _CHUNK_BYTES))):
                with _here(target, "written"):
                    file.write(chunk)
                left -= len(chunk)
                progress.add(len(chunk))
            with _here(target, "written"):
                file.flush()
                os.fsync(file.fileno())

    # ------------------------------------------------------------ the place
    def _at(self, *names: str) -> str:
        return "/".join([self._root, *names])

    def _folders(self) -> list[tuple[int, str]]:
        """(step, name) of what is called as a checkpoint is, oldest first, whole or not."""
        self._files.invalidate_cache()  # others may have written there, or this process by another object
        names = {entry["name"].rstrip("/").rpartition("/")[2] for entry in self._entries(self._root)}
        return sorted((int(match[1]), name) for name in names if (match := _NAME.fullmatch(name)))

    def _contents(self, name: str) -> dict[str, int]:
        """Size of each file of a copy."""
        return {entry["name"].rpartition("/")[2]: int(entry["size"]) for entry in self._entries(self._at(name)) if entry["type"] == "file"}

    def _manifest(self, name: str, sizes: dict[str, int]) -> bytes:
        """Nothing in place of what is larger than any honest one."""
        manifest: bytes = self._files.cat_file(self._at(name, _MANIFEST)) if sizes[_MANIFEST] <= checkpoint.MAX_MANIFEST_BYTES else b""
        return manifest

    def _entries(self, path: str) -> list[dict[str, Any]]:
        try:
            found: list[dict[str, Any]] = self._files.ls(path, detail=True)
        except FileNotFoundError:
            return []
        return found

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """Whatever the library of this protocol raises, as one CheckpointError."""
        try:
            yield
        except CheckpointError:
            raise
        except Exception as error:
            # Not "from error": a traceback would print what the library says, address and all.
            raise CheckpointError(f"{KEY}: {self.shown}: {what}: {reason_of(error)}; are the network, the access rights and the name right?") from None


# ---------------------------------------------------------------- parts
class _Progress:
    """Says how far a transfer is, if it takes long. Told by several threads."""

    def __init__(self, what: str, total: int, say: Callable[[str], Any]) -> None:
        self._what, self._total, self._say = what, total, say
        self._done, self._lock = 0, threading.Lock()
        self._began = self._said = time.monotonic()

    def add(self, n_bytes: int) -> None:
        with self._lock:
            self._done += n_bytes
            now = time.monotonic()
            if now - self._said < _REPORT_S:
                return
            self._said = now
        speed = self._done / 1e6 / (now - self._began)
        self._say(f"{self._what}: {self._done / 1e9:.2f} of {self._total / 1e9:.2f} GB, {speed:.0f} MB/s")


def _side_by_side(jobs: Sequence[Callable[[threading.Event], None]]) -> None:
    """Run all; when one fails the others stop at their next chunk, and its error is raised."""
    stopped = threading.Event()
    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="checkpoint-copy") as pool:
        futures = [pool.submit(job, stopped) for job in jobs]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextmanager
def _here(path: Path, what: str) -> Iterator[None]:
    """Failures of this machine's own disk, told apart from those of the other place."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path} cannot be {what}: {error.strerror or error}") from error


def _listed(manifest: bytes, source: str) -> dict[str, tuple[int, str]]:
    """Size and sha256 of each file that a manifest lists. It may be a stranger's: names are made paths of, sizes take room."""
    try:
        listed = {str(name): (int(file["bytes"]), str(file["sha256"])) for name, file in json.loads(manifest)["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{source} cannot be read: {type(error).__name__}") from None
    for name, (size, _) in listed.items():
        if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", name) or name == _MANIFEST or size < 0:
            raise CheckpointError(f"{source} lists {name!r} of {size} bytes, which is no file of a checkpoint")
    return listed


def _publish(folder: Path, target: Path) -> Path:
    """Give a checked folder its name. Between two renames what had it has another, under which ``checkpoint.sweep`` finds it."""
    sync_folder(folder)
    old = target.with_name(f".old-{target.name}-{os.getpid()}")
    if target.exists():
        target.rename(old)
    folder.rename(target)
    sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)
    return target
