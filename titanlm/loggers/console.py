"""Metrics for people: a line a log step, on the terminal and in log.txt.

On a terminal the newest line of training metrics is rewritten in place, cut to
the terminal's width; it is completed and stays when something else is printed
(validation, a message, the end). Elsewhere, and in log.txt, every line is
printed. A terminal or pipe that goes away does not disturb training.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from titanlm.loggers.text import count, duration, printable
from titanlm.registry import register

_QUALITY: dict[str, Callable[[float], str]] = {
    "loss": "loss {:.4f}".format,
    "bits_per_byte": "bpb {:.4f}".format,
    "grad_norm": "grad {:.3g}".format,
}
_SPEED: dict[str, Callable[[float], str]] = {
    "tokens_per_s": lambda value: f"{count(value)} tok/s",
    "mfu": "MFU {:.1%}".format,
    "memory_gib": "mem {:.2f} GiB".format,
    "stall": "stall {:.1%}".format,
    "eta_s": lambda value: f"ETA {duration(value)}",
}
_UNSAID = {"lr", "tokens", "total_steps", "step_s", "elapsed_s", "reserved_gib"}
"""Known, but another field says it better."""


@dataclass(frozen=True)
class ConsoleConfig:
    live: bool = True
    """On a terminal, rewrite one line; false: print a line a log step there too."""


@register("logger", "console")
class Console:
    """Step, loss, bits per byte, gradient norm before clipping, learning rates, tokens/s, MFU, memory, loader stall, ETA.

    Metrics that are missing are not shown, except that MFU is "n/a" where the
    device's peak is unknown; metrics of other names come last as they are.
    """

    def __init__(self, config: ConsoleConfig, *, run_dir: Path) -> None:
        self.config = config
        self.file = run_dir / "log.txt"
        self._total = 0
        self._live = ""
        """The line that is on the terminal without a line break."""
        self._terminal_lost = False
        self._file: TextIO | None = None
        self._file_lost = False

    def start(self, step: int) -> None:
        """Nothing to prepare; log.txt tells of every attempt and is never cut back."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._total = int(metrics.get("total_steps", self._total))
        training = {name: value for name, value in metrics.items() if not name.startswith("validation/")}
        if training:
            line = "  ".join([self._head(step), *_fields(training)])
            self._to_file(line)
            self._training_line(line)
        for line in _validation_lines(metrics):
            self._line(f"{self._head(step)}  {line}")

    def message(self, text: str) -> None:
        self._line(printable(text).replace("\n", "\n    "))

    def close(self) -> None:
        self._to_terminal(self._finished())
        if self._file is not None:
            self._file.close()
            self._file = None

    def _head(self, step: int) -> str:
        return f"step {step:>{len(str(self._total))}}/{self._total}" if self._total else f"step {step}"

    # ------------------------------------------------------------ where lines go
    def _line(self, line: str) -> None:
        self._to_file(line)
        self._to_terminal(f"{self._finished()}{line}\n")

    def _training_line(self, line: str) -> None:
        width = self._live_width()
        if width:
            self._live = line
            self._to_terminal(f"\r{line[:width]}\x1b[K")
        else:
            self._to_terminal(f"{self._finished()}{line}\n")

    def _finished(self) -> str:
        """What turns the live line into one that stays, in full."""
        line, self._live = self._live, ""
        return f"\r{line}\x1b[K\n" if line else ""

    def _live_width(self) -> int:
        """Columns a live line may take; 0 where there is no terminal to rewrite."""
        try:
            if not self.config.live or sys.stdout is None or not sys.stdout.isatty() or os.environ.get("TERM") == "dumb":
                return 0
            # One column stays free: a full last column makes some terminals wrap, and \r would not get back.
            return (os.get_terminal_size(sys.stdout.fileno()).columns or 80) - 1
        except (OSError, ValueError):
            return 0

    def _to_terminal(self, text: str) -> None:
        stream = sys.stdout
        if not text or stream is None or self._terminal_lost:
            return
        try:
            encoding = getattr(stream, "encoding", None) or "utf-8"
            stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
            stream.flush()
        except (OSError, ValueError) as error:
            self._terminal_lost = True
            if isinstance(error, OSError):
                # What is still buffered would fail again when Python exits, and change the exit status.
                with contextlib.suppress(OSError, ValueError):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            with contextlib.suppress(OSError, ValueError):  # standard error may have gone with it
                print(f"WARNING: standard output is gone; training goes on and {self.file} has its lines", file=sys.stderr)

    def _to_file(self, line: str) -> None:
        if self._file_lost:
            return
        try:
            if self._file is None:
                self._file = open(self.file, "a", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115 - closed by close()
            self._file.write(f"{line}\n")
            self._file.flush()
        except OSError as error:
            self._file_lost = True
            if self._file is not None:
                with contextlib.suppress(OSError):  # it would write again what it could not
                    self._file.close()
                self._file = None
            with contextlib.suppress(OSError, ValueError):
                print(f"WARNING: {self.file}: {error.strerror}; no more is written there", file=sys.stderr)


# ---------------------------------------------------------------- what lines say
def _fields(metrics: Mapping[str, float]) -> Iterator[str]:
    """The most important first, because a narrow terminal shows only those."""
    for name, show in _QUALITY.items():
        if name in metrics:
            yield show(metrics[name])
    groups = {name.removeprefix("lr/"): value for name, value in metrics.items() if name.startswith("lr/")}
    if len(groups) > 1:
        yield "lr " + " ".join(f"{printable(group)} {value:.2e}" for group, value in groups.items())
    elif groups or "lr" in metrics:
        yield f"lr {[*groups.values(), metrics.get('lr')][0]:.2e}"
    for name, show in _SPEED.items():
        if name in metrics:
            yield show(metrics[name])
        elif name == "mfu" and "tokens_per_s" in metrics:
            yield "MFU n/a"
    for name, value in metrics.items():
        counted = name.startswith("data/") or (name.startswith("source/") and name.endswith("/tokens"))  # in metrics.jsonl, too long here
        if name not in _QUALITY and name not in _SPEED and name not in _UNSAID and not name.startswith("lr/") and not counted:
            yield f"{printable(name)} {value:.4g}"


def _validation_lines(metrics: Mapping[str, float]) -> Iterator[str]:
    """One line a validation set and kind of weights."""
    lines: dict[tuple[str, str], list[str]] = {}
    for key, value in metrics.items():
        if key.startswith("validation/"):
            entry, _, name = key.removeprefix("validation/").rpartition("/")
            weights = "averaged" if name.startswith("averaged_") else ""
            lines.setdefault((entry, weights), []).append(f"{name.removeprefix('averaged_').replace('_', ' ')} {value:.4f}")
    for (entry, weights), fields in lines.items():
        label = "validation" if entry == "validation" else f"validation {entry}"
        yield printable(f"{label}{f' ({weights} weights)' if weights else ''}: {'  '.join(fields)}").replace("\n", "\\n")
