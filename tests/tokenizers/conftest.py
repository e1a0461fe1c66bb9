"""What tests of `titanlm tokenizer` share."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from titanlm import cli


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`titanlm tokenizer WORDS`: what it prints, on stderr where a status other than 0 is expected."""

    def run(*words: str, status: int = 0) -> str:
        found = cli.main(["tokenizer", *words])
        out, err = capsys.readouterr()
        assert found == status, err
        return err if status else out

    return run
