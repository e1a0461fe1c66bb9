"""SentencePiece models, with an exact account of bytes.

Kudo and Richardson, "SentencePiece", arXiv 1808.06226.

Two kinds of model exist. A *lossless* one (identity normaliser, byte fallback,
no dummy prefix, whitespace untouched) gives every text back; what
``titanlm tokenizer train`` makes is of this kind. The others change the text
first: NFKC, collapsed spaces, a space put before the first word. Bits per byte
need a byte count of the targets, and only for the first kind is it the UTF-8
length of the text. For the second it is counted from the pieces, the way
Parameter Golf does, and the stream reports the difference to the original.

SentencePiece writes a space as U+2581. A text that itself contains U+2581
would come back with spaces, so a lossless model is never shown that character:
the text is cut there and the character goes in as its three byte pieces.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from titanlm.errors import DataError
from titanlm.registry import register

MODEL_FILE = "tokenizer.model"
SPACE = "\u2581"
PROBES = (
    "The quick brown fox jumps over the lazy dog, 1234567890 times.",
    "  two leading spaces and two trailing  ",
    "a\ttab,  double spaces,   triple\n\nand newlines\r\n",
    "def f(x):\n    return {'a': x ** 2}  # comment\n",
    "\ud55c\uad6d\uc5b4 \ubb38\uc7a5, \u65e5\u672c\u8a9e\u3068\u4e2d\u6587\u3002",
    "\U0001f600\U0001f469\u200d\U0001f469\u200d\U0001f467 \u00e9 e\u0301 \ufb01 \u2460 \uff21 \u00a0\u3000",
    "\x00\x07\ufeff\ufffd\ufdd0\u2581\u2585",
    "<s></s><unk><0x41><pad>",
)


@dataclass(frozen=True)
class SentencePieceConfig:
    """A SentencePiece model and what it puts around a document."""

    path: str
    """The model file; a relative path starts at the working directory. `titanlm tokenizer train` makes one."""
    add_bos: bool = True
    """Begin every document with the model's BOS, or with its EOS when it has no BOS, so that the first piece is a target too."""
    add_eos: bool = True
    """End every document with the model's EOS, if it has one, so that the language model learns to stop."""


@register("tokenizer", "sentencepiece")
class SentencePieceTokenizer:
    """A SentencePiece model (BPE, unigram, any); text goes in unsplit.

    Raises DataError when the model file is missing or no model.
    """

    def __init__(self, config: SentencePieceConfig, *, files: Mapping[str, bytes] | None = None) -> None:
        self.config = config
        self._model = _read(config) if files is None else _from(files)
        try:
            self._load()
        # A damaged model may load and hold pieces that are no UTF-8 or ids that do not exist.
        except (RuntimeError, IndexError, ValueError) as error:
            where = f"tokenizer.path: {config.path}" if files is None else MODEL_FILE
            raise DataError(f"{where} is no SentencePiece model or a damaged one; train one with `titanlm tokenizer train --type spm`") from error

    def _load(self) -> None:
        import sentencepiece

        if not self._model:
            raise ValueError("an empty file")  # the library would take it for no file at all
        self._processor = processor = sentencepiece.SentencePieceProcessor(model_proto=self._model)
        self.vocab_size: int = processor.get_piece_size()
        bos, eos = (None if special < 0 else special for special in (processor.bos_id(), processor.eos_id()))
        self.bos_id: int | None = (eos if bos is None else bos) if self.config.add_bos else None
        self.eos_id: int | None = eos if self.config.add_eos else None

        ids = range(self.vocab_size)
        pieces = [processor.id_to_piece(i) for i in ids]
        byte = np.array([processor.is_byte(i) for i in ids], dtype=bool)
        # One entry more than there are ids, so that "no previous id", -1, finds True at the end.
        self._boundary = np.array([processor.is_control(i) or processor.is_unknown(i) or processor.is_unused(i) for i in ids] + [True])
        self._space = np.array([piece.startswith(SPACE) for piece in pieces], dtype=bool) & ~byte & ~self._boundary[:-1]
        lengths = np.array([len(piece.replace(SPACE, " ").encode("utf-8")) for piece in pieces], dtype=np.int32)
        self._bytes = np.where(self._boundary[:-1], 0, np.where(byte, 1, lengths)).astype(np.int32)

        self._space_as_bytes: list[int] = []
        self.lossless = False
        if _keeps_text(self._model) and byte.sum() == 256:
            self._space_as_bytes = [processor.piece_to_id(f"<0x{value:02X}>") for value in SPACE.encode("utf-8")]
            self.lossless = True  # the probes are counted as a lossless model counts
            self.lossless = all(self._round_trips(probe) for probe in PROBES)
        # The model, what this build of the library makes of it, and the special ids.
        digest = hashlib.sha256(self._model)
        digest.update(json.dumps([[self.encode(probe).tolist() for probe in PROBES], self.bos_id, self.eos_id]).encode())
        self.fingerprint = f"sentencepiece: {digest.hexdigest()}"

    def encode(self, text: str) -> np.ndarray:
        """(n,) int32, no special ids.

        Raises DataError for a lone surrogate, which no UTF-8 text contains.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(f"character {error.start} of a text is the lone surrogate {text[error.start]!r}, which UTF-8 cannot hold") from error
        if not self.lossless or SPACE not in text:
            return np.array(self._processor.encode(text), dtype=np.int32)
        head, *rest = text.split(SPACE)
        ids = list(self._processor.encode(head))
        for part in rest:
            ids += self._space_as_bytes
            ids += self._processor.encode(part)
        return np.array(ids, dtype=np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``; BOS, EOS and other control ids vanish, broken UTF-8 becomes U+FFFD."""
        array = np.asarray(ids, dtype=np.int64)
        if array.size and not 0 <= array.min() <= array.max() < self.vocab_size:
            raise DataError(f"the tokenizer has ids 0 to {self.vocab_size - 1}, not {array.min()} to {array.max()}")
        return self._processor.decode(array.tolist())

    def target_bytes(self, ids: np.ndarray, prev_ids: np.ndarray) -> np.ndarray:
        """UTF-8 bytes that each of ``ids`` stands for after ``prev_ids``: (n,) int32.

        Control and unknown pieces stand for none, a byte piece for one, and
        the U+2581 of a piece for one. When the model may have put that space
        there itself (a normalising one, after a control or unknown piece or
        after nothing, -1), it is free.
        """
        counted = self._bytes[ids]
        if not self.lossless:
            counted = counted - (self._space[ids] & self._boundary[prev_ids])
        return counted.astype(np.int32)

    def files(self) -> Mapping[str, bytes]:
        return {MODEL_FILE: self._model}

    def _round_trips(self, text: str) -> bool:
        ids = self.encode(text)
        counted = self.target_bytes(ids, np.concatenate([[-1], ids[:-1]])).sum()
        return self.decode(ids.tolist()) == text and counted == len(text.encode("utf-8"))


def _read(config: SentencePieceConfig) -> bytes:
    path = Path(config.path).expanduser()
    try:
        return path.read_bytes()
    except OSError as error:
        remedy = "make one with `titanlm tokenizer train --type spm`, or correct the path"
        raise DataError(f"tokenizer.path: cannot read {path.absolute()} ({error.strerror}); {remedy}") from error


def _from(files: Mapping[str, bytes]) -> bytes:
    if MODEL_FILE not in files:
        raise DataError(f"the tokenizer's files lack {MODEL_FILE!r} (there: {', '.join(sorted(files)) or 'none'})")
    return bytes(files[MODEL_FILE])


# ---------------------------------------------------------------- the model file
# The message definitions that come with sentencepiece need the protobuf package;
# five fields do not justify it. Numbers are those of sentencepiece_model.proto.
_TRAINER, _NORMALIZER, _DENORMALIZER = 2, 3, 5
_CHARSMAP, _DUMMY_PREFIX, _REMOVE_EXTRA, _ESCAPE, _RULES = 2, 3, 4, 5, 6
_WHITESPACE_AS_SUFFIX = 24


def _keeps_text(model: bytes) -> bool:
    """Whether the settings stored in the model leave a text as it is."""
    trainer, normalizer, denormalizer = (
        dict(field for number, value in _fields(model) if number == message and isinstance(value, bytes) for field in _fields(value))
        for message in (_TRAINER, _NORMALIZER, _DENORMALIZER)
    )
    maps = [normalizer.get(_CHARSMAP), normalizer.get(_RULES), denormalizer.get(_CHARSMAP), denormalizer.get(_RULES)]
    moved = normalizer.get(_DUMMY_PREFIX, 1) or normalizer.get(_REMOVE_EXTRA, 1) or not normalizer.get(_ESCAPE, 1)
    return not (any(maps) or moved or trainer.get(_WHITESPACE_AS_SUFFIX, 0))


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of every field of a protobuf message that sentencepiece has accepted."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            value |= (byte & 0x7F) << shift
            at, shift = at + 1, shift + 7
            if byte < 0x80:
                return value

    while at < len(message):
        tag = varint()
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            yield number, varint()
        else:
            length = varint() if wire == 2 else {1: 8, 5: 4}[wire]
            yield number, message[at : at + length]
            at += length
