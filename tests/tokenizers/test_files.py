"""One type a file, said by the config: another's file is an error, never read some other way."""

from __future__ import annotations

from pathlib import Path

import pytest

from titanlm.errors import DataError
from titanlm.registry import Component
from titanlm.tokenizers.files import hint, recognise
from titanlm.tokenizers.rebuild import rebuild
from titanlm.tokenizers.training import train_sentencepiece

SETTINGS = {"sentencepiece": {}, "huggingface": {}, "tiktoken": {"pattern": "gpt2"}}
CARRIED = {"sentencepiece": "tokenizer.model", "huggingface": "tokenizer.json", "tiktoken": "tokenizer.tiktoken"}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """A file of each type, under names that say nothing."""
    import base64

    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("files")
    train_sentencepiece(["some words to train on " * 50], folder / "1", 290)
    backend = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel()
    backend.save(str(folder / "2"))
    (folder / "3").write_bytes(b"".join(base64.b64encode(bytes([value])) + f" {value}\n".encode() for value in range(256)))
    return {"sentencepiece": folder / "1", "huggingface": folder / "2", "tiktoken": folder / "3"}


@pytest.mark.parametrize("name", SETTINGS)
def test_no_type_reads_the_file_of_another(files, name):
    Component.named("tokenizer", name, path=str(files[name]), **SETTINGS[name]).build()
    for other, path in files.items():
        if other == name:
            continue
        with pytest.raises(DataError, match=rf'tokenizer\.path: {path}.*; it looks like .*, which name = "{other}" reads'):
            Component.named("tokenizer", name, path=str(path), **SETTINGS[name]).build()
        component = Component.named("tokenizer", name, path="gone", **SETTINGS[name])
        with pytest.raises(DataError, match=rf'^{CARRIED[name]}.*which name = "{other}" reads'):
            rebuild(component, {CARRIED[name]: path.read_bytes()})


def test_types_show_in_the_content(files):
    for name, path in files.items():
        content = path.read_bytes()
        assert recognise(content) == [name]
        assert recognise(content[: len(content) // 2]) in ([name], [])  # damaged
        assert hint(content, name) == ""


@pytest.mark.parametrize(
    "content",
    [b"", b"\n", b"\n\n\n", b"{}", b"{", b"[]", b"[1]", b'{"model": 1}', b'{"a": 0, "b": 1}', b"#version: 0.2\na b\n", b"plain words\n",
     b"word 12 and more\n", b"\x0a\xff\xff\xff\xff\xff", b"\x0a\x02ab", b"\x00" * 64, b"\xff" * 64, b"PK\x03\x04", b"PAR1", b'{"x":' * 100_000],
)  # fmt: skip
def test_other_content_is_of_no_type(content):
    assert recognise(content) == []
    assert hint(content, "sentencepiece") == ""
