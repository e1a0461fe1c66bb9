"""Documents of drawn token ids, for benchmarks and for tests of what a model can learn.

* uniform: ids drawn evenly; no model can do better than ln(vocabulary) nats.
* constant: one id again and again; the loss goes to 0.
* copy: a drawn half, then the same again; the second half can be known.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from titanlm.batch import Document
from titanlm.constraints import PositiveInt
from titanlm.datasets.documents import INDEX_BITS
from titanlm.errors import DataError
from titanlm.registry import Tokenizer, register


@dataclass(frozen=True)
class SyntheticConfig:
    """Drawn documents; they have no text."""

    pattern: Literal["uniform", "constant", "copy"] = "uniform"
    mean_tokens: PositiveInt = 512
    """Documents have half to one and a half times as many ids, BOS and EOS not counted."""
    documents: PositiveInt = 10_000
    """In one epoch; a validation split has a tenth, drawn apart."""


@register("dataset", "synthetic")
class Synthetic:
    """Document d of a split is a function of seed, split and d; stream s of S has d = s, s + S, ...

    Raises DataError when the tokenizer has no id but special ones.
    """

    def __init__(self, config: SyntheticConfig, *, tokenizer: Tokenizer, split: str, stream: int, n_streams: int, seed: int, epochs: int | None = None) -> None:
        special = {tokenizer.bos_id, tokenizer.eos_id, getattr(tokenizer, "pad_id", None)}
        self._ids: np.ndarray = np.setdiff1d(np.arange(tokenizer.vocab_size, dtype=np.int32), [one for one in special if one is not None])
        if not len(self._ids):
            raise DataError("dataset 'synthetic': the tokenizer has no id that is not special")
        self._begin, self._end = (np.array([] if one is None else [one], dtype=np.int32) for one in (tokenizer.bos_id, tokenizer.eos_id))
        self._config, self._stream, self._n_streams = config, stream, n_streams
        self._key = (seed, int(split != "train"))
        self.n_rows = config.documents if split == "train" else max(1, config.documents // 10)
        self._epochs = epochs if split == "train" else 1
        self._taken = 0
        content = repr((asdict(config), self._key, tokenizer.vocab_size, special - {None}))
        self.fingerprint = f"synthetic: {hashlib.sha256(content.encode()).hexdigest()}"

    def __iter__(self) -> Iterator[Document]:
        return self

    def __next__(self) -> Document:
        position = self._stream + self._taken * self._n_streams
        epoch, number = divmod(position, self.n_rows)
        if self._epochs is not None and epoch >= self._epochs:
            raise StopIteration
        self._taken += 1
        ids = np.concatenate([self._begin, self._drawn(number), self._end])
        ids.flags.writeable = False
        return Document(ids, position << INDEX_BITS, None)

    def state(self) -> dict[str, Any]:
        return {"taken": self._taken, "n_shards": self.n_rows}

    def restore(self, state: dict[str, Any]) -> None:
        if state["n_shards"] != self.n_rows:
            raise DataError(f"dataset 'synthetic' has {self.n_rows} documents, but the state to resume was of {state['n_shards']}")
        self._taken = int(state["taken"])

    def _drawn(self, number: int) -> np.ndarray:
        mean = self._config.mean_tokens
        draw = np.random.Philox(np.random.SeedSequence((*self._key, number)))
        n = max(1, mean // 2 + int(draw.random_raw(1)[0] % (mean + 1)))
        if self._config.pattern == "constant":
            return np.repeat(self._ids[:1], n)
        # 32 bits of each word, scaled to the number of ids.
        choice = (draw.random_raw(n) >> np.uint64(32)) * np.uint64(len(self._ids)) >> np.uint64(32)
        ids = self._ids[choice.astype(np.int64)]
        return ids if self._config.pattern == "uniform" else np.concatenate([ids[: (n + 1) // 2]] * 2)[:n]
