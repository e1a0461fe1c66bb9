"""Documents that are tokens already, out of .bin shards.

The files of a split, in the order of their numbers, are one sequence of tokens.
Nothing in a shard says where a document is but its special ids, so what the
tokenizer puts around a document says where documents begin:

* BOS: at every BOS, whether or not there is an EOS too;
* EOS alone: after every EOS;
* BOS and EOS the same id: separators in a row are, in turn, the end of one
  document and the start of the next, so between two documents there is an even
  number of them. Shards with one separator between documents are refused;
* neither: nowhere; every slice is a document.

Shards are cut at a number of tokens and the documents with them. So where a
file's name continues the one before it (the same but for a number that is one
higher) the head of the file, up to its first start, belongs to the last
document of the file before. The head of any other file is a document.

Order, epochs and streams are those of text (``titanlm.datasets.documents``);
what is permuted are *slices* of files, and the documents within a slice. A
slice's documents are those that begin in it; the last may run on into the
next slice or file. Where they begin is found once for a slice, with numpy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from titanlm.batch import Document
from titanlm.constraints import PositiveInt
from titanlm.datasets.documents import INDEX_BITS, order, shared, shuffled
from titanlm.datasets.shard_sequence import ShardSequence, Slice, tokens_of
from titanlm.errors import DataError
from titanlm.registry import Tokenizer, register

_SLICES_A_STREAM = 4
_SMALLEST = 1024
"""Tokens of a slice, however little data there is."""


@dataclass(frozen=True)
class TokenShardsConfig:
    """Token shards (.bin), as `titanlm data prepare`, llm.c and Parameter Golf write them."""

    paths: tuple[str, ...] = ()
    """Files, directories (every .bin below) and globs, relative to the working directory; names with `_bytes_` are no tokens and left out."""
    validation_paths: tuple[str, ...] = ()
    """Shards for validation."""
    shuffle: bool = True
    """Train in another order every epoch; validation always goes in order of the files."""
    slice_tokens: PositiveInt = 1 << 18
    """What is shuffled are pieces of files of so many tokens, and the documents that begin in a piece; each stream holds one piece in memory."""

    def __post_init__(self) -> None:
        if not (self.paths or self.validation_paths):
            raise ValueError("paths is empty: name at least one file, directory or glob")

    def n_training_tokens(self) -> int:
        """Of one pass, by the headers of the shards. Raises DataError as opening them does."""
        return tokens_of(self.paths)


@register("dataset", "token_shards")
class TokenShards:
    """Stream ``stream`` of ``n_streams`` over the shards of a split; ids are (n,) int32, read-only, ``n_bytes`` is None.

    ``epochs`` passes for split "train", for ever when None; one pass in order
    otherwise. Raises DataError when a path matches nothing or a file is named
    twice, for a file that is no shard or a damaged one, for shards of another
    tokenizer or another convention, and for ids that the tokenizer lacks.
    """

    def __init__(
        self, config: TokenShardsConfig, *, tokenizer: Tokenizer, split: str, stream: int, n_streams: int, seed: int, epochs: int | None = None
    ) -> None:
        if not 0 <= stream < n_streams:
            raise DataError(f"stream {stream} of {n_streams} does not exist: streams are numbered from 0")
        key = ("token_shards", Path.cwd(), replace(config, shuffle=True), split, tokenizer.fingerprint, n_streams)
        self._slices = shared(key, lambda: _Slices(config, split, tokenizer, n_streams))
        self.fingerprint = self._slices.fingerprint
        self._n_slices = len(self._slices.places)
        self._epochs = epochs if split == "train" else 1
        self._shuffle = config.shuffle and split == "train"
        self._stream, self._n_streams, self._seed = stream, n_streams, seed
        self._taken = self._emitted = self._documents = 0
        self._order, self._ordered = np.zeros(0, dtype=np.uint32), -1  # the present permutation and its epoch
        self._slice: Slice | None = None

    def __iter__(self) -> Iterator[Document]:
        return self

    def __next__(self) -> Document:
        one = self._slice or self._next_slice()
        index = one.order[self._emitted]
        document = one.document(index)
        self._emitted += 1
        self._documents += 1
        if self._emitted == len(one.order):  # so that a finished slice is not read again after a resume
            self._taken, self._emitted, self._slice = self._taken + 1, 0, None
        return document

    def state(self) -> dict[str, Any]:
        """Slices taken, documents emitted of the present one, slices there are, documents of all."""
        return {"taken": self._taken, "emitted": self._emitted, "n_shards": self._n_slices, "counts": {"documents": self._documents}}

    def restore(self, state: dict[str, Any]) -> None:
        """Raises DataError when the state belongs to data of another size."""
        if state["n_shards"] != self._n_slices:
            before = f"the state to resume was of {state['n_shards']}"
            raise DataError(f"{self._slices.name} has {self._n_slices} slices, but {before}: the data or dataset.slice_tokens has changed")
        self._taken, self._emitted = int(state["taken"]), int(state["emitted"])
        self._documents = int(state["counts"]["documents"])
        self._slice = None

    def _next_slice(self) -> Slice:
        """The slice whose turn it is, or the next in which a document begins."""
        for barren in count():
            position = self._stream + self._taken * self._n_streams
            epoch, offset = divmod(position, self._n_slices)
            if self._epochs is not None and epoch >= self._epochs:
                raise StopIteration
            if barren >= self._n_slices and not self._shuffle:  # shuffled, its turn comes
                where = f"in the slices of stream {self._stream} of {self._n_streams}"
                raise DataError(f"{self._slices.name}: no document begins {where}; change data.n_streams or dataset.slice_tokens")
            if self._shuffle and epoch != self._ordered:
                self._order, self._ordered = order(self._seed, epoch, self._n_slices), epoch
            number = int(self._order[offset]) if self._shuffle else offset
            one = self._slices.read(number)
            if n := len(one.order):
                drawn = shuffled((self._seed, position), n).tolist() if self._shuffle else one.order
                self._slice = replace(one, order=drawn, first_id=position << INDEX_BITS)
                return self._slice
            self._taken += 1
        raise AssertionError


class _Slices:
    """The slices of a split's files; shared by all streams of a process."""

    name = "dataset 'token_shards'"

    def __init__(self, config: TokenShardsConfig, split: str, tokenizer: Tokenizer, n_streams: int) -> None:
        self._sequence = sequence = ShardSequence(self.name, config.paths, config.validation_paths, split, tokenizer)
        n_tokens = config.slice_tokens
        if sequence.separated:
            # Little data: small slices, so that no stream is without. Where slices are the documents they are what the user says.
            n_tokens = min(n_tokens, max(_SMALLEST, sequence.n_tokens // (_SLICES_A_STREAM * n_streams)))
        self.places = sequence.slices(n_tokens)
        self.fingerprint = f"token_shards: {sequence.digest(split, n_tokens)}"

    def read(self, number: int) -> Slice:
        return self._sequence.read_slice(*self.places[number])
