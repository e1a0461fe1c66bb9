from __future__ import annotations

import json
import pickle
import random
import re
import shutil
import sys
import unicodedata
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from titanlm.config import loads
from titanlm.errors import ConfigError, DataError
from titanlm.registry import Component
from titanlm.tokenizers.byte_level import BYTE_OF, IN_UTF8, bytes_of
from titanlm.tokenizers.fingerprint import PROBES, difference
from titanlm.tokenizers.opening import open_tokenizer
from titanlm.tokenizers.rebuild import rebuild
from titanlm.tokenizers.superbpe_training import train_superbpe
from titanlm.tokenizers.superwords import BREAK, PairMerger
from titanlm.tokenizers.text import n_words

FRAMES = [
    "By the way, the {} of the {} is not a {}.", "In the end it was one of the most {} {} of all, at least in {}.", "Question: is it a {}?\nAnswer: {}\n",
    "    if {}[{}] is not None:\n        return self.{}\n", "On the other hand, {} and {}; as well as the {}.\r\n", "{}\t{}  {}",
    "größe {} 한국어 {} 日本語 🙂 ", "# {}\n\n",
]  # fmt: skip


def pages(n: int, seed: int) -> list[str]:
    """Sentences of set phrases and 600 made-up words, the first ones frequent, and numbers."""
    draw = random.Random(0)
    syllables = ["".join(draw.choices("bdfgklmnprstvz")) + draw.choice(["a", "e", "i", "o", "u", "er", "in", "on"]) for _ in range(60)]
    words = ["".join(draw.choices(syllables, k=draw.choice([1, 2, 2, 3]))) for _ in range(600)]
    weights = [1 / (i + 3) for i in range(600)]
    draw = random.Random(seed)

    def word() -> str:
        return draw.choices(words, weights)[0] if draw.random() < 0.95 else str(draw.randrange(10 ** draw.randrange(1, 8)))

    def sentence(frame: str) -> str:
        return frame.format(*(word() for _ in range(frame.count("{}"))))

    return [" ".join(sentence(draw.choice(FRAMES)) for _ in range(150)) for _ in range(n)]


CORPUS = pages(20, 1)
TEXTS = ["", " ", "\n", "at the end of the day,  by the way\n\n\n12345's 7", "<|endoftext|>", "\x00\ufeff\u2581", "é e\u0301 한국어 😀👩‍👩‍👧", *PROBES]
SIZE, TRANSITION = 1500, 900
END = {"<|endoftext|>": 1504, "<|pad|>": 1501}
NAME = {value: name for name, value in BYTE_OF.items()}


def spelt(text: str | bytes) -> str:
    """In the characters of the files."""
    return "".join(NAME[value] for value in (text.encode() if isinstance(text, str) else text))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("superbpe")
    train_superbpe(lambda: CORPUS, folder / "sb", SIZE, TRANSITION)
    return folder / "sb"


@pytest.fixture(scope="module")
def trained(folder):
    return load(folder)


def load(path: Path | str, **settings):
    return Component.named("tokenizer", "superbpe", path=str(path), **settings).build()


def save(folder: Path, pieces: list[str], merges: list[tuple[str, str]], vocab: dict[str, int] | None = None) -> Path:
    """The two files, of all bytes and then ``pieces``, as texts."""
    folder.mkdir(exist_ok=True)
    names = [*(NAME[value] for value in range(256)), *map(spelt, pieces)]
    (folder / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)} if vocab is None else vocab), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{spelt(left)} {spelt(right)}" for left, right in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def counted(tokenizer, text: str) -> int:
    ids = tokenizer.encode(text)
    return int(tokenizer.target_bytes(ids, np.array([-1, *ids[:-1]], dtype=np.int64)[: len(ids)]).sum())


# ---------------------------------------------------------------- references
def cut_at_digits(text: str) -> list[str]:
    """Numbers set apart, and in threes from the right."""
    runs = re.findall(r"\d+|\D+", text)
    return [part for run in runs for part in ([run[: len(run) % 3], *re.findall("...", run[len(run) % 3 :])] if run.isdigit() else [run]) if part]


def merged(piece: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """Byte pair merging as it is defined: again and again the pair of the lowest rank, everywhere, from the left."""
    parts = list(spelt(piece))
    while pairs := [pair for pair in zip(parts, parts[1:]) if pair in ranks]:
        best, after = min(pairs, key=ranks.__getitem__), []
        while parts:
            if tuple(parts[:2]) == best:
                after.append(parts[0] + parts[1])
                parts = parts[2:]
            else:
                after.append(parts[0])
                parts = parts[1:]
        parts = after
    return parts


def slow_merges(words: list[list[int]], n_tokens: int, tokens: list[bytes], allowed) -> list[tuple[int, int]]:
    """BPE training by counting everything before each merge."""
    tokens, learnt, refused = list(tokens), [], set()
    while len(tokens) < n_tokens:
        counts = Counter(pair for word in words for pair in zip(word, word[1:]))
        refused |= {pair for pair in counts if not allowed(tokens[pair[0]] + tokens[pair[1]])}
        counts = Counter({pair: count for pair, count in counts.items() if pair not in refused and count >= 2})
        if not counts:
            break
        pair = min(counts, key=lambda pair: (-counts[pair], pair))
        token = tokens[pair[0]] + tokens[pair[1]]
        if token not in tokens:
            tokens.append(token)
        learnt.append(pair)
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == pair:
                    word[i : i + 2] = [tokens.index(token)]
                i += 1
    return learnt


# ---------------------------------------------------------------- the tokenizer
def test_every_code_point_of_every_plane_comes_back(trained):
    for start in range(0, sys.maxunicode + 1, 1 << 14):
        text = "".join(chr(point) for point in range(start, start + (1 << 14)) if not 0xD800 <= point < 0xE000)
        ids = trained.encode(text)
        assert trained.decode(ids.tolist()) == text
        assert trained.target_bytes(ids, ids).sum() == len(text.encode())


def test_every_text_comes_back_and_its_bytes_add_up(trained):
    draw = random.Random(0)
    noise = ["".join(draw.choices("th e\n\t1'sé한😀\u2581\u00a0\x00٣²½", k=draw.randrange(60))) for _ in range(300)]
    random_bytes = [draw.randbytes(200).decode("latin-1") for _ in range(50)] + [draw.randbytes(200).decode("utf-8", "replace") for _ in range(50)]
    for text in [*TEXTS, *noise, *random_bytes, *CORPUS]:
        ids = trained.encode(text)
        assert ids.dtype == np.int32
        assert trained.decode(ids.tolist()) == text
        assert counted(trained, text) == len(text.encode())


def test_merges_are_made_in_order_of_rank(folder, trained):
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")[1:-1]
    ranks = {tuple(line.split(" ")): rank for rank, line in enumerate(lines)}
    draw = random.Random(1)
    texts = [text[start : start + 400] for text in CORPUS for start in (draw.randrange(len(text)),)]
    for text in [*TEXTS[:6], "1234567 and 12 of the 1000, in the end", *texts]:
        expected = [vocab[name] for part in cut_at_digits(text) for name in merged(part, ranks)]
        assert trained.encode(text).tolist() == expected


def test_a_sentence_in_tokens_of_several_words(tmp_path):
    """The paper's example, in the tokens that the published vocabulary with 180,000 of 200,000 learnt within words makes of it."""
    pieces, merges = [], []
    for wanted in ("By the way", ", I am", " a", " fan", " of the", " Milky Way"):
        made = wanted[0]
        for character in wanted[1:]:
            if (made, character) not in merges:
                merges.append((made, character))
                pieces.append(made + character)
            made += character
    tokenizer = load(save(tmp_path / "sb", list(dict.fromkeys(pieces)), merges))
    ids = tokenizer.encode("By the way, I am a fan of the Milky Way.").tolist()
    assert [tokenizer.decode([i]) for i in ids] == ["By the way", ", I am", " a", " fan", " of the", " Milky Way", "."]
    words = load(tmp_path / "sb", cut="words")
    assert max(n_words(words.pieces()[i]) for i in words.encode("By the way, I am a fan of the Milky Way.")) == 1


def test_numbers_are_cut_in_threes_from_the_right(tmp_path):
    digits = [f"{i:0{n}d}" for n in (2, 3) for i in range(10**n)]
    merges = [(number[:-1], number[-1]) for number in digits]
    more = [("000", "0"), ("8", " "), ("a", " "), ("a ", "b")]  # the first two cross a cut
    tokenizer = load(save(tmp_path / "sb", [*digits, *map("".join, more)], [*merges, *more]))
    for text, expected in {
        "12345678": ["12", "345", "678"],
        "0000": ["0", "000"],
        "1234.5678 a b1000": ["1", "234", ".", "5", "678", " ", "a b", "1", "000"],
        "7": ["7"],
    }.items():
        assert [tokenizer.decode([i]) for i in tokenizer.encode(text)] == expected
    long = "".join(random.Random(0).choices("0123456789", k=20_002))  # n² for the expression, were it given whole
    ranks = {(left, right): rank for rank, (left, right) in enumerate(merges)}
    assert [tokenizer.decode([i]) for i in tokenizer.encode(f"a{long}b")] == ["a", *(name for part in cut_at_digits(long) for name in merged(part, ranks)), "b"]


def test_special_tokens_are_ids_and_never_text(folder):
    tokenizer = load(folder, special_tokens=END, bos="<|endoftext|>", eos="<|endoftext|>", pad="<|pad|>")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (1504, 1504, 1501, 1505)
    ids = tokenizer.encode("<|endoftext|> <|pad|>")
    assert ids.max() < SIZE
    assert tokenizer.decode([1504, *ids, 1501]) == "<|endoftext|> <|pad|>"
    assert tokenizer.target_bytes(np.array([1504, 1501, ids[0]]), np.array([-1, 0, 0])).tolist()[:2] == [0, 0]
    with pytest.raises(DataError, match="id 1503 is no token of this vocabulary, which has gaps"):
        tokenizer.decode([1503])
    with pytest.raises(DataError, match="lone surrogate"):
        tokenizer.encode("\ud800")


def test_special_tokens_may_be_in_the_file(tmp_path):
    """As in GPT-2's."""
    folder = save(tmp_path / "sb", ["a ", "a b", "<|endoftext|>"], [("a", " "), ("a ", "b")])
    with pytest.raises(DataError, match=r"1 tokens of vocab.json are made by no merge of merges.txt \('<\|endoftext\|>'\).*name special tokens in"):
        load(folder)
    tokenizer = load(folder, special_tokens={"<|endoftext|>": 258}, eos="<|endoftext|>")
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (258, 259)
    assert tokenizer.decode([*tokenizer.encode("<|endoftext|>"), 258]) == "<|endoftext|>"
    with pytest.raises(DataError, match=r"'<\|endoftext\|>' has id 258 in vocab.json, not 300"):
        load(folder, special_tokens={"<|endoftext|>": 300})
    with pytest.raises(DataError, match="the id 65 of '<x>' is that of another token"):
        load(folder, special_tokens={"<|endoftext|>": 258, "<x>": 65})


def test_it_is_rebuilt_from_its_files_and_shared_by_threads_and_processes(folder, trained):
    component = Component.named("tokenizer", "superbpe", path="gone", special_tokens=END, cut="words")
    again = rebuild(component, trained.files())
    assert again.vocab_size == 1505
    assert again.fingerprint != trained.fingerprint
    assert "setting cut: digits → words" in difference(trained.fingerprint, again.fingerprint)
    with ThreadPoolExecutor(4) as pool:
        assert [ids.tolist() for ids in pool.map(pickle.loads(pickle.dumps(trained)).encode, CORPUS)] == [trained.encode(text).tolist() for text in CORPUS]
    with pytest.raises(DataError, match="files lack 'merges.txt'"):
        rebuild(component, {"vocab.json": b"{}"})


def test_bytes_that_utf8_never_has_may_be_missing(tmp_path):
    """As from the published vocabularies; any other is an error."""
    names = [NAME[value] for value in sorted(IN_UTF8)] + [spelt("a "), spelt("a b")]
    folder = save(tmp_path / "sb", [], [("a", " "), ("a ", "b")], {name: i for i, name in enumerate(names)})
    tokenizer = load(folder)
    assert tokenizer.vocab_size == 245
    assert tokenizer.decode(tokenizer.encode("\U0010ffff a b").tolist()) == "\U0010ffff a b"
    save(folder, [], [("a", " "), ("a ", "b")], {name: i for i, name in enumerate(names) if name not in (NAME[0x80], "Q")})
    with pytest.raises(DataError, match=r"vocab.json: 2 of the 243 bytes of UTF-8 are no tokens \(0x51, 0x80\)"):
        load(folder)


# ---------------------------------------------------------------- what is refused
MERGE = "#version: 0.2\na Ġ\naĠ b\n"


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        (
            "vocab.json",
            None,
            r"cannot read .*vocab.json \(No such file or directory\); it names a folder with vocab.json and merges.txt; a tokenizer.json is read",
        ),
        ("merges.txt", None, r"cannot read .*merges.txt \(No such file"),
        ("vocab.json", "{", "vocab.json is no JSON"),
        ("vocab.json", "[]", "vocab.json is no table of ids from 0 to"),
        ("vocab.json", '{"a": -1}', "vocab.json is no table of ids from 0 to"),
        ("vocab.json", '{"a": true}', "vocab.json is no table of ids from 0 to"),
        ("vocab.json", '{"model": {"vocab": {}}}', 'a tokenizer.json is read by name = "huggingface"'),
        ("vocab.json", '{"a": 0, "b": 0}', "some tokens have the same id"),
        ("merges.txt", "a Ġ\naĠb\n", "merges.txt, line 2: 'aĠb' are not two names"),
        ("merges.txt", "a Ġ b\n", "merges.txt, line 1: 'a Ġ b' are not two names"),
        ("merges.txt", MERGE + "x y\n", "merges.txt, line 4: merges 'x' and 'y', and .*vocab.json has no 'xy'; give the two files of one tokenizer"),
        ("merges.txt", MERGE + "aĠ c\n", "line 4: merges 'aĠ' and 'c', and .* has no 'aĠc'"),
        ("merges.txt", MERGE + "a Ġ\n", "merges.txt, line 4: the merge of line 2 again"),
        ("merges.txt", "#version: 0.2\na Ġ\n", r"1 tokens of vocab.json are made by no merge of merges.txt \('aĠb'\); give the two files of one tokenizer"),
        ("merges.txt", b"\xff", "merges.txt: byte 0 is not UTF-8"),
    ],
)
def test_files_that_are_damaged_or_do_not_belong_together(tmp_path, name, content, text):
    folder = save(tmp_path / "sb", ["a ", "a b"], [("a", " "), ("a ", "b")])
    assert load(folder).vocab_size == 258
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=text):
        load(folder)


def test_a_vocabulary_without_superwords_must_be_cut_at_words(tmp_path):
    folder = save(tmp_path / "plain", [" a", "\u00a0 \u00a0"], [(" ", "a"), ("\u00a0", " "), ("\u00a0 ", "\u00a0")][:1], None)
    (folder / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate([*NAME.values(), "Ġa"])}), encoding="utf-8")
    with pytest.raises(DataError, match='no token stands for more than one word; if titanlm learnt it within words, set tokenizer.cut = "words"; GPT-2'):
        load(folder)
    assert load(folder, cut="words").encode("b a").tolist() == [NAME_ID("b"), 256]


def test_text_without_spaces_has_superwords_too(tmp_path):
    """What crosses is told by punctuation where there are no spaces."""
    text = "雨の日は家にいる。晴れの日は外に出る。" * 50
    train_superbpe(lambda: [text], tmp_path, 297, 290)
    tokenizer = load(tmp_path)
    assert any("る。晴" in (piece or b"").decode("utf-8", errors="ignore") for piece in tokenizer.pieces())
    assert tokenizer.decode(tokenizer.encode(text).tolist()) == text


def test_no_trained_superword_goes_past_the_end_of_a_line(tmp_path):
    lines = ["if a:\n    return b\nelse:\n    return c\n" * 3] * 40
    train_superbpe(lambda: lines, tmp_path, 280, 270)
    names = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
    merged = [bytes_of(name) for name, i in names.items() if i >= 270]
    assert merged
    assert not [token for token in merged if b"\n" in token[:-1]]


def test_a_folder_with_a_tokenizer_of_its_own_is_not_taken_for_one(folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "gpt2")
    assert open_tokenizer(str(other))[0].startswith("superbpe")
    (other / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match="a tokenizer is a file, NAME:FILE"):
        open_tokenizer(str(other))


def NAME_ID(name: str) -> int:
    return list(NAME.values()).index(name)


def test_the_package_that_is_missing_is_named(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(DataError, match=r"^tokenizer 'superbpe' needs the package `tokenizers`; run: pip install 'titanlm\[huggingface\]'"):
        load(folder)
    with pytest.raises(DataError, match=r"^`titanlm tokenizer train --type superbpe` needs the package"):
        train_superbpe(lambda: CORPUS, tmp_path / "never", SIZE, TRANSITION)


def test_settings_are_checked_where_they_stand():
    base = 'model = "decoder"\noptimizer = "adamw"\n[train]\nsteps = 1\n[tokenizer]\nname = "superbpe"\npath = "x"\n'
    with pytest.raises(ConfigError, match="tokenizer.eos: '<end>' is not among special_tokens; did you mean '<end->'"):
        loads(base + 'eos = "<end>"\nspecial_tokens = {"<end->" = 7}\n')
    with pytest.raises(ConfigError, match="tokenizer.cut"):
        loads(base + 'cut = "spaces"\n')


def test_a_tokenizer_json_that_loses_its_superwords_is_refused(folder, tmp_path):
    """As such vocabularies come out of GPT-2's class: every text comes back, and no superword is used."""
    vocab, merges = json.loads((folder / "vocab.json").read_text(encoding="utf-8")), (folder / "merges.txt").read_text(encoding="utf-8").split("\n")[1:-1]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [tuple(line.split(" ")) for line in merges]))
    for use_regex, lost in ((True, True), (False, False)):
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
        backend.save(str(tmp_path / "tokenizer.json"))
        if lost:
            with pytest.raises(
                DataError, match='ids stand for more than one word, but its pre_tokenizer cuts text at words, so none is used; name = "superbpe"'
            ):
                Component.named("tokenizer", "huggingface", path=str(tmp_path / "tokenizer.json")).build()
        else:
            assert Component.named("tokenizer", "huggingface", path=str(tmp_path / "tokenizer.json")).build().lossless


# ---------------------------------------------------------------- training
def test_superwords_save_tokens(folder, trained):
    words = load(folder, cut="words")
    texts = pages(5, 2)
    characters = sum(map(len, texts))
    per_token = [characters / sum(len(tokenizer.encode(text)) for text in texts) for tokenizer in (trained, words)]
    assert per_token[0] > 1.1 * per_token[1]
    superwords = [i for i, piece in enumerate(trained.pieces()) if n_words(piece) > 1]
    assert min(superwords) >= TRANSITION
    assert {i for text in texts for i in trained.encode(text).tolist()} & {*superwords}
    assert not {i for text in texts for i in words.encode(text).tolist()} & {*superwords}
    assert words.remarks() == [f"text is cut at words, so none of {len(superwords):,} superwords is used"]


def test_the_first_stage_is_the_librarys_own_training(folder, tmp_path):
    learner = tokenizers.Tokenizer(tokenizers.models.BPE())
    cut = tokenizers.Regex(r"(?=(\d{3})+(?!\d))| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    steps = tokenizers.pre_tokenizers
    learner.pre_tokenizer = steps.Sequence([steps.Digits(False), steps.Split(cut, "isolated"), steps.ByteLevel(add_prefix_space=False, use_regex=False)])
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=TRANSITION, min_frequency=2, initial_alphabet=steps.ByteLevel.alphabet(), show_progress=False)
    learner.train_from_iterator(CORPUS, trainer)
    ids = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    assert learner.get_vocab() == {name: i for name, i in ids.items() if i < TRANSITION}
    train_superbpe(lambda: CORPUS, tmp_path / "plain", TRANSITION, TRANSITION)
    assert json.loads((tmp_path / "plain" / "vocab.json").read_text(encoding="utf-8")) == learner.get_vocab()
    plain = load(tmp_path / "plain", cut="words")
    for text in [*TEXTS, *CORPUS[:3]]:
        assert plain.encode(text).tolist() == learner.encode(text).ids


def test_no_token_has_too_many_words_a_space_after_a_colon_or_a_line_end_inside(tmp_path):
    text = "Question: what is it that you want to have of me?\nAnswer: it is the end of the day at last\n" * 40
    for most in (2, 4):
        train_superbpe(lambda: [text, "and so on and on it goes " * 30], tmp_path / "sb", 325, 300, max_words=most)
        pieces = load(tmp_path / "sb").pieces()[256:]
        assert max(map(n_words, pieces)) == most
        assert not any(b": " in piece or b"\n" in piece.rstrip(b"\n") for piece in pieces)
        assert any(piece.endswith(b":") for piece in pieces)


@pytest.mark.parametrize("seed", range(4))
def test_pairs_are_merged_as_by_counting_everything_anew(seed):
    draw = random.Random(seed)
    tokens = [b" a", b" b", b"c", b": ", b"a"]
    words = [draw.choices(range(5), weights=(4, 3, 2, 1, 3), k=draw.randrange(1, 30)) for _ in range(30)]
    text = np.array([BREAK, *(i for word in words for i in [*word, BREAK])])

    def allowed(token: bytes) -> bool:
        return n_words(token) <= 4 and b": " not in token[:-1]

    learnt = list(PairMerger(text, list(tokens)).learn(200, allowed))
    assert len(learnt) > 20
    assert learnt == slow_merges([list(word) for word in words], 200, tokens, allowed)


def test_pairs_are_merged_as_by_the_library_where_all_is_allowed():
    """A character of a private use plane for each id, and the library's own trainer, which knows no limits."""
    draw = random.Random(0)
    vocabulary = 60
    words = [draw.choices(range(vocabulary), weights=[1 / (i + 1) for i in range(vocabulary)], k=draw.randrange(2, 200)) for _ in range(200)]
    first = 0xF0000
    learner = tokenizers.Tokenizer(tokenizers.models.BPE())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1000, min_frequency=2, initial_alphabet=[chr(first + i) for i in range(vocabulary)], show_progress=False
    )
    learner.train_from_iterator(["".join(chr(first + i) for i in word) for word in words], trainer)
    merges = [tuple(tuple(ord(c) - first for c in part) for part in pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    tokens = [chr(first + i).encode() for i in range(vocabulary)]
    text = np.array([BREAK, *(i for word in words for i in [*word, BREAK])])
    merger = PairMerger(text, tokens)
    found = [tuple(tuple(ord(c) - first for c in merger.tokens[i].decode()) for i in pair) for pair in merger.learn(1000, lambda token: True)]
    assert len(found) == len(merges) > 900
    assert found == merges


def test_equal_texts_give_equal_files(folder, tmp_path):
    train_superbpe(lambda: iter(CORPUS), tmp_path / "again", SIZE, TRANSITION)
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_the_alphabet_is_all_bytes(folder):
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    assert {bytes_of(name) for name, i in vocab.items() if i < 256} == {bytes([value]) for value in range(256)}
    assert sorted(vocab.values()) == list(range(SIZE))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"transition": 200}, "transition = 200 must be from 256, the single bytes, to vocab_size = 1500"),
        ({"transition": 1501}, "transition = 1501 must be from 256"),
        ({"transition": 1500, "special_tokens": ["<end>"]}, "to vocab_size = 1500 less 1 special tokens"),
        ({"special_tokens": ["<end>", "<end>"]}, "special tokens must have names, each another"),
        ({"max_words": 1}, "max_words = 1 leaves no superwords"),
        (
            {"vocab_size": 9000, "transition": 8000, "texts": ["a few words, " * 9]},
            r"transition = 8000 is too many tokens within words: at most \d+ come of 117 bytes",
        ),
        (
            {"vocab_size": 9000, "transition": 258, "texts": ["a few words, " * 9]},
            r"vocab_size is too large for 117 bytes of text: at most \d+ tokens come of it",
        ),
        ({"texts": ["", ""]}, "there is no text"),
        ({"texts": ["\ud800"]}, "lone surrogate"),
    ],
)
def test_trainings_that_cannot_be(tmp_path, changes, text):
    arguments = {"texts": CORPUS, "vocab_size": SIZE, "transition": TRANSITION} | changes
    texts = arguments.pop("texts")
    with pytest.raises(DataError, match=text):
        train_superbpe(lambda: texts, tmp_path / "never", **arguments)
    assert not (tmp_path / "never").exists()


# ---------------------------------------------------------------- commands
@pytest.fixture
def run(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pages.txt").write_bytes("\n".join(CORPUS[:10]).encode())
    return command


def test_train_inspect_and_compare_as_typed(run, tmp_path):
    words = ["train", "--type", "superbpe", "--vocab-size", "1202", "--transition", "700", "--output", "sb", "--input", "pages.txt"]
    out = run(*words, "--special", "<end>", "--special", "<pad>", "--max-words", "3")
    assert out.endswith("sb: 1,202 pieces from 1 texts, " + f"{(tmp_path / 'pages.txt').stat().st_size:,} bytes\n")
    section = out.partition("\n\n")[0]
    assert section == '[tokenizer]\nname = "superbpe"\npath = "sb"\nspecial_tokens = { "<end>" = 1200, "<pad>" = 1201 }'
    (tmp_path / "run.toml").write_text(f'model = "decoder"\noptimizer = "adamw"\ntrain = {{ steps = 1 }}\n{section}\neos = "<end>"\n')
    for word in ("sb", "superbpe:sb", "run.toml"):
        text = run("inspect", word)
        assert "type         superbpe, cut digits" in text
        assert re.search(r"superwords   \d+\.\d% of the pieces stand for more than one word", text)
    assert "1,202 ids: 1,200 pieces, 2 special or unknown, 0 unused\n  special ids  BOS none, EOS 1200" in text
    assert "vocab.json: " in text
    assert "merges.txt: " in text

    table = "{name = 'superbpe', path = 'sb', cut = 'words'}"
    with_superwords, without = json.loads(run("compare", "sb", table, "--input", "pages.txt", "--json"))
    assert with_superwords["superwords"] > 0.05
    assert without["superwords"] == 0
    assert with_superwords["characters_per_token"] > 1.1 * without["characters_per_token"]
    assert with_superwords["round_trip"] == without["round_trip"] == 1
    assert "note         text is cut at words, so none of " in run("inspect", table)
    lines = run("compare", "sb", table, "--input", "pages.txt").splitlines()
    assert lines[:2] == ["sb: superbpe, cut digits", f"{table}: superbpe, cut words"]
    assert [line.split("  ")[1] for line in lines[-2:]] == ["sb", "superbpe, cut words"]


def test_commands_say_what_is_wrong(run, tmp_path):
    words = ["train", "--type", "superbpe", "--vocab-size", "700", "--input", "pages.txt"]
    assert "--transition is missing" in run(*words, "--output", "sb", status=2)
    words += ["--transition", "600"]
    assert "--split-digits, --bos: for --type spm, not superbpe" in run(*words, "--output", "sb", "--bos", "3", "--split-digits", status=2)
    assert "--max-words: for --type superbpe, not spm" in run("train", "--type", "spm", "--vocab-size", "700", "--output", "x", "--max-words", "3", status=2)
    assert "pages.txt: is a file; --output names the folder" in run(*words, "--output", "pages.txt", status=2)
    (tmp_path / "sb").mkdir()
    (tmp_path / "sb" / "merges.txt").write_text("mine")
    assert "sb/merges.txt: exists; --force overwrites it" in run(*words, "--output", "sb", status=2)
    assert (tmp_path / "sb" / "merges.txt").read_text() == "mine"
    run(*words, "--output", "sb", "--force")
    assert load(tmp_path / "sb").vocab_size == 700
    assert "tokenizer.cut" in run("inspect", "{name = 'superbpe', path = 'sb', cut = 'x'}", status=2)
    plain = run("train", "--type", "superbpe", "--vocab-size", "600", "--transition", "600", "--output", "plain", "--input", "pages.txt")
    assert 'cut = "words"' in plain
    assert 'set tokenizer.cut = "words"' in run("inspect", "plain", status=2)


def test_words_are_what_is_visible_between_spaces():
    for piece, n in {
        b" of the": 2,
        b"the": 1,
        b"  ": 0,
        b", I": 2,
        b" a ": 1,
        "\u00a0 \u00a0".encode(): 0,
        " \u00e9".encode()[:2] + b" x": 2,
        b"a\nb": 1,
    }.items():
        assert n_words(piece) == n
    assert unicodedata.category("²") == "No"  # set apart as a number, and never one of three digits
