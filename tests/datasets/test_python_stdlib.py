from __future__ import annotations

from itertools import islice

import pytest

from titanlm.errors import DataError
from titanlm.registry import Component


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A small stand-in for the standard library."""
    files = {f"package{i % 3}/module{i}.py": f"'''Module {i}.'''\nx = {i}\n" for i in range(40)}
    files |= {"site-packages/other.py": "no", "test/test_x.py": "no", "idlelib/idle_test/t.py": "no", "a/__pycache__/b.py": "no"}
    files |= {"empty.py": "", "notes.txt": "no"}
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "latin.py").write_bytes("# -*- coding: latin-1 -*-\ns = 'é'\r\n".encode("latin-1"))
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    return tmp_path


def build(split="train", stream=0, n_streams=1, **settings):
    tokenizer = Component.named("tokenizer", "byte").build()
    component = Component.named("dataset", "python_stdlib", **settings)
    return component.build(tokenizer=tokenizer, split=split, stream=stream, n_streams=n_streams, seed=0)


def test_a_file_is_a_document_in_its_declared_encoding(library):
    texts = list(build(validation_fraction=0.0).texts())
    assert len(texts) == 41
    assert "# -*- coding: latin-1 -*-\ns = 'é'\n" in texts
    assert not any(text == "no" for text in texts)
    first = next(build(validation_fraction=0.0, shuffle=False))
    assert first.n_bytes == len(texts[0].encode()) == len(first.ids) - 2


def test_splits_are_disjoint_and_cover_everything(library):
    for fraction in (0.1, 0.5):
        train, validation = (list(build(split, validation_fraction=fraction).texts()) for split in ("train", "validation"))
        assert validation
        assert not set(train) & set(validation)
        assert sorted(train + validation) == sorted(build(validation_fraction=0.0).texts())
        assert len(list(build("validation", validation_fraction=fraction))) == len(validation)
    assert len(list(islice(build(validation_fraction=0.1), 100))) == 100


def test_files_held_out_by_name(library):
    named = {"validation_files": ("package0/*", "latin.py")}
    train, validation = (list(build(split, **named).texts()) for split in ("train", "validation"))
    assert len(validation) == 15
    assert all("Module" in text or "latin" in text for text in validation)
    assert not set(train) & set(validation)
    assert sorted(train + validation) == sorted(build(validation_fraction=0.0).texts())
    assert len(list(build("validation", validation_files=("latin.py",)).texts())) == 1
    with pytest.raises(DataError, match=r"dataset.validation_files: 'jsom/\*' matches none of 42 files, such as 'empty.py'"):
        build(validation_files=("latin.py", "jsom/*"))
    with pytest.raises(DataError, match="none of 42 files is left for 'train'; change dataset.validation_files"):
        build(validation_files=("*",))


def test_limits_cut_files_at_a_line_end(library):
    (library / "aaa.py").write_text("x = 'é'\n" * 10 + "end")
    (library / "aab.py").write_text("é" * 50)
    texts = list(build(validation_fraction=0.0, max_files=3, max_bytes_per_file=20).texts())
    assert texts[:2] == ["x = 'é'\n" * 2, "é" * 10]
    assert len(list(build(validation_fraction=0.0, max_files=5).texts())) == 4  # empty.py is the third


def test_fingerprint_follows_names_contents_and_settings(library):
    prints = [
        build(validation_fraction=0.0).fingerprint,
        build("validation", validation_fraction=0.5).fingerprint,
        build(validation_fraction=0.0, max_bytes_per_file=9).fingerprint,
    ]
    path = library / "package0/module0.py"
    path.write_text(path.read_text().replace("0", "9"))
    prints.append(build(validation_fraction=0.0).fingerprint)
    path.rename(path.with_name("renamed.py"))
    prints.append(build(validation_fraction=0.0).fingerprint)
    assert len(set(prints)) == 5
    assert build(validation_fraction=0.0, shuffle=False).fingerprint == prints[-1]


def test_errors_name_the_remedy(library, monkeypatch, tmp_path_factory):
    with pytest.raises(DataError, match=r"none of 42 files is left for 'validation'; change dataset\.validation_fraction"):
        build("validation", validation_fraction=0.0)
    (library / "aaa.py").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"cannot read aaa\.py"):
        next(build(validation_fraction=0.0, max_files=1))
    nothing = tmp_path_factory.mktemp("zipped")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(nothing))
    with pytest.raises(DataError, match=r"without the source files .* name = \"text\""):
        build()
