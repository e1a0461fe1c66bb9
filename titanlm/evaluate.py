"""Loss, perplexity and bits per byte of a model over validation sets.

Bits per byte is Σ nll / (ln 2 · Σ bytes): the bytes that the scored labels
stand for, counted by the tokenizer. It does not depend on the vocabulary, so
models with different tokenizers can be compared by it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from titanlm.batch import Batch, Row
from titanlm.config import DEFAULT_ROWS, FILE_DATASETS, SUMMARY, RunConfig, Validation
from titanlm.data import batch_of, validation_rows
from titanlm.datasets.mixture import Source
from titanlm.distributed.world import Peers, World
from titanlm.errors import DataError, TitanError
from titanlm.metrics import bits_per_byte, perplexity
from titanlm.registry import Component
from titanlm.stream import Stream, streams_of

if TYPE_CHECKING:
    from titanlm.targets import Target

SCORES = ("loss", "perplexity", "bits_per_byte")


@dataclass(frozen=True)
class Scores:
    """Of one set; natural logarithms, over all scored labels."""

    loss: float
    """Mean negative log-likelihood of a label, nats."""
    n_tokens: int
    n_bytes: int
    nll: float
    """Summed, nats."""
    text_bytes: int = 0
    """UTF-8 length of the texts that were read; 0 where only tokens are known."""
    uncounted_bytes: int = 0
    """How much of it the tokens do not stand for, because the tokenizer changes text; may be negative."""

    @property
    def perplexity(self) -> float:
        return perplexity(self.loss)

    @property
    def bits_per_byte(self) -> float:
        return bits_per_byte(self.nll, self.n_bytes) if self.n_bytes else math.nan

    @property
    def difference(self) -> str:
        """How far the counted bytes are from the text's, or nothing: a tokenizer that normalises is scored by its pieces, and that is never hidden."""
        if not self.uncounted_bytes:
            return ""
        share = self.uncounted_bytes / max(1, self.text_bytes)
        return f"bits per byte counts {-self.uncounted_bytes:+,} bytes ({-share:+.2%}) against the text: the tokenizer does not round-trip"

    def metrics(self, head: str, prefix: str = "") -> dict[str, float]:
        return {f"{head}/{prefix}{name}": getattr(self, name) for name in SCORES}


def summary(sets: Sequence[Validation], metrics: Mapping[str, float]) -> dict[str, float]:
    """``validation/summary/…``: means over sets by their weights, of what ``Scores.metrics`` made for each as ``validation/NAME``.

    A set counts by its weight, not by its size: Σ w·loss / Σ w, bits per byte
    likewise, and for perplexity the exponential of the mean loss, which is the
    geometric mean of theirs. Raw and averaged weights apart; nothing where a
    set has no such score.
    """
    heaviest = max((entry.weight for entry in sets), default=1.0)
    shares = [entry.weight / heaviest for entry in sets]  # the sum of the weights themselves may be too large for a float

    def mean(score: str) -> float:
        return sum(share * metrics[f"validation/{entry.name}/{score}"] for share, entry in zip(shares, sets, strict=True)) / sum(shares)

    found: dict[str, float] = {}
    for prefix in ("", "averaged_"):
        if sets and all(f"validation/{entry.name}/{prefix}loss" in metrics for entry in sets):
            loss = mean(f"{prefix}loss")
            values = {"loss": loss, "perplexity": perplexity(loss), "bits_per_byte": mean(f"{prefix}bits_per_byte")}
            found |= {f"validation/{SUMMARY}/{prefix}{name}": value for name, value in values.items()}
    return found


@dataclass(frozen=True)
class ValidationSet:
    """A set and how it is read; every scoring reads it from the start."""

    name: str
    stream: Stream
    """Kept, so that its listing is made once; a scoring leaves it where it was."""
    seq_len: int
    micro_batch: int
    every: int
    """Steps between scorings; 0: only at the end."""
    max_tokens: int
    boundaries: dict[str, Any]
    """What `batch_of` is told of document boundaries."""

    @classmethod
    def build(cls, entry: Validation, config: RunConfig, tokenizer: Any) -> ValidationSet:
        train, data = config.train, config.data
        seq_len = entry.seq_len or train.seq_len
        every = train.validate_every if entry.every is None else entry.every
        stream = open_set(entry, config, tokenizer)
        boundaries = {"document_mask": data.document_mask, "boundary_label": data.boundary_label, "pad_id": pad_id(tokenizer)}
        rows = entry.micro_batch or train.rows(seq_len) or DEFAULT_ROWS  # of a run whose rows a probe chose, scored elsewhere
        return cls(entry.name, stream, seq_len, rows, every, entry.max_tokens, boundaries)

    def rows(self) -> Iterator[list[Row]]:
        """What each batch is made of."""
        return validation_rows(self.stream, self.seq_len, self.micro_batch, max_tokens=self.max_tokens)

    def batch(self, rows: Sequence[Row]) -> Batch:
        return batch_of(rows, n_sources=self.stream.n_sources, **self.boundaries)

    def batches(self) -> Iterator[Batch]:
        return map(self.batch, self.rows())


def open_set(entry: Validation, config: RunConfig, tokenizer: Any) -> Stream:
    """The one stream of a validation set."""
    split, epochs, sources = entry.split, None, config.sources
    if entry.file is not None:
        # All of the file, in its order: one pass over what would be the training split of a dataset of its own.
        split, epochs = "train", 1
        kind = next(name for end, name in FILE_DATASETS.items() if entry.file.endswith(end))
        sources = (Source(dataset=Component.named("dataset", kind, paths=(entry.file,), shuffle=False)),)
    elif entry.dataset is not None:
        sources = (Source(dataset=entry.dataset),)
    seq_len = entry.seq_len or config.train.seq_len
    return streams_of(config, tokenizer, sources=sources, packer=entry.packer, split=split, n_streams=1, seq_len=seq_len, epochs=epochs)[0]


def pad_id(tokenizer: Any) -> int:
    """What padded positions hold; no label and no mask depends on it."""
    padding = getattr(tokenizer, "pad_id", None)
    return 0 if padding is None else padding


@torch.no_grad()
def score(module: Any, entry: ValidationSet, device: torch.device, poll: Callable[[], object] = lambda: None, peers: Peers | None = None) -> Scores:
    """Score a TrainModule on a set, without touching random numbers or the training data.

    ``poll`` is called before each batch and may raise to end the scoring.
    With ``peers`` the ranks take batches in turn, equally many each, so that
    sharded ranks gather together; all of them read the whole set and cut its
    rows, and make batches of their own. Raises DataError when the set has not
    one label to score.
    """
    peers = Peers() if peers is None else peers
    was_training = module.training
    module.eval()
    # Sums in float64: a validation set may have more tokens than fp32 can count.
    nll = torch.zeros((), dtype=torch.float64, device=device)
    n_tokens = n_bytes = 0
    try:
        for batch in in_turn(entry, peers):
            poll()
            n_tokens += int((batch.labels >= 0).sum())  # on the CPU, before the copy
            n_bytes += int(batch.target_bytes.sum())
            sums, _ = module(batch.to(device))
            nll += sums.nll.sum()
    finally:
        module.train(was_training)
    n_tokens, n_bytes = peers.sum([n_tokens, n_bytes])
    peers.add_(nll)
    if not n_tokens:
        raise DataError(f"validation set {entry.name!r}: its text has no token that follows another, so there is nothing to score")
    total = float(nll)
    passed = entry.stream.passed
    return Scores(total / n_tokens, n_tokens, n_bytes, total, passed["text_bytes"], passed["uncounted_bytes"])


def in_turn(entry: ValidationSet, peers: Peers) -> Iterator[Batch]:
    """Every ``size``-th batch, and at the end one without labels where others still have one."""
    remaining = entry.rows()
    # A row that one rank cannot read ends the scoring on all of them.
    while turn := peers.agree(lambda: list(islice(remaining, peers.size))):
        yield entry.batch(turn[peers.rank]) if peers.rank < len(turn) else entry.batch(turn[0]).unlabelled()


def evaluate_target(
    target: Path,
    *,
    overrides: Sequence[str] = (),
    imports: Sequence[str] = (),
    device: str = "auto",
    averaged: bool | None = None,
    step: int | Literal["best"] | None = None,
    compiled: bool = False,
    as_json: bool = False,
) -> str | None:
    """Score a run, a checkpoint or an artifact on its validation sets, with their summary; the text to print, None on all ranks but the first.

    Under torchrun each rank holds the whole model, and they share out the
    batches. ``overrides`` change the stored config (another dataset, fewer
    tokens). ``averaged``: the averaged weights of a run or checkpoint; None
    takes them where they exist. ``compiled``: as `train.compile` says, which
    pays for long sets.
    """
    from titanlm.distributed.compile import compile_module
    from titanlm.distributed.process_group import connected
    from titanlm.targets import open_target

    opened = open_target(target, overrides=overrides, imports=imports, device=device, averaged=averaged, step=step)
    if compiled:
        if opened.config.train.compile == "none":
            raise TitanError("--compile: train.compile of this run is 'none'; say how with --train.compile=block")
        compile_module(opened.module, opened.config.train.compile)
        opened.module.requires_grad_(False)  # or a whole model, compiled with gradients in mind, keeps what a backward pass would need
    world, parallel = World.from_environment(), opened.config.parallel
    if opened.device.type == "cuda":
        torch.cuda.set_device(opened.device)
    results: dict[str, dict[str, Any]] = {}
    differences: dict[str, str] = {}
    metrics: dict[str, float] = {}
    alone = nullcontext() if world.size == 1 else connected(world, opened.device, timeout_s=parallel.timeout_s, init_timeout_s=parallel.init_timeout_s)
    with alone:
        if len(different := sorted(set(Peers(world).gather(f"{opened.source} ({opened.weights} weights)")))) > 1:
            raise TitanError(
                f"{target}: processes opened different weights, {' and '.join(different)}, as happens while a run is training; name one with --step"
            )
        for entry in opened.config.validation:
            scores = _scored(opened, ValidationSet.build(entry, opened.config, opened.tokenizer), Peers(world))
            results[entry.name] = {
                "loss": scores.loss,
                "perplexity": scores.perplexity,
                "bits_per_byte": scores.bits_per_byte,
                "tokens": scores.n_tokens,
                "bytes": scores.n_bytes,
                "text_bytes": scores.text_bytes,
                "uncounted_bytes": scores.uncounted_bytes,
            }
            differences[entry.name] = scores.difference
            metrics |= scores.metrics(f"validation/{entry.name}")
    if world.rank:
        return None
    mean = {key.rpartition("/")[2]: value for key, value in summary(opened.config.counted, metrics).items()}
    if as_json:
        # JSON has no nan: a number that is not finite is null.
        found = results | ({SUMMARY: mean} if mean else {})
        numbers = {name: {key: value if math.isfinite(value) else None for key, value in values.items()} for name, values in found.items()}
        return json.dumps({"target": str(target), "weights": opened.weights, "validation": numbers})
    lines = [f"{opened.source} ({opened.weights} weights)"]
    for name, values in results.items():
        lines.append(f"  {name}: {_said(values)}  ({values['tokens']:,} tokens, {values['bytes']:,} bytes)")
        if differences[name]:
            lines.append(f"  {name}: {differences[name]}")
    if mean:
        lines.append(f"  {SUMMARY}: {_said(mean)}  ({', '.join(f'{entry.name} {entry.weight:g}' for entry in opened.config.counted)})")
    return "\n".join(lines)


def _said(values: Mapping[str, float]) -> str:
    return f"loss {values['loss']:.4f}  perplexity {values['perplexity']:.3f}  bits per byte {values['bits_per_byte']:.4f}"


def _scored(opened: Target, entry: ValidationSet, peers: Peers) -> Scores:
    """With a count of batches on a terminal: a sliding set may take minutes."""
    from tqdm import tqdm

    with tqdm(unit=" batches", desc=entry.name, leave=False, disable=True if peers.rank else None) as bar:  # None: only on a terminal
        return score(opened.module, entry, opened.device, bar.update, peers)
