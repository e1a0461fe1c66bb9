"""Files of a remote folder: what is there, and copying them whole or not at all.

The folder is behind an address that fsspec opens, above all the Hugging Face
Hub's, or a local one. Names of a listing are a
stranger's: they are checked before a path is made of them. What libraries say of
a failure may carry addresses and tokens, so only its class, its status and the
system's own words are printed.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from titanlm.datasets.files import PROTOCOLS, options_of
from titanlm.errors import DataError, TitanError
from titanlm.loggers.text import printable

_CHUNK_BYTES = 1 << 20
_PACKAGES = {**PROTOCOLS, "http": "aiohttp"}
"""What opens an address, by its protocol. Mirrors in a local network have no certificate."""


@dataclass(frozen=True)
class Remote:
    """A file of a remote folder."""

    name: str
    """Below the folder, with slashes."""
    path: str
    """What the file system calls it."""
    size_bytes: int


@dataclass(frozen=True)
class Fetched:
    """What a download did."""

    n_files: int
    """Copied now."""
    n_present: int
    """There already, with the right size."""
    n_bytes: int
    """Copied now."""
    elapsed_s: float

    def __str__(self) -> str:
        speed = f", {self.n_bytes / 1e6 / max(self.elapsed_s, 1e-9):.1f} MB/s" if self.n_files else ""
        present = f"; {self.n_present:,} were there already" if self.n_present else ""
        return f"{self.n_files:,} files, {self.n_bytes / 1e6:,.1f} MB{speed}{present}"


class Folder:
    """A remote folder, opened.

    Raises DataError for an address of a kind that is not read or with a
    password in it, and when what opens it is not installed.
    """

    def __init__(self, url: str) -> None:
        self.shown = shown(url)
        self._files, self._root = self._open(url)
        # One request a file; without it each block of a file is a request of its own.
        self._streaming = {"block_size": 0} if url.startswith(("hf://", "http://", "https://")) else {}

    def _open(self, url: str) -> tuple[Any, str]:
        import fsspec.core
        from fsspec.implementations.local import LocalFileSystem

        if not is_url(url):
            return LocalFileSystem(), os.path.abspath(os.path.expanduser(url))
        protocol, _, rest = url.partition("://")
        if protocol not in _PACKAGES or "::" in rest:
            raise DataError(f"{self.shown}: no address that is read (there are {', '.join(f'{one}://' for one in _PACKAGES)}; local folders have none)")
        if "@" in re.split(r"[/?#]", rest)[0]:
            raise DataError(f"{self.shown}: has a user or password in it, which would end up in logs; put them in the environment")
        try:
            with self._told("cannot be opened"):
                files, root = fsspec.core.url_to_fs(url, **options_of(protocol))
        except ImportError:
            raise DataError(f"{self.shown}: a package is missing; pip install '{_PACKAGES[protocol]}'") from None
        return files, root

    def list(self) -> list[Remote]:
        """Every file below, sorted by name.

        Raises DataError when the folder cannot be reached, does not exist or is
        empty, and for a name that leads out of it.
        """
        with self._told("cannot be listed"):
            found = self._files.find(self._root, detail=True)
        if not found:
            raise DataError(f"{self.shown}: there is no file in it; is the name right?")
        return sorted((Remote(_safe(self._below(path), self.shown), path, info.get("size") or 0) for path, info in found.items()), key=lambda one: one.name)

    def fetch(self, files: Sequence[Remote], output: Path) -> Fetched:
        """Copy files into ``output``, under their names.

        Raises DataError when a file cannot be read to its end or has not the
        size of the listing; what was copied until then stays.
        """
        from tqdm import tqdm

        missing = [file for file in files if not _is_there(output / file.name, file.size_bytes)]
        total = sum(file.size_bytes for file in missing)
        output.mkdir(parents=True, exist_ok=True)
        if total > (free := shutil.disk_usage(output).free):
            raise DataError(f"{output}: {total / 1e9:.1f} GB are to come and {free / 1e9:.1f} GB are free; name another folder with --output or fewer files")
        start = time.perf_counter()
        with tqdm(total=total, unit="B", unit_scale=True, disable=None, desc="downloading") as bar:  # None: only on a terminal
            for number, file in enumerate(missing, 1):
                bar.set_postfix_str(f"file {number} of {len(missing)}", refresh=False)
                with self._told(f"{printable(file.name)} was not copied; the same command goes on with what is missing"):
                    self._copy(file, output / file.name, bar.update)
        return Fetched(len(missing), len(files) - len(missing), total, time.perf_counter() - start)

    def _copy(self, file: Remote, target: Path, advance: Callable[[int], Any]) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        # In the same folder, or the rename would not be one; a name of its own, so that two downloads do not write one file.
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
        n_bytes = 0
        try:
            with open(temporary, "xb") as out:
                with self._files.open(file.path, "rb", **self._streaming) as source:
                    while n_bytes <= file.size_bytes and (chunk := source.read(_CHUNK_BYTES)):
                        out.write(chunk)
                        n_bytes += len(chunk)
                        advance(len(chunk))
                out.flush()
                os.fsync(out.fileno())
            if n_bytes != file.size_bytes:
                raise DataError(
                    f"{self.shown}: {printable(file.name)} has {file.size_bytes:,} bytes by the listing and "
                    f"{'more' if n_bytes > file.size_bytes else f'{n_bytes:,}'} came; it was not kept, try again"
                )
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)  # renamed, unless something went wrong, Ctrl-C included

    def _below(self, path: str) -> str:
        root = self._root
        if hasattr(self._files, "resolve_path"):  # the Hub writes a path with its revision in several ways
            root, path = (self._files.resolve_path(one).path_in_repo for one in (root, path))
        head = root.rstrip("/") + "/" if root else ""
        return path[len(head) :] if path.startswith(head) else path

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """Whatever the library for such an address raises, as one DataError: each has its own classes, often no OSError."""
        try:
            yield
        except (TitanError, ImportError):
            raise
        except FileNotFoundError:
            private = ", or is private and HF_TOKEN in the environment has no access to it" if self.shown.startswith("hf://") else ""
            raise DataError(f"{self.shown}: {what}: it does not exist{private}") from None
        except Exception as error:
            # Not "from error": a traceback would print what the library says, address and all.
            raise DataError(f"{self.shown}: {what} ({_reason(error)}); is the network there? --source names a mirror or a local copy") from None


def is_url(path: str) -> bool:
    return "://" in path


def shown(path: str) -> str:
    """A path or URL on one line of a terminal, without user, password and query."""
    if is_url(path):
        scheme, _, rest = re.split(r"[?#]", path)[0].partition("://")
        host, slash, below = rest.partition("/")
        path = f"{scheme}://{host.rpartition('@')[2]}{slash}{below}"
    return printable(path.replace("\n", "\\n"))


def _reason(error: BaseException) -> str:
    """The class of a failure, its status and, from whatever caused it, the words of the system."""
    words = [type(error).__name__]
    cause: BaseException | None = error
    while cause is not None:
        status = getattr(getattr(cause, "response", None), "status_code", getattr(cause, "status", None))
        words += [str(status)] if isinstance(status, int) else []
        words += [cause.strerror] if isinstance(cause, OSError) and cause.errno is not None and isinstance(cause.strerror, str) else []
        cause = cause.__cause__ or cause.__context__
    return printable(", ".join(dict.fromkeys(words)))


def _safe(name: str, where: str) -> str:
    parts = PurePosixPath(name).parts
    if not parts or name.startswith(("/", "~")) or ".." in parts or "\\" in name or "://" in name or not name.isprintable():
        raise DataError(f"{where}: lists a file called {printable(ascii(name))}, which leads out of its folder or hides what it is; nothing was copied")
    return name


def _is_there(path: Path, size_bytes: int) -> bool:
    return path.is_file() and path.stat().st_size == size_bytes
