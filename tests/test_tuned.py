"""Choices made by measurement are made once, are the same on all ranks, and a file that is not theirs is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from titanlm.config import load
from titanlm.distributed.world import Peers
from titanlm.errors import TitanError
from titanlm.train import Trainer
from titanlm.tuned import TUNED, Tuned


def test_decided_once_and_taken_up_by_the_next_start(tmp_path: Path) -> None:
    asked: list[int] = []
    told: list[str] = []

    def decide() -> dict[str, Any]:
        asked.append(1)
        return {"backend": "flex", "shape": (4, 2)}

    first = Tuned(tmp_path, Peers(), told.append)
    assert first.get("attention") is None
    # As it will be read again: a run must not compute with a tuple that its resume has as a list.
    assert first.choice("attention", decide) == first.choice("attention", decide) == {"backend": "flex", "shape": [4, 2]}
    assert first.choice("none", lambda: None) is None
    assert first.keep("rows", 4) == 4
    again = Tuned(tmp_path, Peers(), told.append)
    assert again.choice("attention", decide) == {"backend": "flex", "shape": [4, 2]}
    assert again.choice("none", decide) is None
    assert again.get("rows") == 4
    assert len(asked) == 1
    assert told == [
        "measuring, which may take a minute: attention",
        'chosen by measurement: attention = {"backend": "flex", "shape": [4, 2]}',
        "measuring, which may take a minute: none",
        "chosen by measurement: none = null",
        "chosen by measurement: rows = 4",
    ]


def test_a_run_begins_with_the_choices_of_another(tmp_path: Path) -> None:
    """Unless it has some of its own, and they are its own at once."""
    told: list[str] = []
    run, other = tmp_path / "run", tmp_path / "other"
    for folder in (run, other):
        folder.mkdir()
    assert Tuned(run, Peers(), told.append, other).get("rows") is None
    assert told == []
    assert not (run / TUNED).exists()
    for key, value in (("rows", 4), ("attention", "flex")):
        Tuned(other, Peers(), print).keep(key, value)
    assert Tuned(run, Peers(), told.append, other).choice("rows", lambda: 5) == 4
    assert told == [f"choices made before by {other}: 2"]
    (other / TUNED).unlink()
    assert Tuned(run, Peers(), told.append, other).get("attention") == "flex"
    Tuned(other, Peers(), print).keep("rows", 6)
    assert Tuned(run, Peers(), told.append, other).get("rows") == 4
    assert len(told) == 1
    (run / TUNED).unlink()
    (other / TUNED).write_text("{")
    with pytest.raises(TitanError, match=r"other/tuned\.json: damaged, no JSON"):
        Tuned(run, Peers(), print, other)


@pytest.mark.parametrize(
    ("settings", "taken"),
    [
        (["--train.compile_cache={other}", "--train.compile=block"], True),
        (["--train.compile_cache={other}/compile_cache.bin", "--train.compile=block"], False),
        (["--train.compile_cache={other}"], False),  # nothing is compiled
    ],
)
def test_it_is_the_run_whose_compile_cache_is_named(tiny: Path, tmp_path: Path, settings: list[str], taken: bool) -> None:
    other = tmp_path / "other"
    other.mkdir()
    Tuned(other, Peers(), print).keep("rows", 4)
    (other / "compile_cache.bin").touch()
    with Trainer(load(tiny, [setting.format(other=other) for setting in settings])) as trainer:
        assert trainer.choices.tuned.get("rows") == (4 if taken else None)
    assert (f"choices made before by {other}: 1" in (trainer.folder.path / "log.txt").read_text()) == taken


def test_a_decision_that_fails_is_not_kept(tmp_path: Path) -> None:
    def fail() -> None:
        raise TitanError("no")

    tuned = Tuned(tmp_path, Peers(), print)
    with pytest.raises(TitanError, match="no"):
        tuned.choice("a", fail)
    assert not (tmp_path / TUNED).exists()
    assert tuned.choice("a", lambda: 1) == 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"format": 1, "choi', "damaged, no JSON"),
        (b"\xff\xfe", "damaged, no JSON"),
        (b"[" * 100_000, "damaged, no JSON"),
        (b"[]", "holds no choices"),
        (b'{"format": 1, "choices": []}', "holds no choices"),
        (b'{"format": 2, "choices": {}}', "is of format 2, and this version reads 1"),
    ],
)
def test_other_files_are_refused_with_the_remedy(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / TUNED).write_bytes(content)
    with pytest.raises(TitanError, match=rf"tuned\.json: .*{said}.*delete or move it"):
        Tuned(tmp_path, Peers(), print)
    assert (tmp_path / TUNED).read_bytes() == content


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    tuned = Tuned(tmp_path / "gone", Peers(), print)
    with pytest.raises(TitanError, match=r"tuned\.json: cannot be written: No such file"):
        tuned.choice("a", lambda: 1)
    (tmp_path / TUNED).mkdir()
    with pytest.raises(TitanError, match=r"tuned\.json: cannot be read: Is a directory"):
        Tuned(tmp_path, Peers(), print)


@pytest.mark.distributed
def test_rank_0_decides_for_all(tmp_path: Path, zygote: Any) -> None:
    """Rank 1 would decide otherwise and sees another file: it goes by rank 0 all the same."""
    code = f"""
import torch.distributed as dist
from pathlib import Path
from titanlm.distributed.world import Peers, World
from titanlm.errors import TitanError
from titanlm.tuned import Tuned
dist.init_process_group("gloo")
rank = dist.get_rank()
folder = Path({str(tmp_path)!r}) / str(rank)
folder.mkdir()
tuned = Tuned(folder, Peers(World.from_environment()), print)
print("got", tuned.choice("a", lambda: 10 + rank), tuned.keep("b", 20 + rank), tuned.get("a"), (folder / "tuned.json").exists())
def fail():
    raise TitanError("rank 0 cannot")
try:
    tuned.choice("c", fail)
except TitanError as error:
    print("told", error)
dist.destroy_process_group()
"""
    launched = zygote.run(code, ranks=2).expect(0)
    assert "got 10 20 10 True" in launched.output(0)
    assert "got 10 20 10 False" in launched.output(1)
    assert "told rank 0 cannot" in launched.output(0)
    assert "told rank 0: rank 0 cannot" in launched.output(1)
    assert json.loads((tmp_path / "0" / TUNED).read_text()) == {"format": 1, "choices": {"a": 10, "b": 20}}
