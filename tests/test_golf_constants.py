"""Parameter Golf's published counts of targets, bytes and windows, reproduced from shards by the path that scores a model.

The validation tokens themselves are not here. Drawn ones take their place, of
as many, in as many documents and of as many bytes; what is tested is that
shards, documents, sliding rows and scores lose and invent none of them.
"""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch

from titanlm.batch import IGNORE, Batch
from titanlm.config import Validation, load
from titanlm.datasets.shard_file import ShardWriter, dtype_for
from titanlm.errors import DataError
from titanlm.evaluate import ValidationSet, score
from titanlm.registry import Component
from titanlm.tokenizers.byte_counts import ByteCounts

BOS, ONE_BYTE, TWO_BYTES = 1, 4, 5
CPU = torch.device("cpu")


class Golf(NamedTuple):
    """A tokenizer of Parameter Golf's kind by its tables: BOS alone around documents, pieces that may begin with a space."""

    vocab_size: int
    n_bytes: np.ndarray
    """(V,) of a piece without its space."""
    space: np.ndarray
    boundary: np.ndarray

    @classmethod
    def of(cls, vocab_size: int, longest: int) -> Golf:
        ids = np.arange(vocab_size)
        n_bytes, space = 1 + ids % longest, ids % 5 < 2
        n_bytes[:4], space[:6] = 0, False
        n_bytes[[ONE_BYTE, TWO_BYTES]] = 1, 2
        return cls(vocab_size, n_bytes.astype(np.uint8), space, ids < 4)

    def tokenizer(self) -> SimpleNamespace:
        counts = ByteCounts(self.n_bytes.astype(np.int64) + self.space, self.space, self.boundary)
        return SimpleNamespace(vocab_size=self.vocab_size, bos_id=BOS, eos_id=None, lossless=False, fingerprint="golf", target_bytes=counts.of)

    def bytes_of(self, tokens: np.ndarray) -> int:
        """Σ base[y] + (space[y] and not boundary[x]) over all targets y after x: the rule of the baseline's evaluation."""
        before, targets = tokens[:-1], tokens[1:]
        return int(self.n_bytes[targets].sum(dtype=np.int64)) + int(np.count_nonzero(self.space[targets] & ~self.boundary[before]))

    def draw(self, n_tokens: int, n_documents: int, n_targets: int, n_bytes: int | None = None) -> np.ndarray:
        """Tokens, half of them of one byte; so many of those are made two that the first ``n_targets`` targets have ``n_bytes``."""
        rng = np.random.default_rng(0)
        tokens = rng.integers(6, 2 * self.vocab_size, n_tokens, dtype=np.uint16)
        tokens[tokens >= self.vocab_size] = ONE_BYTE
        tokens[rng.choice(n_tokens - 1, n_documents - 1, replace=False) + 1] = BOS
        tokens[0] = BOS
        if n_bytes is not None:
            missing = n_bytes - self.bytes_of(tokens[: n_targets + 1])
            places = np.flatnonzero(tokens[1 : n_targets + 1] == ONE_BYTE)[:missing] + 1
            assert 0 <= missing == len(places)
            tokens[places] = TWO_BYTES
        return tokens


def write(folder: Path, tokens: np.ndarray) -> Path:
    """The tokens as two validation shards, with a sidecar of byte counts beside them, which holds no tokens."""
    folder.mkdir()
    middle = len(tokens) // 3
    for name, part in (("val_000000", tokens[:middle]), ("val_000001", tokens[middle:]), ("val_bytes_000000", tokens[:10])):
        with ShardWriter(folder / f"fineweb_{name}.bin", dtype_for(1024)) as writer:
            writer.write(part)
            writer.close()
    return folder / "fineweb_val_*.bin"


def validation(tiny: Path, shards: Path, golf: Golf, seq_len: int, stride: int | None = None) -> ValidationSet:
    config = load(tiny, ["--data.document_mask=false"])
    dataset = Component.named("dataset", "token_spans", validation_paths=(str(shards),))
    packer = Component.named("packer", "sliding", stride=stride, drop_tail=True)
    return ValidationSet.build(Validation(dataset=dataset, packer=packer, seq_len=seq_len, micro_batch=64), config, golf.tokenizer())


class Uniform:
    """A model that has learned nothing: ln V nats for every label."""

    training = False

    def __init__(self, vocab_size: int) -> None:
        self.nats = math.log(vocab_size)

    def eval(self) -> None: ...
    def train(self, mode: bool) -> None: ...

    def __call__(self, batch: Batch) -> tuple[SimpleNamespace, None]:
        return SimpleNamespace(nll=self.nats * (batch.labels >= 0).sum(dtype=torch.float64)), None


def windows(n_targets: int, seq_len: int, stride: int) -> int:
    """ws = 0, stride, 2 · stride ... while ws = 0 or ws + T − stride < N."""
    return 1 + max(0, -(-(n_targets - seq_len) // stride))


def scored_once(entry: ValidationSet, tokens: np.ndarray, n_targets: int, stride: int) -> tuple[int, int]:
    """Rows and bytes of a set whose scored labels are targets 1, 2 ... N, in order and once each, in front of what they follow."""
    n_rows = n_bytes = done = 0
    for rows in entry.rows():
        rows = [row for row in rows if row.document_ids[0] >= 0]
        first = 1 if n_rows == 0 else 0  # is scored whole
        for row in rows[:first]:
            assert np.array_equal(row.labels, tokens[1 : entry.seq_len + 1])
            done = entry.seq_len
        labels, n_rows = np.stack([row.labels for row in rows])[first:], n_rows + len(rows)
        end = done + labels.shape[0] * stride
        assert np.array_equal(labels[:, -stride:].ravel(), tokens[done + 1 : end + 1])
        assert (labels[:, :-stride] == IGNORE).all()
        last = rows[-1]
        assert np.array_equal(last.tokens, tokens[end - entry.seq_len : end])
        done = end
        marked = np.stack([row.target_bytes for row in rows])
        n_bytes += int((marked ^ (marked >> 31)).sum())  # a document's first token is marked by the complement
    assert done == n_targets
    return n_rows, n_bytes


@pytest.mark.parametrize("tail", [0, 1, 31, 63])
@pytest.mark.parametrize("seq_len", [64, 32])
def test_counts_of_a_small_set(tiny: Path, tmp_path: Path, seq_len: int, tail: int) -> None:
    n_targets = 64 * 37
    golf = Golf.of(1024, longest=5)
    tokens = golf.draw(n_targets + 1 + tail, 50, n_targets, n_bytes=round(2.43593 * n_targets))
    shards = write(tmp_path / "data", tokens)
    seen = (len(tokens) - 1) // seq_len * seq_len
    expected = seen, golf.bytes_of(tokens[: seen + 1])
    for stride in (None, 8, 1):
        scores = score(Uniform(1024), validation(tiny, shards, golf, seq_len, stride), CPU)
        assert (scores.n_tokens, scores.n_bytes) == expected
        assert scores.loss == pytest.approx(math.log(1024), rel=1e-12)
    if seen == n_targets:
        assert scores.n_bytes == round(2.43593 * n_targets)
    assert scored_once(validation(tiny, shards, golf, seq_len, 8), tokens, seen, 8) == (windows(seen, seq_len, 8), expected[1])


def test_a_set_that_is_all_tail_is_an_error(tiny: Path, tmp_path: Path) -> None:
    golf = Golf.of(1024, longest=5)
    shards = write(tmp_path / "data", golf.draw(64, 3, 63))
    with pytest.raises(DataError, match=r"packer\.drop_tail: all 64 tokens are a tail, for a row of 64 takes 65"):
        list(validation(tiny, shards, golf, 64).batches())


def test_b17_the_records_windows_are_ours_and_those_that_scored_the_end_again() -> None:
    n_targets, seq_len, stride = 62_021_632, 2048, 64
    starts = range(0, n_targets, stride)
    kept = sum(1 for start in starts[-100:] if n_targets - start >= stride) + len(starts) - 100
    again = sum(1 for start in starts[-100:] if start + seq_len > n_targets and n_targets - start >= stride)
    assert (kept, again) == (969_088, 31)
    assert windows(n_targets, seq_len, stride) == kept - again == 969_057
    assert again * stride == 1_984
    assert kept == 8 * 121_136  # of each rank, in the record's log


@pytest.mark.slow
@pytest.mark.parametrize(
    ("vocab_size", "longest", "n_targets", "tail", "n_bytes", "lengths"),
    [
        pytest.param(1024, 5, 62_021_632, 700, 151_080_363, (1024, 2048), id="sp1024"),
        pytest.param(4096, 7, 45_508_608, 2047, None, (2048,), id="sp4096"),
        pytest.param(8192, 10, 40_540_160, 1, 151_078_222, (2048,), id="sp8192"),
        pytest.param(8192, 8, 47_851_520, 47_853_343 - 47_851_520, None, (2048,), id="caseops"),
    ],
)
def test_published_targets_and_bytes(
    tiny: Path, tmp_path: Path, vocab_size: int, longest: int, n_targets: int, tail: int, n_bytes: int | None, lengths: tuple[int, ...]
) -> None:
    golf = Golf.of(vocab_size, longest)
    tokens = golf.draw(n_targets + 1 + tail, 50_000, n_targets, n_bytes)
    shards = write(tmp_path / "data", tokens)
    for seq_len in lengths:
        scores = score(Uniform(vocab_size), validation(tiny, shards, golf, seq_len), CPU)
        assert scores.n_tokens == n_targets
        assert scores.n_bytes == (golf.bytes_of(tokens[: n_targets + 1]) if n_bytes is None else n_bytes)
        if vocab_size == 1024:
            assert round(scores.n_bytes / scores.n_tokens, 5) == 2.43593
            assert 4.1035 < scores.bits_per_byte < 4.1055  # of untrained models, in the logs
        if n_bytes == 151_078_222:
            assert round(scores.n_bytes / scores.n_tokens, 5) == 3.72663
    for path in shards.parent.iterdir():
        path.unlink()  # pytest would keep them


@pytest.mark.slow
def test_published_windows_of_stride_64(tiny: Path, tmp_path: Path) -> None:
    golf, n_targets, n_bytes = Golf.of(1024, longest=5), 62_021_632, 151_080_363
    tokens = golf.draw(n_targets + 1 + 700, 50_000, n_targets, n_bytes)
    shards = write(tmp_path / "data", tokens)
    assert scored_once(validation(tiny, shards, golf, 2048, 64), tokens, n_targets, 64) == (969_057, n_bytes)
    for path in shards.parent.iterdir():
        path.unlink()
