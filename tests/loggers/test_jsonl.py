"""metrics.jsonl: exact numbers, and every step once however often a run was killed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from titanlm.errors import TitanError
from titanlm.loggers.jsonl import Jsonl, JsonlConfig


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def logger(folder: Path, step: int) -> Jsonl:
    made = Jsonl(JsonlConfig(), run_dir=folder)
    made.message("a message before the start")
    made.start(step)
    return made


def test_floats_are_exact_and_lines_are_flushed(tmp_path: Path) -> None:
    made = logger(tmp_path, 0)
    values = {"loss": 0.1 + 0.2, "tiny": 5e-324, "large": 1.7976931348623157e308, "lr/adamw": 1 / 3}
    made.log(1, values)
    assert lines(tmp_path) == [{"step": 1, **values}]  # before close
    made.log(1, {"validation/a/loss": float("nan"), "perplexity": float("inf")})
    made.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text.splitlines()[1], parse_constant=pytest.fail) == {"step": 1, "validation/a/loss": None, "perplexity": None}


def test_resume_has_no_repeated_steps(tmp_path: Path) -> None:
    first = logger(tmp_path, 0)
    for step in (10, 20, 30):
        first.log(step, {"loss": float(step)})
        first.log(step, {"validation/a/loss": float(step)})
    first.close()
    second = logger(tmp_path, 20)  # the checkpoint was of step 20
    for step in (30, 40):
        second.log(step, {"loss": -float(step)})
    second.close()
    found = [(line["step"], line.get("loss")) for line in lines(tmp_path)]
    assert found == [(10, 10.0), (10, None), (20, 20.0), (20, None), (30, -30.0), (40, -40.0)]


def test_new_run_in_an_old_folder_begins_anew(tmp_path: Path) -> None:
    logger(tmp_path, 0).log(5, {"loss": 1.0})
    logger(tmp_path, 0).log(5, {"loss": 2.0})
    assert lines(tmp_path) == [{"step": 5, "loss": 2.0}]


@pytest.mark.parametrize("torn", [b'{"step": 3, "lo', b'{"step": 3}', b'{"step"', b"\xff\xfe", b"[3]", b"3", b'{"step": "3"}', b"\0\0\0"])
def test_torn_last_line_is_dropped(tmp_path: Path, torn: bytes) -> None:
    whole = b'{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.25}\n'
    (tmp_path / "metrics.jsonl").write_bytes(whole + torn)
    made = logger(tmp_path, 2)
    assert (tmp_path / "metrics.jsonl").read_bytes() == whole
    made.log(3, {"loss": 0.125})
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]


def test_last_line_without_its_break_is_completed(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": 2}')
    logger(tmp_path, 2).log(3, {})
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]


def test_untouched_file_is_not_rewritten(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n')
    before = (tmp_path / "metrics.jsonl").stat().st_ino
    logger(tmp_path, 1)
    assert (tmp_path / "metrics.jsonl").stat().st_ino == before


def test_unwritable_file_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(TitanError, match=r"metrics\.jsonl: cannot be written"):
        logger(tmp_path, 0)
