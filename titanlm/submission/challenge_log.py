"""Reads the log of a challenge run: the lines that all its scripts print, whoever wrote the script.

A log begins with the script's source, then a line of a hundred ``=``; what
stands above it could look like a result and is passed over. Lines of one run:

    seed:1337
    step:500/20000 val_loss:2.3801 val_bpb:1.4096 train_time:29010ms step_avg:58.02ms
    stopping_early: wallclock_cap train_time:600019ms step:10352/20000
    Code size: 61147 bytes
    Total submission size int6+zstd: 15886143 bytes
    final_int8_zlib_roundtrip_exact val_loss:1.91128470 val_bpb:1.13196492

Logs of strangers may be of any size and hold anything: a line is read up to a
bound, the rest of it passed over, and nothing of it is kept but numbers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import BinaryIO

SEPARATOR = b"=" * 100
MAX_LINE = 4096
"""Bytes of a line that are looked at."""

_NUMBER = r"\s*(\d{1,12}(?:\.\d{1,20})?(?:e[-+]\d{1,3})?)"
_WHOLE = r"\s*(\d[\d,]{0,18})"
_SEED = re.compile(r"seed:\s*(\d{1,18})$")
_STEP = re.compile(r"(?:step:)?(\d{1,12})/\d{1,12}\s")
_STOP = re.compile(r"stopping_early:[^:]{0,60} train_time:\S{1,40} step:(\d{1,12})/")
_TIME = re.compile(rf"\btrain_time:{_NUMBER}ms")
_EVAL_TIME = re.compile(rf"\beval_time:{_NUMBER}ms")
_STEP_MS = re.compile(rf"\bstep_avg:{_NUMBER}ms")
_CODE = re.compile(rf"Code size[^:]{{0,60}}:{_WHOLE} bytes")
_TOTAL = re.compile(rf"Total submission size[^:]{{0,60}}:{_WHOLE} bytes")
_SCORE = re.compile(rf"([^\s:][^:]{{0,119}}) val_loss:{_NUMBER}\s{{1,8}}val_bpb:{_NUMBER}(?:\s|$)")


@dataclass(frozen=True)
class ChallengeLog:
    """What a log says; None for what it does not."""

    seed: int | None = None
    steps: int | None = None
    """Of the last line that counts them."""
    train_time_ms: float | None = None
    step_avg_ms: float | None = None
    code_bytes: int | None = None
    total_bytes: int | None = None
    """The last one: a script that prunes until it fits prints several."""
    score_name: str = ""
    """Of the line that the score is of."""
    val_loss: float | None = None
    """Nats a token, of the last line whose name ends in ``exact``, without one of the last scoring line after training."""
    val_bpb: float | None = None
    """Bits a byte, of the same line."""
    eval_time_ms: float | None = None
    """Of the last score that has one."""

    @property
    def bytes_per_token(self) -> float | None:
        """Of the validation set, as the two scores imply."""
        return self.val_loss / (math.log(2) * self.val_bpb) if self.val_loss and self.val_bpb else None


def read_log(file: BinaryIO) -> ChallengeLog:
    """What an open log says. Time grows with its size, memory does not."""
    log, in_run = ChallengeLog(), False
    for line in _lines(file):
        if line == SEPARATOR and not in_run:
            log, in_run = ChallengeLog(), True  # what came so far was source
        else:
            log = _said(log, line.decode("utf-8", "replace"))
    return log


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Each line's beginning, without white space around it."""
    while piece := file.readline(MAX_LINE):
        yield piece.strip()
        while piece and not piece.endswith(b"\n"):
            piece = file.readline(MAX_LINE)


def _said(log: ChallengeLog, line: str) -> ChallengeLog:
    if match := _SEED.match(line):
        return replace(log, seed=int(match[1]))
    if match := _CODE.match(line):
        return replace(log, code_bytes=_whole(match[1]))
    if match := _TOTAL.match(line):
        return replace(log, total_bytes=_whole(match[1]))
    if match := _STEP.match(line) or _STOP.match(line):
        time, step_ms = _TIME.search(line), _STEP_MS.search(line)
        log = replace(log, steps=int(match[1]))
        log = replace(log, train_time_ms=float(time[1])) if time else log
        return replace(log, step_avg_ms=float(step_ms[1])) if step_ms else log
    if match := _SCORE.match(line):
        if time := _EVAL_TIME.search(line):
            log = replace(log, eval_time_ms=float(time[1]))
        if match[1].endswith("exact") or not log.score_name.endswith("exact"):  # an exact score is not replaced by a rounded one
            log = replace(log, score_name=match[1], val_loss=float(match[2]), val_bpb=float(match[3]))
    return log


def _whole(digits: str) -> int:
    return int(digits.replace(",", ""))
