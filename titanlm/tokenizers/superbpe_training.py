"""Training a SuperBPE vocabulary in process; `titanlm tokenizer train --type superbpe`.

Two stages, after Liu et al. (March 2025, arXiv:2503.13423). The first is
byte-level BPE on text that is cut at words, by the `tokenizers` library. For
the second the text is encoded with those merges as the finished tokenizer will
do it, cut at numbers alone, and merging goes on there
(``titanlm/tokenizers/superwords.py``). As in the published vocabularies no
token has parts of more than four words, none has a space after a colon, so
that what follows "Answer:" is a token of its own, and none goes on past the
end of a line.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from titanlm.errors import DataError
from titanlm.tokenizers.byte_level import BYTE_OF, bytes_of
from titanlm.tokenizers.files import write
from titanlm.tokenizers.superbpe import backend, parts
from titanlm.tokenizers.superwords import BREAK, PairMerger
from titanlm.tokenizers.text import hf_library, n_words, utf8
from titanlm.tokenizers.training import Trained
from titanlm.tokenizers.vocab_merges import written

MIN_FREQUENCY = 2
"""What stands once in the text teaches nothing."""
_BATCH_BYTES = 4_000_000
_LONGEST = 1 << 20


def train_superbpe(
    texts: Callable[[], Iterable[str]],
    output: Path,
    vocab_size: int,
    transition: int,
    *,
    max_words: int = 4,
    special_tokens: Sequence[str] = (),
    max_bytes: int | None = None,
) -> Trained:
    """Train on ``texts()``, which is read twice, and write ``vocab.json`` and ``merges.txt`` into the folder ``output``.

    Ids: the 256 bytes, merges within words until there are ``transition``
    tokens, merges across spaces. ``special_tokens`` are in neither file: they
    are the last of ``vocab_size`` ids, and named in the settings of the
    tokenizer. With a ``transition`` that leaves nothing to the second stage
    this is plain byte-level BPE, for ``cut = "words"``. Texts are read until
    ``max_bytes`` of UTF-8 are exceeded. Equal texts give equal files.

    Raises DataError when there is no text, when it cannot fill either stage,
    and for sizes that cannot be; nothing is written then.
    """
    hf_library("`titanlm tokenizer train --type superbpe`")
    n_tokens = vocab_size - len(special_tokens)
    if len(set(special_tokens)) < len(special_tokens) or "" in special_tokens:
        raise DataError(f"special tokens must have names, each another: {', '.join(map(repr, special_tokens))}")
    if not 256 <= transition <= n_tokens:
        room = f"vocab_size = {vocab_size} less {len(special_tokens)} special tokens" if special_tokens else f"vocab_size = {vocab_size}"
        raise DataError(f"transition = {transition} must be from 256, the single bytes, to {room}")
    if max_words < 2:
        raise DataError(f"max_words = {max_words} leaves no superwords; for none set transition to vocab_size")
    read = _Reading(texts, max_bytes)
    names, merges = _within_words(read, transition)
    if n_tokens > transition:
        _across_words(read, names, merges, n_tokens, max_words)
    for name, content in written(names, merges).items():
        write(Path(output) / name, content)
    return Trained(Path(output), vocab_size, read.n_texts, read.n_bytes)


def settings(trained: Trained, transition: int, special_tokens: Sequence[str]) -> str:
    """The section of a config that uses what was trained, as TOML."""
    lines = ["[tokenizer]", 'name = "superbpe"', f"path = {_toml(str(trained.path))}"]
    n_tokens = trained.vocab_size - len(special_tokens)
    if n_tokens == transition:
        lines.append('cut = "words"')
    if special_tokens:
        lines.append(f"special_tokens = {{ {', '.join(f'{_toml(name)} = {n_tokens + i}' for i, name in enumerate(special_tokens))} }}")
    return "\n".join(lines)


def _within_words(read: _Reading, transition: int) -> tuple[list[str], list[tuple[str, str]]]:
    """Names by id and merges of the first stage."""
    from tokenizers import trainers

    trainer = trainers.BpeTrainer(
        vocab_size=transition, min_frequency=MIN_FREQUENCY, initial_alphabet=list(BYTE_OF), special_tokens=[], show_progress=sys.stderr.isatty()
    )
    learner = backend({}, [], "words")
    learner.train_from_iterator(read("first stage"), trainer)
    if not read.n_bytes:
        raise DataError("there is no text to train a tokenizer on: every text was empty")
    model = json.loads(learner.to_str())["model"]
    names = sorted(model["vocab"], key=model["vocab"].__getitem__)
    if len(names) < transition:
        most = f"at most {len(names):,} come of {read.n_bytes:,} bytes of text"
        raise DataError(f"transition = {transition} is too many tokens within words: {most}; lower it or give more text")
    return names, [(left, right) for left, right in model["merges"]]


def _across_words(read: _Reading, names: list[str], merges: list[tuple[str, str]], n_tokens: int, max_words: int) -> None:
    """Go on with names and merges, both in place."""
    from tqdm import tqdm

    tokens = [bytes_of(name) for name in names]
    merger = PairMerger(_encoded(read, names, merges, tokens), tokens, MIN_FREQUENCY)
    with tqdm(total=n_tokens, initial=len(names), unit=" tokens", desc="second stage", leave=False, disable=None) as bar:
        done = set(merges)  # a pair may come up again after another made its token too
        for left, right in merger.learn(n_tokens, lambda token: b": " not in token and b"\n" not in token[:-1] and n_words(token) <= max_words):
            if (pair := (names[left], names[right])) not in done:
                done.add(pair)
                merges.append(pair)
            if len(tokens) > len(names):
                names.append(names[left] + names[right])
                bar.update()
    if len(names) < n_tokens:
        raise DataError(f"vocab_size is too large for {read.n_bytes:,} bytes of text: at most {len(names):,} tokens come of it; lower it or give more text")


def _encoded(read: _Reading, names: Sequence[str], merges: Sequence[tuple[str, str]], tokens: Sequence[bytes]) -> np.ndarray:
    """All texts in tokens of the first stage, BREAK around each, at cuts and after line ends: (n,) int32."""
    learnt = backend({name: i for i, name in enumerate(names)}, list(merges), "digits")
    ends_line = np.array([b"\n" in token for token in tokens])
    found = [np.array([BREAK], dtype=np.int32)]
    for batch in _batches(read("second stage")):
        for encoding in learnt.encode_batch(batch, add_special_tokens=False):
            ids, pieces = np.array(encoding.ids, dtype=np.int32), np.array(encoding.word_ids, dtype=np.int64)
            cut = np.flatnonzero((pieces[1:] != pieces[:-1]) | ends_line[ids[:-1]]) + 1
            found.append(np.insert(ids, np.append(cut, len(ids)), BREAK))
    return np.concatenate(found)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _Reading:
    """The texts, as often as they are asked for, in parts that are encoded with little memory."""

    def __init__(self, texts: Callable[[], Iterable[str]], max_bytes: int | None) -> None:
        self.texts, self.max_bytes = texts, max_bytes
        self.n_texts = self.n_bytes = 0

    def __call__(self, stage: str) -> Iterator[str]:
        from tqdm import tqdm

        self.n_texts = self.n_bytes = 0
        with tqdm(unit="B", unit_scale=True, desc=f"{stage}: reading", leave=False, disable=None) as bar:
            for text in self.texts():
                if self.max_bytes is not None and self.n_bytes >= self.max_bytes:
                    break
                size = len(utf8(text))
                self.n_texts, self.n_bytes = self.n_texts + 1, self.n_bytes + size
                for part in parts(text):
                    yield from _lines(part)
                bar.update(size)
        print(f"{stage}: read {self.n_texts:,} texts, {self.n_bytes / 1e6:.1f} MB; learning merges", file=sys.stderr, flush=True)


def _lines(text: str) -> Iterator[str]:
    """The text whole, or if it is long cut at line ends, which no token crosses."""
    start = 0
    while start < len(text):
        end = start + _LONGEST
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield text[start:end]
        start = end


def _toml(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
