"""One logical stream of a run: documents in, packed rows out, resumable at every row.

A row leaves here as the packer made it, marks and all; ``boundaries.finish``
resolves many rows at once, when a step is put together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from titanlm.batch import Document, Row
from titanlm.datasets.mixture import Source, mix
from titanlm.errors import DataError
from titanlm.packers.boundaries import mark
from titanlm.registry import Component, Dataset, Packer, Tokenizer

if TYPE_CHECKING:
    from titanlm.config import RunConfig


class Stream:
    """One logical stream: its documents, tokenised, packed into rows."""

    def __init__(self, dataset: Dataset, packer: Packer, tokenizer: Tokenizer) -> None:
        self._dataset, self._packer, self._tokenizer = dataset, packer, tokenizer
        self.counts = {"documents": 0, "text_bytes": 0, "uncounted_bytes": 0, "unreadable": 0, "passed_over": 0}
        """Documents read; the UTF-8 length of their texts, and how much of it their tokens do not account for (may be negative);
        rows that could not be read; rows without text or refused by a filter."""

        self.passed: dict[str, int] = {}
        """What the last pass over a validation split read, as ``counts``."""

    @property
    def fingerprint(self) -> str:
        """Of the dataset; the caller compares it before a resume."""
        return self._dataset.fingerprint

    @property
    def n_rows(self) -> int | None:
        """Rows of the dataset's split, where it knows."""
        return getattr(self._dataset, "n_rows", None)

    @property
    def n_sources(self) -> int:
        """Datasets that are mixed; a document's source is its id modulo this."""
        return getattr(self._dataset, "n_sources", 1)

    @property
    def dataset(self) -> Dataset:
        return self._dataset

    def stride(self, seq_len: int) -> int:
        """Positions from the start of a row to that of the next; fewer than ``seq_len`` where the packer's rows overlap."""
        stride = getattr(self._packer, "stride", None)
        return seq_len if stride is None else int(stride(seq_len))

    def next_row(self, seq_len: int) -> Row | None:
        """The next ``seq_len`` positions, unfinished; None at the end of a stream that ends.

        Raises DataError when a lossless tokenizer's target bytes do not add up
        to the UTF-8 length of a document.
        """
        while (row := self._packer.pop(seq_len)) is None:
            document = next(self._dataset, None)
            if document is None:
                return self._packer.flush(seq_len)
            self.counts["unreadable"] = getattr(self._dataset, "unreadable", 0)
            self.counts["passed_over"] = getattr(self._dataset, "passed_over", 0)
            self._packer.add(document, mark(self._target_bytes(document), document.trained))
        return row

    def state(self) -> dict[str, Any]:
        return {"dataset": self._dataset.state(), "packer": self._packer.state(), "counts": dict(self.counts)}

    def restore(self, state: dict[str, Any]) -> None:
        """Go back (or on) to a state; raises DataError when it is none of such a stream's.

        With ``replay`` in it, the state is of so many rows before, which are
        made again.
        """
        try:
            self._dataset.restore(state["dataset"])
            self._packer.restore(state["packer"])
            self.counts = {name: int(state["counts"][name]) for name in self.counts}
            replay = state.get("replay", {"rows": 0, "seq_len": 1})
            rows, seq_len = int(replay["rows"]), int(replay["seq_len"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"not a state of this dataset and packer: {error!r}; resume with the ones it was saved with") from error
        for _ in range(rows):
            self.next_row(seq_len)

    def _target_bytes(self, document: Document) -> np.ndarray:
        target_bytes = document.target_bytes
        if target_bytes is None:
            previous = np.empty_like(document.ids)
            previous[:1], previous[1:] = -1, document.ids[:-1]
            target_bytes = self._tokenizer.target_bytes(document.ids, previous)
        self.counts["documents"] += 1
        if document.n_bytes is not None:
            missing = document.n_bytes - int(target_bytes.sum())
            if missing and self._tokenizer.lossless:
                raise DataError(
                    f"document {document.document_id}: its tokens stand for {document.n_bytes - missing} bytes and its text has {document.n_bytes}, "
                    "though the tokenizer says it loses nothing; bits per byte would be wrong"
                )
            self.counts["text_bytes"] += document.n_bytes
            self.counts["uncounted_bytes"] += missing
        return target_bytes


def counts_of(state: Mapping[str, Any]) -> dict[str, int]:
    """``Stream.counts`` where a state stands, behind the rows that it leaves to be made again."""
    return dict(state.get("replay", state).get("counts", {}))


def build_streams(
    sources: Component | Sequence[Source],
    packer: Component,
    tokenizer: Tokenizer,
    *,
    split: str,
    n_streams: int,
    seed: int,
    seq_len: int,
    on_error: str = "raise",
    epochs: int | None = None,
    only: Sequence[int] | None = None,
) -> list[Stream]:
    """All logical streams of a run, numbered as in the list; ``seq_len`` is the longest row a packer must expect.

    ``sources`` is one dataset or what is mixed; ``epochs`` is how often the
    training split is read, None for ever. ``only`` builds some of them.
    """
    mixed = [Source(dataset=sources)] if isinstance(sources, Component) else list(sources)
    return [
        Stream(
            mix(mixed, tokenizer=tokenizer, split=split, stream=stream, n_streams=n_streams, seed=seed, on_error=on_error, epochs=epochs),
            packer.build(seq_len=seq_len),
            tokenizer,
        )
        for stream in (range(n_streams) if only is None else only)
    ]


def streams_of(
    config: RunConfig,
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    sources: Sequence[Source] | None = None,
    packer: Component | None = None,
    split: str = "train",
    n_streams: int | None = None,
    epochs: int | None = None,
    only: Sequence[int] | None = None,
) -> list[Stream]:
    """Streams as a config has them; without more said, those it trains on."""
    data = config.data
    return build_streams(
        config.sources if sources is None else sources,
        packer or config.packer,
        tokenizer,
        split=split,
        n_streams=data.n_streams if n_streams is None else n_streams,
        seed=config.train.seed,
        seq_len=seq_len,
        on_error=data.on_error,
        epochs=data.epochs or None if epochs is None else epochs,
        only=only,
    )
