"""The codecs of an artifact, one stream each, with bounded output on the way back.

A stranger's file may hold a few kilobytes that unfold to terabytes. So every
decoder here hands out its output in pieces of bounded size and the caller
stops at the size that was declared; no codec is ever asked for "all of it".
Window and dictionary are bounded too, since a decoder allocates them before
the first byte of output.

What helps weights: quantized values and bytes of mantissas are close to
independent draws, so there is little for a match finder to find and the coding
of single bytes decides. On synthetic int6 rows zstd level 1 is within 0.1 % of
level 22, above it where long runs of zeros exist, and levels between are
worse than both; brotli comes closest to the entropy.
"""

from __future__ import annotations

import contextlib
import importlib
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, get_args

from titanlm.errors import ArtifactError

Codec = Literal["zstd", "lzma", "zlib", "brotli", "none"]
CODECS: tuple[str, ...] = get_args(Codec)

LEVELS = {"zstd": range(1, 23), "lzma": range(10), "zlib": range(1, 10), "brotli": range(12), "none": range(0)}
DEFAULT_LEVELS = {"zstd": (1, 22), "lzma": (9,), "zlib": (9,), "brotli": (11,), "none": (0,)}
"""Tried when no level is asked for; the smallest outcome is kept."""

_PIECE = 1 << 20
_ZSTD_INPUT = 1 << 10
"""zstd has no limit on output: 4 bytes of input make at most 128 KiB, so this much input makes at most 32 MiB."""
_ZSTD_WINDOW = 1 << 27
_LZMA_MEMORY = 100 << 20
"""Level 9 needs 65 MiB."""


def require(codec: str) -> None:
    """Raise ArtifactError now if the package behind ``codec`` is missing or too old."""
    if codec == "zstd":
        _package("zstandard", "zstandard>=0.23")
    elif codec == "brotli" and not hasattr(_package("brotli", "brotli>=1.2").Decompressor, "can_accept_more_data"):
        raise ArtifactError('codec "brotli" cannot bound its output in this version; run: pip install "brotli>=1.2"')


def installed() -> tuple[str, ...]:
    """The codecs that ``require`` takes."""
    found = []
    for codec in CODECS:
        with contextlib.suppress(ArtifactError):
            require(codec)
            found.append(codec)
    return tuple(found)


def compress(codec: str, level: int, pieces: Iterable[Any], n_bytes: int) -> bytearray:
    """One stream of the codec over ``pieces`` (buffers, ``n_bytes`` in all); equal input gives equal bytes."""
    require(codec)
    add: Callable[[Any], Any]
    finish: Callable[[], Any]
    if codec == "zstd":
        encoder = _package("zstandard").ZstdCompressor(level=level).compressobj(size=n_bytes)
        add, finish = encoder.compress, encoder.flush
    elif codec == "lzma":
        # The artifact has a checksum of its own.
        encoder = lzma.LZMACompressor(lzma.FORMAT_XZ, check=lzma.CHECK_NONE, preset=level | lzma.PRESET_EXTREME)
        add, finish = encoder.compress, encoder.flush
    elif codec == "zlib":
        encoder = zlib.compressobj(level)
        add, finish = encoder.compress, encoder.flush
    elif codec == "brotli":
        encoder = _package("brotli").Compressor(quality=level, lgwin=24)
        add, finish = encoder.process, encoder.finish
    else:
        add, finish = lambda piece: piece, bytes
    out = bytearray()
    for piece in sliced(pieces):
        out += add(piece)
    out += finish()
    return out


def sliced(pieces: Iterable[Any]) -> Iterator[memoryview]:
    """``pieces`` (buffers of bytes) in parts of at most a MiB, the most that a codec is given at once and cannot be stopped within."""
    for piece in pieces:
        view = memoryview(piece)
        yield from (view[start : start + _PIECE] for start in range(0, len(view), _PIECE))


def decompress(codec: str, pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The stream in pieces of at most 32 MiB; asks for no more input than the consumer's reading needs.

    Raises ArtifactError when the stream is damaged, ends early, is followed by
    other bytes, or wants more memory than a writer of ours ever does.
    """
    require(codec)
    return _decoders[codec](iter(pieces))


def _none(pieces: Iterator[bytes]) -> Iterator[bytes]:
    return pieces


def _zstd(pieces: Iterator[bytes]) -> Iterator[bytes]:
    package = _package("zstandard")
    decoder = package.ZstdDecompressor(max_window_size=_ZSTD_WINDOW).decompressobj()
    small = (piece[start : start + _ZSTD_INPUT] for piece in pieces for start in range(0, len(piece), _ZSTD_INPUT))
    return _drive("zstd", package.ZstdError, small, decoder.decompress, lambda: True, lambda: decoder.eof, lambda: decoder.unused_data)


def _lzma(pieces: Iterator[bytes]) -> Iterator[bytes]:
    decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_LZMA_MEMORY)
    return _drive(
        "lzma", lzma.LZMAError, pieces, lambda data: decoder.decompress(data, _PIECE),
        lambda: decoder.needs_input, lambda: decoder.eof, lambda: decoder.unused_data,
    )  # fmt: skip


def _zlib(pieces: Iterator[bytes]) -> Iterator[bytes]:
    decoder = zlib.decompressobj()
    return _drive(
        "zlib", zlib.error, pieces, lambda data: decoder.decompress(decoder.unconsumed_tail + data, _PIECE),
        lambda: not decoder.unconsumed_tail, lambda: decoder.eof, lambda: decoder.unused_data,
    )  # fmt: skip


def _brotli(pieces: Iterator[bytes]) -> Iterator[bytes]:
    package = _package("brotli")
    decoder = package.Decompressor()
    return _drive(
        "brotli", package.error, pieces, lambda data: decoder.process(data, output_buffer_limit=_PIECE),
        decoder.can_accept_more_data, decoder.is_finished, lambda: b"",
    )  # fmt: skip


_decoders: dict[str, Callable[[Iterator[bytes]], Iterator[bytes]]] = {
    "zstd": _zstd,
    "lzma": _lzma,
    "zlib": _zlib,
    "brotli": _brotli,
    "none": _none,
}


def _drive(
    codec: str,
    failure: type[Exception],
    pieces: Iterator[bytes],
    step: Callable[[bytes], bytes],
    hungry: Callable[[], bool],
    ended: Callable[[], bool],
    unused: Callable[[], bytes],
) -> Iterator[bytes]:
    """Feed ``pieces`` to a decoder and drain it after each; one stream, nothing after it."""
    try:
        for piece in pieces:
            if ended():
                raise ArtifactError(f"{codec} payload: bytes follow the end of the stream")
            out = step(piece)
            yield out
            # A decoder may have taken all its input and still hold output back.
            while not ended() and (out or not hungry()):
                out = step(b"")
                yield out
    except (failure, MemoryError) as error:
        raise ArtifactError(f"{codec} payload is damaged: {error}") from error
    if not ended():
        raise ArtifactError(f"{codec} payload ends early")
    if unused():
        raise ArtifactError(f"{codec} payload: bytes follow the end of the stream")


def _package(name: str, requirement: str = "") -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ArtifactError(f'this codec needs a package that is not installed; run: pip install "{requirement or name}"') from error
