"""Token shards on disk, the .bin files of llm.c, modded-nanogpt and Parameter Golf.

    256 little-endian int32   [0] 20240520, [1] 1, [2] n tokens
    n little-endian uint16    the ids

A vocabulary beyond 65,536 takes llm.c's other variant: 20240801, version 7 and
uint32 ids. The rest of a header is zero in other people's shards; ours carry
the sha256 of the tokenizer's fingerprint in words 8 to 15, because ids mean
nothing without their tokenizer and a wrong one crashes nowhere. What cannot be
in a header (the fingerprint itself, which makes a difference readable, counts
of documents and bytes, hashes of the files) is in ``shards.json`` beside them.

A file is believed only after its header and its size agree; nothing is mapped
or allocated by what a header claims.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from titanlm.errors import DataError
from titanlm.runs import write_atomic

HEADER_WORDS = 256
HEADER_BYTES = 4 * HEADER_WORDS
DIGEST = slice(8, 16)
"""Header words with the sha256 of the tokenizer's fingerprint."""
VARIANTS: dict[int, tuple[int, np.dtype[Any]]] = {20240520: (1, np.dtype("<u2")), 20240801: (7, np.dtype("<u4"))}
"""Version and ids by magic number."""
MANIFEST = "shards.json"
MANIFEST_FORMAT = 1
HEAD_BYTES = 65536
SIDECAR = "_bytes_"
"""In the names of files that hold byte counts and no tokens, though their header is the same."""


@dataclass(frozen=True)
class Shard:
    """A file whose header and size agree."""

    path: Path
    n_tokens: int
    dtype: np.dtype[Any]
    """uint16 or uint32, little-endian."""
    tokenizer_digest: bytes
    """(32,) sha256 of the tokenizer's fingerprint; empty when the shard does not say."""
    head_digest: str
    """Of the first 64 KiB."""
    changed_ns: int
    """When the file was last written."""

    def tokens(self) -> np.ndarray:
        """(n_tokens,) ids as they lie in the file, mapped.

        Raises DataError when the file is not the one that was opened.
        """
        self.require_unchanged()
        return np.memmap(self.path, dtype=self.dtype, mode="r", offset=HEADER_BYTES, shape=(self.n_tokens,)).view(np.ndarray)

    def require_unchanged(self) -> None:
        """Raises DataError when the file was written to or replaced: reading past the end of a mapped file would kill the process."""
        try:
            now = self.path.stat()
        except OSError as error:
            raise DataError(f"{self.path}: gone while it was in use ({error.strerror}); put it back and resume, or start again without it") from error
        if (now.st_size, now.st_mtime_ns) != (HEADER_BYTES + self.n_tokens * self.dtype.itemsize, self.changed_ns):
            raise DataError(f"{self.path}: changed while it was in use; start again")


def open_shard(path: Path) -> Shard:
    """The shard in a file; only its head is read.

    Raises DataError, with what was found, when the file cannot be read, has
    another magic number or version, is big-endian, claims no tokens or another
    number than it has, or ends inside an id.
    """
    _require_no_pipe(path)
    try:
        with open(path, "rb") as file:
            head = file.read(HEAD_BYTES)
            stat = os.fstat(file.fileno())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    if len(head) < HEADER_BYTES:
        raise DataError(f"{path}: {len(head)} bytes are too few for a token shard, whose header alone has {HEADER_BYTES}; {_REMEDY}")
    header = np.frombuffer(head, dtype="<i4", count=HEADER_WORDS)
    magic, version, claimed = (int(word) for word in header[:3])
    if magic not in VARIANTS:
        if int(header[:1].byteswap()[0]) in VARIANTS:
            raise DataError(f"{path}: a big-endian token shard (magic number {head[:4].hex()}); write it little-endian: {_REMEDY}")
        raise DataError(f"{path}: no token shard: its magic number is {magic}, not {' or '.join(map(str, VARIANTS))}; {_REMEDY}")
    wanted, dtype = VARIANTS[magic]
    if version != wanted:
        raise DataError(f"{path}: version {version} of token shards; {magic} is read in version {wanted}; {_REMEDY}")
    size = stat.st_size - HEADER_BYTES
    if size % dtype.itemsize:
        raise DataError(f"{path}: ends inside an id: {size:,} bytes after the header are no multiple of {dtype.itemsize}; copy or prepare it again")
    if claimed != size // dtype.itemsize:
        raise DataError(f"{path}: its header claims {claimed:,} tokens and {size // dtype.itemsize:,} follow; copy or prepare it again")
    if not claimed:
        raise DataError(f"{path}: a token shard without tokens; leave it out or prepare it again")
    digest = header[DIGEST].tobytes()
    return Shard(path, claimed, dtype, digest if any(digest) else b"", hashlib.sha256(head).hexdigest(), stat.st_mtime_ns)


def _require_no_pipe(path: Path) -> None:
    if path.exists() and not path.is_file():  # opening a pipe would wait for ever
        raise DataError(f"{path}: a folder, a pipe or a device, not a file; move it away")


_REMEDY = "`titanlm data prepare` writes shards that can be read"


def digest_of(fingerprint: str) -> bytes:
    """What a header keeps of a tokenizer's fingerprint: (32,) sha256."""
    return hashlib.sha256(fingerprint.encode()).digest()


def dtype_for(vocab_size: int) -> np.dtype[Any]:
    """The smallest ids that hold a vocabulary."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


class ShardWriter:
    """A shard written piece by piece; there is no file of that name before ``close``.

    Ids must fit ``dtype``. A writer that is left without ``close`` removes
    what it wrote when it is used in ``with``.
    """

    def __init__(self, path: Path, dtype: np.dtype[Any], tokenizer_fingerprint: str = "") -> None:
        self.path, self.n_tokens = path, 0
        self._dtype = dtype
        self._digest = digest_of(tokenizer_fingerprint) if tokenizer_fingerprint else bytes(32)
        self._temporary = path.with_name(f"{TEMPORARY}{path.name}-{os.getpid()}")
        self._file = open(self._temporary, "wb")  # noqa: SIM115 - closed by `close` or `abandon`
        self._file.write(bytes(HEADER_BYTES))

    def write(self, ids: np.ndarray) -> None:
        """Append (n,) ids."""
        self._file.write(ids.astype(self._dtype, copy=False).tobytes())
        self.n_tokens += len(ids)

    def close(self) -> str:
        """Finish the file; its sha256."""
        magic, version = next((magic, version) for magic, (version, dtype) in VARIANTS.items() if dtype == self._dtype)
        header = np.zeros(HEADER_WORDS, dtype="<i4")
        header[:3] = magic, version, self.n_tokens
        header[DIGEST] = np.frombuffer(self._digest, dtype="<i4")
        self._file.seek(0)
        self._file.write(header.tobytes())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        with open(self._temporary, "rb") as written:
            sha256 = hashlib.file_digest(written, "sha256").hexdigest()
        os.replace(self._temporary, self.path)
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        return sha256

    def abandon(self) -> None:
        """Remove what was written, unless it is finished."""
        if not self._file.closed:
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.abandon()


TEMPORARY = ".write-"
"""Begins the names of files that are being written."""


# ---------------------------------------------------------------- the manifest
def read_manifest(folder: Path) -> dict[str, Any]:
    """What ``shards.json`` of a folder says of its sets of shards, by name; empty when there is none.

    Raises DataError when it is no such file.
    """
    path = folder / MANIFEST
    _require_no_pipe(path)
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read ({error}); move it away, or prepare the shards again") from error
    sets = stored.get("sets") if isinstance(stored, dict) else None
    if not isinstance(sets, dict) or stored.get("format") != MANIFEST_FORMAT or not all(isinstance(one, dict) for one in sets.values()):
        raise DataError(f"{path}: no manifest of token shards in format {MANIFEST_FORMAT}; move it away, or prepare the shards again")
    return sets


def write_manifest(folder: Path, sets: Mapping[str, Any]) -> None:
    """Replace ``shards.json``."""
    write_atomic(folder / MANIFEST, json.dumps({"format": MANIFEST_FORMAT, "sets": dict(sets)}, indent=1) + "\n")
