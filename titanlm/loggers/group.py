"""All loggers of a run behind one."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping, Sequence

from titanlm.errors import TitanError
from titanlm.loggers.text import printable
from titanlm.registry import Logger


class LoggerGroup:
    """Hands everything to every logger; one that fails is dropped and training goes on.

    A run must not die at hour nine because a disk is full or a server is away.
    A failure is one warning on stderr. Only a TitanError from ``start`` is
    passed on: it is a mistake the user can mend, and nothing has run yet.
    Only rank 0 has loggers.
    """

    def __init__(self, loggers: Sequence[Logger]) -> None:
        self.loggers = list(loggers)

    def start(self, step: int) -> None:
        """Raises TitanError when a logger cannot be used at all."""
        try:
            self._each(lambda logger: logger.start(step), passed_on=TitanError)
        except TitanError:
            self.close()
            raise

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._each(lambda logger: logger.log(step, metrics))

    def message(self, text: str) -> None:
        self._each(lambda logger: logger.message(text))

    def close(self) -> None:
        self._each(lambda logger: logger.close())
        self.loggers.clear()

    def _each(self, call: Callable[[Logger], None], passed_on: type[Exception] | tuple[()] = ()) -> None:
        for logger in list(self.loggers):
            try:
                call(logger)
            except passed_on:
                raise
            except Exception as error:
                self.loggers.remove(logger)
                with contextlib.suppress(Exception):
                    logger.close()
                with contextlib.suppress(OSError, ValueError):  # stderr may be gone as well
                    problem = printable(f"{type(error).__name__}: {error}")
                    print(f"WARNING: logger {type(logger).__name__} failed and is dropped; training goes on ({problem})", file=sys.stderr)
