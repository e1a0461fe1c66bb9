"""Token spans against the loader of Parameter Golf's baseline, written again from its description, and against arrays."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from titanlm.data import DataEnded, Loader, merge_states
from titanlm.datasets.shard_file import ShardWriter, dtype_for
from titanlm.distributed.world import Peers
from titanlm.errors import DataError
from titanlm.progress import Phase
from titanlm.registry import Component
from titanlm.stream import Stream, build_streams

SPAN, SEQ_LEN = 48, 16


def tokenizer(vocab_size: int = 1024, fingerprint: str = "a tokenizer"):
    """Parameter Golf's rule for bytes, over drawn tables; documents begin with id 1 and do not end."""
    rng = np.random.default_rng(9)
    base, space = rng.integers(1, 12, vocab_size), rng.random(vocab_size) < 0.4
    base[:4], space[:4] = 0, False
    boundary = np.append(np.arange(vocab_size) < 4, True)
    return SimpleNamespace(
        vocab_size=vocab_size,
        bos_id=1,
        eos_id=None,
        lossless=False,
        fingerprint=fingerprint,
        target_bytes=lambda ids, previous: (base[ids] + (space[ids] & ~boundary[previous])).astype(np.int32),
    )


def write(path: Path, ids) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with ShardWriter(path, dtype_for(1024)) as writer:
        writer.write(np.asarray(ids))
        writer.close()


def shards(folder: Path, *lengths: int, seed: int = 0) -> list[np.ndarray]:
    """Drawn tokens, documents of about 20, in files of so many."""
    rng = np.random.default_rng(seed)
    files = []
    for number, length in enumerate(lengths):
        ids = rng.integers(4, 1024, length)
        ids[rng.random(length) < 0.05] = 1
        write(folder / f"fineweb_train_{number:06d}.bin", ids)
        files.append(ids)
    return files


def spans(folder: Path, number: int = 0, n_streams: int = 1, *, split="train", seed=3, epochs=None, one=None, **settings):
    paths = {"paths" if split == "train" else "validation_paths": (str(folder),)}
    component = Component.named("dataset", "token_spans", **(paths | {"span_tokens": SPAN} | settings))
    return component.build(tokenizer=one or tokenizer(), split=split, stream=number, n_streams=n_streams, seed=seed, epochs=epochs)


# ---------------------------------------------------------------- the baseline's loader
class Ring:
    """The baseline's token stream: files in order, for ever, whatever number of tokens is asked for next."""

    def __init__(self, files: list[np.ndarray]) -> None:
        self.files, self.file, self.at = files, 0, 0

    def take(self, n: int) -> np.ndarray:
        parts = []
        while n:
            if self.at == len(self.files[self.file]):
                self.file, self.at = (self.file + 1) % len(self.files), 0
            part = self.files[self.file][self.at : self.at + n]
            parts.append(part)
            self.at, n = self.at + len(part), n - len(part)
        return np.concatenate(parts)


class RankLoader:
    """The baseline's loader of one rank: every rank advances the whole ring by the share of all and keeps its own."""

    def __init__(self, files: list[np.ndarray], rank: int, world_size: int) -> None:
        self.ring, self.rank, self.world_size = Ring(files), rank, world_size

    def next_batch(self, global_tokens: int, seq_len: int, accumulation: int) -> tuple[np.ndarray, np.ndarray]:
        own = global_tokens // (self.world_size * accumulation) + 1  # one more for the shift
        chunk = self.ring.take(own * self.world_size)
        local = chunk[self.rank * own : (self.rank + 1) * own]
        return local[:-1].reshape(-1, seq_len), local[1:].reshape(-1, seq_len)


def pairs(inputs, targets) -> list[tuple]:
    return [(tuple(x), tuple(y)) for x, y in zip(np.asarray(inputs).tolist(), np.asarray(targets).tolist(), strict=True)]


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_every_step_of_every_rank_has_the_rows_of_the_baselines_loader(tmp_path: Path, world_size: int) -> None:
    """Over five files, none a multiple of anything, and three times around the ring."""
    files = shards(tmp_path / "data", 701, 97, 13, 1009, 350)
    step_tokens, accumulation = 8 * SPAN, 8 // world_size
    n_steps = 3 * sum(map(len, files)) // step_tokens + 1
    everything = []
    for rank in range(world_size):
        theirs = RankLoader(files, rank, world_size)
        streams = build_streams(
            Component.named("dataset", "token_spans", paths=(str(tmp_path / "data"),), span_tokens=SPAN),
            Component.named("packer", "none"),
            tokenizer(),
            split="train",
            n_streams=8,
            seed=0,
            seq_len=SEQ_LEN,
        )
        ours = Loader(streams, world_size=world_size, rank=rank, document_mask=False, boundary_label="next", prefetch=0)
        phase = Phase(seq_len=SEQ_LEN, micro_batch=SPAN // SEQ_LEN, accumulation=accumulation)
        for step in range(n_steps):
            expected = [pair for _ in range(accumulation) for pair in pairs(*theirs.next_batch(step_tokens, SEQ_LEN, accumulation))]
            data = ours.next(phase)
            found = [pair for batch in data.micro_batches for pair in pairs(batch.tokens, batch.labels)]
            assert Counter(found) == Counter(expected), (rank, step)
            assert data.n_valid == data.n_tokens == step_tokens // world_size
            everything.append((step, sorted(found)))
    if world_size == 1:
        return
    alone = RankLoader(files, 0, 1)
    for step in range(n_steps):
        together = sorted(pair for at, rows in everything if at == step for pair in rows)
        assert together == sorted(pair for _ in range(8) for pair in pairs(*alone.next_batch(step_tokens, SEQ_LEN, 8)))


def test_bytes_are_counted_with_the_true_previous_token(tmp_path: Path) -> None:
    (ids,) = shards(tmp_path, 500)
    one = tokenizer()
    packer = Component.named("packer", "none").build(seq_len=SEQ_LEN)
    loader = Loader([Stream(spans(tmp_path, one=one), packer, one)], document_mask=False, prefetch=0)
    step = loader.next(Phase(seq_len=SEQ_LEN, micro_batch=SPAN // SEQ_LEN, accumulation=1))
    expected = sum(int(one.target_bytes(ids[at : at + 1], ids[at - 1 : at])[0]) for at in range(1, SPAN + 1))
    assert step.n_bytes == expected


# ---------------------------------------------------------------- in order
def test_spans_in_order_run_over_files_and_around_the_ring(tmp_path: Path) -> None:
    ring = np.concatenate(shards(tmp_path, 100, 7, 260))
    found = list(islice(spans(tmp_path), 40))
    for number, document in enumerate(found):
        assert document.ids.tolist() == [int(ring[(number * (SPAN + 1) + i) % len(ring)]) for i in range(SPAN + 1)]
        assert document.ids.dtype == np.int32
        assert not document.ids.flags.writeable
    assert len({document.document_id for document in found}) == 40


@pytest.mark.parametrize("n_tokens", [49 * 3, 49 * 3 + 1, 200, 49 * 4 - 1])
@pytest.mark.parametrize("epochs", [1, 2, 5])
def test_epochs_in_order_read_no_token_oftener(tmp_path: Path, n_tokens: int, epochs: int) -> None:
    write(tmp_path / "a.bin", np.arange(n_tokens) + 4)
    found = [document.ids for number in range(3) for document in spans(tmp_path, number, 3, epochs=epochs)]
    assert len(found) == epochs * n_tokens // (SPAN + 1)
    times = np.bincount(np.concatenate(found), minlength=n_tokens + 4)[4:]
    assert times.max() <= epochs
    assert times.sum() > epochs * n_tokens - (SPAN + 1)


# ---------------------------------------------------------------- shuffled
@pytest.mark.parametrize("n_tokens", [49, 60, 95, 96, 97, 500, 528, 529])
def test_shuffled_epochs_are_permutations_of_spans_at_a_phase(tmp_path: Path, n_tokens: int) -> None:
    write(tmp_path / "a.bin", np.arange(n_tokens) + 4)
    n_spans = max(1, n_tokens // SPAN - 1)
    read = list(islice(spans(tmp_path, shuffle=True), 30 * n_spans))
    phases, orders = set(), set()
    for epoch in range(30):
        starts = [int(document.ids[0]) - 4 for document in read[epoch * n_spans : (epoch + 1) * n_spans]]
        for start, document in zip(starts, read[epoch * n_spans :], strict=False):
            assert document.ids.tolist() == list(range(start + 4, start + 4 + SPAN + 1)), "no span wraps"
        phase = min(starts)
        assert sorted(starts) == [phase + SPAN * i for i in range(n_spans)]
        assert phase < SPAN
        phases.add(phase)
        orders.add(tuple((start - phase) // SPAN for start in starts))
    assert len(phases) == 1 if n_tokens == SPAN + 1 else len(phases) > 1
    assert len(orders) > 20 or n_spans < 5
    assert len({document.document_id for document in read}) == len(read)


def test_shuffled_order_follows_the_seed_and_streams_share_an_epoch(tmp_path: Path) -> None:
    shards(tmp_path, 3000)
    first, again, other = ([document.ids.tolist() for document in spans(tmp_path, shuffle=True, seed=seed, epochs=2)] for seed in (1, 1, 2))
    assert first == again != other
    apart = [document for number in range(3) for document in spans(tmp_path, number, 3, shuffle=True, seed=1, epochs=2)]
    in_turn = sorted(apart, key=lambda document: document.document_id)
    assert [document.ids.tolist() for document in in_turn] == first


# ---------------------------------------------------------------- resume
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_stream_resumes_at_every_span_through_json(tmp_path: Path, shuffle: bool) -> None:
    shards(tmp_path, 300, 333)
    settings = {"number": 1, "n_streams": 2, "epochs": 4, "shuffle": shuffle}
    running, read = spans(tmp_path, **settings), []
    states = [json.dumps(running.state())]
    for document in running:
        read.append((document.document_id, document.ids.tolist()))
        states.append(json.dumps(running.state()))
    assert len(read) > 15
    for at, state in enumerate(states):
        resumed = spans(tmp_path, **settings)
        resumed.restore(json.loads(state))
        assert [(document.document_id, document.ids.tolist()) for document in resumed] == read[at:]


@pytest.mark.parametrize("shuffle", [False, True])
def test_the_number_of_ranks_may_change_at_any_step(tmp_path: Path, shuffle: bool) -> None:
    shards(tmp_path / "data", 300, 555)
    dataset = Component.named("dataset", "token_spans", paths=(str(tmp_path / "data"),), span_tokens=SPAN, shuffle=shuffle)

    def loaders(world_size: int) -> list[Loader]:
        common = {"split": "train", "n_streams": 8, "seed": 4, "seq_len": SEQ_LEN}
        streams = build_streams(dataset, Component.named("packer", "none"), tokenizer(), **common)
        return [Loader(streams, world_size=world_size, rank=rank, document_mask=False, prefetch=0) for rank in range(world_size)]

    def step(ranks: list[Loader], rows: int = 8) -> list[tuple]:
        phase = Phase(seq_len=SEQ_LEN, micro_batch=1, accumulation=rows // len(ranks))
        found = [pair for rank in ranks for batch in rank.next(phase).micro_batches for pair in pairs(batch.tokens, batch.labels)]
        for rank in ranks:
            rank.commit()
        return sorted(found)

    (alone,) = loaders(1)
    straight = [step([alone]) for _ in range(12)]
    ranks, found = loaders(1), []
    for world_size in (1, 4, 2, 8):
        state = merge_states([rank.state() for rank in ranks])  # in the middle of spans, which have three rows
        ranks = loaders(world_size)
        for rank in ranks:
            rank.restore(state)
        found += [step(ranks) for _ in range(3)]
    assert found == straight


def test_a_state_of_other_spans_is_refused_and_the_fingerprint_follows_all_that_decides_them(tmp_path: Path) -> None:
    shards(tmp_path / "a", 500)
    one = spans(tmp_path / "a")
    with pytest.raises(DataError, match=r"has 20 spans, but the state to resume was of 10: the data, dataset\.span_tokens or dataset\.shuffle"):
        spans(tmp_path / "a", span_tokens=24).restore(one.state())
    shards(tmp_path / "b", 500)
    shards(tmp_path / "c", 500, seed=1)
    assert one.fingerprint == spans(tmp_path / "b").fingerprint
    changed = (spans(tmp_path / "c"), spans(tmp_path / "a", span_tokens=47), spans(tmp_path / "a", shuffle=True))
    assert len({one.fingerprint, *(other.fingerprint for other in changed)}) == 4


def test_the_data_ends_after_its_epochs(tmp_path: Path) -> None:
    shards(tmp_path, 49 * 4)
    packer = Component.named("packer", "none").build(seq_len=SEQ_LEN)
    one = tokenizer()
    loader = Loader([Stream(spans(tmp_path, epochs=1), packer, one)], document_mask=False, prefetch=0)
    phase = Phase(seq_len=SEQ_LEN, micro_batch=3, accumulation=1)
    for _ in range(4):
        assert loader.next(phase).over(Peers()).n_valid == SPAN
    with pytest.raises(DataEnded):
        loader.next(phase).over(Peers())


# ---------------------------------------------------------------- validation
def test_validation_reads_the_documents_of_token_shards(tmp_path: Path) -> None:
    shards(tmp_path / "data", 300, 77)
    write(tmp_path / "data" / "fineweb_val_bytes_000000.bin", [5] * 1000)
    one = tokenizer()
    found = list(spans(tmp_path / "data", split="validation", one=one))
    shards_of = Component.named("dataset", "token_shards", validation_paths=(str(tmp_path / "data"),))
    expected = list(shards_of.build(tokenizer=one, split="validation", stream=0, n_streams=1, seed=0))
    assert [document.ids.tolist() for document in found] == [document.ids.tolist() for document in expected]
    assert len(found) > 10
    assert all(document.ids[0] == 1 for document in found[1:])
    assert sum(len(document.ids) for document in found) == 377


# ---------------------------------------------------------------- what is refused
def test_data_that_is_too_short_says_what_would_help(tmp_path: Path) -> None:
    shards(tmp_path, SPAN)
    remedy = r"give more shards, or lower dataset\.span_tokens or data\.n_streams"
    for shuffle in (False, True):
        with pytest.raises(DataError, match=rf"48 tokens are 0 spans of span_tokens = 48 and a last label.*data\.n_streams = 1 .*{remedy}"):
            spans(tmp_path, shuffle=shuffle)
    shards(tmp_path, 49 * 3 + 5)
    with pytest.raises(DataError, match=r"152 tokens are 3 spans of .*data\.n_streams = 4 streams"):
        spans(tmp_path, n_streams=4)
    with pytest.raises(DataError, match=r"stream 3 of 3 does not exist"):
        spans(tmp_path, 3, 3)
    with pytest.raises(ValueError, match="paths is empty"):
        Component.named("dataset", "token_spans")


@pytest.mark.parametrize("shuffle", [False, True])
def test_ids_and_shards_that_are_no_such_are_named(tmp_path: Path, shuffle: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("titanlm.datasets.shard_sequence._PROBED", 10)
    shards(tmp_path, 200, 200)
    ids = np.full(200, 5)
    ids[77], ids[0] = 1023, 1
    write(tmp_path / "fineweb_train_000001.bin", ids)
    with pytest.raises(DataError, match=r"fineweb_train_000001\.bin: token 77 is 1023, .*ids 0 to 1022"):
        list(spans(tmp_path, shuffle=shuffle, epochs=2, one=tokenizer(1023)))
    (tmp_path / "fineweb_train_000001.bin").write_bytes(b"x" * 2000)
    with pytest.raises(DataError, match=r"fineweb_train_000001\.bin: no token shard"):
        spans(tmp_path, shuffle=shuffle)
    with pytest.raises(DataError, match=r"dataset\.paths: .*none\*\.bin"):
        spans(tmp_path / "none*.bin", shuffle=shuffle)
