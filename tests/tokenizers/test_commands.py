"""`titanlm tokenizer train`, `inspect` and `compare`, as they are typed."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from titanlm.errors import DataError
from titanlm.registry import Component
from titanlm.tokenizers.corpus import documents
from titanlm.tokenizers.training import train_sentencepiece

ENGLISH = [f"The quick brown fox number {i} jumps over {i * 7} lazy dogs.\nAnd  so on.\n" for i in range(40)]
CHINESE = ["敏捷的棕色狐狸跳过了懒惰的狗。" * 3] * 5
SMALL = 'model = "decoder"\noptimizer = "adamw"\n[train]\nsteps = 1\n'


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("commands")
    train_sentencepiece(ENGLISH, folder / "spm.model", 330)
    (folder / "ranks").write_bytes(b"".join(base64.b64encode(bytes([value])) + f" {value}\n".encode() for value in range(256)))
    (folder / "ranks.toml").write_text(f'{SMALL}[tokenizer]\nname = "tiktoken"\npath = "ranks"\npattern = "gpt2"\nspecial_tokens = {{"<|end|>" = 400}}\n')
    pyarrow.parquet.write_table(pyarrow.table({"text": [*ENGLISH, None], "body": ["b"] * 41}), folder / "en.parquet")
    (folder / "zh.jsonl").write_text("".join(json.dumps({"text": text}) + "\n\n" for text in CHINESE), encoding="utf-8")
    (folder / "one.txt").write_text("".join(ENGLISH))
    return folder


@pytest.fixture
def run(folder, monkeypatch, command):
    monkeypatch.chdir(folder)
    return command


# ---------------------------------------------------------------- inspect
def test_inspect_says_what_a_tokenizer_is(run):
    text = run("inspect", "spm.model")
    assert text.startswith("spm.model\n  type         sentencepiece\n  vocabulary   330 ids: 327 pieces, 3 special or unknown, 0 unused\n")
    for line in ("special ids  BOS 1, EOS 2, PAD none", "note         U+2581 alone, a space that joins no word, is piece ", "lossless     yes"):
        assert line in text
    for line in ("bytes        256 of 256 single bytes are pieces", "longest      | ", "sample       |", "fingerprint  sha256 ", "tokenizer.model: "):
        assert line in text
    assert "type         byte" in run("inspect", "byte")
    text = run("inspect", "ranks.toml")
    assert "type         tiktoken, pattern gpt2\n  vocabulary   401 ids: 256 pieces, 1 special or unknown, 144 unused" in text


def test_inspect_shows_which_probes_do_not_come_back(run, folder):
    import io

    import sentencepiece

    out = io.BytesIO()
    lines = [line for text in ENGLISH for line in text.splitlines()]
    settings = {"vocab_size": 330, "byte_fallback": True, "model_type": "bpe", "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=out, **settings)
    (folder / "nfkc.model").write_bytes(out.getvalue())
    text = run("inspect", "sentencepiece:nfkc.model")
    assert "note         characters are normalised (nmt_nfkc)" in text
    assert "note         a space is put before the first word" in text
    assert "lossless     no; " in text
    assert "'  two leading spaces and two trailing  ' → 'two leading spaces and two trailing'" in text
    assert "\x07" not in text


def test_a_tokenizer_that_is_not_clear_is_asked_for(run):
    assert "ranks: a rank file does not say how text is cut; name a config" in run("inspect", "ranks", status=2)
    assert "ranks: a rank file does not say how text is cut" in run("inspect", "tiktoken:ranks", status=2)
    assert "one.txt: is no tokenizer's file by its content; say which tokenizer reads it, NAME:one.txt (names: byte, huggingface, " in run(
        "inspect", "one.txt", status=2
    )
    assert "nowhere.model: cannot be read" in run("inspect", "nowhere.model", status=2)
    assert "nowhere: cannot read" in run("inspect", "tiktoken:nowhere", status=2).replace("be read", "read")
    assert "one.txt is no SentencePiece model" in run("inspect", "sentencepiece:one.txt", status=2)
    assert "tokenizer 'byte' is not made of a file alone" in run("inspect", "byte:one.txt", status=2)
    assert 'which name = "sentencepiece" reads' in run("inspect", "huggingface:spm.model", status=2)


# ---------------------------------------------------------------- compare
def test_compare_counts_tokens(run):
    rows = json.loads(run("compare", "byte", "spm.model", "ranks.toml", "--input", "en.parquet", "zh.jsonl", "--json"))
    assert [(row["tokenizer"], row["input"]) for row in rows] == [
        (word, file) for file in ("en.parquet", "zh.jsonl") for word in ("byte", "spm.model", "ranks.toml")
    ]
    spm = Component.named("tokenizer", "sentencepiece", path="spm.model").build()
    for row, texts in ((rows[1], ENGLISH), (rows[4], CHINESE)):
        tokens, characters = sum(len(spm.encode(text)) for text in texts), sum(map(len, texts))
        n_bytes = sum(len(text.encode()) for text in texts)
        assert (row["documents"], row["bytes"], row["tokens"], row["refused"], row["round_trip"]) == (len(texts), n_bytes, tokens, 0, 1.0)
        assert row["characters_per_token"] == pytest.approx(characters / tokens)
        assert row["bytes_per_token"] == pytest.approx(n_bytes / tokens)
        assert row["tokens_per_character"] == pytest.approx(tokens / characters)
        assert row["megabytes_per_s"] > 0
    assert rows[1]["tokens_per_word"] == pytest.approx(rows[1]["tokens"] / sum(len(text.split()) for text in ENGLISH))
    assert rows[4]["tokens_per_word"] is None  # written without spaces
    assert rows[0]["bytes_per_token"] == rows[2]["bytes_per_token"] == 1.0


def test_compare_prints_a_table(run):
    lines = run("compare", "spm.model", "byte", "--input", "one.txt", "zh.jsonl").splitlines()
    assert lines[:3] == ["spm.model: sentencepiece", "byte: byte", ""]
    assert lines[3].startswith("one.txt: 1 documents, 0.0")
    assert lines[4].split() == ["tokenizer", "tokens", "chars/token", "bytes/token", "tokens/word", "superwords", "round", "trip", "MB/s"]
    assert lines[9].split()[4] == "tokens/char"
    assert len({len(line) for line in lines[4:7]}) == 1
    assert lines[5].split()[5:7] == ["0.0%", "100.0%"]


def test_compare_reads_only_so_much_and_the_library_by_default(run):
    (row,) = json.loads(run("compare", "byte", "--max-bytes", "100", "--input", "en.parquet", "--json"))
    assert row["documents"] == 2
    (row,) = json.loads(run("compare", "byte", "--max-bytes", "100000", "--json"))
    assert row["input"] == "Python's standard library"
    assert row["bytes"] >= 100_000


def test_a_document_that_is_refused_is_counted_apart(run, folder, monkeypatch):
    from titanlm.tokenizers.byte import ByteTokenizer

    encode = ByteTokenizer.encode

    def picky(self, text):
        if text == "refused":
            raise DataError("refused")
        return encode(self, text)

    monkeypatch.setattr(ByteTokenizer, "encode", picky)
    (folder / "odd.jsonl").write_text('{"text": "fine"}\n{"text": "refused"}\n')
    (row,) = json.loads(run("compare", "byte", "--input", "odd.jsonl", "--json"))
    assert (row["documents"], row["tokens"], row["refused"], row["round_trip"]) == (2, 4, 1, 0.5)
    assert "1 documents refused" in run("compare", "byte", "--input", "odd.jsonl")


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("gone.parquet", None, "'gone.parquet' is no file"),
        ("bad.parquet", b"nothing", "bad.parquet: is no readable parquet file"),
        ("bad.jsonl", b'{"text": "a"}\n{\n', "bad.jsonl line 2: no JSON"),
        ("key.jsonl", b'{"body": "a"}\n', "key.jsonl line 1: no key 'text' (keys: body; dataset.column names it)"),
        ("bad.txt", b"\xff", "bad.txt: byte 0 is not UTF-8"),
        ("odd.jsonl", b'{"text": "\\ud800"}\n', "odd.jsonl line 1: 'text' has half a surrogate pair"),
        ("blank.txt", b" ", "blank.txt: there is no text in it"),
        ("empty.txt", b"", "every file is empty"),
        ("a.jsonl.zst", b"x", "a.jsonl.zst: is compressed; decompress it first"),
        ("a.txt.gz", b"x", "a.txt.gz: is compressed; decompress it first"),
        ("a.bin", b"x", "a.bin: has tokens and no texts"),
    ],
)
def test_inputs_that_cannot_be_read(run, folder, name, content, text):
    if content is not None:
        (folder / name).write_bytes(content)
    assert text in run("compare", "byte", "--input", name, status=2)


def test_columns(run, folder):
    assert list(documents(folder / "en.parquet", "body")) == ["b"] * 41
    assert list(documents(folder / "en.parquet")) == ENGLISH
    assert "has no column 'txt'; did you mean 'text'? (columns: text, body); set dataset.column (here by --column)" in run(
        "compare", "byte", "--input", "en.parquet", "--column", "txt", status=2
    )


# ---------------------------------------------------------------- train
def test_train_makes_the_model_that_is_asked_for(run, folder, tmp_path):
    out = str(tmp_path / "t.model")
    options = ["--symbol", "<|user|>", "--symbol", "lazy dogs", "--no-split-by-whitespace", "--no-whitespace-pieces", "--split-digits", "--pad", "0"]
    words = ["train", "--type", "spm", "--model", "bpe", "--vocab-size", "350", "--output", out, *options, "--bos", "1", "--eos", "2"]
    assert run(*words, "--input", "en.parquet", "zh.jsonl", "one.txt").startswith(f"{out}: 350 pieces from 46 texts")
    tokenizer = Component.named("tokenizer", "sentencepiece", path=out).build()
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    assert [tokenizer.pieces()[i] for i in (4, 5)] == [b"<|user|>", b"lazy dogs"]
    assert any(b" " in (piece or b"").strip() for piece in tokenizer.pieces()[6:])
    assert tokenizer.lossless


def test_train_takes_every_source_of_a_config(run, folder, tmp_path):
    sources = "".join(f'[[data.source]]\nname = "{name}"\ndataset = {{name = "text", paths = ["{name}"]}}\n' for name in ("one.txt", "two.txt"))
    (folder / "two.txt").write_text("zebra " * 500)
    (folder / "mixed.toml").write_text(SMALL + sources)
    out = str(tmp_path / "t.model")
    assert " from 2 texts" in run("train", "--type", "spm", "--vocab-size", "300", "--output", out, "--config", "mixed.toml")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--symbol", "<s>"], "symbol '<s>' is empty, a name that the model uses itself"),
        (["--pad", "2"], "special ids must differ"),
        (["--input", "gone.parquet"], "'gone.parquet' is no file"),
        (["--input", "a.txt.gz"], "a.txt.gz: is compressed; decompress it first"),
        (["--input", "one.txt", "--max-bytes", "100", "--vocab-size", "9000"], "vocab_size = 9000 is too large"),
        (["--model-type", "bpe"], "no option '--model-type'"),
    ],
)
def test_train_says_what_is_wrong(run, folder, words, text):
    given = [] if "--input" in words else ["--input", "one.txt"]
    size = [] if "--vocab-size" in words else ["--vocab-size", "300"]
    assert text in run("train", "--type", "spm", "--output", "never.model", *size, *given, *words, status=2)
    assert not Path("never.model").exists()
