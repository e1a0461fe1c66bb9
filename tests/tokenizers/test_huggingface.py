from __future__ import annotations

import base64
import builtins
import json
import pickle
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from titanlm.errors import DataError
from titanlm.registry import Component
from titanlm.tokenizers.fingerprint import PROBES
from titanlm.tokenizers.rebuild import rebuild

SOURCES = [path.read_text(encoding="utf-8") for path in sorted((Path(__file__).parents[2] / "titanlm").glob("c*.py"))]
TEXTS = [
    "", " ", "\n", "def f(x):\n    return x\r\n", "the  end  ", "<|endoftext|> </s> <pad>", "\x00\ufeff\u2581",
    "é e\u0301 ﬁ ① Ａ", "한국어 日本語", "😀👩‍👩‍👧", *PROBES,
]  # fmt: skip


def byte_level(**settings) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE(**settings))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<|endoftext|>", "<pad>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(SOURCES, trainer)
    return backend


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("hf") / "tokenizer.json"
    byte_level().save(str(path))
    return path


def load(path, **settings):
    return Component.named("tokenizer", "huggingface", path=str(path), **settings).build()


def changed(file: Path, path: Path, **parts) -> Path:
    """The file with other parts; ``model__dropout`` reaches into ``model``."""
    tables = json.loads(file.read_text())
    for key, value in parts.items():
        outer, _, inner = key.partition("__")
        if inner:
            tables[outer][inner] = value
        else:
            tables[outer] = value
    path.write_text(json.dumps(tables))
    return path


def saved(backend: tokenizers.Tokenizer, path: Path) -> Path:
    backend.save(str(path))
    return path


def counted(tokenizer, text: str) -> int:
    ids = tokenizer.encode(text)
    return int(tokenizer.target_bytes(ids, np.array([-1, *ids[:-1]], dtype=np.int64)[: len(ids)]).sum())


# ---------------------------------------------------------------- byte-level
def test_byte_level_gives_every_text_back_and_counts_its_bytes(file):
    tokenizer = load(file, bos="<|endoftext|>", pad="<pad>")
    assert tokenizer.lossless
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (0, None, 1, 500)
    draw = random.Random(0)
    noise = ["".join(draw.choices("th e\n\t1'sé한😀\u2581\u00a0\x00", k=draw.randrange(60))) for _ in range(200)]
    for text in [*TEXTS, *noise, *SOURCES]:
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32
        assert tokenizer.decode(ids.tolist()) == text
        assert tokenizer.decode([0, *ids, 1]) == text
        assert counted(tokenizer, text) == len(text.encode())


def test_ids_equal_tiktokens_on_the_same_vocabulary(tmp_path, file):
    """Two libraries, two file formats, one vocabulary."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    value = {chr(v): v for v in printable} | dict(zip((chr(i) for i in range(256, 512)), (v for v in range(256) if v not in printable)))
    assert set(alphabet) == set(value)
    tokens = {i: token for token, i in json.loads(file.read_text())["model"]["vocab"].items() if i > 1}
    lines = [base64.b64encode(bytes(value[c] for c in token)) + f" {i}\n".encode() for i, token in sorted(tokens.items())]
    (tmp_path / "same.tiktoken").write_bytes(b"".join(lines))
    special = {"<|endoftext|>": 0, "<pad>": 1}
    ours = load(file)
    other = Component.named("tokenizer", "tiktoken", path=str(tmp_path / "same.tiktoken"), pattern="gpt2", special_tokens=special).build()
    assert other.vocab_size == ours.vocab_size
    for text in [*TEXTS, *SOURCES]:
        ids = ours.encode(text)
        assert other.encode(text).tolist() == ids.tolist()
        assert other.target_bytes(ids, ids).tolist() == ours.target_bytes(ids, ids).tolist()


def test_special_tokens_cannot_be_written_into_a_text(tmp_path, file):
    backend = byte_level()
    backend.add_special_tokens(["<|end|>"])
    backend.add_tokens(["<tool>", "<|user|>"])
    path = saved(backend, tmp_path / "t.json")
    tokenizer = load(path, eos="<|user|>")
    ids = {name: backend.token_to_id(name) for name in ("<|end|>", "<tool>", "<|user|>", "<|endoftext|>")}
    assert tokenizer.eos_id == ids["<|user|>"]
    text = "a<|endoftext|>b<|end|><|user|>c<tool>d"
    found = tokenizer.encode(text).tolist()
    assert [name for name, i in ids.items() if i in found] == ["<tool>"]  # an ordinary added token is text
    assert tokenizer.decode(found) == text
    assert counted(tokenizer, text) == len(text.encode())
    assert tokenizer.decode([ids["<|end|>"], *found, ids["<|user|>"]]) == text
    assert tokenizer.lossless
    # Not named, it is an ordinary added token too.
    assert ids["<|user|>"] in load(path).encode(text).tolist()


@pytest.mark.parametrize(
    "parts",
    [
        {"truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}},
        {"padding": {"strategy": {"Fixed": 99}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 1, "pad_type_id": 0, "pad_token": "<pad>"}},
        {"post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<pad>", "type_id": 0}}], "pair": [], "special_tokens": {}}},
        {"model__dropout": 0.9},
        {"auto_map": {"AutoTokenizer": ["evil.py", None]}, "tokenizer_class": "Evil", "trust_remote_code": True},
    ],
)
def test_what_the_file_says_beyond_cutting_text_is_ignored(tmp_path, file, parts):
    tokenizer, plain = load(changed(file, tmp_path / "t.json", **parts)), load(file)
    assert tokenizer.lossless
    for text in (SOURCES[0], "one two three four"):
        assert tokenizer.encode(text).tolist() == plain.encode(text).tolist()


def test_nothing_reaches_for_a_network(monkeypatch, file):
    import socket

    def refuse(*args, **kwargs):
        raise AssertionError("a network was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(tokenizers.Tokenizer, "from_pretrained", refuse)
    load(file).encode("text")


# ---------------------------------------------------------------- what changes a text
@pytest.mark.parametrize(
    "change",
    [
        lambda backend: setattr(backend, "normalizer", normalizers.NFC()),
        lambda backend: setattr(backend, "normalizer", normalizers.Lowercase()),
        lambda backend: setattr(backend, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
        lambda backend: setattr(backend, "pre_tokenizer", pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(False)])),
        lambda backend: setattr(
            backend, "pre_tokenizer", pre_tokenizers.Sequence([pre_tokenizers.Split("\u2585", "removed"), pre_tokenizers.ByteLevel(False)])
        ),
        lambda backend: backend.add_tokens([AddedToken("<tool>", lstrip=True)]),
    ],
)
def test_only_files_that_keep_everything_are_lossless(tmp_path, change):
    backend = byte_level()
    change(backend)
    assert not load(saved(backend, tmp_path / "t.json")).lossless


def test_a_vocabulary_without_all_bytes_is_not_lossless(tmp_path, file):
    """A superword vocabulary may lack the thirteen bytes that UTF-8 never has, but no other."""
    for missing, lossless in (("\xc0", True), ("\xf5", True), ("\xea", False), ("\u0100", False)):
        tables = json.loads(file.read_text())
        model = tables["model"]
        model["vocab"][f"<gone{missing}>"] = model["vocab"].pop(missing)
        model["merges"] = [pair for pair in model["merges"] if all(missing not in part for part in pair)]
        kept = {part for pair in model["merges"] for part in pair} | {"".join(pair) for pair in model["merges"]}
        assert missing not in kept
        model["merges"] = [pair for pair in model["merges"] if {*pair} <= model["vocab"].keys()]
        (tmp_path / "t.json").write_text(json.dumps(tables))
        assert load(tmp_path / "t.json").lossless == lossless


def test_added_prefix_space_is_free(tmp_path):
    backend = byte_level()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer = load(saved(backend, tmp_path / "t.json"))
    assert tokenizer.decode(tokenizer.encode("def").tolist()) == " def"
    assert counted(tokenizer, "def build(x)") == len("def build(x)")


@pytest.fixture(scope="module")
def unigram(tmp_path_factory) -> Path:
    backend = tokenizers.Tokenizer(models.Unigram())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    backend.normalizer = normalizers.NFKC()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False)
    backend.train_from_iterator(SOURCES, trainer)
    return saved(backend, tmp_path_factory.mktemp("unigram") / "tokenizer.json")


def test_metaspace_counts_pieces_with_the_first_space_free(unigram):
    tokenizer = load(unigram, eos="</s>")
    assert not tokenizer.lossless
    assert tokenizer.eos_id == 1
    for text in ("def build", "the end of it", "import os"):
        ids = tokenizer.encode(text).tolist()
        assert 1 not in ids
        assert tokenizer.decode([*ids, 1]) == text
        assert counted(tokenizer, text) == len(text)
    # After a special token, too, but not inside a document.
    word = tokenizer.encode("def")[:1]
    first, later = (int(tokenizer.target_bytes(word, np.array([previous]))[0]) for previous in (1, tokenizer.encode("x")[-1]))
    assert later - first == 1
    assert 0 in tokenizer.encode("x \u4e00").tolist()
    assert counted(tokenizer, "x \u4e00") < len("x \u4e00".encode())  # an unknown one stands for no bytes


def test_a_special_token_that_is_a_piece_too_is_refused_in_text(unigram):
    tokenizer = load(unigram, eos="</s>")
    with pytest.raises(DataError, match=r"a text contains '</s>', a special token"):
        tokenizer.encode("the end</s> of it")
    assert any("</s>" in remark for remark in tokenizer.remarks())


def test_word_pieces_count_a_space_for_each_word(tmp_path):
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.WhitespaceSplit(), decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=["[UNK]", "[CLS]"], show_progress=False)
    backend.train_from_iterator(SOURCES, trainer)
    tokenizer = load(saved(backend, tmp_path / "t.json"), bos="[CLS]")
    assert not tokenizer.lossless
    text = "def build the model"
    assert counted(tokenizer, text) == len(text)
    ids = tokenizer.encode(text)
    assert tokenizer.target_bytes(ids[:1], np.array([tokenizer.bos_id])).sum() == len(tokenizer.pieces()[ids[0]]) - 1
    assert tokenizer.decode(ids.tolist()) == text


def test_bytes_of_byte_fallback_pieces(tmp_path):
    vocab = {"<unk>": 0, **{f"<0x{value:02X}>": 1 + value for value in range(256)}, "\u2581": 257, "a": 258, "\u2581a": 259}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[("\u2581", "a")], unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = load(saved(backend, tmp_path / "t.json"))
    for text in ("a a", "a 한 😀a"):
        ids = tokenizer.encode(text).tolist()
        assert tokenizer.decode(ids) == text
        assert counted(tokenizer, text) == len(text.encode())


# ---------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", r"is no tokenizer\.json"),
        (b"{}", r"is no tokenizer\.json \(it has no table `model`\)"),
        (b"[" * 100_000, r"is no tokenizer\.json"),
        (b"[1]", r"is no tokenizer\.json"),
        (b'{"model": 3}', r"is no tokenizer\.json"),
        (b'{"model": {}, "added_tokens": [3]}', r"is no tokenizer\.json"),
        (b'{"model": {}, "added_tokens": 3}', r"is no tokenizer\.json"),
        (b'{"model": {}, "added_tokens": [{"content": "a"}]}', r"an added token needs `content` and `id`"),
        (b'{"model": {}}', r"is a damaged tokenizer\.json or one of another version"),
        (b'{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}', "is a damaged"),
        (b'{"model": {"type": "BPE", "vocab": {"a": 4000000000}, "merges": []}}', "ids must be 0 to"),
        (b'{"model": {"type": "BPE", "vocab": {"a": 0, "b": 0}, "merges": []}}', "each for one token"),
        (b'{"model": {"type": "BPE", "vocab": {}, "merges": []}}', "ids must be 0 to"),
        (b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "added_tokens": [{"id": 7, "content": "a", "single_word": false, "lstrip": false, '
         b'"rstrip": false, "normalized": false, "special": true}]}', "added token 'a' has id 7, which the library makes 0"),
    ],
)  # fmt: skip
def test_what_is_no_tokenizer_json_is_an_error(tmp_path, content, text):
    (tmp_path / "t.json").write_bytes(content)
    with pytest.raises(DataError, match=rf"tokenizer\.path: .*t\.json.*{text}"):
        load(tmp_path / "t.json")
    with pytest.raises(DataError, match=rf"^tokenizer\.json.*{text}"):
        rebuild(Component.named("tokenizer", "huggingface", path="gone"), {"tokenizer.json": content})


def test_missing_files_tokens_and_packages_are_named(tmp_path, file, monkeypatch):
    with pytest.raises(DataError, match=r"tokenizer\.path: cannot read .*absent\.json"):
        load(tmp_path / "absent.json")
    with pytest.raises(DataError, match=r"has no added token '<\|endoftxt\|>'; did you mean '<\|endoftext\|>'\? \(there: '<\|endoftext\|>', '<pad>'\)"):
        load(file, eos="<|endoftxt|>")
    with pytest.raises(DataError, match="has no added token 'def'"):  # an ordinary piece
        load(file, eos="def")

    def without(name, *args, **kwargs):
        if name == "tokenizers":
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    imported = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match=r"needs the package `tokenizers`; run: pip install 'titanlm\[huggingface\]'"):
        load(file)


def test_surrogates_foreign_ids_and_gaps_are_errors(tmp_path, file, unigram):
    tables = json.loads(file.read_text())
    tables["model"]["vocab"]["far"] = 502
    (tmp_path / "gap.json").write_text(json.dumps(tables))
    for tokenizer in (load(file), load(unigram), load(tmp_path / "gap.json")):
        with pytest.raises(DataError, match="character 1 .*surrogate"):
            tokenizer.encode("a\ud800")
        for foreign in (tokenizer.vocab_size, -1):
            with pytest.raises(DataError, match=f"ids 0 to {tokenizer.vocab_size - 1}"):
                tokenizer.decode([foreign])
    assert load(tmp_path / "gap.json").vocab_size == 503
    with pytest.raises(DataError, match="id 501 is no token"):
        load(tmp_path / "gap.json").decode([501])


# ---------------------------------------------------------------- travelling
def test_rebuilds_and_pickles_without_the_path(tmp_path, file):
    path = tmp_path / "t.json"
    path.write_bytes(file.read_bytes())
    component = Component.named("tokenizer", "huggingface", path=str(path), eos="<|endoftext|>")
    tokenizer = component.build()
    files = dict(tokenizer.files())
    assert files == {"tokenizer.json": file.read_bytes()}
    path.unlink()
    for again in (rebuild(component, files), pickle.loads(pickle.dumps(tokenizer))):
        assert again.fingerprint == tokenizer.fingerprint
        assert again.encode("a<|endoftext|>b").tolist() == tokenizer.encode("a<|endoftext|>b").tolist()
        assert again.eos_id == 0
    with pytest.raises(DataError, match="lack 'tokenizer.json'"):
        rebuild(component, {})
    assert len({tokenizer.fingerprint, load(file).fingerprint, load(file, eos="<pad>").fingerprint}) == 3


def test_serves_several_threads(file):
    tokenizer = load(file)
    texts = [f"the thing number {i} in the end" * 20 for i in range(100)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda text: tokenizer.encode(text).tolist(), texts))
    assert found == [tokenizer.encode(text).tolist() for text in texts]
