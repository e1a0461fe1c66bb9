from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from titanlm.batch import IGNORE, Document
from titanlm.data import DataEnded, Loader, merge_states, validation_batches
from titanlm.datasets.documents import INDEX_BITS
from titanlm.distributed.world import Peers
from titanlm.errors import DataError
from titanlm.packers.boundaries import finish
from titanlm.progress import Phase
from titanlm.registry import Component
from titanlm.stream import Stream, build_streams
from titanlm.tokenizers.training import train_sentencepiece

SPECIMENS = ["emoji 😀👩‍👩‍👧 and é", "한국어 문장입니다", "line\n\nbreaks\r\n\ttabs\t", "  many   spaces    here ", "\u2581 odd \x00", " \n "]


def corpus() -> list[str]:
    draw = random.Random(1)
    words = ["the", "model", "reads", "한국어", "bytes", "😀", "and\tpacks\n\n", "them", "", "", "into", "rows"]
    return SPECIMENS + [" ".join(draw.choices(words, k=draw.randrange(1, 60))) for _ in range(60)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("corpus")
    for number, text in enumerate(corpus()):
        (path / f"{number:03}.txt").write_bytes(text.encode("utf-8"))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return train_sentencepiece(corpus(), tmp_path_factory.mktemp("spm") / "t.model", 400).path


def tokenizer_named(name: str, model: Path):
    return Component.named("tokenizer", name, **({"path": str(model)} if name == "sentencepiece" else {})).build()


def streams_of(folder: Path, n_streams: int = 4, *, split="train", tokenizer=None, packer="concat", epochs=None, **settings) -> list[Stream]:
    paths = {"paths": (str(folder),)} if split == "train" else {"paths": (str(folder.parent),), "validation_paths": (str(folder),)}
    if split != "train":
        other = folder.parent / f"{folder.name}-train"
        other.mkdir(exist_ok=True)
        (other / "x.txt").write_text("x")
        paths["paths"] = (str(other),)
    return build_streams(
        Component.named("dataset", "text", **paths, **settings),
        Component.named("packer", packer),
        tokenizer or Component.named("tokenizer", "byte").build(),
        split=split,
        epochs=epochs,
        n_streams=n_streams,
        seed=5,
        seq_len=64,
    )


PHASE = Phase(seq_len=32, micro_batch=3, accumulation=2)


def content(step) -> tuple:
    """All of a step, comparable."""
    fields = ("tokens", "labels", "positions", "document_ids", "target_bytes")
    arrays = tuple(getattr(batch, name).numpy().tobytes() for batch in step.micro_batches for name in fields)
    return (arrays, step.n_valid, step.n_tokens, step.n_bytes, step.document_ids)


def take(loader: Loader, n_steps: int, phase: Phase = PHASE) -> list[tuple]:
    steps = []
    for _ in range(n_steps):
        steps.append(content(loader.next(phase)))
        loader.commit()
    return steps


def through_json(value):
    """As a checkpoint keeps it: arrays copied, everything else through JSON."""
    arrays: list[np.ndarray] = []

    def out(one):
        if isinstance(one, np.ndarray):
            arrays.append(one.copy())
            return {"array": len(arrays) - 1}
        if isinstance(one, dict):
            assert all(type(key) is str for key in one)
            return {key: out(item) for key, item in one.items()}
        if isinstance(one, list):
            return [out(item) for item in one]
        assert type(one) in (int, float, str, bool)
        return one

    def back(one):
        if isinstance(one, dict):
            return arrays[one["array"]] if set(one) == {"array"} else {key: back(item) for key, item in one.items()}
        return [back(item) for item in one] if isinstance(one, list) else one

    return back(json.loads(json.dumps(out(value))))


# ---------------------------------------------------------------- what a step holds
def test_a_step_has_the_shape_of_its_phase_and_counts_itself(folder):
    loader = Loader(streams_of(folder))
    step = loader.next(PHASE)
    assert len(step.micro_batches) == 2
    for batch in step.micro_batches:
        assert batch.document_mask
        assert {tuple(getattr(batch, name).shape) for name in ("tokens", "labels", "positions", "document_ids", "target_bytes")} == {(3, 32)}
        assert (batch.tokens.dtype, batch.positions.dtype, batch.target_bytes.dtype) == (torch.int64, torch.int32, torch.int32)
    labels = torch.cat([batch.labels for batch in step.micro_batches])
    assert step.n_valid == int((labels != IGNORE).sum())
    assert step.n_tokens == 6 * 32
    assert step.n_bytes == int(torch.cat([batch.target_bytes for batch in step.micro_batches]).sum())
    ids = torch.cat([batch.document_ids for batch in step.micro_batches]).unique().tolist()
    assert step.document_ids == tuple(ids)
    loader.close()


def test_boundaries_inside_batches(folder):
    loader = Loader(streams_of(folder), prefetch=0)
    for batch in (batch for _ in range(5) for batch in loader.next(PHASE).micro_batches):
        same = batch.document_ids[:, 1:] == batch.document_ids[:, :-1]
        assert (batch.labels[:, :-1][~same] == IGNORE).all()
        assert (batch.labels[:, :-1][same] == batch.tokens[:, 1:][same]).all()
        assert (batch.target_bytes[batch.labels == IGNORE] == 0).all()
        assert (batch.positions[:, 0] == 0).all()
        assert (batch.positions[:, 1:][~same] == 0).all()
        assert (batch.positions[:, 1:][same] == batch.positions[:, :-1][same] + 1).all()


def test_plain_causal_is_one_text(folder):
    masked, plain = (Loader(streams_of(folder), document_mask=mask, prefetch=0).next(PHASE) for mask in (True, False))
    assert plain.n_valid == plain.n_tokens > masked.n_valid
    assert plain.n_bytes == masked.n_bytes  # the separator stands for no byte
    for one, other in zip(plain.micro_batches, masked.micro_batches, strict=True):
        assert not one.document_mask
        assert (one.tokens == other.tokens).all()
        assert (one.labels[:, :-1] == one.tokens[:, 1:]).all()
        assert (one.positions == torch.arange(32)).all()


@pytest.mark.parametrize("name", ["byte", "sentencepiece"])
@pytest.mark.parametrize("seq_len", [7, 64])
def test_one_pass_scores_every_target_once_and_every_byte(folder, model, name, seq_len):
    tokenizer = tokenizer_named(name, model)
    streams = streams_of(folder, 3, split="validation", tokenizer=tokenizer)
    batches = list(validation_batches(streams, seq_len, 4))
    assert {tuple(batch.tokens.shape) for batch in batches} == {(4, seq_len)}
    texts = [text for text in corpus() if text.strip()]
    expected: dict[int, list[int]] = {}
    for number, text in enumerate(corpus()):
        if text.strip():
            expected[number] = [*tokenizer.encode(text).tolist(), tokenizer.eos_id]
    found: dict[int, list[int]] = {}
    rows = [(d, label) for batch in batches for d, label in zip(batch.document_ids.flatten().tolist(), batch.labels.flatten().tolist(), strict=True)]
    for document_id, label in rows:
        if label != IGNORE:
            found.setdefault(document_id >> INDEX_BITS, []).append(label)
    assert found == expected
    assert sum(int(batch.target_bytes.sum()) for batch in batches) == sum(len(text.encode("utf-8")) for text in texts)
    assert sum(stream.counts["documents"] for stream in streams) == 0  # left as they were


def test_validation_repeats_itself_and_stops_where_told(folder):
    stream = streams_of(folder, 1, split="validation")[0]
    first, second = (list(validation_batches(stream, 16, 2)) for _ in range(2))
    assert [batch.tokens.tolist() for batch in first] == [batch.tokens.tolist() for batch in second]
    short = list(validation_batches(stream, 16, 2, max_tokens=16 * 5 + 3))
    assert len(short) == 3
    assert (short[2].labels[1] == IGNORE).all()
    assert (short[2].document_ids[1] == -1).all()
    assert all((one.tokens == other.tokens).all() for one, other in zip(short[:2], first, strict=False))
    assert len(list(validation_batches(stream, 16, 2, max_tokens=1))) == 1
    partly = validation_batches(stream, 16, 2)
    next(partly)
    partly.close()
    assert len(list(validation_batches(stream, 16, 2))) == len(first)


def test_validation_without_text_is_an_error(tmp_path):
    (tmp_path / "blank.txt").write_text(" \n ")
    with pytest.raises(DataError, match="no text to score"):
        list(validation_batches(streams_of(tmp_path, 2, split="validation"), 8, 2))


# ---------------------------------------------------------------- resuming
@pytest.mark.parametrize("prefetch", [0, 2])
def test_resume_is_exact_at_every_cut(folder, model, prefetch):
    tokenizer = tokenizer_named("sentencepiece", model)
    loader = Loader(streams_of(folder, tokenizer=tokenizer), prefetch=prefetch)
    straight, states = [], [loader.state()]
    for _ in range(20):
        straight += take(loader, 1)
        states.append(loader.state())
    end, counts = loader.state()["row"], loader.counts()
    loader.close()
    assert any(state["streams"]["0"]["packer"]["ids"] for state in states)
    for cut in range(21):
        resumed = Loader(streams_of(folder, tokenizer=tokenizer), prefetch=prefetch)
        resumed.restore(through_json(states[cut]))
        assert take(resumed, 20 - cut) == straight[cut:]
        assert (resumed.state()["row"], resumed.counts()) == (end, counts)
        resumed.close()


def test_five_resumes_in_a_row(folder):
    straight = take(Loader(streams_of(folder), prefetch=0), 25)
    steps, state = [], None
    for _ in range(5):
        loader = Loader(streams_of(folder))
        if state is not None:
            loader.restore(state)
        steps += take(loader, 5)
        loader.next(PHASE)  # handed out and abandoned
        state = through_json(loader.state())
        loader.close()
    assert steps == straight


def test_an_uncommitted_step_comes_again(folder):
    loader = Loader(streams_of(folder))
    take(loader, 3)
    state = loader.state()
    abandoned = [content(loader.next(PHASE)) for _ in range(2)]
    assert loader.state()["row"] == state["row"]
    loader.restore(loader.state())
    assert [content(loader.next(PHASE)) for _ in range(2)] == abandoned
    loader.commit()
    assert loader.state()["row"] == state["row"] + 12
    loader.close()


def test_building_ahead_and_changing_phases_give_the_same_rows(folder):
    long = Phase(seq_len=50, micro_batch=1, accumulation=5)
    clipped = Phase(seq_len=32, micro_batch=3, accumulation=2, clip=1.0)
    plan = [PHASE] * 3 + [long] * 2 + [PHASE, clipped] + [long] * 3
    found = []
    for prefetch in (0, 1, 4):
        loader = Loader(streams_of(folder), prefetch=prefetch)
        steps = []
        for phase in plan:
            steps.append(content(loader.next(phase)))
            loader.commit()
        found.append((steps, loader.state()["row"], loader.counts()))
        loader.close()
    assert found[0] == found[1] == found[2]
    # Nothing is lost at a change: the rows of each stream still overlap by one id.
    loader = Loader(streams_of(folder, 1), prefetch=2, document_mask=False)
    tokens, labels = [], []
    for phase in plan:
        for batch in loader.next(phase).micro_batches:
            tokens += batch.tokens.flatten().tolist()
            labels += batch.labels.flatten().tolist()
    loader.close()
    assert tokens[1:] == labels[:-1]


def test_restoring_other_states_is_refused_and_changes_nothing(folder):
    loader = Loader(streams_of(folder, 4))
    other = Loader(streams_of(folder, 2), prefetch=0).state()
    expected = take(Loader(streams_of(folder, 4), prefetch=0), 3)
    with pytest.raises(DataError, match=r"data\.n_streams = 4, but the state to resume has 2"):
        loader.restore(other)
    state = loader.state()
    with pytest.raises(DataError, match=r"lacks the data streams \[1\]"):
        loader.restore({**state, "streams": {key: value for key, value in state["streams"].items() if key != "1"}})
    with pytest.raises(DataError, match="not a state of this dataset and packer"):
        loader.restore({**state, "streams": {**state["streams"], "2": {"dataset": {}}}})
    assert take(loader, 3) == expected
    loader.close()


# ---------------------------------------------------------------- ranks
def rows_of(step) -> list[tuple]:
    rows = [row for batch in step.micro_batches for row in zip(batch.tokens, batch.labels, batch.document_ids, strict=True)]
    return [tuple(value for tensor in row for value in tensor.tolist()) for row in rows]


def test_ranks_share_the_rows_of_one_process_and_may_change_in_number(folder):
    alone = Loader(streams_of(folder, 12), prefetch=0)
    one = [rows_of(alone.next(Phase(32, 6, 2))) for _ in range(6)]
    state, found = None, []
    for world_size, n_steps in ((1, 1), (2, 2), (3, 1), (4, 1), (1, 1)):
        loaders = [Loader(streams_of(folder, 12), world_size=world_size, rank=rank) for rank in range(world_size)]
        for loader in loaders:
            if state is not None:
                loader.restore(state)
        for _ in range(n_steps):
            found.append([rows_of(loader.next(Phase(32, 12 // world_size, 1))) for loader in loaders])
            for loader in loaders:
                loader.commit()
        state = through_json(merge_states([loader.state() for loader in loaders]))
        for loader in loaders:
            loader.close()
    for expected, ranks in zip(one, found, strict=True):
        assert sorted(row for rows in ranks for row in rows) == sorted(expected)
        # In the order of the run, rank r has every W-th row.
        assert [rows[i] for i in range(len(ranks[0])) for rows in ranks] == expected


def test_streams_must_divide_among_ranks_and_states_must_match(folder):
    with pytest.raises(DataError, match=r"data\.n_streams = 4 must be a multiple of the world size 3"):
        Loader(streams_of(folder, 4), world_size=3)
    first, second = (Loader(streams_of(folder, 2), world_size=2, rank=rank, prefetch=0) for rank in (0, 1))
    with pytest.raises(DataError, match=r"leave out the streams \[1\]"):
        merge_states([first.state()])
    take(first, 1)
    with pytest.raises(DataError, match="do not belong to one step"):
        merge_states([first.state(), second.state()])


# ---------------------------------------------------------------- what goes wrong
class Broken:
    """A dataset whose nth document raises."""

    fingerprint = "broken"

    def __init__(self, fails_at: int, n_bytes: int = 0) -> None:
        self.taken, self.fails_at, self.n_bytes = 0, fails_at, n_bytes

    def __iter__(self):
        return self

    def __next__(self):
        if self.taken == self.fails_at:
            raise OSError("the disk is gone")
        self.taken += 1
        return Document(np.full(40, 97, dtype=np.int32), self.taken, 40 + self.n_bytes)

    def state(self):
        return {"taken": self.taken}

    def restore(self, state):
        self.taken = state["taken"]


def stream_over(dataset) -> Stream:
    return Stream(dataset, Component.named("packer", "concat").build(seq_len=8), Component.named("tokenizer", "byte").build())


@pytest.mark.parametrize("prefetch", [0, 3])
def test_an_error_while_building_surfaces_in_its_own_step(prefetch):
    dataset = Broken(fails_at=3)
    loader = Loader([stream_over(dataset)], prefetch=prefetch)
    phase = Phase(39, 1, 1)
    take(loader, 3, phase)
    with pytest.raises(OSError, match="the disk is gone"):
        loader.next(phase)
    assert loader.state()["row"] == 3
    dataset.fails_at = -1  # the disk is back: the same step can be had
    assert loader.next(phase).document_ids == (3, 4)
    loader.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_streams_that_end_are_padded_until_all_have(folder, workers):
    streams = streams_of(folder, 4, epochs=2)
    loader = Loader(streams, workers=workers)
    found: dict[int, int] = {}
    padded = 0

    def read_on() -> int:
        step = loader.next(PHASE).over(Peers())
        loader.commit()
        for batch in step.micro_batches:
            for document in batch.document_ids[batch.labels != IGNORE].tolist():
                found[document] = found.get(document, 0) + 1
        return sum(int((batch.document_ids == -1).all(1).sum()) for batch in step.micro_batches)

    while padded < 4:
        padded += read_on()
    ended = None
    while ended is None:
        try:
            read_on()
        except DataEnded as error:
            ended = error
    assert "as often as `epochs` says" in str(ended)
    state = loader.state()
    loader.close()
    labels = sorted(len(text.encode()) + 1 for text in corpus() if text.strip())
    assert sorted(found.values()) == sorted(labels + labels)
    again = Loader(streams_of(folder, 4, epochs=2), prefetch=0)
    again.restore(through_json(state))
    with pytest.raises(DataEnded):
        again.next(PHASE).over(Peers())


def test_bytes_that_do_not_add_up_name_the_document():
    with pytest.raises(DataError, match=r"document 1: its tokens stand for 40 bytes and its text has 43"):
        stream_over(Broken(-1, n_bytes=3)).next_row(8)


def test_a_normalising_tokenizer_is_counted_and_the_difference_shown():
    stream = stream_over(Broken(-1, n_bytes=3))
    stream._tokenizer.lossless = False
    row = finish(stream.next_row(100), document_mask=True)
    assert int(row.target_bytes.sum()) > 0
    assert stream.counts == {"documents": 3, "text_bytes": 129, "uncounted_bytes": 9, "unreadable": 0, "passed_over": 0}


def test_stall_is_reset_when_read(folder):
    loader = Loader(streams_of(folder), prefetch=0)
    loader.next(PHASE)
    assert loader.take_stall_s() > 0
    assert loader.take_stall_s() == 0
    loader.close()


def test_fingerprint_is_the_datasets(folder):
    first, second = streams_of(folder, 2)
    assert first.fingerprint == second.fingerprint
    assert first.fingerprint.startswith("text: ")


# ---------------------------------------------------------------- worker processes
PACKERS = ["concat", "best_fit", "none"]


@pytest.mark.parametrize("packer", PACKERS)
def test_c4_rows_do_not_depend_on_workers_and_resume_with_any_number(folder, packer):
    """Workers 0 → 2 → 4 → 1 → 0, cut inside blocks, against the straight run."""
    straight = take(Loader(streams_of(folder, 8, packer=packer), prefetch=0), 15)
    found, state = [], None
    for workers, n_steps in ((0, 3), (2, 1), (4, 4), (1, 2), (3, 4), (0, 1)):
        loader = Loader(streams_of(folder, 8, packer=packer), workers=workers, prefetch=workers)
        if state is not None:
            loader.restore(state)
        found += take(loader, n_steps)
        state = through_json(loader.state())
        loader.close()
    assert found == straight


def test_c5_world_size_2_1_2_with_workers_loses_and_repeats_nothing(folder):
    """All documents of every label, compared with the run on one rank."""

    def documents(steps) -> list[tuple]:
        return [(batch.document_ids.tolist(), batch.labels.tolist()) for step in steps for batch in step.micro_batches]

    def run(world_size, n_steps, state, workers):
        phase = Phase(32, 2, 4 // world_size)
        loaders = [Loader(streams_of(folder, 8), world_size=world_size, rank=rank, workers=workers) for rank in range(world_size)]
        rows = []
        for loader in loaders:
            if state is not None:
                loader.restore(state)
        for _ in range(n_steps):
            by_rank = []
            for loader in loaders:
                by_rank.append([row for batch in loader.next(phase).micro_batches for row in zip(batch.document_ids.tolist(), batch.labels.tolist())])
                loader.commit()
            rows += [by_rank[g % world_size][g // world_size] for g in range(8)]
        state = through_json(merge_states([loader.state() for loader in loaders]))
        for loader in loaders:
            loader.close()
        return rows, state

    straight, _ = run(1, 9, None, 0)
    found, state = [], None
    for world_size, n_steps, workers in ((2, 2, 2), (1, 3, 0), (2, 1, 0), (4, 1, 1), (1, 2, 3)):
        rows, state = run(world_size, n_steps, state, workers)
        found += rows
    assert found == straight


def test_row_length_may_change_under_workers(folder):
    def run(workers):
        loader = Loader(streams_of(folder, 4), workers=workers)
        steps = []
        for seq_len in (32, 32, 64, 16, 16):
            steps += take(loader, 1, Phase(seq_len, 2, 2))
        loader.close()
        return steps

    assert run(2) == run(0)


def test_d13_a_killed_worker_is_an_error_within_ten_seconds_and_no_hang(folder):
    loader = Loader(streams_of(folder, 4), workers=2, prefetch=0)
    take(loader, 1)
    before = loader.state()
    os.kill(loader._rows._engine.processes[0].pid, signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(DataError, match=r"data worker \d+ \(exit code -9\) has died; start again"):
        take(loader, 10_000)
    assert time.monotonic() - started < 10
    assert loader.state()["row"] >= before["row"]
    loader.close()


def test_d13_workers_end_when_the_trainer_is_killed(folder):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        loader = Loader(streams_of(folder, 4), workers=2)
        take(loader, 1)
        os.write(writer, " ".join(str(process.pid) for process in loader._rows._engine.processes).encode())
        time.sleep(60)
        os._exit(1)
    workers = os.read(reader, 100).decode().split()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    deadline = time.monotonic() + 20
    while any(running(worker) for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert len(workers) == 2


def running(process: str) -> bool:
    """False for one that is gone, or dead and not yet waited for."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_counts_are_of_the_last_row_whoever_makes_rows(folder):
    def run(workers):
        loader = Loader(streams_of(folder, 4), workers=workers)
        take(loader, 5)
        state = through_json(loader.state())
        loader.close()
        again = Loader(streams_of(folder, 4), prefetch=0)
        again.restore(state)
        return loader.counts(), again.counts()

    (straight, resumed), (from_workers, resumed_workers) = run(0), run(2)
    assert straight == resumed == from_workers == resumed_workers
    assert straight["documents"] > 0


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_i2_workers_ignore_the_signals_of_the_group(folder, signal_number):
    straight = take(Loader(streams_of(folder, 4), prefetch=0), 6)
    loader = Loader(streams_of(folder, 4), workers=2)
    steps = take(loader, 2)
    for process in loader._rows._engine.processes:
        os.kill(process.pid, signal_number)
    assert steps + take(loader, 4) == straight
    processes = loader._rows._engine.processes
    loader.close()
    assert not any(process.is_alive() for process in processes)


def test_an_error_in_a_worker_comes_in_its_own_step_without_a_traceback(folder):
    loader = Loader([stream_over(Broken(fails_at=3, n_bytes=0)), stream_over(Broken(fails_at=-1))], workers=2)
    phase = Phase(39, 2, 1)
    take(loader, 3, phase)
    with pytest.raises(RuntimeError, match="OSError: the disk is gone"):
        loader.next(phase)
    loader.close()
    wrong = Loader([stream_over(Broken(-1, n_bytes=3))], workers=1)
    with pytest.raises(DataError, match=r"^document 1: its tokens stand for 40 bytes and its text has 43"):
        wrong.next(phase)
    assert wrong.state()["row"] == 0
    wrong.close()
