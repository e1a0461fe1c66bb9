"""SentencePiece models, with an exact account of bytes.

Kudo and Richardson, "SentencePiece", arXiv 1808.06226.

Two kinds of model exist. A *lossless* one (identity normaliser, byte fallback,
no dummy prefix, whitespace untouched) gives every text back; what
``titanlm tokenizer train`` makes is of this kind. The others change the text
first: NFKC, collapsed spaces, a space put before the first word. Bits per byte
need a byte count of the targets, and only for the first kind is it the UTF-8
length of the text. For the second it is counted from the pieces, the way
Parameter Golf does, and the stream reports the difference to the original.

Text goes in whole: a model may have pieces that cross spaces, and cutting at
spaces first, as converters to other formats do, would never let it use them.

Two things a text may contain are kept from the model, by cutting the text
there and writing them as byte pieces. SentencePiece writes a space as U+2581,
so a text's own U+2581 would come back as a space. And a user-defined symbol
that serves as BOS, EOS or PAD would let a text end its document.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from titanlm.constraints import NonNegativeInt
from titanlm.errors import DataError
from titanlm.registry import register
from titanlm.tokenizers.byte_counts import ByteCounts
from titanlm.tokenizers.files import carried, hint, read
from titanlm.tokenizers.fingerprint import PROBES, fingerprint
from titanlm.tokenizers.model_proto import changes, is_user_defined
from titanlm.tokenizers.text import MAX_ID, require_ids, utf8

MODEL_FILE = "tokenizer.model"
SPACE = "\u2581"


@dataclass(frozen=True)
class SentencePieceConfig:
    """A SentencePiece model and what it puts around a document."""

    path: str
    """The model file; a relative path starts at the working directory. `titanlm tokenizer train` makes one."""
    add_bos: bool = True
    """Begin every document with BOS, or with EOS when there is no BOS, so that the first piece is a target too."""
    add_eos: bool = True
    """End every document with EOS, if there is one, so that the language model learns to stop."""
    bos_id: NonNegativeInt | None = None
    """Begin documents with this id instead of the model's own BOS; it may lie past the model's pieces."""
    eos_id: NonNegativeInt | None = None
    """End documents with this id instead of the model's own EOS; it may equal `pad_id`."""
    pad_id: NonNegativeInt | None = None
    """Fill padded positions with this id instead of the model's own PAD; nothing is ever masked by it."""


@register("tokenizer", "sentencepiece")
class SentencePieceTokenizer:
    """A SentencePiece model (BPE, unigram, any); text goes in unsplit.

    Raises DataError when the model file is missing or no model, and for a
    special id that text can have.
    """

    def __init__(self, config: SentencePieceConfig, *, files: Mapping[str, bytes] | None = None) -> None:
        self.config = config
        remedy = "make one with `titanlm tokenizer train --type spm`, or correct the path"
        self._model = read(config.path, remedy) if files is None else carried(files, MODEL_FILE)
        try:
            self._load()
        # A damaged model may load and hold pieces that are no UTF-8 or ids that do not exist.
        except (RuntimeError, LookupError, ValueError) as error:
            where = f"tokenizer.path: {config.path}" if files is None else MODEL_FILE
            what = "is no SentencePiece model or a damaged one; train one with `titanlm tokenizer train --type spm`"
            raise DataError(f"{where} {what}{hint(self._model, 'sentencepiece')}") from error

    def _load(self) -> None:
        import sentencepiece

        if not self._model:
            raise ValueError("an empty file")  # the library would take it for no file at all
        self._processor = processor = sentencepiece.SentencePieceProcessor(model_proto=self._model)
        self._n_pieces: int = processor.get_piece_size()
        self._set_special_ids()

        ids = range(self._n_pieces)
        past = self.vocab_size - self._n_pieces
        texts = [processor.id_to_piece(i) for i in ids]
        byte = np.array([processor.is_byte(i) for i in ids] + [False] * past, dtype=bool)
        outside = np.array([processor.is_control(i) or processor.is_unknown(i) or processor.is_unused(i) for i in ids] + [True] * past, dtype=bool)
        outside[list(self._special)] = True
        self._pieces: list[bytes | None] = [b"" if out else text.replace(SPACE, " ").encode("utf-8") for text, out in zip(texts, outside)]
        for i in np.flatnonzero(byte):
            self._pieces[i] = bytes([int(texts[i][3:5], 16)])  # "<0x41>"
        self._pieces += [b"" if i in self._special else None for i in range(self._n_pieces, self.vocab_size)]
        n_bytes = np.array([len(piece or b"") for piece in self._pieces], dtype=np.int32)
        space = np.array([text.startswith(SPACE) for text in texts] + [False] * past, dtype=bool) & ~outside
        self._counts = ByteCounts(n_bytes, space, outside)
        self._counts_of_text = ByteCounts(n_bytes, np.zeros_like(space), outside)

        # What the model is never shown, and the byte pieces that stand for it.
        all_bytes = bool(byte.sum() == 256)
        self.lossless = all_bytes and not changes(self._model)  # the probes are counted as a lossless model counts
        texts_kept_out = [processor.id_to_piece(i).replace(SPACE, " ") for i in self._symbols if all_bytes] + [SPACE] * self.lossless
        self._kept_out = {text: [processor.piece_to_id(f"<0x{value:02X}>") for value in text.encode("utf-8")] for text in texts_kept_out}
        self._cut = re.compile(f"({'|'.join(map(re.escape, self._kept_out))})") if self._kept_out else None
        self.lossless = self.lossless and all(self._keeps(probe) for probe in PROBES)
        self.fingerprint = fingerprint("sentencepiece", self, reserved=sorted(self._special))

    def _set_special_ids(self) -> None:
        processor, config = self._processor, self.config
        given = {"bos_id": config.bos_id, "eos_id": config.eos_id, "pad_id": config.pad_id}
        own = {"bos_id": processor.bos_id(), "eos_id": processor.eos_id(), "pad_id": processor.pad_id()}
        self._symbols: list[int] = []
        for key, special in given.items():
            if special is not None and special < self._n_pieces:
                self._check_inside(key, special)
            elif special is not None and special > MAX_ID:
                raise DataError(f"tokenizer.{key}: {special} is too large; the model has ids 0 to {self._n_pieces - 1}")
        ids = {key: own[key] if special is None else special for key, special in given.items()}
        bos, eos, self.pad_id = (None if special < 0 else special for special in ids.values())
        self.bos_id: int | None = (eos if bos is None else bos) if config.add_bos else None
        self.eos_id: int | None = eos if config.add_eos else None
        self._special = {special for special in ids.values() if special >= 0}
        self.vocab_size: int = max(self._n_pieces, *(special + 1 for special in ids.values()))

    def _check_inside(self, key: str, special: int) -> None:
        if self._processor.is_control(special) or self._processor.is_unused(special):
            return  # never in text
        if not is_user_defined(self._model, special):
            piece = self._processor.id_to_piece(special)
            remedy = f"name a control, unused or user-defined piece, or an id from {self._n_pieces} on"
            raise DataError(f"tokenizer.{key}: id {special} is the piece {piece!r}, which text can have; {remedy}")
        if special not in self._symbols:
            self._symbols.append(special)

    def encode(self, text: str) -> np.ndarray:
        """(n,) int32, no special ids.

        Raises DataError for a lone surrogate, which no UTF-8 text contains,
        and for a text that cannot be kept from having a special id.
        """
        utf8(text)
        if self._cut is None or not self._cut.search(text):
            ids = self._processor.encode(text)
        else:
            ids = []
            for part in self._cut.split(text):
                ids += self._kept_out.get(part) or self._processor.encode(part)
        array = np.array(ids, dtype=np.int32)
        if self._symbols and (found := np.isin(array, self._symbols)).any():
            piece = self._processor.id_to_piece(int(array[found][0]))
            raise DataError(f"a text contains {piece!r}, a special token of this tokenizer, and the model has no bytes to write it with; filter such texts out")
        return array

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``; BOS, EOS, PAD and other control ids vanish, broken UTF-8 becomes U+FFFD.

        Raises DataError for an id that the tokenizer does not have.
        """
        array = np.asarray(ids, dtype=np.int64)
        require_ids(array, self.vocab_size)
        array = array[~np.isin(array, list(self._special))]
        if (gap := array[array >= self._n_pieces]).size:
            raise DataError(f"id {gap[0]} is no token: the model's pieces end at {self._n_pieces - 1}, special ids are {sorted(self._special)}")
        return self._processor.decode(array.tolist())

    def target_bytes(self, ids: np.ndarray, prev_ids: np.ndarray) -> np.ndarray:
        """UTF-8 bytes that each of ``ids`` stands for after ``prev_ids``: (n,) int32.

        Special, control and unknown pieces stand for none, a byte piece for
        one, and the U+2581 of a piece for one. When the model may have put
        that space there itself (a normalising one, after a special, control or
        unknown piece or after nothing, -1), it is free.
        """
        return (self._counts_of_text if self.lossless else self._counts).of(ids, prev_ids)

    def files(self) -> Mapping[str, bytes]:
        return {MODEL_FILE: self._model}

    def pieces(self) -> Sequence[bytes | None]:
        """The bytes of each id, U+2581 as a space; none for special ids, None where there is no such id."""
        return self._pieces

    def remarks(self) -> list[str]:
        """What a user should know about the model, a sentence each."""
        found = changes(self._model)
        alone = self._processor.piece_to_id(SPACE)
        if self._processor.id_to_piece(alone) == SPACE:
            found.append(f"U+2581 alone, a space that joins no word, is piece {alone}")
        else:
            found.append("WARNING: U+2581 alone is no piece: a space that joins no word becomes three byte tokens, and bits per byte come out too low")
        if self.vocab_size > self._n_pieces:
            found.append(f"special ids lie past the model's {self._n_pieces:,} pieces")
        return found

    def _keeps(self, text: str) -> bool:
        ids = self.encode(text)
        counted = self.target_bytes(ids, np.concatenate([[-1], ids[:-1]])).sum()
        return self.decode(ids.tolist()) == text and counted == len(text.encode("utf-8"))
