from __future__ import annotations

import io
import random
from pathlib import Path

import numpy as np
import pytest

from titanlm.errors import DataError
from titanlm.registry import Component
from titanlm.tokenizers.rebuild import rebuild
from titanlm.tokenizers.sentencepiece import PROBES
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


def test_byte_count_of_a_normalising_model_against_a_plain_loop(tmp_path):
    import sentencepiece

    path = other_model(tmp_path / "golf.model", add_dummy_prefix=False, split_digits=True)
    tokenizer, processor = load(path), sentencepiece.SentencePieceProcessor(model_file=path)
    for text in TEXTS:
        ids = [tokenizer.bos_id, *tokenizer.encode(text).tolist(), tokenizer.eos_id]
        total, previous_is_boundary = 0, True
        for i in ids:
            piece, special = processor.id_to_piece(i), processor.is_control(i) or processor.is_unknown(i)
            if processor.is_byte(i):
                total += 1
            elif not special:
                space = piece.startswith("\u2581")
                total += len(piece[space:].replace("\u2581", " ").encode()) + (space and not previous_is_boundary)
            previous_is_boundary = special
        assert int(tokenizer.target_bytes(np.array(ids), np.array([-1, *ids[:-1]])).sum()) == total


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


def test_fingerprint_depends_on_model_and_special_ids(tmp_path, model):
    other = train_sentencepiece(corpus(), tmp_path / "b.model", 701).path
    prints = {load(model).fingerprint, load(other).fingerprint, load(model, add_eos=False).fingerprint}
    assert len(prints) == 3
    assert load(model).fingerprint in prints


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
