"""Token shards: where documents begin, order, streams, resume, and whose tokens they are."""

from __future__ import annotations

import json
import math
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from titanlm.datasets import shard_sequence
from titanlm.datasets.shard_file import ShardWriter, dtype_for, write_manifest
from titanlm.errors import DataError
from titanlm.metrics import bits_per_byte
from titanlm.packers.boundaries import finish
from titanlm.registry import Component
from titanlm.stream import Stream

BOS, EOS, BOTH, NEITHER = "bos", "eos", "both", "neither"
SEPARATORS = {BOS: (1, None), EOS: (None, 2), BOTH: (1, 2), "same": (1, 1), NEITHER: (None, None)}


def tokenizer(convention: str = BOS, vocab_size: int = 1024, fingerprint: str = "a tokenizer"):
    bos, eos = SEPARATORS[convention]
    return SimpleNamespace(
        vocab_size=vocab_size,
        bos_id=bos,
        eos_id=eos,
        lossless=False,
        fingerprint=fingerprint,
        target_bytes=lambda ids, previous: (ids > 3).astype(np.int32),
    )


def bodies(n: int, seed: int = 0, longest: int = 40) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(4, 1000, rng.integers(1, longest)).tolist() for _ in range(n)]


def documents_of(texts, convention: str) -> list[list[int]]:
    bos, eos = SEPARATORS[convention]
    return [[*([] if bos is None else [bos]), *text, *([] if eos is None else [eos])] for text in texts]


def write(path: Path, ids, fingerprint: str = "", vocab_size: int = 1024) -> Path:
    with ShardWriter(path, dtype_for(vocab_size), fingerprint) as writer:
        writer.write(np.array(ids))
        writer.close()
    return path


def files(folder: Path, documents, n_files: int, name: str = "x_train_{:06d}.bin") -> Path:
    """The documents end to end, cut into so many files of about the same length."""
    ids = [one for document in documents for one in document]
    folder.mkdir(exist_ok=True)
    for number, part in enumerate(np.array_split(ids, n_files)):
        write(folder / name.format(number), part)
    return folder


def stream(folder, one=None, *, split="train", number=0, n_streams=1, seed=3, epochs=1, **settings):
    paths = {"paths" if split == "train" else "validation_paths": (str(folder),)}
    component = Component.named("dataset", "token_shards", **(paths | settings))
    return component.build(tokenizer=one or tokenizer(), split=split, stream=number, n_streams=n_streams, seed=seed, epochs=epochs)


def ids_of(documents) -> list[list[int]]:
    return [document.ids.tolist() for document in documents]


# ---------------------------------------------------------------- documents
@pytest.mark.parametrize("slice_tokens", [1, 3, 50, 1 << 20])
@pytest.mark.parametrize("n_files", [1, 3, 40])
@pytest.mark.parametrize("convention", [BOS, EOS, BOTH, "same"])
def test_documents_come_back_across_slices_and_files(tmp_path: Path, convention: str, n_files: int, slice_tokens: int) -> None:
    documents = documents_of(bodies(30), convention)
    folder = files(tmp_path / "data", documents, n_files)
    read = list(stream(folder, tokenizer(convention), shuffle=False, slice_tokens=slice_tokens))
    assert ids_of(read) == documents
    assert all(document.ids.dtype == np.int32 and not document.ids.flags.writeable and document.n_bytes is None for document in read)
    assert len({document.document_id for document in read}) == len(read)


def test_without_separators_a_slice_is_a_document(tmp_path: Path) -> None:
    folder = files(tmp_path / "data", [list(range(4, 104))], 2)
    assert [len(ids) for ids in ids_of(stream(folder, tokenizer(NEITHER), shuffle=False, slice_tokens=20))] == [20, 20, 10, 20, 20, 10]


@pytest.mark.parametrize("slice_tokens", [1, 4, 100])
def test_empty_documents_are_kept_where_separators_alternate(tmp_path: Path, slice_tokens: int) -> None:
    documents = documents_of([[], [5], [], [], [6, 7], []], "same")
    folder = files(tmp_path / "data", documents, 1)
    assert ids_of(stream(folder, tokenizer("same"), shuffle=False, slice_tokens=slice_tokens)) == documents


def test_the_head_of_a_file_that_continues_none_is_a_document(tmp_path: Path) -> None:
    write(tmp_path / "a_000007.bin", [9, 9, 1, 8])
    write(tmp_path / "a_000008.bin", [8, 1, 7])
    write(tmp_path / "a_000010.bin", [6, 1, 5])  # 9 is not there
    write(tmp_path / "b_000011.bin", [4, 1, 4])
    assert ids_of(stream(tmp_path, shuffle=False)) == [[9, 9], [1, 8, 8], [1, 7], [6], [1, 5], [4], [1, 4]]


def test_a_document_over_several_files(tmp_path: Path) -> None:
    for number, ids in enumerate([[1, 5], [5, 5, 5], [5], [5, 1, 6]]):
        write(tmp_path / f"a_{number}.bin", ids)
    assert ids_of(stream(tmp_path, shuffle=False)) == [[1, 5, 5, 5, 5, 5, 5], [1, 6]]


@pytest.mark.parametrize("slice_tokens", [3, 1000])
def test_one_separator_between_documents_is_refused_where_two_are_written(tmp_path: Path, slice_tokens: int) -> None:
    folder = files(tmp_path / "data", documents_of(bodies(5), BOS), 1)
    with pytest.raises(DataError, match=r"token \d+: one separator .*add_eos = false"):
        list(stream(folder, tokenizer("same"), slice_tokens=slice_tokens))


def test_documents_without_the_end_that_the_tokenizer_writes_are_refused(tmp_path: Path) -> None:
    folder = files(tmp_path / "data", documents_of(bodies(5), BOS), 1)
    with pytest.raises(DataError, match=r"do not end with EOS.*add_eos = false"):
        stream(folder, tokenizer(BOTH))


def test_shards_without_any_separator_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = files(tmp_path / "data", [[5] * 300], 1)
    assert ids_of(stream(folder)) == [[5] * 300]  # a short one may be the rest of a document
    monkeypatch.setattr(shard_sequence, "_ENOUGH", 300)
    with pytest.raises(DataError, match=r"none of the first 300 tokens separates documents \(BOS 1"):
        stream(folder)


def test_a_document_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_sequence, "LONGEST", 1000)
    folder = files(tmp_path / "data", [[1, 5, 1, *[5] * 60_000, 1]], 1)
    with pytest.raises(DataError, match="document at token 2 has no end within 1,000 tokens"):
        list(stream(folder, shuffle=False, slice_tokens=16))


# ---------------------------------------------------------------- order, streams, resume
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("n_streams", [1, 3, 5])
def test_streams_hold_every_document_once_an_epoch(tmp_path: Path, n_streams: int, shuffle: bool) -> None:
    documents = documents_of(bodies(60), BOS)
    folder = files(tmp_path / "data", documents, 3)
    read = [
        document for number in range(n_streams) for document in stream(folder, number=number, n_streams=n_streams, epochs=2, shuffle=shuffle, slice_tokens=100)
    ]
    assert sorted(ids_of(read)) == sorted(2 * documents)
    assert len({document.document_id for document in read}) == 2 * len(documents)


def test_order_follows_seed_and_epoch(tmp_path: Path) -> None:
    documents = documents_of(bodies(60), BOS)
    folder = files(tmp_path / "data", documents, 2)
    first, second = (ids_of(stream(folder, seed=seed, epochs=2, slice_tokens=200)) for seed in (3, 4))
    assert first != second
    assert first == ids_of(stream(folder, seed=3, epochs=2, slice_tokens=200))
    assert documents != first[:60] != first[60:]
    assert sorted(first[:60]) == sorted(first[60:]) == sorted(documents)


def test_training_never_ends_without_epochs_and_validation_is_one_pass_in_order(tmp_path: Path) -> None:
    documents = documents_of(bodies(10), BOS)
    folder = files(tmp_path / "data", documents, 1)
    assert len(list(islice(stream(folder, epochs=None), 35))) == 35
    assert ids_of(stream(folder, split="validation", epochs=None)) == documents


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_stream_resumes_at_every_document_through_json(tmp_path: Path, shuffle: bool) -> None:
    folder = files(tmp_path / "data", documents_of(bodies(25), BOS), 3)
    settings = {"n_streams": 2, "number": 1, "epochs": 2, "shuffle": shuffle, "slice_tokens": 60}
    running, states, read = stream(folder, **settings), [], []
    states.append(json.dumps(running.state()))
    for document in running:
        read.append((document.document_id, document.ids.tolist()))
        states.append(json.dumps(running.state()))
    for at, state in enumerate(states):
        resumed = stream(folder, **settings)
        resumed.restore(json.loads(state))
        assert [(document.document_id, document.ids.tolist()) for document in resumed] == read[at:]


def test_a_state_of_other_slices_is_refused(tmp_path: Path) -> None:
    folder = files(tmp_path / "data", documents_of(bodies(25), BOS), 1)
    state = stream(folder, slice_tokens=50).state()
    with pytest.raises(DataError, match=r"slices, but the state to resume was of"):
        stream(folder, slice_tokens=60).restore(state)


def test_d6_a_stream_that_can_meet_no_document_ends_with_an_error(tmp_path: Path) -> None:
    folder = files(tmp_path / "data", [[1, *[5] * 99]], 1)
    with pytest.raises(DataError, match="no document begins in the slices of stream 1 of 2"):
        next(stream(folder, number=1, n_streams=2, epochs=None, shuffle=False, slice_tokens=50))


def test_the_fingerprint_follows_names_contents_and_slices(tmp_path: Path) -> None:
    documents = documents_of(bodies(10), BOS)
    first = stream(files(tmp_path / "a", documents, 2)).fingerprint
    assert first == stream(files(tmp_path / "b", documents, 2)).fingerprint
    assert first == stream(tmp_path / "a", shuffle=False).fingerprint
    other = documents_of(bodies(10, seed=1), BOS)
    changes = [files(tmp_path / "c", documents, 3), files(tmp_path / "d", documents, 2, "y_{}.bin"), files(tmp_path / "e", other, 2)]
    assert first not in {*(stream(folder).fingerprint for folder in changes), stream(tmp_path / "a", slice_tokens=9).fingerprint}


# ---------------------------------------------------------------- which files
def test_sidecars_of_byte_counts_are_left_out(tmp_path: Path) -> None:
    write(tmp_path / "fineweb_val_000000.bin", [1, 5])
    write(tmp_path / "fineweb_val_bytes_000000.bin", [0, 9])
    assert ids_of(stream(tmp_path / "fineweb_val_*.bin")) == [[1, 5]]
    with pytest.raises(DataError, match="hold no tokens"):
        stream(tmp_path / "*_bytes_*")


def test_d11_a_path_that_matches_nothing_or_a_file_twice_is_refused(tmp_path: Path) -> None:
    folder = files(tmp_path / "data", [[1, 5]], 1)
    with pytest.raises(DataError, match=r"none\*\.bin"):
        stream(tmp_path / "none*.bin")
    with pytest.raises(DataError, match="twice"):
        stream(folder, paths=(str(folder), str(folder / "*.bin")))
    with pytest.raises(DataError, match="in dataset.paths and in dataset.validation_paths"):
        stream(folder, validation_paths=(str(folder),))
    with pytest.raises(DataError, match="training and validation must differ"):
        stream(folder, validation_paths=(str(files(tmp_path / "copy", [[1, 5]], 1, "y_{}.bin")),))
    with pytest.raises(ValueError, match="paths is empty"):
        Component.named("dataset", "token_shards")
    with pytest.raises(DataError, match=r"set dataset\.validation_paths"):
        Component.named("dataset", "token_shards", paths=(str(folder),)).build(tokenizer=tokenizer(), split="validation", stream=0, n_streams=1, seed=0)


def test_d10_a_shard_replaced_during_the_run_is_noticed(tmp_path: Path) -> None:
    folder = files(tmp_path / "data", documents_of(bodies(30), BOS), 1)
    running = stream(folder, slice_tokens=100)
    next(running)
    write(folder / "x_train_000000.bin", [1, 5])
    with pytest.raises(DataError, match="changed while it was in use"):
        list(running)


# ---------------------------------------------------------------- whose tokens
@pytest.mark.parametrize("at", [0, 1, 77, 99])
def test_d15_an_id_beyond_the_vocabulary_is_named_with_its_place(tmp_path: Path, at: int) -> None:
    ids = np.full(100, 5)
    ids[::10], ids[at] = 1, 1024
    write(tmp_path / "a.bin", ids)
    with pytest.raises(DataError, match=rf"a\.bin: token {at} is 1024, .*ids 0 to 1023"):
        list(stream(tmp_path, slice_tokens=20))


def test_d15_an_id_beyond_the_vocabulary_past_what_is_looked_at_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_sequence, "_PROBED", 10)
    write(tmp_path / "a_0.bin", [1, 5] * 20)
    write(tmp_path / "a_1.bin", [5, 2000, 1, 5])
    with pytest.raises(DataError, match=r"a_1\.bin: token 1 is 2000"):
        list(stream(tmp_path, slice_tokens=20))


def test_shards_of_another_tokenizer_are_refused_with_the_difference(tmp_path: Path) -> None:
    byte = Component.named("tokenizer", "byte").build()
    write(tmp_path / "a.bin", [256, 65, 256], byte.fingerprint)
    assert ids_of(stream(tmp_path, byte)) == [[256, 65, 256]]
    with pytest.raises(DataError, match="another tokenizer.*\n.*what differs is not known"):
        stream(tmp_path, tokenizer())
    write_manifest(tmp_path, {"a": {"tokenizer": byte.fingerprint}})
    with pytest.raises(DataError, match="another tokenizer.*\n.*fingerprint: .* → a tokenizer"):
        stream(tmp_path, tokenizer())


def test_large_vocabularies_take_wide_ids(tmp_path: Path) -> None:
    write(tmp_path / "a.bin", [1, 100_000, 1, 128_255], vocab_size=128_256)
    assert ids_of(stream(tmp_path, tokenizer(vocab_size=128_256), shuffle=False)) == [[1, 100_000], [1, 128_255]]


# ---------------------------------------------------------------- bytes
def test_golf_bytes_of_targets_are_those_of_a_loop_over_ids(tmp_path: Path) -> None:
    """Parameter Golf's rule, one id after the other, against the stream's arrays."""
    rng = np.random.default_rng(0)
    base, space, boundary = rng.integers(1, 12, 1024), rng.random(1024) < 0.4, np.zeros(1024, dtype=bool)
    boundary[:4], base[:4], space[:4] = True, 0, False

    class Golf(SimpleNamespace):
        def target_bytes(self, ids, previous):
            return (base[ids] + (space[ids] & ~np.append(boundary, True)[previous])).astype(np.int32)

    golf = Golf(**{key: value for key, value in vars(tokenizer()).items() if key != "target_bytes"})
    texts = documents_of(bodies(400, longest=80), BOS)
    folder = files(tmp_path / "data", texts, 3, "fineweb_val_{:06d}.bin")
    for one in folder.iterdir():  # control ids inside documents, too
        ids = np.fromfile(one, dtype="<u2", offset=1024)
        ids[::97] = np.where(ids[::97] == 1, 1, 3)
        write(one, ids)
    tokens = [int(one) for path in sorted(folder.iterdir()) for one in np.fromfile(path, dtype="<u2", offset=1024)]
    seq_len = 64
    n_targets = (len(tokens) - 1) // seq_len * seq_len
    expected = 0
    for x, y in zip(tokens[:n_targets], tokens[1 : n_targets + 1]):
        expected += int(base[y])
        if space[y] and not boundary[x]:
            expected += 1
    packer = Component.named("packer", "concat").build(seq_len=seq_len)
    rows = Stream(stream(folder, golf, split="validation"), packer, golf)
    n_bytes = labels = 0
    for _ in range(n_targets // seq_len):
        row = finish(rows.next_row(seq_len), document_mask=False)
        n_bytes, labels = n_bytes + int(row.target_bytes.sum()), labels + int((row.labels >= 0).sum())
    assert (labels, n_bytes) == (n_targets, expected)


def test_golf_scores_follow_from_the_published_counts() -> None:
    targets, n_bytes = 62_021_632, 151_080_363
    assert round(n_bytes / targets, 5) == 2.43593
    low, high = (bits_per_byte(mean * targets, n_bytes) for mean in (6.9286, 6.9320))
    assert (round(low, 4), round(high, 4)) == (4.1035, 4.1055)
    assert low < bits_per_byte(math.log(1024) * targets, n_bytes) < high


def test_every_stream_has_documents_when_there_is_little_data(tmp_path: Path) -> None:
    folder = files(tmp_path / "data", documents_of([list(range(5, 100))] * 1500, BOS), 2)
    counts = [sum(1 for _ in stream(folder, number=number, n_streams=64)) for number in range(64)]
    assert sum(counts) == 1500
    assert min(counts) >= 5


def test_d14_training_and_validation_shards_of_one_folder_are_told_apart_by_name(tmp_path: Path) -> None:
    for name in ("fineweb_train_000000.bin", "fineweb_val_000000.bin"):
        write(tmp_path / name, [1, 5, 6])
    with pytest.raises(DataError, match=r"by their names, training and validation shards; keep them apart: paths = .*_train_\*\.bin"):
        stream(tmp_path)
    assert ids_of(stream(tmp_path / "*_train_*.bin")) == [[1, 5, 6]]
