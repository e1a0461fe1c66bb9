"""Padding, cut documents and time of each packer.

    python benchmarks/packing.py
    python benchmarks/packing.py --input corpus/*.parquet --tokenizer spm.model --seq-len 1024 2048 8192 --buffer-rows 4 16 64

Documents are tokenised first, with what the tokenizer puts around them; then
one stream of each packer makes them into rows. ``efficiency`` is the share of
positions that are not padding; ``cut`` the share of documents whose labels lie
in more than one row, ``cut short`` that among those of at most a row's length
(the packers ``best_fit`` and ``none`` cut no such document). ``μs/1k`` is the
processor time of ``add`` and ``pop`` for a thousand ids, the least of the
repeats, which the packers take in turns; ``waiting`` is the largest number of
ids that the stream held.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from titanlm.batch import IGNORE, Document, Row
from titanlm.packers.boundaries import finish, mark
from titanlm.registry import Component

Packable = list[tuple[Document, np.ndarray]]


def texts(paths: list[Path], column: str) -> Iterator[str]:
    """The rows of parquet files, everything else whole."""
    for path in paths:
        if path.suffix == ".parquet":
            from pyarrow import parquet

            for batch in parquet.ParquetFile(path).iter_batches(columns=[column]):
                yield from (text for text in batch.column(0).to_pylist() if text)
        else:
            yield path.read_text(encoding="utf-8")


def tokenised(options: argparse.Namespace) -> Packable:
    """Documents with their target bytes, as a stream hands them to a packer; here every id stands for one byte."""
    settings = {"path": options.tokenizer} if options.tokenizer else {}
    tokenizer = Component.named("tokenizer", "sentencepiece" if options.tokenizer else "byte", **settings).build()
    if options.input:
        around = [[] if special is None else [special] for special in (tokenizer.bos_id, tokenizer.eos_id)]
        all_ids = (np.concatenate([around[0], tokenizer.encode(text), around[1]]).astype(np.int32) for text in texts(options.input, options.column))
    else:
        dataset = Component.named("dataset", "python_stdlib", validation_fraction=1.0)
        runtime = {"tokenizer": tokenizer, "split": "validation", "stream": 0, "n_streams": 1, "seed": 0, "epochs": 1, "on_error": "raise"}
        all_ids = (document.ids for document in dataset.build(**runtime))
    pairs = []
    for number, ids in enumerate(all_ids):
        if number == options.max_documents:
            break
        pairs.append((Document(ids, number, len(ids)), mark(np.ones(len(ids), dtype=np.int32))))
    return pairs


def rows_of(packer: Any, pairs: Packable, seq_len: int) -> Iterator[Row]:
    for document, target_bytes in pairs:
        packer.add(document, target_bytes)
        while (row := packer.pop(seq_len)) is not None:
            yield row
    while (row := packer.flush(seq_len)) is not None:
        yield row


def seconds(packer: Component, pairs: Packable, seq_len: int) -> float:
    built = packer.build(seq_len=seq_len)
    start = time.process_time()
    for _ in rows_of(built, pairs, seq_len):
        pass
    return time.process_time() - start


def measure(packer: Component, pairs: Packable, seq_len: int) -> tuple[float, float, float, int]:
    """Efficiency, share of documents cut, of those that would fit a row, and most ids waiting."""
    built = packer.build(seq_len=seq_len)
    positions = used = waiting = 0
    rows_with_labels = np.zeros(len(pairs), dtype=np.int64)
    for row in rows_of(built, pairs, seq_len):
        positions += seq_len
        used += int((row.document_ids >= 0).sum())
        waiting = max(waiting, sum(len(ids) for ids in built.state()["ids"]))
        row = finish(row, document_mask=True)
        rows_with_labels[np.unique(row.document_ids[row.labels != IGNORE])] += 1
    cut = rows_with_labels > 1
    short = np.array([len(document.ids) <= seq_len for document, _ in pairs])
    return used / positions, cut.mean(), cut[short].mean() if short.any() else 0.0, waiting


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, nargs="+", help="parquet or text files; default: the dataset python_stdlib")
    parser.add_argument("--column", default="text", help="of parquet files")
    parser.add_argument("--tokenizer", help="a SentencePiece model; default: bytes")
    parser.add_argument("--seq-len", type=int, nargs="+", default=[1024, 8192])
    parser.add_argument("--buffer-rows", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--max-documents", type=int)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()

    pairs = tokenised(options)
    lengths = np.array([len(document.ids) for document, _ in pairs])
    typical = ", ".join(f"{length:,.0f}" for length in np.percentile(lengths, [10, 50, 90]))
    print(f"{len(lengths):,} documents, {lengths.sum():,} ids; 10th, 50th and 90th percentile of the lengths {typical}, longest {lengths.max():,}")
    print(f"{'seq_len':>8} {'packer':<14} {'efficiency':>10} {'cut':>7} {'cut short':>9} {'μs/1k':>7} {'waiting':>9}")
    packers = {
        "concat": Component.named("packer", "concat"),
        **{f"best_fit {rows}": Component.named("packer", "best_fit", buffer_rows=rows) for rows in options.buffer_rows},
        "none": Component.named("packer", "none"),
    }
    for seq_len in options.seq_len:
        rounds = [{name: seconds(packer, pairs, seq_len) for name, packer in packers.items()} for _ in range(options.repeats)]
        for name, packer in packers.items():
            efficiency, cut, cut_short, waiting = measure(packer, pairs, seq_len)
            us_per_1k = min(one[name] for one in rounds) / lengths.sum() * 1e9
            print(f"{seq_len:>8} {name:<14} {efficiency:>10.2%} {cut:>7.1%} {cut_short:>9.1%} {us_per_1k:>7.1f} {waiting:>9,}")


if __name__ == "__main__":
    main()
