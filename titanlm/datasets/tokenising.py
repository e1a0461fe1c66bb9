"""Batches of texts tokenised by forked processes, in order; for `titanlm data prepare`."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import numpy as np

from titanlm.datasets.shard_file import dtype_for
from titanlm.errors import DataError
from titanlm.registry import Tokenizer
from titanlm.workers import serve

_Item = tuple[dict[str, Any], int]


@dataclass(frozen=True)
class Batch:
    """Texts of one source, in its order."""

    source: int
    state: dict[str, Any]
    """Of the dataset before the first."""
    items: list[_Item]
    """Rows as ``next_text`` gave them, and document ids."""


@dataclass(frozen=True)
class Tokens:
    """The N documents of a batch, end to end."""

    ids: np.ndarray
    """uint16, or uint32 for a vocabulary that needs it."""
    lengths: np.ndarray
    """(N,) int64."""
    text_bytes: np.ndarray
    """(N,) int64, UTF-8 length of the texts."""
    counted_bytes: np.ndarray
    """(N,) int64, what the tokens stand for."""


def tokens_of(dataset: Any, tokenizer: Tokenizer, items: Sequence[_Item]) -> Tokens:
    """The documents of some texts.

    Raises DataError for a text that cannot be tokenised, or that shards cannot
    hold so that the same document comes back.
    """
    special = {one for one in (tokenizer.bos_id, tokenizer.eos_id) if one is not None}
    n_special = (tokenizer.bos_id is not None) + (tokenizer.eos_id is not None)
    parts, text_bytes, counted_bytes = [], [], []
    for item, document_id in items:
        document = dataset.tokenise(item, document_id)
        ids, where = document.ids, item.get("place", f"document {document_id}")
        if document.trained is not None:
            raise DataError(f"{where}: has tokens that are read but not predicted, which shards cannot say; train on this dataset as it is")
        if sum(int((ids == one).sum()) for one in special) != n_special:
            raise DataError(f"{where}: its text has an id that separates documents ({special}); read back from shards it would be several")
        counted = int(tokenizer.target_bytes(ids, np.concatenate([[-1], ids[:-1]])).sum())
        n_bytes = counted if document.n_bytes is None else document.n_bytes
        if n_bytes != counted and tokenizer.lossless:
            raise DataError(f"{where}: its tokens stand for {counted} bytes and its text has {n_bytes}, though the tokenizer says it loses nothing")
        parts.append(ids)
        text_bytes.append(n_bytes)
        counted_bytes.append(counted)
    ids = np.concatenate(parts).astype(dtype_for(tokenizer.vocab_size))
    return Tokens(ids, np.array([len(part) for part in parts]), np.array(text_bytes), np.array(counted_bytes))


@contextlib.contextmanager
def tokenised(
    datasets: Sequence[Any], tokenizer: Tokenizer, batches: Iterator[Batch], workers: int | None, private: int
) -> Iterator[Iterator[tuple[Batch, Tokens]]]:
    """The batches with their tokens, in order.

    ``workers`` processes, 0: this one, None: one for every core but one.
    ``private`` is a descriptor that they must not keep open. Raises DataError
    when a process dies.
    """
    workers = max(1, len(os.sched_getaffinity(0)) - 1) if workers is None else workers
    if not workers:
        yield ((batch, tokens_of(datasets[batch.source], tokenizer, batch.items)) for batch in batches)
        return
    # Forked: datasets and tokenizers of any module are there, and need not be pickled.
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(datasets, tokenizer, private, os.getpid()))
    try:
        yield _in_order(pool, batches, 2 * workers + 2)
    except BrokenProcessPool as error:
        raise DataError("a tokenising process has died (killed, perhaps for want of memory); run again to go on, with fewer --workers") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(pool: ProcessPoolExecutor, batches: Iterator[Batch], at_most: int) -> Iterator[tuple[Batch, Tokens]]:
    waiting: deque[tuple[Batch, Future[Tokens]]] = deque()
    for batch in batches:
        waiting.append((batch, pool.submit(_work, batch.source, batch.items)))
        if len(waiting) == at_most:
            first, future = waiting.popleft()
            yield first, future.result()
    while waiting:
        first, future = waiting.popleft()
        yield first, future.result()


# ---------------------------------------------------------------- in a worker
_datasets: Sequence[Any] = ()
_tokenizer: Any = None


def _begin(datasets: Sequence[Any], tokenizer: Tokenizer, private: int, parent: int) -> None:
    global _datasets, _tokenizer
    _datasets, _tokenizer = datasets, tokenizer
    os.close(private)
    serve(parent)


def _work(source: int, items: list[_Item]) -> Tokens:
    return tokens_of(_datasets[source], _tokenizer, items)
