"""Spans of equal length out of .bin shards: training in the order of the Parameter Golf records.

The files of a split, in the order of their numbers, are one sequence of N
tokens, of which ``token_shards`` gives the documents. Here it is cut by length
alone, as those records read it, into spans of ``span_tokens`` tokens and the
one behind, which is the last label. Logical stream s of n gives the spans s,
s + n, s + 2n...

* In order: the sequence is an endless ring, and span k begins k · (span_tokens
  + 1) tokens behind the beginning, so that no two spans share a token until the
  ring closes. This is the baseline's loader: there each of W processes, in each
  of its 8/W micro-steps, takes the next 524,288/8 tokens and one more. With that
  ``span_tokens``, 8 streams and the packer ``none``, a step of 524,288 positions
  has the same rows, for any W.
* Shuffled: epoch e has spans that share one token, beginning at a phase drawn
  from seed and e, in an order drawn likewise; none runs over the end of the
  data. With ``span_tokens`` of a row's length every row is a window of its own,
  as in the ShuffledSequenceLoader of later records (#1394), which draws phase
  and order for each file, and files for each rank; here ranks do not matter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from titanlm.batch import Document
from titanlm.constraints import Size
from titanlm.datasets.documents import INDEX_BITS, order, shared
from titanlm.datasets.shard_sequence import ShardSequence, tokens_of
from titanlm.datasets.token_shards import TokenShards, TokenShardsConfig
from titanlm.errors import DataError
from titanlm.registry import Dataset, Tokenizer, register


@dataclass(frozen=True)
class TokenSpansConfig:
    """Token shards (.bin), read in spans of equal length."""

    paths: tuple[str, ...] = ()
    """Files, directories (every .bin below) and globs, as for `token_shards`."""
    validation_paths: tuple[str, ...] = ()
    """Shards for validation, of which documents are read as `token_shards` does."""
    span_tokens: Size = 65_536
    """Tokens trained on of a span; a span has one more, its last label. A multiple of the row's length, or rows are padded."""
    shuffle: bool = False
    """Cut and order the spans anew in every epoch; False: one after the other, for ever."""

    def __post_init__(self) -> None:
        if not (self.paths or self.validation_paths):
            raise ValueError("paths is empty: name at least one file, directory or glob")

    def n_training_tokens(self) -> int:
        """Of one pass, by the headers of the shards. Raises DataError as opening them does."""
        return tokens_of(self.paths)


@register("dataset", "token_spans")
def token_spans(config: TokenSpansConfig, *, tokenizer: Tokenizer, split: str, stream: int, n_streams: int, seed: int, epochs: int | None = None) -> Dataset:
    """Spans for split "train", else the documents in order.

    A span is a ``Document`` though it holds many: they are not told apart in
    it, so `data.document_mask` must be false. Raises DataError as
    ``token_shards`` does, and when there are fewer spans than streams.
    """
    runtime: dict[str, Any] = {"tokenizer": tokenizer, "split": split, "stream": stream, "n_streams": n_streams, "seed": seed, "epochs": epochs}
    if split != "train":
        return TokenShards(TokenShardsConfig(config.paths, config.validation_paths), **runtime)
    return TokenSpans(config, **runtime)


class TokenSpans:
    """Stream ``stream`` of ``n_streams``: documents of ``span_tokens + 1`` ids, (n,) int32, read-only; bytes are counted by whoever receives them.

    ``epochs`` passes, for ever when None. In order a pass is N tokens; the
    last one ends before the span that would run into the next.
    """

    def __init__(
        self, config: TokenSpansConfig, *, tokenizer: Tokenizer, split: str, stream: int, n_streams: int, seed: int, epochs: int | None = None
    ) -> None:
        if not 0 <= stream < n_streams:
            raise DataError(f"stream {stream} of {n_streams} does not exist: streams are numbered from 0")
        key = ("token_spans", Path.cwd(), config.paths, config.validation_paths, split, tokenizer.fingerprint)
        name = "dataset 'token_spans'"
        self._sequence = shared(key, lambda: ShardSequence(name, config.paths, config.validation_paths, split, tokenizer))
        self._n_tokens, self._length, self._shuffle = self._sequence.n_tokens, config.span_tokens, config.shuffle
        self.fingerprint = f"token_spans: {self._sequence.digest(split, self._length, self._shuffle)}"
        # Of one pass. Shuffled, a span less than would fit leaves room for every phase, so that all epochs have as many.
        self._n_spans = max(int(self._n_tokens > self._length), self._n_tokens // self._length - 1) if self._shuffle else self._n_tokens // (self._length + 1)
        if self._n_spans < n_streams:
            raise DataError(
                f"{name}: {self._n_tokens:,} tokens are {self._n_spans:,} spans of span_tokens = {self._length:,} and a last label, but each of "
                f"data.n_streams = {n_streams} streams needs one; give more shards, or lower dataset.span_tokens or data.n_streams"
            )
        self._end: int | None = None
        if epochs is not None:
            self._end = epochs * self._n_spans if self._shuffle else epochs * self._n_tokens // (self._length + 1)
        self._stream, self._n_streams, self._seed = stream, n_streams, seed
        self._taken = 0
        self._order, self._phase, self._epoch = np.zeros(0, dtype=np.uint32), 0, -1  # as drawn for the epoch

    def __iter__(self) -> Iterator[Document]:
        return self

    def __next__(self) -> Document:
        number = self._stream + self._taken * self._n_streams
        if self._end is not None and number >= self._end:
            raise StopIteration
        ids = self._shuffled(number) if self._shuffle else self._in_order(number)
        self._taken += 1
        return Document(ids, number << INDEX_BITS, None)

    def state(self) -> dict[str, Any]:
        """Spans taken, spans there are in a pass."""
        return {"taken": self._taken, "n_shards": self._n_spans, "counts": {"documents": self._taken}}

    def restore(self, state: dict[str, Any]) -> None:
        """Raises DataError when the state belongs to data of another size."""
        if state["n_shards"] != self._n_spans:
            before = f"the state to resume was of {state['n_shards']}"
            raise DataError(f"{self._sequence.name} has {self._n_spans} spans, but {before}: the data, dataset.span_tokens or dataset.shuffle has changed")
        self._taken = int(state["taken"])

    def _in_order(self, number: int) -> np.ndarray:
        start = number * (self._length + 1) % self._n_tokens
        over = start + self._length + 1 - self._n_tokens
        if over <= 0:
            return self._sequence.ids(start, self._n_tokens + over)
        ids = np.concatenate([self._sequence.ids(start, self._n_tokens), self._sequence.ids(0, over)])
        ids.flags.writeable = False
        return ids

    def _shuffled(self, number: int) -> np.ndarray:
        epoch, place = divmod(number, self._n_spans)
        if epoch != self._epoch:
            phases = min(self._length, self._n_tokens - self._n_spans * self._length)
            word = np.random.Philox(np.random.SeedSequence((self._seed, epoch, self._n_spans))).random_raw(1)[0]
            self._order, self._phase, self._epoch = order(self._seed, epoch, self._n_spans), int(word % np.uint64(phases)), epoch
        start = self._phase + int(self._order[place]) * self._length
        return self._sequence.ids(start, start + self._length + 1)
