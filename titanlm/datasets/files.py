"""Which files the entries of ``paths`` mean, here or behind a URL, and reading them.

An entry is a file, a directory (everything below with a wanted suffix, hidden
ones left out), a glob, or a URL of fsspec that is one of these. Hundreds of
thousands of files are listed in seconds: of each only name, size and time of
change are asked; contents are looked at in a sample, for the fingerprint.

URLs carry secrets: signatures in the query, passwords before the host. What
is shown of a URL has neither, and what libraries say when something fails is
not repeated, only the type of their exception.
"""

from __future__ import annotations

import glob
import hashlib
import io
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy as np

from titanlm.datasets.documents import shared
from titanlm.errors import DataError
from titanlm.loggers.text import printable

_HEAD_BYTES = 65536
_SAMPLED = 64
_REMOTE_BLOCK_BYTES = 4 << 20
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
PROTOCOLS = {
    "hf": "titanlm[hub]",
    "https": "aiohttp",
    "s3": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "memory": "fsspec",
}
"""Protocols that are opened, and the package each needs. No others: fsspec knows some that run commands."""
_INSTEAD = {"file": "give the path alone", "local": "give the path alone", "http": "use https:// or download it first"}
"""What to do about some of the others."""

_offline: ContextVar[bool] = ContextVar("titanlm_offline", default=False)


class OfflineError(DataError):
    """A URL that would have been opened inside ``offline()``."""


@contextmanager
def offline() -> Iterator[None]:
    """Inside, a URL raises OfflineError instead of being listed or opened."""
    token = _offline.set(True)
    try:
        yield
    finally:
        _offline.reset(token)


_Found = tuple[str, int, int, str]
"""Absolute path, or behind a URL the path within its file system; size; time of change in ns, behind a URL 0; and what is the same for the same
file, whichever links lead to it. Plain tuples: hundreds of thousands of any other object keep the garbage collector busy."""


class Files:
    """The files of one setting, in the order of its entries and sorted within each.

    ``order`` sorts by something else than the path. A directory is searched for
    ``suffixes``; "" is that of every file.

    Raises DataError when an entry means no file, or one that was meant before.
    """

    def __init__(self, entries: Sequence[str], key: str, suffixes: tuple[str, ...], order: Callable[[_Found], Any] | None = None) -> None:
        self.key = key
        self.by: dict[str, str] = {}
        """The entry that each real file comes from."""
        self._names: list[str] = []
        self._urls: list[str | None] = []
        sizes: list[int] = []
        mtimes: list[int] = []
        for entry in entries:
            url = entry if is_url(entry) else None
            found = sorted(_remote(entry, key, suffixes) if url else _local(entry, key, suffixes), key=order)
            own = {real: entry for _, _, _, real in found}
            if len(own) < len(found) or not self.by.keys().isdisjoint(own):
                raise self._named_twice(found, entry, url)
            self.by.update(own)
            self._names += [name for name, _, _, _ in found]
            self._urls += [url] * len(found)
            sizes += [size for _, size, _, _ in found]
            mtimes += [mtime_ns for _, _, mtime_ns, _ in found]
        self.sizes = np.array(sizes, dtype=np.int64)
        self._mtimes = np.array(mtimes, dtype=np.int64)

    def _named_twice(self, found: list[_Found], entry: str, url: str | None) -> DataError:
        by = dict(self.by)
        for name, _, _, real in found:  # noqa: B007 - used behind the loop
            if real in by:
                break
            by[real] = entry
        entries = f"by {one_line(shown(by[real]))!r} and by {one_line(shown(entry))!r}"
        return DataError(f"{self.key}: {_shown_name(name, url)} is named twice, {entries}; every file may be read once only")

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        """What errors call the file: printable, in one line and without secrets."""
        return _shown_name(self._names[index], self._urls[index])

    def is_local(self, index: int) -> bool:
        return self._urls[index] is None

    def path(self, index: int) -> Path:
        """Of a local file; what any links lead to."""
        return Path(os.path.realpath(self._names[index]))

    def base(self, index: int) -> str:
        """The file's own name, without directories and query."""
        name = self._names[index]
        return (name if self._urls[index] is None else name.partition("?")[0]).rpartition("/")[2]

    def open(self, index: int) -> Source:
        """The file for reading, which nobody else uses; call it in the process that reads.

        Raises DataError when it is gone or not what was listed.
        """
        self.check(index)
        name, url = self._names[index], self._urls[index]
        if url is None:
            try:
                return Source(open(name, "rb"), self.name(index))
            except OSError as error:
                raise DataError(f"{self.name(index)} cannot be opened: {error.strerror}") from None
        filesystem, _ = filesystem_of(url, self.key)
        try:
            raw = filesystem.open(name, "rb", block_size=_REMOTE_BLOCK_BYTES, cache_type="readahead")
            size = getattr(raw, "size", None)
        except Exception as error:  # whatever the library of this protocol raises
            raise DataError(f"{self.name(index)} cannot be opened: {reason_of(error)}") from None
        if size is not None and size != self.sizes[index]:
            raw.close()
            raise self._changed(index, f"{size} bytes, {self.sizes[index]} when it was listed")
        return Source(raw, self.name(index))

    def check(self, index: int) -> None:
        """Raises DataError when a local file is gone or was changed since it was listed."""
        if self._urls[index] is not None:
            return
        try:
            status = os.stat(self._names[index])
        except OSError as error:
            raise DataError(f"{self.name(index)} was listed and cannot be read any more: {error.strerror}; put it back") from None
        if not stat.S_ISREG(status.st_mode) or (status.st_size, status.st_mtime_ns) != (self.sizes[index], self._mtimes[index]):
            raise self._changed(index, "its size or time of change is another than when it was listed")

    def fingerprint(self) -> str:
        """Of all names and sizes, and of the first 64 KiB of at most 64 files, evenly spread."""
        digest = hashlib.sha256(repr([(self.base(index), size) for index, size in enumerate(self.sizes.tolist())]).encode())
        for index in np.unique(np.linspace(0, len(self) - 1, min(len(self), _SAMPLED)).round().astype(np.int64)).tolist():
            digest.update(self._head(index))
        return digest.hexdigest()

    def equal_to(self, other: Files) -> tuple[int, int] | None:
        """A pair of files, one of each, with the same content. Only of those of equal size are contents read."""
        heads: dict[tuple[int, bytes], list[int]] = {}
        for index in np.flatnonzero(np.isin(other.sizes, self.sizes) & (other.sizes > 0)).tolist():
            heads.setdefault((int(other.sizes[index]), other._head(index)), []).append(index)
        for index in np.flatnonzero(np.isin(self.sizes, other.sizes) & (self.sizes > 0)).tolist():
            for second in heads.get((int(self.sizes[index]), self._head(index)), ()):
                if self._whole(index) == other._whole(second):
                    return index, second
        return None

    def _head(self, index: int) -> bytes:
        with self.open(index) as file:
            return hashlib.sha256(file.read(_HEAD_BYTES)).digest()

    def _whole(self, index: int) -> bytes:
        with self.open(index) as file:
            digest = hashlib.sha256()
            while chunk := file.read(1 << 20):
                digest.update(chunk)
            return digest.digest()

    def _changed(self, index: int, how: str) -> DataError:
        return DataError(f"{self.name(index)} changed while it was in use: {how}; start again")


class Listing:
    """The files of ``paths`` and of ``validation_paths``.

    Raises DataError when a file is among both, by whatever name, and as Files.
    """

    def __init__(self, paths: Sequence[str], validation_paths: Sequence[str], suffixes: tuple[str, ...], order: Callable[[_Found], Any] | None = None) -> None:
        self.train = Files(paths, "dataset.paths", suffixes, order)
        self.validation = Files(validation_paths, "dataset.validation_paths", suffixes, order)
        both = "dataset.paths and in dataset.validation_paths; a file can be in one only"
        if twice := self.train.by.keys() & self.validation.by.keys():
            raise DataError(f"{one_line(shown(min(twice)))} is in {both}")
        if pair := self.train.equal_to(self.validation):
            raise DataError(f"{self.train.name(pair[0])} and {self.validation.name(pair[1])} have the same content, but lie in {both}")
        self.train.by, self.validation.by = {}, {}  # of no use any more, and large

    def of(self, split: str, validation_fraction: float, name: str) -> Files:
        """The files that hold rows of a split. Raises DataError when there is no validation data."""
        if split == "train" or (validation_fraction and not len(self.validation)):
            return self.train
        if not len(self.validation):
            raise DataError(f"{name}: there is no validation data; set dataset.validation_paths or dataset.validation_fraction")
        return self.validation


def listed(
    paths: Sequence[str], validation_paths: Sequence[str], suffixes: tuple[str, ...], order: Callable[[_Found], Any] | None = None, split: str = "train"
) -> Listing:
    """The ``Listing``, made once for all who use it at the same time.

    Where both name the same, as the dataset of a validation set may, it has
    no training split: for ``split`` "validation" alone that is no mistake.
    """
    if split == "validation" and paths == validation_paths:
        paths = ()
    key = ("files", Path.cwd(), tuple(paths), tuple(validation_paths), suffixes, order, _offline.get())
    return shared(key, lambda: Listing(paths, validation_paths, suffixes, order))


class Source(io.RawIOBase):
    """A file whose failures to read are DataErrors and kept in ``error``.

    So a network that failed is told from content that is damaged, however the
    library in between wraps what was raised: only the latter may be skipped.
    """

    def __init__(self, raw: Any, name: str) -> None:
        super().__init__()
        self._raw, self._name = raw, name
        self.error: DataError | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        """Raises DataError when the file cannot be read."""
        try:
            return self._raw.read(size)
        except Exception as error:  # whatever the library of this protocol raises
            self.error = DataError(f"{self._name} cannot be read: {reason_of(error)}; try again")
            raise self.error from None

    def read_at(self, offset: int, size: int) -> bytes:
        """Of a local file, leaving alone the place where ``read`` goes on, which processes forked since it was opened share.

        Raises DataError when the file cannot be read.
        """
        try:
            return os.pread(self._raw.fileno(), size, offset)
        except OSError as error:
            self.error = DataError(f"{self._name} cannot be read: {reason_of(error)}; try again")
            raise self.error from None

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._raw.seek(offset, whence)

    def tell(self) -> int:
        return self._raw.tell()

    def close(self) -> None:
        if not self.closed:
            self._raw.close()
        super().close()


def is_url(entry: str) -> bool:
    """Whether it is to be taken for a URL, be it one that is refused; no path needs to be written so."""
    return "://" in entry


def shown(url: str) -> str:
    """A URL without user, password, query, fragment and further URLs, which may be secret; a path as it is."""
    if not is_url(url):
        return url
    protocol, separator, rest = re.split(r"[?#]", url, maxsplit=1)[0].partition("://")
    host, slash, path = rest.partition("::")[0].partition("/")
    return f"{protocol}{separator}{host.rpartition('@')[2]}{slash}{path}"


def one_line(text: str) -> str:
    """Foreign text for a message: no line breaks, nothing that a terminal obeys."""
    return printable(text.replace("\n", "\\n").replace("\r", "\\r"))


def _shown_name(name: str, url: str | None) -> str:
    return one_line(name if url is None else shown(_full(name, url)))


def _full(name: str, url: str) -> str:
    protocol = url.partition("://")[0]
    return name if _URL.match(name) else f"{protocol}://{name.lstrip('/')}"


def reason_of(error: Exception) -> str:
    """What went wrong, without the words of the library that raised it: they may repeat a URL whole."""
    status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
    errno = getattr(error, "errno", None)
    details = [str(status)] if isinstance(status, int) else []
    details += [os.strerror(errno)] if isinstance(errno, int) else []
    return " ".join([type(error).__name__, *details])


# ---------------------------------------------------------------- local
def _local(entry: str, key: str, suffixes: tuple[str, ...]) -> list[_Found]:
    path = os.path.abspath(os.path.expanduser(entry))
    said = f"{key}: {one_line(entry)!r}"
    try:
        try:
            status = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return _globbed(path, said)
        if stat.S_ISREG(status.st_mode):
            return [(path, status.st_size, status.st_mtime_ns, os.path.realpath(path))]
        if not stat.S_ISDIR(status.st_mode):
            raise DataError(f"{said} is a pipe, a socket or a device, not a file; it is not opened")
        found = list(_below(path, suffixes))
    except OSError as error:
        where = "" if error.filename is None else f" {one_line(os.fsdecode(error.filename))}"
        raise DataError(f"{said} cannot be listed: {error.strerror}{where}") from error
    except ValueError as error:  # a NUL in the name
        raise DataError(f"{said} is no path: {error}") from error
    if not found and "" in suffixes:
        raise _nothing(said)
    if not found:
        raise DataError(f"{said} is a directory without any {' or '.join(f'*{suffix}' for suffix in suffixes)}; name the files")
    return found


def _below(folder: str, suffixes: tuple[str, ...], above: tuple[str, ...] = ()) -> Iterator[_Found]:
    real = os.path.realpath(folder)
    if real in above:  # a link back up
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.name.endswith(suffixes) and not entry.is_dir():
                status = entry.stat()  # of what a link leads to, which must be there
                if not stat.S_ISREG(status.st_mode):
                    continue
                same = os.path.realpath(entry.path) if entry.is_symlink() else entry.path if real == folder else f"{real}/{entry.name}"
                yield (entry.path, status.st_size, status.st_mtime_ns, same)
            elif entry.is_dir():
                yield from _below(entry.path, suffixes, (*above, real))


def _globbed(pattern: str, said: str) -> list[_Found]:
    names = set(glob.glob(pattern, recursive=True))
    found: list[_Found] = []
    folders: dict[str, str] = {}
    for name in names:
        status = os.stat(name)
        if stat.S_ISREG(status.st_mode):
            folder, base = os.path.split(name)
            if folder not in folders:
                folders[folder] = os.path.realpath(folder)
            real = os.path.realpath(name) if os.path.islink(name) else os.path.join(folders[folder], base)
            found.append((name, status.st_size, status.st_mtime_ns, real))
    if not found and any(map(os.path.isdir, names)):
        raise DataError(f"{said} matches only directories; add /* for the files in them")
    if not found:
        raise _nothing(said)
    return found


def _nothing(said: str) -> DataError:
    base = f"relative paths start at {one_line(str(Path.cwd()))}"
    return DataError(f"{said} is no file, no directory with files and no glob that matches any ({base})")


# ---------------------------------------------------------------- remote
def filesystem_of(url: str, key: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path in it. Not kept: after a fork another one is needed.

    Raises OfflineError inside ``offline()``, DataError for a URL that holds a
    password and for a protocol that is not among ``PROTOCOLS`` or not installed.
    """
    said = f"{key}: {one_line(shown(url))!r}"
    if _offline.get():
        raise OfflineError(f"{said} is a URL, and nothing is fetched now")
    protocol = url.partition("://")[0].lower()
    user, at, _ = re.split(r"[/?#]", url.partition("://")[2], maxsplit=1)[0].rpartition("@")
    if at and (":" in user or protocol in ("http", "https", "ftp")):
        raise DataError(f"{said} holds a user's name or password; take it out and put it in the environment or where the protocol's library looks")
    if "::" in url:
        raise DataError(f"{said} chains protocols (::), which is not supported")
    if not _URL.match(url):
        raise DataError(f"{said} has :// in it and is no URL; give a path with one slash in a row, or a URL alone")
    if protocol not in PROTOCOLS:
        read = f"there are {', '.join(f'{one}://' for one in PROTOCOLS if one != 'memory')}; anything else has to be downloaded first"
        raise DataError(f"{said}: {protocol}:// is not read; {_INSTEAD.get(protocol, read)}")
    import fsspec

    try:
        return fsspec.core.url_to_fs(url, **options_of(protocol))
    except ImportError:
        raise DataError(f"{said} needs a package for {protocol}:// that is not installed; pip install '{PROTOCOLS[protocol]}'") from None
    except Exception as error:  # whatever the library of this protocol raises
        raise DataError(f"{said} cannot be opened: {reason_of(error)}") from None


def options_of(protocol: str) -> dict[str, Any]:
    """What fsspec is told for a protocol: the Hub's token comes from the environment or not at all, since what an earlier login left is nobody's choice."""
    return {"token": os.environ.get("HF_TOKEN") or False} if protocol == "hf" else {}


def _remote(url: str, key: str, suffixes: tuple[str, ...]) -> list[_Found]:
    filesystem, path = filesystem_of(url, key)
    said = f"{key}: {one_line(shown(url))!r}"
    try:
        filesystem.invalidate_cache()
        details = _details(filesystem, path, suffixes)
    except Exception as error:
        raise DataError(f"{said} cannot be listed: {reason_of(error)}") from None
    found = []
    for name, info in details.items():
        if info.get("type") != "file":
            continue
        if info.get("size") is None:
            raise DataError(f"{_shown_name(name, url)}: the server does not tell its size; download it first")
        found.append((name, int(info["size"]), 0, _full(name, url)))
    if not found:
        raise DataError(f"{said} is no file, no directory with {' or '.join(suffixes)} files and no glob that matches any")
    return found


def _details(filesystem: Any, path: str, suffixes: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    try:
        info = filesystem.info(path)
    except FileNotFoundError:
        if not glob.has_magic(path):
            return {}
        fixed = path[: re.search(r"[*?[]", path).start()].rpartition("/")[0]  # type: ignore[union-attr]
        return {name: one for name, one in filesystem.glob(path, detail=True).items() if "/." not in name[len(fixed) :]}
    if info["type"] != "directory":
        return {path: info}
    fixed = path.rstrip("/")
    return {name: one for name, one in filesystem.find(path, detail=True).items() if name.endswith(suffixes) and "/." not in name[len(fixed) :]}
