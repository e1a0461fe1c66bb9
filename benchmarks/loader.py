"""Tokens a second that the data loader makes: from token shards and from text, by number of workers.

    python benchmarks/loader.py
    python benchmarks/loader.py --tokens 200000000 --seq-len 1024 2048 --workers 0 1 2 4
    python benchmarks/loader.py --input corpus/*.parquet --tokenizer sentencepiece:spm.model

Steps are taken out of the loader as a trainer does, and nothing is done with
them, so the figures are what a step may cost before the loader makes it wait.
Shards are written to a temporary folder: drawn ids, documents of about
``--document-tokens``. Text is the standard library's source and bytes, unless
said otherwise. "alone" is the tokenizer by itself on the same texts, one after
the other: what a worker could reach if nothing else took time.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from pathlib import Path

import numpy as np

from titanlm.data import Loader
from titanlm.datasets.shard_file import ShardWriter
from titanlm.progress import Phase
from titanlm.registry import Component, Tokenizer
from titanlm.stream import build_streams
from titanlm.tokenizers.byte_counts import ByteCounts


class Drawn:
    """Ids of a vocabulary of 1,024 with BOS 1, counted as the challenge's models are; no text."""

    vocab_size, bos_id, eos_id, lossless, fingerprint = 1024, 1, None, False, ""

    def __init__(self) -> None:
        draw = np.random.default_rng(0)
        special = np.arange(self.vocab_size) == 1
        n_bytes = np.where(special, 0, draw.integers(1, 6, self.vocab_size))
        self.target_bytes = ByteCounts(n_bytes, (draw.random(self.vocab_size) < 0.4) & ~special, special).of


def write_shards(folder: Path, n_tokens: int, document_tokens: int) -> None:
    """Two shards of documents that begin with 1."""
    draw = np.random.default_rng(2)
    for number in range(2):
        with ShardWriter(folder / f"drawn_train_{number:06}.bin", np.dtype("<u2")) as writer:
            ids = draw.integers(2, 1024, n_tokens // 2, dtype=np.int64)
            ids[np.cumsum(draw.integers(document_tokens // 2, document_tokens * 3 // 2, len(ids) // document_tokens + 1)) % len(ids)] = 1
            ids[0] = 1
            writer.write(ids)
            writer.close()


def rate(dataset: Component, packer: str, tokenizer: Tokenizer, seq_len: int, workers: int, n_tokens: int, seconds: float) -> float:
    """Tokens a second after the first step."""
    common = {"split": "train", "n_streams": 64, "seed": 0, "seq_len": seq_len}
    streams = build_streams(dataset, Component.named("packer", packer), tokenizer, **common)  # type: ignore[arg-type]
    loader = Loader(streams, workers=workers)
    rows = max(1, min(256, n_tokens // seq_len // 4))
    micro_batch = max(n for n in range(1, 33) if rows % n == 0)
    phase = Phase(seq_len, micro_batch, rows // micro_batch)
    loader.next(phase)
    loader.commit()
    taken, started = 0, time.perf_counter()
    while taken < n_tokens and time.perf_counter() - started < seconds:
        taken += loader.next(phase).n_tokens
        loader.commit()
    elapsed = time.perf_counter() - started
    loader.close()
    return taken / elapsed


def alone(dataset: Component, tokenizer: Tokenizer, seconds: float) -> float:
    """Tokens a second of the tokenizer by itself."""
    rows = dataset.build(tokenizer=tokenizer, split="train", stream=0, n_streams=1, seed=0)
    texts = list(itertools.islice(rows.texts(), 2000))
    n_ids, started = 0, time.perf_counter()
    for text in texts:
        n_ids += len(tokenizer.encode(text))
        if time.perf_counter() - started > seconds:
            break
    return n_ids / (time.perf_counter() - started)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=50_000_000, help="tokens of the shards, and read of each (default: %(default)s)")
    parser.add_argument("--document-tokens", type=int, default=1000)
    parser.add_argument("--seq-len", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--packer", nargs="+", default=["concat", "best_fit"])
    parser.add_argument("--seconds", type=float, default=20.0, help="longest time of a measurement (default: %(default)s)")
    parser.add_argument("--input", nargs="+", help="parquet, jsonl or text files, all of one kind (default: the standard library's source)")
    parser.add_argument("--tokenizer", help="of the text: byte (the default) or NAME:PATH")
    options = parser.parse_args(argv)

    print(f"{'data':<34} {'packer':<9} {'seq_len':>7} {'workers':>7} {'tokens/s':>12}")

    def line(what: str, packer: str, seq_len: int, workers: int, tokens_per_s: float) -> None:
        print(f"{what:<34} {packer:<9} {seq_len:>7} {workers:>7} {tokens_per_s:>12,.0f}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder), options.tokens, options.document_tokens)
        shards = Component.named("dataset", "token_shards", paths=(folder,))
        for seq_len, packer in itertools.product(options.seq_len, options.packer):
            line("token_shards", packer, seq_len, 0, rate(shards, packer, Drawn(), seq_len, 0, options.tokens, options.seconds))

    name, _, path = (options.tokenizer or "byte").partition(":")
    tokenizer = Component.named("tokenizer", name, **({"path": path} if path else {})).build()
    if options.input:
        kind = {".parquet": "parquet", ".jsonl": "jsonl"}.get(Path(options.input[0]).suffix, "text")
        text = Component.named("dataset", kind, paths=tuple(options.input))
    else:
        text = Component.named("dataset", "python_stdlib")
    line(f"{name} alone", "", 0, 0, alone(text, tokenizer, options.seconds))
    seq_len = options.seq_len[-1]
    for workers in options.workers:
        line(f"{text.name}, {name}", "concat", seq_len, workers, rate(text, "concat", tokenizer, seq_len, workers, options.tokens, options.seconds))


if __name__ == "__main__":
    main()
