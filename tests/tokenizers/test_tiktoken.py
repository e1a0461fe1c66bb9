from __future__ import annotations

import base64
import pickle
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from titanlm.config import loads
from titanlm.errors import ConfigError, DataError
from titanlm.registry import Component
from titanlm.tokenizers.fingerprint import PROBES
from titanlm.tokenizers.rebuild import rebuild
from titanlm.tokenizers.tiktoken import PATTERNS, read_ranks

WORDS = [b"th", b"the", b" the", b" t", b"he", b"in", b"ing", b"  ", b"    ", b"\n\n", b"12", b"123", "한".encode(), "é".encode()]
TEXTS = ["", " ", "\n", "the thing in the  end\n\n\n  123456's", "<|endoftext|>", "\x00\ufeff\u2581", "é e\u0301 한국어 😀👩‍👩‍👧", *PROBES]
END = {"<|endoftext|>": 300}


def ranks_text(tokens: list[bytes] | None = None) -> bytes:
    tokens = [*(bytes([value]) for value in range(256)), *WORDS] if tokens is None else tokens
    return b"".join(base64.b64encode(token) + f" {rank}\n".encode() for rank, token in enumerate(tokens))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "own.tiktoken"
    path.write_bytes(ranks_text())
    return path


def load(path: Path | str, pattern: str = "gpt2", **settings):
    return Component.named("tokenizer", "tiktoken", path=str(path), pattern=pattern, **settings).build()


def merged(piece: bytes, ranks: dict[bytes, int]) -> list[int]:
    """Byte pair merging as it is defined: again and again the pair with the lowest rank."""
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while True:
        pairs = [(ranks[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:])) if a + b in ranks]
        if not pairs:
            return [ranks[part] for part in parts]
        _, at = min(pairs)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


@pytest.mark.parametrize("pattern", [*PATTERNS, r"[\s\S]"])
def test_every_text_comes_back_and_its_bytes_add_up(file, pattern):
    tokenizer = load(file, pattern)
    assert tokenizer.lossless
    draw = random.Random(0)
    noise = ["".join(draw.choices("th e\n\t1'sé한😀\u2581\u00a0\x00", k=draw.randrange(60))) for _ in range(200)]
    for text in [*TEXTS, *noise]:
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32
        assert tokenizer.decode(ids.tolist()) == text
        counted = tokenizer.target_bytes(ids, ids)
        assert counted.dtype == np.int32
        assert counted.sum() == len(text.encode())


def test_ids_are_those_of_byte_pair_merging(file):
    """Without a cut inside a word the pieces are known, so a plain loop gives the ids."""
    tokenizer, ranks = load(file), read_ranks(ranks_text(), "")
    for piece in ("the", " the", "nothing", " thething", "123123", "한한국"):
        assert tokenizer.encode(piece).tolist() == merged(piece.encode(), ranks)
    # The pattern cuts before a word's space and between letters and digits.
    assert tokenizer.encode("the the123").tolist() == [ranks[b"the"], ranks[b" the"], ranks[b"123"]]
    assert load(file, r"[\s\S]").encode("the").tolist() == list(b"the")


def test_the_three_patterns_cut_where_they_say(file):
    """gpt2 takes digits together, the others by threes."""
    ranks = read_ranks(ranks_text(), "")
    assert load(file, "cl100k_base").encode("0123").tolist() == [ranks[b"0"], ranks[b"12"], ranks[b"3"]]
    assert load(file, "o200k_base").encode("0123").tolist() == [ranks[b"0"], ranks[b"12"], ranks[b"3"]]
    assert load(file, "gpt2").encode("0123").tolist() == [ranks[b"0"], ranks[b"123"]]


def test_special_tokens_are_never_found_in_text(file):
    tokenizer = load(file, special_tokens={**END, "<|pad|>": 305}, bos="<|endoftext|>", pad="<|pad|>")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (300, None, 305, 306)
    text = "a<|endoftext|>b"
    ids = tokenizer.encode(text).tolist()
    assert 300 not in ids
    assert tokenizer.decode([300, *ids, 305]) == text
    around = np.array([300, *ids, 305])
    assert tokenizer.target_bytes(around, np.array([-1, *around[:-1]])).tolist()[:: len(ids) + 1] == [0, 0]
    for foreign in (299, 304):
        with pytest.raises(DataError, match=f"id {foreign} is no token"):
            tokenizer.decode([foreign])
    for foreign in (306, -1):
        with pytest.raises(DataError, match="ids 0 to 305"):
            tokenizer.decode([foreign])
    nothing = load(file)
    assert (nothing.bos_id, nothing.eos_id, nothing.pad_id, nothing.vocab_size) == (None, None, None, 256 + len(WORDS))


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "256 of the 256 single bytes are no tokens"),
        (ranks_text()[7:], r"1 of the 256 single bytes are no tokens \(0x00\)"),
        (ranks_text() + b"!!! 900\n", r"line 271: b'!!! 900' is no token and rank"),
        (ranks_text() + b"QUJD\n", r"line 271: b'QUJD' is no token and rank"),
        (ranks_text() + b"QUJD 9x\n", "line 271"),
        (ranks_text() + b"QUJD -1\n", "line 271: rank -1 is not 0 to"),
        (ranks_text() + b"QUJD 4294967295\n", "line 271: rank 4294967295 is not 0 to"),
        (ranks_text() + b"QUJD 3\n", "line 271: rank 3 stands in line 4 already"),
        (ranks_text() + b"AA== 900\n", r"line 271: token b'\\x00' stands in line 1 already"),
        (b"\xff\xfe\x00", "line 1"),
    ],
)
def test_what_is_no_rank_file_is_named_with_its_line(tmp_path, content, text):
    (tmp_path / "bad.tiktoken").write_bytes(content)
    with pytest.raises(DataError, match=rf"tokenizer\.path: .*bad\.tiktoken.*{text}"):
        load(tmp_path / "bad.tiktoken")
    with pytest.raises(DataError, match=rf"^tokenizer\.tiktoken.*{text}"):
        rebuild(Component.named("tokenizer", "tiktoken", path="gone", pattern="gpt2"), {"tokenizer.tiktoken": content})


def test_wrong_settings_are_errors_that_name_the_key(tmp_path, file):
    with pytest.raises(DataError, match=r"tokenizer\.path: cannot read .*absent"):
        load(tmp_path / "absent")
    with pytest.raises(DataError, match=r"tokenizer\.pattern: '\(' is neither gpt2, cl100k_base, o200k_base nor a regular expression"):
        load(file, "(")
    with pytest.raises(DataError, match=r"tokenizer\.pattern: 'r50k_base' leaves out part of a text: .*known names are gpt2"):
        load(file, "r50k_base")
    with pytest.raises(DataError, match=r"tokenizer\.special_tokens: the id 5 of 'x' is that of another token; the file's ids end at 269"):
        load(file, special_tokens={"x": 5})
    with pytest.raises(DataError, match=r"tokenizer\.special_tokens: the id 400 of 'y' is that of another token"):
        load(file, special_tokens={"x": 400, "y": 400})
    with pytest.raises(DataError, match=r"the id 99999999999 of 'x' is not 0 to"):
        load(file, special_tokens={"x": 99999999999})
    with pytest.raises(ValueError, match=r"eos: '<\|endoftxt\|>' is not among special_tokens; did you mean '<\|endoftext\|>'\? \(there: "):
        load(file, special_tokens=END, eos="<|endoftxt|>")


def test_settings_come_from_a_config(file):
    text = f'''
        [tokenizer]
        name = "tiktoken"
        path = "{file}"
        pattern = "gpt2"
        special_tokens = {{"<|endoftext|>" = 300}}
        %s
        [model]
        name = "decoder"
        [[optimizer]]
        name = "adamw"
        [train]
        steps = 1
    '''
    tokenizer = loads(text % 'bos = "<|endoftext|>"', "run.toml").tokenizer.build()
    assert (tokenizer.bos_id, tokenizer.eos_id) == (300, None)
    with pytest.raises(ConfigError, match=r"run.toml:7: tokenizer.bos: 'x' is not among special_tokens"):
        loads(text % 'bos = "x"', "run.toml")


def test_surrogates_and_texts_beyond_the_library_are_errors(file):
    tokenizer = load(file)
    with pytest.raises(DataError, match="character 1 .*surrogate"):
        tokenizer.encode("a\ud800")
    for text in ("a" * 1_000_000, " " * 500_000 + "x", "한" * 300_000):
        assert tokenizer.decode(tokenizer.encode(text).tolist()) == text
    with pytest.raises(DataError, match="very long run of white space; give shorter documents"):
        tokenizer.encode(" " * 1_500_000 + "x")
    assert tokenizer.encode("the").tolist() == [257]  # and it works on


def test_fingerprint_follows_file_pattern_and_special_tokens(tmp_path, file):
    longer = tmp_path / "longer.tiktoken"
    longer.write_bytes(ranks_text() + base64.b64encode(b"unheard of") + b" 270\n")
    kinds = [
        load(file), load(longer), load(file, "o200k_base"), load(file, special_tokens=END),
        load(file, special_tokens=END, bos="<|endoftext|>"), load(file, r"\p{L}+| |[\s\S]"),
    ]  # fmt: skip
    assert len({tokenizer.fingerprint for tokenizer in kinds}) == len(kinds)
    assert load(file).fingerprint == kinds[0].fingerprint


def test_a_file_replaced_in_place_is_read_anew(file):
    """The library's own loader keeps files by their path."""
    before = load(file)
    file.write_bytes(ranks_text([bytes([255 - value]) for value in range(256)]))
    after = load(file)
    assert (before.encode("a").tolist(), after.encode("a").tolist()) == ([0x61], [255 - 0x61])
    assert before.fingerprint != after.fingerprint


def test_rebuilds_and_pickles_without_the_path(file):
    component = Component.named("tokenizer", "tiktoken", path=str(file), pattern="gpt2", special_tokens=END, eos="<|endoftext|>")
    tokenizer = component.build()
    files = dict(tokenizer.files())
    assert files == {"tokenizer.tiktoken": file.read_bytes()}
    file.unlink()
    for again in (rebuild(component, files), pickle.loads(pickle.dumps(tokenizer))):
        assert again.fingerprint == tokenizer.fingerprint
        assert again.encode("the end").tolist() == tokenizer.encode("the end").tolist()
    with pytest.raises(DataError, match="lack 'tokenizer.tiktoken'"):
        rebuild(component, {"other": b""})


def test_serves_several_threads(file):
    tokenizer = load(file)
    texts = [f"the thing number {i} in the end" * 20 for i in range(200)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda text: tokenizer.encode(text).tolist(), texts))
    assert found == [tokenizer.encode(text).tolist() for text in texts]
