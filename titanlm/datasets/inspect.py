"""`titanlm data inspect`: what is in data files, or in the data of a config.

Everything is read through the datasets themselves, so what is counted is what
training would meet: documents as they are cut, filtered and tokenised. Rows
that cannot be read are passed over and named, whatever the config says.
"""

from __future__ import annotations

import json
import random
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from titanlm.datasets.opening import Piece, Reading, Target, files_of, open_targets
from titanlm.errors import DataError
from titanlm.loggers.text import printable

_SAMPLE_CHARACTERS = 240
_SAMPLE_TOKENS = 512
_BAR = 40
_NAMED = 8


@dataclass
class Report:
    """What one target holds; lengths and counts of documents as training would meet them."""

    target: str
    dataset: str
    split: str
    facts: list[str] = field(default_factory=list)
    """What the files say of themselves."""
    rows: int = 0
    """Read; a long row that is cut counts for each of its pieces."""
    n_rows: int | None = None
    """Rows there are, where that is known without reading them."""
    stopped: bool = False
    """Whether --rows left some unread."""
    counts: dict[str, int] = field(default_factory=dict)
    """What became of rows: documents, empty, filtered, unreadable."""
    unreadable: list[str] = field(default_factory=list)
    """The first places that could not be read."""
    text_bytes: int | None = None
    """UTF-8; None where only tokens are known."""
    histogram: list[tuple[int, int]] = field(default_factory=list)
    """(n, documents of n up to 2n − 1 bytes)."""
    tokens: int | None = None
    """BOS and EOS included; None without a tokenizer."""
    bytes_per_token: float | None = None
    document_tokens: dict[str, int] = field(default_factory=dict)
    """p10, p50, p90 and max."""
    refused: list[str] = field(default_factory=list)
    """The first documents that the tokenizer does not take."""
    n_refused: int = 0
    samples: list[tuple[str, str]] = field(default_factory=list)
    """(source, beginning of the text)."""


def inspect(
    words: Sequence[str],
    *,
    tokenizer: str | None = None,
    column: str | None = None,
    max_rows: int | None = None,
    n_samples: int = 3,
    as_json: bool = False,
    overrides: Sequence[str] = (),
) -> Iterator[str]:
    """What to print of every dataset that ``words`` name (files, folders, globs, configs), each as soon as it is read.

    Raises TitanError when one names no data, DataError when its data cannot
    be opened.
    """
    targets = [target for word in words for target in open_targets(word, tokenizer=tokenizer, column=column, overrides=overrides)]
    reports = (measure(target, max_rows, n_samples) for target in targets)
    if as_json:
        yield json.dumps({"targets": [asdict(report) for report in reports]})
        return
    for number, report in enumerate(reports):
        yield "\n".join(["", *_lines(report)] if number else _lines(report))


def measure(target: Target, max_rows: int | None = None, n_samples: int = 3) -> Report:
    """Read a target and count. Raises DataError when its data cannot be opened."""
    report = Report(target.label, target.dataset.name, target.split)
    if target.dataset.name in ("token_shards", "token_spans"):
        report.facts, report.tokens = _of_shards(target)
        if target.tokenizer is None:  # which says where documents begin
            return report
    reading = Reading(target, max_rows)
    report.n_rows = reading.n_rows
    samples: list[Piece] = []
    bins: Counter[int] = Counter()
    lengths = array("I")  # four bytes a document
    draws = random.Random(0)
    text_bytes = tokenised_bytes = 0
    for number, piece in enumerate(progress(reading, max_rows)):
        # Reservoir sampling (Vitter 1985): each document has the same chance, and only the drawn ones are kept.
        at = number if number < n_samples else draws.randrange(number + 1)
        if at < n_samples:
            samples[at : at + 1] = [piece]
        n_bytes = None if piece.text is None else len(piece.text.encode("utf-8", "surrogatepass"))
        if target.tokenizer is not None:
            try:
                ids = piece.tokenise().ids
            except DataError as error:
                report.n_refused += 1
                if report.n_refused <= _NAMED:
                    report.refused.append(str(error))
            else:
                if n_bytes is None:
                    n_bytes = int(target.tokenizer.target_bytes(ids, np.concatenate([[-1], ids[:-1]]).astype(ids.dtype)).sum())
                lengths.append(len(ids))
                tokenised_bytes += n_bytes
        if n_bytes is not None:
            text_bytes += n_bytes
            bins[n_bytes.bit_length()] += 1
    report.rows, report.counts, report.stopped = reading.rows, reading.counts, reading.stopped
    report.unreadable = list(reading.dataset.state().get("unreadable", []))
    report.samples = [(piece.source, beginning(piece, target)) for piece in samples]
    if bins:
        report.text_bytes = text_bytes
        report.histogram = [(1 << bits >> 1, bins[bits]) for bits in range(min(bins), max(bins) + 1)]
    if lengths:
        every = np.frombuffer(lengths, dtype=np.uint32)
        report.tokens = int(every.sum(dtype=np.int64))
        report.bytes_per_token = tokenised_bytes / report.tokens
        shares = np.quantile(every, (0.1, 0.5, 0.9, 1.0), method="inverted_cdf")
        report.document_tokens = {name: int(value) for name, value in zip(("p10", "p50", "p90", "max"), shares, strict=True)}
    return report


def progress(reading: Reading, max_rows: int | None = None) -> Iterator[Piece]:
    """The same documents, with a bar of rows on a terminal."""
    from tqdm import tqdm

    total = min((n for n in (reading.n_rows, max_rows) if n is not None), default=None)
    with tqdm(total=total, unit=" rows", unit_scale=True, disable=None, desc="reading", leave=False) as bar:
        for piece in reading:
            bar.update(0 if bar.disable else reading.rows - bar.n)
            yield piece


def line(text: str) -> str:
    """``text`` on one line of a terminal, line breaks and control characters escaped."""
    return printable(text.replace("\n", "\\n"))


def _of_shards(target: Target) -> tuple[list[str], int]:
    """What the headers of token shards say, and how many tokens they hold."""
    from titanlm.datasets.shard_file import digest_of, open_shard

    config = target.dataset.config
    entries = config.paths if target.split == "train" else config.validation_paths
    shards = [open_shard(Path(path)) for entry in entries for path in files_of(entry) if path.endswith(".bin")]
    if not shards:
        raise DataError(f"{target.label}: there are no shards (.bin) for split {target.split!r}")
    facts = []
    for dtype, digest in dict.fromkeys((shard.dtype, shard.tokenizer_digest) for shard in shards):
        alike = [shard for shard in shards if (shard.dtype, shard.tokenizer_digest) == (dtype, digest)]
        whose = "no tokenizer's fingerprint"
        if digest:
            same = target.tokenizer is not None and digest_of(target.tokenizer.fingerprint) == digest
            whose = f"of {'this' if same else 'the'} tokenizer with fingerprint {digest.hex()[:16]}"
        facts.append(f"{len(alike):,} shards, {sum(shard.n_tokens for shard in alike):,} tokens, {dtype.name}, {whose}")
    if target.tokenizer is None:
        facts += ["a tokenizer (--tokenizer) is needed to find documents and decode them; the first ids are"]
        facts += [" ".join(map(str, shards[0].tokens()[:32].tolist()))]
    return facts, sum(shard.n_tokens for shard in shards)


def beginning(piece: Piece, target: Target) -> str:
    """Of its text, or else of its tokens, decoded where there is a tokenizer."""
    text = piece.text
    if text is None:
        ids = piece.tokenise().ids[:_SAMPLE_TOKENS].tolist()
        text = " ".join(map(str, ids)) if target.tokenizer is None else target.tokenizer.decode(ids)
    return text if len(text) <= _SAMPLE_CHARACTERS else f"{text[:_SAMPLE_CHARACTERS]}…"


def _lines(report: Report) -> Iterator[str]:
    yield line(report.target)
    rows = list(_rows(report))
    width = max(len(name) for name, _ in rows)
    yield from (f"  {name:<{width}}  {line(value)}".rstrip() for name, value in rows)


def _rows(report: Report) -> Iterator[tuple[str, str]]:
    yield "dataset", f"{report.dataset}, split {report.split!r}"
    yield from _headed("files", report.facts)
    known = f" of {report.n_rows:,}" if report.n_rows is not None and report.stopped else ""
    stopped = " (stopped by --rows)" if report.stopped else ""
    if not report.counts:
        return
    yield "rows", f"{report.rows:,}{known}{stopped}: {', '.join(f'{n:,} {fate}' for fate, n in report.counts.items())}"
    yield from _headed("unreadable", report.unreadable)
    documents = report.counts["documents"]
    if report.text_bytes is not None:
        yield "text", f"{report.text_bytes:,} bytes, {report.text_bytes / documents:,.0f} a document"
    most = max((n for _, n in report.histogram), default=0)
    for number, (low, n) in enumerate(report.histogram):
        bar = "█" * -(-n * _BAR // most)
        yield "" if number else "bytes", f"{f'{low:,} –':>12} {f'{max(low * 2 - 1, 0):,}':<10} {n:>10,}  {bar}"
    if report.tokens is not None:
        yield "tokens", f"{report.tokens:,}, {report.bytes_per_token:.3f} bytes a token (BOS and EOS counted)"
        yield "tokens a document", ", ".join(f"{name} {n:,}" for name, n in report.document_tokens.items())
    yield from _headed("refused", [f"{report.n_refused:,} documents that the tokenizer does not take", *report.refused] if report.n_refused else ())
    for source, text in report.samples:
        yield "sample", source
        yield "", text


def _headed(name: str, values: Iterable[str]) -> Iterator[tuple[str, str]]:
    for number, value in enumerate(values):
        yield "" if number else name, value
