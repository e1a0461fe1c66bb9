"""The run folder.

    runs/NAME/config.toml        resolved; that of the newest start
              config-<n>.toml    of earlier starts, where it differed, oldest first
              environment.json   what it ran on (environment-<n>.json likewise)
              metrics.jsonl, log.txt, tensorboard/, wandb/    from the loggers
              checkpoints/
              .lock              who is training in it

One trainer at a time: the lock is the kernel's (flock), so it ends with the
process however that dies, and a new process that happens to get the old one's
number is not mistaken for it. The file says whom to look for. Between machines
that share a file system a kernel's lock may not be seen; there the file alone
counts, until its owner or the user removes what it says.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import json
import os
import re
import socket
from pathlib import Path

from titanlm import environment
from titanlm.errors import TitanError

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_TEMPORARY = ".write-"


def write_atomic(path: Path, data: bytes | str, *, sync: bool = True) -> None:
    """Write a file so that a reader, or a kill, finds the old content or the new, never a mixture.

    With ``sync`` that holds for a power cut too. Raises OSError.
    """
    temporary = path.with_name(f"{_TEMPORARY}{path.name}-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if sync:
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames and new files in a folder outlast a power cut. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Lock:
    """An exclusive lock on a file, held until ``release`` or the end of the process.

    Raises TitanError naming the process that holds it, OSError when the file
    cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            self._acquire()
        except BaseException:
            os.close(self._fd)
            raise
        self._pid = os.getpid()
        # A forked worker that outlives the trainer must not keep the lock.
        os.register_at_fork(after_in_child=self._forget)
        atexit.register(self.release)

    def _acquire(self) -> None:
        host, pid = socket.gethostname(), os.getpid()
        kernel = True
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._taken(*self._owner()) from None
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL):
                raise
            kernel = False  # a file system without locks
        owner_pid, owner_host = self._owner()
        elsewhere = owner_host not in ("", host)
        if elsewhere or (not kernel and owner_pid not in (0, pid) and _alive(owner_pid)):
            raise self._taken(owner_pid, owner_host)
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, json.dumps({"pid": pid, "host": host}).encode(), 0)

    def _owner(self) -> tuple[int, str]:
        """(process, host) as the file says; (0, "") when it says nothing."""
        try:
            owner = json.loads(os.pread(self._fd, 4096, 0))
            return int(owner["pid"]), str(owner["host"])
        except (ValueError, TypeError, KeyError):
            return 0, ""

    def _taken(self, pid: int, host: str) -> TitanError:
        where = f" on {host}" if host not in ("", socket.gethostname()) else ""
        remedy = f"; if that process is gone, delete {self.path}" if where else ""
        return TitanError(f"{self.path.parent}: process {pid or 'unknown'}{where} is training in it; stop it or choose another run.name{remedy}")

    def _forget(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def release(self) -> None:
        """Let others in; the file stays, empty, because removing a locked file lets two in."""
        if self._fd >= 0 and self._pid == os.getpid():
            atexit.unregister(self.release)
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, 0)
                fcntl.flock(self._fd, fcntl.LOCK_UN)  # at once, even if a worker was forked this instant
            self._forget()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def require_name(name: str) -> None:
    """Raise TitanError when a run's name is no plain folder name."""
    if not _NAME.fullmatch(name):
        raise TitanError(
            f"run.name: {name!r} is not usable as a folder name; use up to 128 letters, digits and . _ - (not first: . -), "
            "in the config or with --run.name=NAME"
        )


class RunFolder:
    """A run on disk; ``open`` makes or takes it up for training."""

    def __init__(self, path: Path, lock: Lock | None = None) -> None:
        self.path = path
        self._lock = lock

    @classmethod
    def open(cls, root: Path, name: str, config_toml: str | None = None) -> RunFolder:
        """The folder ``root/name``, locked, with this config and environment recorded (None: not yet, see ``record``).

        Raises TitanError when the name is no plain name, when the folder
        cannot be written, or when another process trains in it.
        """
        require_name(name)
        if "\0" in str(root):
            raise TitanError(f"run.dir: {str(root)!r} is no path: there is a zero byte in it")
        path = Path(root) / name
        try:
            (path / "checkpoints").mkdir(parents=True, exist_ok=True)
            lock = Lock(path / ".lock")
            try:
                for litter in path.glob(f"{_TEMPORARY}*"):  # of a killed write
                    litter.unlink(missing_ok=True)
                folder = cls(path, lock)
                if config_toml is not None:
                    folder.record(config_toml)
            except BaseException:
                lock.release()
                raise
        except OSError as error:
            raise TitanError(f"{_unusable(path, error)}; choose another run.dir or run.name") from error
        return folder

    def record(self, config_toml: str, **sizes: int) -> None:
        """Write the config and the environment of this start, with its ``sizes``; earlier ones that differ are kept beside them."""
        _record(self.path / "config.toml", config_toml)
        _record(self.path / "environment.json", json.dumps(environment.report() | sizes, indent=1) + "\n")

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def close(self) -> None:
        """Let another process train in it."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _record(path: Path, text: str) -> None:
    """Write ``text``; what was there before and differs is kept as NAME-<n>."""
    if path.exists():
        before = path.read_bytes()
        if before == text.encode():
            return
        n = 1
        while (kept := path.with_name(f"{path.stem}-{n}{path.suffix}")).exists():
            n += 1
        write_atomic(kept, before)
    write_atomic(path, text)


def _unusable(path: Path, error: OSError) -> str:
    at = error.filename or path
    if isinstance(error, FileExistsError | NotADirectoryError | IsADirectoryError):
        at = next((each for each in [*reversed(Path(at).parents), Path(at)] if each.is_file()), at)  # the system names the last of the path
        return f"{path}: cannot be a run folder: {at} is in the way ({error.strerror})"
    if isinstance(error, PermissionError) or error.errno == errno.EROFS:
        return f"{path}: not writable: {at} ({error.strerror})"
    return f"{path}: cannot be written: {at} ({error.strerror})"
