"""`titanlm data prepare`: shards hold what the dataset gives, however the work is cut, killed and shared out."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from titanlm import cli
from titanlm.datasets import prepare as preparing
from titanlm.datasets.prepare import Request, prepare, request_of
from titanlm.datasets.shard_file import open_shard, read_manifest
from titanlm.errors import DataError, TitanError
from titanlm.registry import Component
from titanlm.tokenizers.training import train_sentencepiece

ROOT = Path(__file__).parents[2]
BYTE = Component.named("tokenizer", "byte")


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparing, "BATCH_TEXTS", 7)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "spm.model"
    train_sentencepiece((f"words and numbers {i} {i * i} größe" for i in range(300)), path, 320)
    return path


def paragraphs(path: Path, unit: str = "paragraph", **settings) -> Component:
    return Component.named("dataset", "text", paths=(str(path),), unit=unit, **settings)


def request(output: Path, *datasets: Component, tokenizer: Component = BYTE, shard_tokens: int = 5000, workers: int = 0, **settings) -> Request:
    sources = tuple((f"source {number}", dataset) for number, dataset in enumerate(datasets))
    return Request(output, sources, tokenizer.build(), shard_tokens=shard_tokens, workers=workers, **settings)


def read(dataset: Component, tokenizer, split: str = "train") -> list[list[int]]:
    one = dataset.build(tokenizer=tokenizer, split=split, stream=0, n_streams=1, seed=0, epochs=1, on_error="skip")
    return [document.ids.tolist() for document in one]


def shards(folder: Path) -> Component:
    return Component.named("dataset", "token_shards", paths=(str(folder),), shuffle=False, slice_tokens=777)


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.bin"))}


# ---------------------------------------------------------------- what is written
@pytest.mark.parametrize("settings", [None, {"add_eos": False}, {}, {"add_bos": False}], ids=["byte", "bos", "bos and eos", "eos"])
@pytest.mark.parametrize("shard_tokens", [1, 997, 10**8], ids=str)
def test_documents_from_shards_are_those_from_text(tmp_path: Path, corpus: Path, model: Path, settings, shard_tokens: int) -> None:
    if shard_tokens == 1:  # a file a token
        corpus.write_text("ab\n\nc\n\nöd\n\n", encoding="utf-8")
    tokenizer = BYTE if settings is None else Component.named("tokenizer", "sentencepiece", path=str(model), **settings)
    text = paragraphs(corpus, shuffle=False)
    result = prepare(request(tmp_path / "out", text, tokenizer=tokenizer, shard_tokens=shard_tokens))
    built = tokenizer.build()
    expected = read(text, built)
    assert read(shards(tmp_path / "out"), built) == expected
    assert (result.documents, result.tokens) == (len(expected), sum(map(len, expected)))
    assert result.text_bytes == result.counted_bytes == sum(len(one.encode()) for one in corpus.read_text().split("\n\n"))
    assert [open_shard(path).n_tokens for path in sorted((tmp_path / "out").glob("*.bin"))][:-1] == [shard_tokens] * (result.shards - 1)


def test_the_manifest_says_what_there_is(tmp_path: Path, corpus: Path) -> None:
    result = prepare(request(tmp_path / "out", paragraphs(corpus), prefix="corpus"))
    assert sorted(one.name for one in (tmp_path / "out").iterdir()) == [*(f"corpus_train_{n:06d}.bin" for n in range(result.shards)), "shards.json"]
    entry = read_manifest(tmp_path / "out")["corpus_train"]
    tokenizer = BYTE.build()
    assert (entry["tokenizer"], entry["bos_id"], entry["eos_id"]) == (tokenizer.fingerprint, 256, 256)
    assert {one["name"]: one["sha256"] for one in entry["shards"]} == hashes(tmp_path / "out")
    assert sum(one["documents"] for one in entry["shards"]) == result.documents == entry["totals"]["documents"]
    assert sum(one["tokens"] for one in entry["shards"]) == result.tokens
    dataset = paragraphs(corpus).build(tokenizer=tokenizer, split="train", stream=0, n_streams=1, seed=0)
    assert entry["request"]["data of source 0"] == dataset.fingerprint
    assert str(ROOT) not in json.dumps(entry)


@pytest.mark.parametrize("max_tokens", [None, 20_000])
def test_output_does_not_depend_on_the_number_of_workers(tmp_path: Path, corpus: Path, max_tokens: int | None) -> None:
    corpus.write_text(corpus.read_text() + "\n\n \n\n".join(["", "short", "also short", ""]), encoding="utf-8")
    filters = (Component.named("filter", "min_tokens", tokens=30),)
    results = []
    for workers in (0, 1, 2):
        folder = tmp_path / f"out{workers}"
        result = prepare(request(folder, paragraphs(corpus, filter=filters), workers=workers, max_tokens=max_tokens))
        results.append((hashes(folder), read_manifest(folder), result.documents, result.empty, result.filtered))
    assert results[0] == results[1] == results[2]
    assert len(results[0][0]) > 2


def test_max_tokens_ends_before_the_document_that_would_exceed_it(tmp_path: Path, corpus: Path) -> None:
    lengths = [len(ids) for ids in read(paragraphs(corpus, shuffle=False), BYTE.build())]
    for limit, n in ((sum(lengths[:20]), 20), (sum(lengths[:20]) - 1, 19)):
        result = prepare(request(tmp_path / f"out{n}", paragraphs(corpus), max_tokens=limit))
        assert (result.documents, result.tokens) == (n, sum(lengths[:n]))
    with pytest.raises(DataError, match="no document of at most 3 tokens"):
        prepare(request(tmp_path / "none", paragraphs(corpus), max_tokens=3))


def test_sources_are_written_one_after_the_other(tmp_path: Path, corpus: Path) -> None:
    (tmp_path / "other.txt").write_text("other one\n\nother two", encoding="utf-8")
    both = [paragraphs(corpus, shuffle=False), paragraphs(tmp_path / "other.txt", shuffle=False)]
    prepare(request(tmp_path / "out", *both))
    tokenizer = BYTE.build()
    assert read(shards(tmp_path / "out"), tokenizer) == [ids for one in both for ids in read(one, tokenizer)]


def test_a_normalising_tokenizer_is_counted_by_its_tokens(tmp_path: Path, corpus: Path) -> None:
    import sentencepiece

    texts = [f"words and numbers {i} größe" for i in range(300)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(tmp_path / "m"), vocab_size=310, byte_fallback=True, add_dummy_prefix=False, minloglevel=2
    )
    corpus.write_text("\n\n".join(f"two  spaces ﬁ {text}" for text in texts), encoding="utf-8")
    tokenizer = Component.named("tokenizer", "sentencepiece", path=str(tmp_path / "m.model"), add_eos=False)
    result = prepare(request(tmp_path / "out", paragraphs(corpus), tokenizer=tokenizer))
    built = tokenizer.build()
    counted = sum(
        int(built.target_bytes(np.array(ids), np.array([-1, *ids[:-1]])).sum()) for ids in read(shards(tmp_path / "out"), built)
    )  # fmt: skip
    assert result.counted_bytes == counted < result.text_bytes
    assert "the tokenizer changes text" in str(result)


# ---------------------------------------------------------------- resume
def in_child(asked: Request, at: int, action: Callable[[], Any]) -> int:
    """Prepare in a forked process that acts before its ``at``-th write of anything; its number."""
    if child := os.fork():
        return child
    steps = iter(range(1, 1 << 30))

    def acts(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **settings: Any) -> Any:
            if next(steps) == at:
                action()
            return function(*args, **settings)

        return wrapped

    for place, name in ((preparing.ShardWriter, "write"), (preparing.ShardWriter, "close"), (preparing, "write_atomic"), (preparing, "write_manifest")):
        setattr(place, name, acts(getattr(place, name)))
    try:
        prepare(asked)
    finally:
        os._exit(0)


def kill_me() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def config(tmp_path: Path, corpus: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(
        f'model = "decoder"\noptimizer = ["adamw"]\n[dataset]\nname = "text"\npaths = ["{corpus}"]\nunit = "paragraph"\nvalidation_fraction = 0.2\n'
    )
    return path


def test_a_run_killed_at_any_moment_goes_on_to_the_same_bytes(tmp_path: Path, config: Path) -> None:
    straight = prepare(request_of(tmp_path / "straight", config=config, shard_tokens=3000, workers=0))
    for at, workers in ((1, 0), (9, 2), (40, 0), (41, 1), (90, 0), (137, 2), (170, 0)):
        folder = tmp_path / f"killed{at}"
        _, status = os.waitpid(in_child(request_of(folder, config=config, shard_tokens=3000, workers=workers), at, kill_me), 0)
        assert os.WIFSIGNALED(status)
        assert not (folder / "shards.json").exists()
        result = prepare(request_of(folder, config=config, shard_tokens=3000, workers=0))
        assert hashes(folder) == hashes(tmp_path / "straight")
        assert read_manifest(folder) == read_manifest(tmp_path / "straight")
        assert (result.documents, result.tokens, result.text_bytes) == (straight.documents, straight.tokens, straight.text_bytes)
        assert all(path.suffix == ".bin" or path.name == "shards.json" for path in folder.iterdir())


def stop_after(monkeypatch: pytest.MonkeyPatch, n_shards: int) -> None:
    """An interrupt right after so many shards."""
    original = preparing.ShardWriter.close
    left = [n_shards]

    def close(self):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self)

    monkeypatch.setattr(preparing.ShardWriter, "close", close)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_interrupt_keeps_whole_shards_and_says_how_to_go_on(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    straight = prepare(request(tmp_path / "straight", paragraphs(corpus)))
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        result = prepare(request(tmp_path / "out", paragraphs(corpus), workers=workers))
    assert not result.finished
    assert "interrupted; 2 whole shards with 10,000 tokens kept, the same command goes on" in str(result)
    assert len(hashes(tmp_path / "out")) == 2
    again = prepare(request(tmp_path / "out", paragraphs(corpus), workers=workers))
    assert again.finished
    assert hashes(tmp_path / "out") == hashes(tmp_path / "straight")
    assert again.tokens == straight.tokens


def test_other_settings_or_data_are_refused_on_resume_with_the_difference(tmp_path: Path, corpus: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        prepare(request(out, paragraphs(corpus)))
    for changed, said in (
        (request(out, paragraphs(corpus), shard_tokens=4000), "--shard-tokens: 5000 → 4000"),
        (request(out, paragraphs(corpus, "line")), "dataset.unit of source 0: 'paragraph' → 'line'"),
        (request(out, paragraphs(corpus), paragraphs(corpus)), "dataset of source 1: none → text"),
        (request(out, paragraphs(corpus), tokenizer=Component.named("tokenizer", "sentencepiece", path=str(model))), "tokenizer: vocabulary size: 257 → 320"),
    ):
        with pytest.raises(DataError) as error:
            prepare(changed)
        assert said in str(error.value)


def test_other_data_is_refused_on_resume(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        prepare(request(out, paragraphs(corpus)))
    corpus.write_text("other data\n\nand more", encoding="utf-8")
    with pytest.raises(DataError, match="data of source 0: text: "):
        prepare(request(out, paragraphs(corpus)))
    assert prepare(request(out, paragraphs(corpus), force=True)).documents == 2


def test_finished_output_is_recognised_and_checked(tmp_path: Path, corpus: Path) -> None:
    first = prepare(request(tmp_path, paragraphs(corpus)))
    again = prepare(request(tmp_path, paragraphs(corpus)))
    assert (first.fresh, again.fresh) == (True, False)
    assert (again.documents, again.tokens, again.shards) == (first.documents, first.tokens, first.shards)
    with pytest.raises(DataError, match="another --prefix"):
        prepare(request(tmp_path, paragraphs(corpus), shard_tokens=1500))
    prepare(request(tmp_path, paragraphs(corpus), shard_tokens=1500, prefix="small"))
    assert set(read_manifest(tmp_path)) == {"tokens_train", "small_train"}
    (tmp_path / "tokens_train_000001.bin").unlink()
    with pytest.raises(DataError, match=r"tokens_train_000001\.bin: missing"):
        prepare(request(tmp_path, paragraphs(corpus)))


def test_files_in_the_way_are_not_overwritten(tmp_path: Path, corpus: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "tokens_train_000000.bin").write_bytes(b"mine")
    with pytest.raises(DataError, match="in the way"):
        prepare(request(out, paragraphs(corpus)))
    assert (out / "tokens_train_000000.bin").read_bytes() == b"mine"
    assert prepare(request(out, paragraphs(corpus), force=True)).finished


def test_two_at_a_time_in_a_folder_are_refused(tmp_path: Path, corpus: Path) -> None:
    with preparing._locked(tmp_path), pytest.raises(TitanError, match="another `titanlm data prepare` is writing"):
        prepare(request(tmp_path, paragraphs(corpus)))


def test_workers_end_with_a_killed_parent(tmp_path: Path, corpus: Path) -> None:
    marker = tmp_path / "waiting"

    def wait() -> None:
        marker.write_text(Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text())
        time.sleep(100)

    child = in_child(request(tmp_path / "out", paragraphs(corpus), workers=2), 50, wait)
    deadline = time.monotonic() + 60
    while not (marker.exists() and marker.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    workers = marker.read_text().split()
    assert len(workers) == 2
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while any(Path(f"/proc/{worker}/cmdline").exists() and Path(f"/proc/{worker}/cmdline").read_bytes() for worker in workers):  # an unreaped one has none
        assert time.monotonic() < deadline
        time.sleep(0.1)


# ---------------------------------------------------------------- what is refused
def test_d6_data_without_documents_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n\n  \n\n", encoding="utf-8")
    with pytest.raises(DataError, match="no document"):
        prepare(request(tmp_path / "out", paragraphs(tmp_path / "empty.txt")))
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize("workers", [0, 1])
def test_documents_that_are_tokens_already_are_written_as_they_are(tmp_path: Path, workers: int) -> None:
    drawn = Component.named("dataset", "synthetic", documents=20, mean_tokens=30)
    asked = request(tmp_path / "out", drawn, workers=workers)
    prepare(asked)
    shards = Component.named("dataset", "token_shards", paths=(str(tmp_path / "out" / "*_train_*.bin"),), shuffle=False)
    runtime = {"tokenizer": asked.tokenizer, "split": "train", "stream": 0, "n_streams": 1, "seed": 0, "epochs": 1}
    found, written = ([document.ids.tolist() for document in one.build(**runtime)] for one in (shards, drawn))
    assert found == written


@pytest.mark.parametrize("prefix", ["", "../x", "a/b", ".hidden", "val_bytes"])
def test_prefixes_that_are_no_names_are_refused(tmp_path: Path, corpus: Path, prefix: str) -> None:
    with pytest.raises(TitanError, match="--prefix"):
        prepare(request(tmp_path / "out", paragraphs(corpus), prefix=prefix))


def test_a_worker_that_dies_is_said(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from titanlm.tokenizers.byte import ByteTokenizer

    asked = request(tmp_path / "out", paragraphs(corpus), workers=1)
    monkeypatch.setattr(ByteTokenizer, "encode", lambda self, text: os._exit(9))
    with pytest.raises(DataError, match="has died"):
        prepare(asked)


# ---------------------------------------------------------------- the command line
def test_the_command_prepares_files_and_says_what_it_wrote(tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["data", "prepare", "--output", str(tmp_path / "out"), "--input", str(corpus), "--tokenizer", "byte", "--workers", "0"]
    assert cli.main(words) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("1 shard tokens_train_*.bin", "documents        1;", "a token", "MB/s"))
    assert cli.main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["documents"], told["text_bytes"], told["fresh"]) == (1, corpus.stat().st_size, False)


def test_the_command_prepares_both_splits_of_a_config(tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "validation"):
        assert cli.main(["data", "prepare", "--output", str(tmp_path / "out"), "--config", str(config), "--split", split, "--json"]) == 0
    train, validation = (json.loads(line)["documents"] for line in capsys.readouterr().out.splitlines())
    assert train > validation > 0
    assert train + validation == 200
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"tokens_train_000000.bin", "tokens_val_000000.bin", "shards.json"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--input", "a.txt"], "with --tokenizer"),
        (["--input", "a.csv", "--tokenizer", "byte"], "how its name ends"),
        (
            ["--input", "a.jsonl.zst", "--tokenizer", "byte"],
            "(.parquet, .jsonl, .jsonl.gz, .txt); decompress it first",
        ),
        (["--input", "a.txt.gz", "--tokenizer", "byte"], "decompress it first"),
        (["--input", "a.txt", "--tokenizer", "byte", "--train.steps=3"], "overrides change the config"),
    ],
    ids=["no tokenizer", "no type", "zst", "compressed text", "no config"],
)
def test_what_does_not_go_together_is_said(tmp_path: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "prepare", "--output", str(tmp_path / "out"), *words]) == 2
    assert said in capsys.readouterr().err
