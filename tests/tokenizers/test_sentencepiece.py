from __future__ import annotations

import io
import json
import pickle
import random
import re
from pathlib import Path

import numpy as np
import pytest

from titanlm.errors import DataError
from titanlm.registry import Component
from titanlm.tokenizers.fingerprint import PROBES
from titanlm.tokenizers.rebuild import rebuild
from titanlm.tokenizers.training import SENTENCE_BYTES, sentences, train_sentencepiece

SOURCES = sorted((Path(__file__).parents[2] / "titanlm").glob("*.py"))
TEXTS = [
    "",
    " ",
    "\n",
    "   leading",
    "trailing   ",
    "\ttabs\t\tand \n\n\n newlines\r\n",
    "한국어 문장, 日本語",
    "😀👩‍👩‍👧 ﬁ ① Ａ \u00a0\u3000",
    "\u2581",
    " \u2581 \u2581\u2581x\u2581",
    "<s></s><unk><0x41>",
    "\x00\ufeff\ufffd\u2585",
    *PROBES,
]


def corpus() -> list[str]:
    return [path.read_text(encoding="utf-8") for path in SOURCES] + ["한국어 문장과 日本語 텍스트. " * 40]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return train_sentencepiece(corpus(), tmp_path_factory.mktemp("spm") / "own.model", 700).path


def other_model(path: Path, **settings) -> str:
    """A model with settings that are not ours."""
    import sentencepiece

    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in corpus() for line in text.splitlines() if line),
        model_writer=out,
        minloglevel=2,
        **{"vocab_size": 700, "model_type": "bpe", "byte_fallback": True, **settings},
    )
    path.write_bytes(out.getvalue())
    return str(path)


def load(path, **settings):
    return Component.named("tokenizer", "sentencepiece", path=str(path), **settings).build()


def counted(tokenizer, text: str) -> int:
    ids = np.array([tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id])
    return int(tokenizer.target_bytes(ids[1:], ids[:-1]).sum())


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_trained_model_gives_every_text_back_and_counts_its_bytes(tmp_path, model_type):
    trained = train_sentencepiece(corpus(), tmp_path / "deep" / "t.model", 600, model_type)
    tokenizer = load(trained.path)
    assert tokenizer.lossless
    assert tokenizer.vocab_size == trained.vocab_size == 600
    assert trained.n_texts == len(corpus())
    assert trained.n_bytes == sum(len(text.encode()) for text in corpus())
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    draw = random.Random(0)
    alphabet = "ab  \t\n\r\u2581\u2585é한😀<s>\x00"
    noise = ["".join(draw.choices(alphabet, k=draw.randrange(1, 40))) for _ in range(300)]
    for text in [*TEXTS, *noise, *corpus()]:
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode([1, *ids, 2]) == text
        assert counted(tokenizer, text) == len(text.encode("utf-8"))


def test_compresses_indentation(model):
    tokenizer = load(model)
    text = SOURCES[0].parent.joinpath("registry.py").read_text(encoding="utf-8")
    assert len(text.encode()) / len(tokenizer.encode(text)) > 2


def test_normalising_model_is_not_lossless_and_counts_pieces(tmp_path):
    tokenizer = load(other_model(tmp_path / "nfkc.model"))  # nmt_nfkc, dummy prefix, collapsed spaces
    assert not tokenizer.lossless
    # The space that the model put before the first word is free, the others are not.
    assert counted(tokenizer, "def build") == len("def build")
    assert counted(tokenizer, "  def   build  ") == len("def build")
    assert counted(tokenizer, "ﬁ") == len("fi")
    assert tokenizer.target_bytes(tokenizer.encode("def")[:1], np.array([tokenizer.encode("x")[-1]]))[0] > 0


def golf_tables(processor, vocab_size: int) -> list[tuple[int, bool, bool]]:
    """(base bytes, leading space, boundary) of each id, as Parameter Golf's script builds its tables."""
    tables = []
    for i in range(vocab_size):
        if i >= processor.get_piece_size() or processor.is_control(i) or processor.is_unknown(i) or processor.is_unused(i):
            tables.append((0, False, True))
        elif processor.is_byte(i):
            tables.append((1, False, False))
        else:
            piece = processor.id_to_piece(i)
            space = piece.startswith("\u2581")
            tables.append((len((piece[1:] if space else piece).encode("utf-8")), space, False))
    return tables


def test_byte_count_of_a_normalising_model_is_parameter_golfs(tmp_path):
    import sentencepiece

    settings = {"normalization_rule_name": "nmt_nfkc", "add_dummy_prefix": False, "split_digits": True, "character_coverage": 0.999}
    path = other_model(tmp_path / "golf.model", **settings, pad_id=0, bos_id=1, eos_id=2, unk_id=3, hard_vocab_limit=False)
    processor = sentencepiece.SentencePieceProcessor(model_file=path)
    draw = np.random.default_rng(0)
    for tokenizer in (load(path), load(path, eos_id=705)):
        tables = golf_tables(processor, tokenizer.vocab_size)
        assert sum(boundary for _, _, boundary in tables) == 4 + tokenizer.vocab_size - processor.get_piece_size()
        documents = [[tokenizer.bos_id, *tokenizer.encode(text).tolist(), tokenizer.eos_id] for text in TEXTS]
        anything = draw.integers(tokenizer.vocab_size, size=20_000).tolist()
        assert any(processor.is_byte(i) for ids in documents for i in ids[1:-1])
        for ids in [*documents, anything]:
            expected, previous = [], -1
            for i in ids:
                base, space, _ = tables[i]
                expected.append(base + 1 if space and not (previous < 0 or tables[previous][2]) else base)
                previous = i
            found = tokenizer.target_bytes(np.array(ids), np.array([-1, *ids[:-1]]))
            assert found.dtype == np.int32
            assert found.tolist() == expected


def test_bytes_of_emoji_compatibility_characters_and_marks(tmp_path, model):
    """A lossless model counts the UTF-8 of the text; a normalising one that of what it made of it."""
    texts = {
        "\U0001f600": "\U0001f600", "\ufb01ne": "fine", "\u2460": "1", "\uff21": "A", "\ufeffdef": " def",
        "e\u0301": "\u00e9", "x\u3000y": "x y", "\ud55c": "\ud55c", "a\tb": "a b",
    }  # fmt: skip
    lossless, golf = load(model), load(other_model(tmp_path / "golf.model", add_dummy_prefix=False))
    for text, normalised in texts.items():
        assert counted(lossless, text) == len(text.encode())
        assert golf.decode(golf.encode(text).tolist()) == normalised.lstrip()
        assert counted(golf, f"x{text}") == len(f"x{normalised}".encode()), text


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"add_dummy_prefix": True},
        {"remove_extra_whitespaces": True},
        {"normalization_rule_name": "nfkc"},
        {"byte_fallback": False},
        {"treat_whitespace_as_suffix": True, "add_dummy_prefix": True},
    ],
)
def test_only_models_that_keep_everything_are_lossless(tmp_path, settings):
    keeps = {"normalization_rule_name": "identity", "add_dummy_prefix": False, "remove_extra_whitespaces": False}
    tokenizer = load(other_model(tmp_path / "m.model", **{**keeps, **settings}))
    assert tokenizer.lossless == (not settings)


def test_user_defined_symbols_and_padding_id(tmp_path):
    keeps = {"normalization_rule_name": "identity", "add_dummy_prefix": False, "remove_extra_whitespaces": False}
    tokenizer = load(other_model(tmp_path / "m.model", **keeps, user_defined_symbols=["\ue001", "<|x|>"], pad_id=3))
    assert tokenizer.lossless
    text = "a \ue001b <|x|>c <pad>"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert counted(tokenizer, text) == len(text.encode())


def test_which_special_ids_surround_a_document(tmp_path, model):
    only_eos = other_model(tmp_path / "eos.model", bos_id=-1)
    neither = other_model(tmp_path / "none.model", bos_id=-1, eos_id=-1)
    found = {
        (name, begin, end): (tokenizer.bos_id, tokenizer.eos_id)
        for name, path in (("both", model), ("eos", only_eos), ("none", neither))
        for begin, end in ((True, True), (True, False), (False, True))
        for tokenizer in [load(path, add_bos=begin, add_eos=end)]
    }
    eos = load(only_eos).eos_id
    assert [found["both", *key] for key in ((True, True), (True, False), (False, True))] == [(1, 2), (1, None), (None, 2)]
    assert [found["eos", *key] for key in ((True, True), (True, False), (False, True))] == [(eos, eos), (eos, None), (None, eos)]
    assert found["none", True, True] == (None, None)


# ---------------------------------------------------------------- special ids that are asked for
def symbol_model(path: Path, **settings) -> str:
    """Without special ids of its own: 0 is unknown and 1 the symbol <|endoftext|>."""
    keeps = {"normalization_rule_name": "identity", "add_dummy_prefix": False, "remove_extra_whitespaces": False}
    return other_model(path, **{**keeps, "user_defined_symbols": ["<|endoftext|>"], "bos_id": -1, "eos_id": -1, **settings})


def test_bos_past_the_table_and_eos_that_is_pad(tmp_path):
    """The vocabulary of hunmin in small: BOS is one past the pieces, EOS and PAD are the same."""
    tokenizer = load(symbol_model(tmp_path / "m.model"), bos_id=700, eos_id=1, pad_id=1)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (700, 1, 1, 701)
    assert tokenizer.lossless
    text = "def build 한국어 😀 \u2581"
    ids = [700, *tokenizer.encode(text).tolist(), 1, 1]
    assert tokenizer.decode(ids) == text
    array = np.array(ids)
    bytes_of = tokenizer.target_bytes(array, np.array([-1, *ids[:-1]]))
    assert bytes_of.sum() == len(text.encode())
    assert (bytes_of[0], bytes_of[-2], bytes_of[-1]) == (0, 0, 0)
    assert tokenizer.pieces()[1] == tokenizer.pieces()[700] == b""
    again = rebuild(Component.named("tokenizer", "sentencepiece", path="gone", bos_id=700, eos_id=1, pad_id=1), tokenizer.files())
    assert again.fingerprint == tokenizer.fingerprint


def test_a_symbol_that_ends_documents_cannot_be_written_into_one(tmp_path):
    path = symbol_model(tmp_path / "m.model")
    text = "a <|endoftext|>\u2581<|endoftext|><|endoftext|> b"
    plain, tokenizer = load(path), load(path, eos_id=1)
    assert (plain.encode(text) == 1).sum() == 3
    assert 1 not in tokenizer.encode(text)
    for each in (plain, tokenizer):
        assert each.lossless
        ids = each.encode(text)
        assert each.decode(ids.tolist()) == text
        assert each.target_bytes(ids, ids).sum() == len(text.encode())
    assert plain.fingerprint != load(path, pad_id=1, add_eos=False).fingerprint
    # Without byte pieces there is nothing else to write it with.
    with pytest.raises(DataError, match=r"a text contains '<\|endoftext\|>', a special token"):
        load(symbol_model(tmp_path / "n.model", byte_fallback=False), eos_id=1).encode(text)


def test_explicit_ids_inside_the_model_are_no_pieces_of_text(tmp_path):
    path = other_model(tmp_path / "m.model", pad_id=3, control_symbols=["<mask>"])
    mask = 4
    tokenizer = load(path, bos_id=mask, eos_id=3)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (mask, 3, 3, 700)
    assert tokenizer.decode([mask, *tokenizer.encode("def build"), 3]) == "def build"
    for key, special, piece in (("bos_id", 600, ".+"), ("eos_id", 0, "<unk>"), ("pad_id", 5, "<0x00>")):
        with pytest.raises(DataError, match=rf"tokenizer\.{key}: id {special} is the piece '{piece}', which text can have; name .* or an id from 700 on"):
            load(path, **{key: special})
    with pytest.raises(DataError, match=r"tokenizer\.bos_id: 4000000000 is too large"):
        load(path, bos_id=4_000_000_000)


def test_ids_in_the_gap_behind_the_pieces_are_refused(model):
    tokenizer = load(model, pad_id=710)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, 711)
    assert tokenizer.decode([710]) == ""
    assert tokenizer.pieces()[705] is None
    with pytest.raises(DataError, match=r"id 705 is no token: the model's pieces end at 699, special ids are \[1, 2, 710\]"):
        tokenizer.decode([705])
    with pytest.raises(DataError, match="ids 0 to 710"):
        tokenizer.decode([711])
    assert tokenizer.target_bytes(np.array([705]), np.array([710])).tolist() == [0]


def test_pad_is_the_models_own_or_none(tmp_path, model):
    assert load(model).pad_id is None
    assert load(other_model(tmp_path / "pad.model", pad_id=3)).pad_id == 3


# ---------------------------------------------------------------- text goes in unsplit
PHRASES = ["one of the most important things in the world", "at the end of the day", "in the middle of the night", "for the first time in years"]
WORDS = re.findall(r"\w+", "time year people way day man thing life child world school state family group country problem hand part place week")


def story(draw: random.Random) -> str:
    """English-like text in which phrases recur."""
    sentences = (" ".join(draw.choice(PHRASES if draw.random() < 0.4 else WORDS) for _ in range(8)) for _ in range(30))
    return ". ".join(sentences) + ".\n"


def converted(processor, split: bool):
    """The model as converters to a tokenizer.json make it, with the words split or not."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocab = {processor.id_to_piece(i): i for i in range(processor.get_piece_size())}
    learnt = [piece for piece, i in vocab.items() if not (processor.is_byte(i) or processor.is_control(i))]
    merges = [(piece[:k], piece[k:]) for piece in learnt for k in range(1, len(piece)) if {piece[:k], piece[k:]} <= vocab.keys()]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=split)
    return backend


def test_pieces_that_cross_spaces_are_used(tmp_path):
    """Text that is cut at spaces first, as a converted tokenizer does, never has them: other and more ids."""
    import sentencepiece

    draw = random.Random(0)
    path = train_sentencepiece([story(draw) for _ in range(60)], tmp_path / "m.model", 500, split_by_whitespace=False).path
    tokenizer, processor = load(path), sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert tokenizer.lossless
    text = story(draw)
    ids = tokenizer.encode(text).tolist()
    assert ids == processor.encode(text)
    assert any("\u2581" in processor.id_to_piece(i)[1:] for i in ids)
    words = [i for word in re.findall(r" ?[^ ]+", text) for i in processor.encode(word)]
    assert len(ids) < 0.6 * len(words)
    # The same vocabulary and merges in the other library: the split alone makes the difference.
    assert converted(processor, split=True).encode(text).ids == words
    assert converted(processor, split=False).encode(text).ids == ids
    assert tokenizer.decode(ids) == text
    # Pieces of a model that was trained on words do not tell the two apart.
    path = train_sentencepiece([story(draw) for _ in range(60)], tmp_path / "words.model", 340).path
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    words = [i for word in re.findall(r" ?[^ ]+", text) for i in processor.encode(word)]
    assert load(path).encode(text).tolist() == words


def test_a_space_that_is_no_piece_is_remarked(tmp_path, model):
    """Such a model writes a lone space as three bytes, which has made bits per byte look a fifth better than they were."""
    alone = load(model).encode(" \u2581")[0]
    assert f"U+2581 alone, a space that joins no word, is piece {alone}" in load(model).remarks()
    path = tmp_path / "m.model"
    path.write_bytes(load(model).files()["tokenizer.model"].replace(b"\x0a\x03\xe2\x96\x81\x15", b"\x0a\x03\xee\x80\x80\x15"))
    tokenizer = load(path)
    assert not tokenizer.lossless
    assert any(remark.startswith("WARNING: U+2581 alone is no piece") for remark in tokenizer.remarks())


def test_pickles(model):
    tokenizer = load(model, bos_id=700)
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.fingerprint == tokenizer.fingerprint
    assert again.encode("def \u2581 build").tolist() == tokenizer.encode("def \u2581 build").tolist()


# ---------------------------------------------------------------- fingerprint, files, errors
def test_fingerprint_depends_on_model_and_special_ids(tmp_path, model):
    other = train_sentencepiece(corpus(), tmp_path / "b.model", 701).path
    prints = {load(model).fingerprint, load(other).fingerprint, load(model, add_eos=False).fingerprint}
    assert len(prints) == 3
    assert load(model).fingerprint in prints
    tables = json.loads(load(model).fingerprint)
    assert (tables["name"], tables["vocab_size"], tables["bos_id"], tables["eos_id"]) == ("sentencepiece", 700, 1, 2)
    assert tables["probes"] == [load(model).encode(probe).tolist() for probe in PROBES]


def test_rebuilds_from_its_files_without_the_path(model):
    tokenizer = load(model)
    files = dict(tokenizer.files())
    assert list(files) == ["tokenizer.model"]
    gone = Component.named("tokenizer", "sentencepiece", path="nowhere/at/all.model")
    again = rebuild(gone, files)
    assert again.fingerprint == tokenizer.fingerprint
    assert again.encode("again 😀").tolist() == tokenizer.encode("again 😀").tolist()
    with pytest.raises(DataError, match=r"lack 'tokenizer.model'"):
        rebuild(gone, {"other": b""})
    with pytest.raises(DataError, match=r"tokenizer.model is no SentencePiece model"):
        rebuild(gone, {"tokenizer.model": b"junk"})


def test_missing_and_wrong_files_name_key_and_remedy(tmp_path):
    with pytest.raises(DataError, match=r"tokenizer\.path: .*absent\.model.*titanlm tokenizer train"):
        load(tmp_path / "absent.model")
    with pytest.raises(DataError, match=r"tokenizer\.path: .*cannot read|tokenizer\.path: cannot read"):
        load(tmp_path)
    for junk in (b"", b"not a model", b"\xff" * 64):
        (tmp_path / "junk").write_bytes(junk)
        with pytest.raises(DataError, match=r"tokenizer\.path: .*no SentencePiece model.*titanlm tokenizer train"):
            load(tmp_path / "junk")


def test_surrogates_and_foreign_ids_are_errors(model):
    tokenizer = load(model)
    with pytest.raises(DataError, match="surrogate"):
        tokenizer.encode("\ud800")
    with pytest.raises(DataError, match="ids 0 to 699"):
        tokenizer.decode([700])


# ---------------------------------------------------------------- training
def test_sentences_lose_nothing_and_do_not_end_where_the_trainer_strips():
    line = "x" * 70 + "\r\n"
    text = line * 500 + "\n" * 9000 + "한" * 9000 + "\u2581end\u2585\n"
    cut = list(sentences(text))
    assert "".join(cut) == text.replace("\u2581", "").replace("\u2585", "")
    assert max(len(part.encode()) for part in cut) <= SENTENCE_BYTES
    assert sum(part.endswith(("\n", "\r")) for part in cut[:10]) <= 3  # only inside the run of 9,000 line ends
    assert list(sentences("")) == []


def test_training_errors_say_what_to_change_and_write_nothing(tmp_path):
    path = tmp_path / "t.model"
    with pytest.raises(DataError, match=r"vocab_size = 50000 is too large .* at most \d+"):
        train_sentencepiece(["just a few words"] * 3, path, 50000)
    with pytest.raises(DataError, match=r"vocab_size = 100 is too small"):
        train_sentencepiece(["just a few words"] * 3, path, 100)
    with pytest.raises(DataError, match="no text"):
        train_sentencepiece(["", ""], path, 500)

    def broken():
        yield "text"
        raise DataError("the third file is broken")

    with pytest.raises(DataError, match="^the third file is broken$"):
        train_sentencepiece(broken(), path, 500)
    assert list(tmp_path.iterdir()) == []


def test_training_stops_reading_at_max_bytes_and_repeats_itself(tmp_path):
    def endless():
        while True:
            yield from corpus()

    first = train_sentencepiece(endless(), tmp_path / "a.model", 500, max_bytes=100_000)
    again = train_sentencepiece(endless(), tmp_path / "b.model", 500, max_bytes=100_000)
    assert 100_000 <= first.n_bytes < 200_000
    assert first.path.read_bytes() == again.path.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.model", "b.model"]


def test_special_ids_symbols_and_spaces_as_asked_for(tmp_path):
    symbols = ["<|user|>", "two words", 'a,"b"', "\n\n"]
    rules = {"split_by_whitespace": False, "whitespace_pieces": False, "split_digits": True}
    trained = train_sentencepiece(corpus(), tmp_path / "t.model", 600, symbols=symbols, bos_id=1, eos_id=0, pad_id=2, **rules)
    tokenizer = load(trained.path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 0, 2)
    assert tokenizer.lossless
    assert [tokenizer.pieces()[i].decode() for i in range(4, 8)] == symbols
    text = 'x<|user|>two words\n\nend 2024 a,"b"'
    ids = tokenizer.encode(text).tolist()
    assert [i for i in ids if i in range(4, 8)] == [4, 5, 7, 6]
    assert tokenizer.decode(ids) == text
    assert counted(tokenizer, text) == len(text.encode())
    pieces = [piece.decode(errors="ignore") for piece in tokenizer.pieces() if piece]
    assert not any(len(piece) > 1 and re.search(r"\d", piece) for piece in pieces)
    assert any(re.search(r"\w \w", piece) for piece in pieces)
    assert not any(piece in ("  ", "    ") for piece in pieces)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"symbols": ["<s>"]}, "symbol '<s>' is empty, a name that the model uses itself"),
        ({"symbols": [""]}, "symbol '' is empty"),
        ({"symbols": ["a\u2581b"]}, "has U.2581"),
        ({"symbols": ["<0x41>"]}, "symbol '<0x41>'"),
        ({"symbols": ["z", "z"]}, "symbol 'z' stands twice"),
        ({"eos_id": 1}, r"special ids must differ .*set tokenizer\.pad_id"),
        ({"pad_id": 2}, "special ids must differ"),
        ({"bos_id": 500}, r"special ids are 0 to 499 in a model .*tokenizer\.bos_id"),
        ({"bos_id": -1}, "special ids are 0 to 499"),
    ],
)
def test_symbols_and_ids_that_cannot_be(tmp_path, settings, text):
    with pytest.raises(DataError, match=text):
        train_sentencepiece(corpus(), tmp_path / "t.model", 500, **settings)
    assert list(tmp_path.iterdir()) == []
