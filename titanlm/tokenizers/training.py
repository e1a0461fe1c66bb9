"""Training a SentencePiece model in process; `titanlm tokenizer train --type spm`.

The model is lossless: identity normaliser, byte fallback, no dummy prefix,
whitespace kept and, unless told otherwise, allowed to form pieces (without
that, indented source code takes a third more tokens).

SentencePiece leaves out of its training text, with no more than a line in a
log, every sentence longer than its limit and every one with a character that
it reserves, and it strips line ends from a sentence's end. So a document goes
in as several sentences, cut where nothing of it is lost.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from titanlm.errors import DataError
from titanlm.tokenizers.files import write

SENTENCE_BYTES = 16384
# U+2581 stands for a space and U+2585 for an unknown character inside the trainer.
# Neither can be learnt; the byte pieces write them.
_RESERVED = re.compile("[\u2581\u2585]")
_META = ("<unk>", "<s>", "</s>", "<pad>")


@dataclass(frozen=True)
class Trained:
    """What a training made, and from how much."""

    path: Path
    vocab_size: int
    n_texts: int
    n_bytes: int
    """UTF-8 length of the texts that were read."""


def train_sentencepiece(
    texts: Iterable[str],
    output: Path,
    vocab_size: int,
    model_type: Literal["bpe", "unigram"] = "bpe",
    *,
    character_coverage: float = 0.9995,
    max_bytes: int | None = None,
    symbols: Sequence[str] = (),
    split_by_whitespace: bool = True,
    whitespace_pieces: bool = True,
    split_digits: bool = False,
    bos_id: int = 1,
    eos_id: int = 2,
    pad_id: int | None = None,
) -> Trained:
    """Train on ``texts`` and write the model to ``output``, whole or not at all.

    Ids: BOS, EOS and, if wanted, PAD where they are asked for, unknown at the
    first that is left, ``symbols`` and 256 bytes at the next, then learnt
    pieces. Symbols are always pieces of their own. Characters beyond
    ``character_coverage`` of the text are left to the bytes. Texts are read
    until ``max_bytes`` of UTF-8 are exceeded. Without ``split_by_whitespace``
    pieces may cross spaces, with ``whitespace_pieces`` they may be white space
    alone, with ``split_digits`` every digit is one.

    Raises DataError when there is no text, when the text cannot fill
    ``vocab_size`` pieces, for symbols that cannot be and for ids taken twice;
    nothing is written then.
    """
    import sentencepiece

    special = _special_ids(bos_id, eos_id, pad_id, vocab_size)
    feed = _Feed(texts, max_bytes)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(feed),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            character_coverage=character_coverage,
            user_defined_symbols=_symbols(symbols),
            split_by_whitespace=split_by_whitespace,
            allow_whitespace_only_pieces=whitespace_pieces,
            split_digits=split_digits,
            normalization_rule_name="identity",
            byte_fallback=True,
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            max_sentence_length=SENTENCE_BYTES,
            num_threads=min(16, os.cpu_count() or 1),
            minloglevel=2,
            **special,
        )
    except RuntimeError as error:
        if feed.error is not None:
            raise feed.error from None
        raise DataError(_explain(str(error), vocab_size, feed)) from error
    write(Path(output), model.getvalue())
    return Trained(output, vocab_size, feed.n_texts, feed.n_bytes)


def _special_ids(bos_id: int, eos_id: int, pad_id: int | None, vocab_size: int) -> dict[str, Any]:
    wanted: dict[str, Any] = {"bos_id": bos_id, "eos_id": eos_id} | ({} if pad_id is None else {"pad_id": pad_id})
    ids = list(wanted.values())
    if len(set(ids)) < len(ids):
        raise DataError(f"special ids must differ in a model ({wanted}); to pad with EOS, set tokenizer.pad_id in the config that uses the model")
    if not all(0 <= i < vocab_size for i in ids):
        remedy = "one past its pieces is set by tokenizer.bos_id in the config that uses the model"
        raise DataError(f"special ids are 0 to {vocab_size - 1} in a model ({wanted}); {remedy}")
    return {"pad_id": -1, **wanted, "unk_id": next(i for i in range(len(ids) + 1) if i not in ids)}


def _symbols(symbols: Sequence[str]) -> list[str]:
    """As the trainer wants them: spaces marked. It would pass over one that collides, or is no text, or switch off a special token for it."""
    for symbol in symbols:
        if not symbol or _RESERVED.search(symbol) or symbol in _META or re.fullmatch("<0x[0-9A-F]{2}>", symbol) or symbols.count(symbol) > 1:
            why = "stands twice" if symbols.count(symbol) > 1 else "is empty, a name that the model uses itself, or has U+2581 or U+2585"
            raise DataError(f"symbol {symbol!r} {why}")
    return [symbol.replace(" ", "\u2581") for symbol in symbols]


class _Feed:
    """Sentences for the trainer; keeps the error that it would wrap."""

    def __init__(self, texts: Iterable[str], max_bytes: int | None) -> None:
        self.texts, self.max_bytes = texts, max_bytes
        self.n_texts = self.n_bytes = 0
        self.error: BaseException | None = None

    def __iter__(self) -> Iterator[str]:
        try:
            for text in self.texts:
                if self.max_bytes is not None and self.n_bytes >= self.max_bytes:
                    return
                self.n_texts += 1
                self.n_bytes += len(text.encode("utf-8"))
                yield from sentences(text)
        except BaseException as error:
            self.error = error
            raise


def sentences(text: str) -> Iterator[str]:
    """Cut ``text`` into sentences of at most SENTENCE_BYTES; joined they are the text without its reserved characters."""
    longest = SENTENCE_BYTES // 4  # no character takes more than four bytes
    for part in _RESERVED.split(text):
        start = 0
        while start < len(part):
            end = min(start + longest, len(part))
            if end < len(part):
                # Before a line end rather than after it, where it would be stripped.
                cut = part.rfind("\n", start + 1, end)
                while cut > start and part[cut - 1] in "\r\n":
                    cut -= 1
                end = cut if cut > start else end
            yield part[start:end]
            start = end


def _explain(message: str, vocab_size: int, feed: _Feed) -> str:
    if feed.n_bytes == 0:
        return "there is no text to train a tokenizer on: every text was empty"
    if limit := re.search(r"too high .*<= (\d+)", message):
        return f"vocab_size = {vocab_size} is too large for {feed.n_bytes:,} bytes of text: at most {limit[1]}; lower it or give more text"
    if limit := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        what = f"bytes, special ids and single characters alone are {limit[1]}"
        return f"vocab_size = {vocab_size} is too small: {what}; raise it or lower character_coverage"
    return f"SentencePiece could not be trained: {message}"
