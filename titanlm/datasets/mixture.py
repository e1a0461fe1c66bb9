"""Several datasets as one: which source the next document of a stream comes from.

Weights are shares of *tokens*: the next document comes from the source that is
furthest behind its share of the tokens read so far, so in every stream the
shares are right to within a document at any time, whatever the lengths of the
documents, and the choice needs no random numbers that a resume could lose. Each
stream starts the sources at another offset (a draw from seed and stream), or
all streams would read the same source at the same time.

With M sources a document of source m has the id ``own id · M + m``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np

from titanlm.batch import Document
from titanlm.constraints import NonNegativeInt, PositiveFloat
from titanlm.errors import DataError
from titanlm.registry import PYDANTIC_CONFIG, Component, Dataset, Slot, lookup

OFFSET_TOKENS = 2048
"""How far apart the sources of a stream may start."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One dataset of a mixture."""

    name: str = ""
    """Heads its metrics; empty: the dataset's own name."""
    weight: PositiveFloat = 1.0
    """Its share of the tokens, against the sum of all weights."""
    epochs: NonNegativeInt = 0
    """After so many passes the others go on without it; 0: `data.epochs`."""
    dataset: Annotated[Component, Slot("dataset")]

    @property
    def label(self) -> str:
        return self.name or self.dataset.name


Source.__pydantic_config__ = PYDANTIC_CONFIG  # type: ignore[attr-defined]


def mix(sources: Sequence[Source], *, stream: int, split: str, seed: int, epochs: int | None, **runtime: Any) -> Dataset:
    """Stream ``stream`` of the sources: the dataset itself when there is one, else a ``Mixture``.

    Raises DataError when a dataset is to end after some epochs and cannot.
    """
    built = []
    for source in sources:
        passes = source.epochs or epochs
        if passes and split == "train" and "epochs" not in lookup("dataset", source.dataset.name).runtime:
            raise DataError(f"epochs: dataset {source.dataset.name!r} knows no end (its factory does not ask for `epochs`); leave epochs at 0")
        built.append(source.dataset.build(stream=stream, split=split, seed=seed, epochs=passes, **runtime))
    return built[0] if len(built) == 1 else Mixture(sources, built, stream=stream, split=split, seed=seed)


class Mixture:
    """Documents of several datasets by token shares; in splits other than "train" one after the other."""

    def __init__(self, sources: Sequence[Source], datasets: Sequence[Dataset], *, stream: int, split: str, seed: int) -> None:
        self._labels = [source.label for source in sources]
        self._datasets = list(datasets)
        self.n_sources = len(self._datasets)
        weights = np.array([source.weight for source in sources])
        self._weights = (weights / weights.sum()).tolist()
        self._chained = split != "train"
        draws = np.random.Philox(np.random.SeedSequence((seed, stream))).random_raw(self.n_sources)
        self._offsets = (draws / 2.0**64 * OFFSET_TOKENS).tolist()
        self._tokens, self._documents = [0] * self.n_sources, [0] * self.n_sources
        self._ended = [False] * self.n_sources
        parts = [(source.label, source.weight, source.epochs, dataset.fingerprint) for source, dataset in zip(sources, datasets, strict=True)]
        self.fingerprint = f"mixture: {hashlib.sha256(repr(parts).encode()).hexdigest()}"

    @property
    def n_rows(self) -> int | None:
        """Rows of one pass over all sources, where all know theirs."""
        rows: list[int | None] = [getattr(dataset, "n_rows", None) for dataset in self._datasets]
        known = [n for n in rows if n is not None]
        return sum(known) if len(known) == len(rows) else None

    @property
    def unreadable(self) -> int:
        """Rows of all sources passed over so far because they cannot be read."""
        return sum(getattr(dataset, "unreadable", 0) for dataset in self._datasets)

    @property
    def passed_over(self) -> int:
        """Rows of all sources so far that have no text, or that a filter refused."""
        return sum(getattr(dataset, "passed_over", 0) for dataset in self._datasets)

    def __iter__(self) -> Iterator[Document]:
        return self

    def __next__(self) -> Document:
        while not all(self._ended):
            number = self._furthest_behind()
            document = next(self._datasets[number], None)
            if document is None:
                self._ended[number] = True
                continue
            self._tokens[number] += len(document.ids)
            self._documents[number] += 1
            return replace(document, document_id=document.document_id * self.n_sources + number)
        raise StopIteration

    def state(self) -> dict[str, Any]:
        """Tokens and documents taken from each source, and the sources' own states; which have ended they know themselves."""
        return {
            "labels": list(self._labels),
            "tokens": list(self._tokens),
            "documents": list(self._documents),
            "sources": [dataset.state() for dataset in self._datasets],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Raises DataError when the state is of another mixture."""
        if list(state["labels"]) != self._labels:
            raise DataError(f"the data is mixed of {', '.join(self._labels)}, the state to resume of {', '.join(map(str, state['labels']))}")
        self._tokens, self._documents = ([int(n) for n in state[key]] for key in ("tokens", "documents"))
        self._ended = [False] * self.n_sources  # there may be more epochs now
        for dataset, own in zip(self._datasets, state["sources"], strict=True):
            dataset.restore(own)

    def _furthest_behind(self) -> int:
        left = [number for number in range(self.n_sources) if not self._ended[number]]
        if self._chained:
            return left[0]
        return min(left, key=lambda number: self._tokens[number] / self._weights[number] + self._offsets[number])
