"""Loss, perplexity and bits per byte of a model over validation sets.

Bits per byte is Σ nll / (ln 2 · Σ bytes): the bytes that the scored labels
stand for, counted by the tokenizer. It does not depend on the vocabulary, so
models with different tokenizers can be compared by it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from titanlm.batch import Batch
from titanlm.config import RunConfig, Validation
from titanlm.data import Stream, build_streams, validation_batches
from titanlm.errors import DataError
from titanlm.metrics import bits_per_byte, perplexity


@dataclass(frozen=True)
class Scores:
    """Of one set; natural logarithms, over all scored labels."""

    loss: float
    """Mean negative log-likelihood of a label, nats."""
    n_tokens: int
    n_bytes: int
    nll: float
    """Summed, nats."""

    @property
    def perplexity(self) -> float:
        return perplexity(self.loss)

    @property
    def bits_per_byte(self) -> float:
        return bits_per_byte(self.nll, self.n_bytes) if self.n_bytes else math.nan

    def metrics(self, head: str, prefix: str = "") -> dict[str, float]:
        return {f"{head}/{prefix}{name}": getattr(self, name) for name in ("loss", "perplexity", "bits_per_byte")}


@dataclass(frozen=True)
class ValidationSet:
    """A set and how it is read; every scoring reads it from the start."""

    name: str
    stream: Stream
    """Kept, so that its listing is made once; a scoring leaves it where it was."""
    seq_len: int
    micro_batch: int
    document_mask: bool
    max_tokens: int

    @classmethod
    def build(cls, entry: Validation, config: RunConfig, tokenizer: Any) -> ValidationSet:
        """Raises DataError for a set that would be read for ever."""
        if entry.split == "train" and not entry.max_tokens:
            raise DataError(f"max_tokens: set {entry.name!r} reads the split 'train', which never ends; say how many tokens of it to score")
        train = config.train
        dataset = entry.dataset or config.dataset
        (stream,) = build_streams(dataset, config.packer, tokenizer, split=entry.split, n_streams=1, seed=train.seed, seq_len=train.seq_len)
        return cls(entry.name, stream, train.seq_len, train.micro_batch, config.data.document_mask, entry.max_tokens)

    def batches(self) -> Iterator[Batch]:
        return validation_batches(self.stream, seq_len=self.seq_len, micro_batch=self.micro_batch, document_mask=self.document_mask, max_tokens=self.max_tokens)


@torch.no_grad()
def score(module: Any, entry: ValidationSet, device: torch.device, poll: Callable[[], None] = lambda: None) -> Scores:
    """Score a TrainModule on a set, without touching random numbers or the training data.

    ``poll`` is called before each batch and may raise to end the scoring.
    Raises DataError when the set has not one label to score.
    """
    was_training = module.training
    module.eval()
    # Sums in float64: a validation set may have more tokens than fp32 can count.
    nll = torch.zeros((), dtype=torch.float64, device=device)
    n_tokens = n_bytes = 0
    try:
        for batch in entry.batches():
            poll()
            n_tokens += int((batch.labels >= 0).sum())  # on the CPU, before the copy
            n_bytes += int(batch.target_bytes.sum())
            sums, _ = module(batch.to(device))
            nll += sums.nll
    finally:
        module.train(was_training)
    if not n_tokens:
        raise DataError(f"validation set {entry.name!r}: its text has no token that follows another, so there is nothing to score")
    total = float(nll)
    return Scores(loss=total / n_tokens, n_tokens=n_tokens, n_bytes=n_bytes, nll=total)


def evaluate_target(
    target: Path,
    *,
    overrides: Sequence[str] = (),
    imports: Sequence[str] = (),
    device: str = "auto",
    averaged: bool | None = None,
    as_json: bool = False,
) -> str:
    """Score a run, a checkpoint or an artifact on its validation sets; the text to print.

    ``overrides`` change the stored config (another dataset, fewer tokens).
    ``averaged``: the averaged weights of a run or checkpoint; None takes them
    where they exist.
    """
    from titanlm.targets import open_target

    opened = open_target(target, overrides=overrides, imports=imports, device=device, averaged=averaged)
    results = {}
    for entry in opened.config.validation:
        scores = score(opened.module, ValidationSet.build(entry, opened.config, opened.tokenizer), opened.device)
        results[entry.name] = {
            "loss": scores.loss,
            "perplexity": scores.perplexity,
            "bits_per_byte": scores.bits_per_byte,
            "tokens": scores.n_tokens,
            "bytes": scores.n_bytes,
        }
    if as_json:
        # JSON has no nan: a number that is not finite is null.
        numbers = {name: {key: value if math.isfinite(value) else None for key, value in values.items()} for name, values in results.items()}
        return json.dumps({"target": str(target), "weights": opened.weights, "validation": numbers})
    lines = [f"{opened.source} ({opened.weights} weights)"]
    for name, values in results.items():
        lines.append(
            f"  {name}: loss {values['loss']:.4f}  perplexity {values['perplexity']:.3f}  bits per byte {values['bits_per_byte']:.4f}"
            f"  ({values['tokens']:,} tokens, {values['bytes']:,} bytes)"
        )
    return "\n".join(lines)
