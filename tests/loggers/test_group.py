"""One failing logger must not stop training or the others."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from titanlm.errors import TitanError
from titanlm.loggers.group import LoggerGroup


class Recorder:
    def __init__(self, fails: str = "", error: Exception | None = None) -> None:
        self.calls: list[tuple] = []
        self.fails, self.error = fails, error or RuntimeError("disk\x1b full")

    def _call(self, *call: object) -> None:
        self.calls.append(call)
        if call[0] == self.fails:
            raise self.error

    def start(self, step: int) -> None:
        self._call("start", step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._call("log", step, dict(metrics))

    def message(self, text: str) -> None:
        self._call("message", text)

    def close(self) -> None:
        self._call("close")


def everything(group: LoggerGroup) -> None:
    group.message("hello")
    group.start(3)
    group.log(4, {"loss": 1.0})
    group.log(5, {"loss": 0.5})
    group.close()


ALL = [("message", "hello"), ("start", 3), ("log", 4, {"loss": 1.0}), ("log", 5, {"loss": 0.5}), ("close",)]


@pytest.mark.parametrize("moment", ["message", "start", "log", "close"])
def test_a_failing_logger_is_dropped_with_one_warning(moment: str, capsys: pytest.CaptureFixture[str]) -> None:
    before, broken, after = Recorder(), Recorder(fails=moment), Recorder()
    everything(LoggerGroup([before, broken, after]))
    assert before.calls == after.calls == ALL
    made = [call[0] for call in broken.calls]
    assert made.count(moment) == (2 if moment == "close" else 1)
    errors = capsys.readouterr().err
    assert errors.count("WARNING") == 1
    assert "RuntimeError: disk\\x1b full" in errors


def test_a_mistake_found_at_the_start_is_passed_on_and_others_are_closed() -> None:
    fine, wrong = Recorder(), Recorder(fails="start", error=TitanError("no key"))
    with pytest.raises(TitanError, match="no key"):
        LoggerGroup([fine, wrong]).start(0)
    assert fine.calls[-1] == ("close",)


def test_a_titan_error_later_does_not_stop_training(capsys: pytest.CaptureFixture[str]) -> None:
    group = LoggerGroup([Recorder(fails="log", error=TitanError("gone"))])
    group.log(1, {})
    group.log(2, {})
    assert capsys.readouterr().err.count("gone") == 1


def test_interrupts_pass_through() -> None:
    class Interrupts(Recorder):
        def log(self, step: int, metrics: Mapping[str, float]) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        LoggerGroup([Interrupts()]).log(1, {})
