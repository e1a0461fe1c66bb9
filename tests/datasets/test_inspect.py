"""`titanlm data inspect`, as it is typed: counts against a loop over the same texts, and what two splits share."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from titanlm import cli
from titanlm.registry import Component

TEXTS = [f"Document {i}: " + "word " * (i * i % 97) for i in range(50)]
HOSTILE = "\x1b[31mred\x1b[0m \x07bell\u202eright to left"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run(*words: object, status: int = 0) -> str:
        found = cli.main(["data", "inspect", *map(str, words)])
        out, err = capsys.readouterr()
        assert found == status, out + err
        return err if status == 2 else out

    return run


def files(folder: Path, texts: list[str], end: str = ".txt") -> Path:
    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / f"{number:03}{end}").write_bytes(text.encode())
    return folder


def config(tmp_path: Path, rest: str) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(f'model = "decoder"\noptimizer = "adamw"\n[train]\nsteps = 1\n{rest}', encoding="utf-8")
    return path


# ---------------------------------------------------------------- counts
def test_counts_are_those_of_a_loop(tmp_path, run):
    files(tmp_path / "texts", [*TEXTS, "  \n", "", "\t"])
    (tmp_path / "texts" / "broken.txt").write_bytes(b"\xff\xfe\x00")
    (report,) = json.loads(run("texts", "--json", "--tokenizer", "byte", "--samples", 4))["targets"]
    assert report["counts"] == {"documents": 50, "empty": 2, "filtered": 0, "unreadable": 1}  # a file without a byte is no row
    assert report["rows"] == report["n_rows"] == 53
    assert not report["stopped"]
    assert "broken.txt: byte 0 is not UTF-8" in report["unreadable"][0]
    sizes = [len(text) for text in TEXTS]
    assert report["text_bytes"] == sum(sizes)
    assert sum(n for _, n in report["histogram"]) == 50
    for low, n in report["histogram"]:
        assert n == sum(low <= size < 2 * low for size in sizes)
    tokens = sorted(size + 2 for size in sizes)  # BOS and EOS
    assert report["tokens"] == sum(tokens)
    assert report["bytes_per_token"] == pytest.approx(sum(sizes) / sum(tokens))
    for name, share in (("p10", 0.1), ("p50", 0.5), ("p90", 0.9), ("max", 1.0)):
        assert report["document_tokens"][name] == tokens[int(np.ceil(share * 50)) - 1]
    assert len(report["samples"]) == 4
    assert len({source for source, _ in report["samples"]}) == 4


def test_rows_stop_and_say_so(tmp_path, run):
    files(tmp_path / "texts", TEXTS)
    assert "10 of 50 (stopped by --rows): 10 documents" in run("texts", "--rows", 10)
    assert " 50: 50 documents" in run("texts", "--rows", 50)
    assert "no whole number above 0" in run("texts", "--rows", 0, status=2)


def test_a_folder_of_several_kinds_is_several_datasets(tmp_path, run):
    folder = files(tmp_path / "mixed", TEXTS[:3])
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": text, "body": "b"}) + "\n" for text in TEXTS))
    (folder / "README.md").write_text("not data")
    reports = {one["dataset"]: one for one in json.loads(run("mixed", "--json"))["targets"]}
    assert {name: one["counts"]["documents"] for name, one in reports.items()} == {"text": 3, "jsonl": 50}
    assert reports["jsonl"]["tokens"] is None
    assert json.loads(run("mixed/*.jsonl", "--column", "body", "--json"))["targets"][0]["text_bytes"] == 50


def test_parquet(tmp_path, run):
    pyarrow.parquet.write_table(pyarrow.table({"text": [*TEXTS, None, " "]}), tmp_path / "rows.parquet")
    (report,) = json.loads(run("rows.parquet", "--json"))["targets"]
    assert report["counts"] == {"documents": 50, "empty": 2, "filtered": 0, "unreadable": 0}
    assert report["text_bytes"] == sum(map(len, TEXTS))


def test_a_config_shows_sources_and_validation_sets(tmp_path, run):
    files(tmp_path / "texts", TEXTS)
    (tmp_path / "held_out.txt").write_text("held out")
    filters = 'filter = [{ name = "min_tokens", tokens = 100 }]'
    run_toml = config(
        tmp_path,
        f'[dataset]\nname = "text"\npaths = ["texts"]\nvalidation_fraction = 0.2\n{filters}\n'
        '[[validation]]\nname = "own"\n[[validation]]\nname = "file"\nfile = "held_out.txt"\n',
    )
    train, own, file = json.loads(run(run_toml, "--json"))["targets"]
    assert [one["target"].removeprefix(f"{run_toml} ") for one in (train, own, file)] == ["source text", "validation own", "validation file"]
    assert train["rows"] + own["rows"] == 50
    long = sum(len(text) >= 98 for text in TEXTS), sum(len(text) >= 100 for text in TEXTS)
    assert train["counts"]["documents"] + own["counts"]["documents"] in long  # BOS and EOS may count
    assert train["counts"]["filtered"] > 0
    assert file["text_bytes"] == 8
    assert file["tokens"] == 10
    assert "split 'validation'" in run(run_toml)
    (halved, *_) = json.loads(run(run_toml, "--json", "--dataset.paths=['texts/00*.txt']"))["targets"]
    assert halved["rows"] < train["rows"]


def test_text_that_the_tokenizer_refuses_is_counted(tmp_path, run, monkeypatch):
    files(tmp_path / "texts", TEXTS[:3])
    from titanlm.errors import DataError
    from titanlm.tokenizers.byte import ByteTokenizer

    encode = ByteTokenizer.encode

    def refusing(self, text):
        if text == TEXTS[1]:
            raise DataError("no such text")
        return encode(self, text)

    monkeypatch.setattr(ByteTokenizer, "encode", refusing)
    (report,) = json.loads(run("texts", "--tokenizer", "byte", "--json"))["targets"]
    assert report["n_refused"] == 1
    assert "no such text" in report["refused"][0]
    assert "refused" in run("texts", "--tokenizer", "byte")


def test_what_a_stranger_wrote_does_not_reach_the_terminal(tmp_path, run):
    """Of text, file names and what errors quote of them."""
    folder = files(tmp_path / "texts", [HOSTILE * 2])
    (folder / "\x1b[2Jname\nline.txt").write_text(HOSTILE)
    printed = run("texts", "--tokenizer", "byte")
    assert "\\x1b[31mred" in printed
    assert all(character.isprintable() for line in printed.splitlines() for character in line)
    assert "\\x1b[2Jname\\nline.txt" in printed
    shared = run("--overlap", "texts", "texts", status=1)
    assert all(character.isprintable() for line in shared.splitlines() for character in line)


def test_mistakes(tmp_path, run):
    (tmp_path / "table.csv").write_text("a,b")
    for nothing in ("table.csv", "nothing/*.txt", "."):
        assert f"{nothing}: names no file that titanlm reads (.parquet, .jsonl, .jsonl.gz, .txt, .bin)" in run(nothing, status=2)
    for packed in ("a.jsonl.zst", "b.txt.gz"):
        (tmp_path / packed).write_bytes(b"x")
        assert "decompress it first (of compressed files only .jsonl.gz is read)" in run(packed, status=2)
    assert "cannot be read" in run("table.csv", "--tokenizer", "none.model", status=2)


# ---------------------------------------------------------------- token shards
def shards(path: Path, documents: list[list[int]]) -> Path:
    ids = np.array([id for document in documents for id in document], dtype="<u2")
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, len(ids)
    path.write_bytes(header.tobytes() + ids.tobytes())
    return path


def test_token_shards_say_what_their_header_says(tmp_path, run):
    byte = Component.named("tokenizer", "byte").build()
    documents = [[byte.bos_id, *byte.encode(text).tolist(), byte.eos_id] for text in TEXTS]
    shards(tmp_path / "tokens_000000.bin", documents)
    n_tokens = sum(map(len, documents))
    printed = run("tokens_000000.bin")
    assert f"1 shards, {n_tokens:,} tokens, uint16, no tokenizer's fingerprint" in printed
    assert f"{byte.bos_id} 68 111 99" in printed  # "Doc"
    (report,) = json.loads(run("tokens_000000.bin", "--tokenizer", "byte", "--json"))["targets"]
    assert report["counts"]["documents"] == 50
    assert report["tokens"] == n_tokens
    assert report["text_bytes"] == sum(map(len, TEXTS))
    assert any(text.startswith("Document ") for _, text in report["samples"])


# ---------------------------------------------------------------- overlap
def test_overlap_is_found_and_is_the_exit_status(tmp_path, run):
    files(tmp_path / "train", TEXTS)
    files(tmp_path / "apart", [f"{text}!" for text in TEXTS[:5]])
    files(tmp_path / "mixed", [TEXTS[7], "of its own", TEXTS[7], TEXTS[9]])
    assert run("--overlap", "train", "apart") == "apart: 5 documents, none of them in training\n"
    printed = run("--overlap", "train", "mixed", status=1)
    assert "mixed: 4 documents (3 different), 3 of them in training (2 different texts, met 2 times)" in printed
    assert "train/007.txt byte 0 = " in printed
    found = json.loads(run("--overlap", "train", "mixed", "--json", status=1))["overlap"][0]
    assert (found["documents"], found["different"], found["shared_documents"], found["shared_different"], found["times"]) == (4, 3, 3, 2, 2)
    assert "not compared" in run("--overlap", "train", "mixed", "--rows", 3)
    assert "two targets" in run("--overlap", "train", status=2)


def test_overlap_of_a_config(tmp_path, run):
    files(tmp_path / "train", [*TEXTS, *TEXTS])  # equal texts stay on one side of the split
    files(tmp_path / "copied", TEXTS[:3])
    dataset = '[dataset]\nname = "text"\npaths = ["train"]\nvalidation_fraction = 0.3\n'
    assert "none of them in training" in run("--overlap", config(tmp_path, f'{dataset}[[validation]]\nname = "own"\n'))
    copied = '[[validation]]\nname = "copied"\nsplit = "train"\nmax_tokens = 100\n[validation.dataset]\nname = "text"\npaths = ["copied"]\n'
    assert "validation copied: 3 documents" in run("--overlap", config(tmp_path, f"{dataset.replace('0.3', '0.0')}{copied}"), status=1)
    assert "no validation set" in run("--overlap", config(tmp_path, "").as_posix(), "--validation=[]", status=2)


def test_overlap_of_tokens_with_text(tmp_path, run):
    byte = Component.named("tokenizer", "byte").build()
    shards(tmp_path / "tokens_000000.bin", [[byte.bos_id, *byte.encode(text).tolist(), byte.eos_id] for text in TEXTS])
    files(tmp_path / "mixed", [TEXTS[7], "of its own"])
    assert "--tokenizer" in run("--overlap", "tokens_000000.bin", "mixed", status=2)
    assert "2 documents, 1 of them in training" in run("--overlap", "tokens_000000.bin", "mixed", "--tokenizer", "byte", status=1)
