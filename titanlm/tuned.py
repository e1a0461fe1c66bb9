"""Choices made by measurement: which kernel, how many rows at a time. They are made once and kept with the run.

What is fastest or largest depends on the machine, and measuring the same twice
may give two answers, so a resumed run that measured again might compute with
other kernels, and in other roundings, than it began with. Therefore
``tuned.json`` in the run folder holds what was chosen, and a run that finds it
there goes by it. So does one that begins with what another run compiled, which
would fit nothing that it chose otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from titanlm.distributed.world import Peers
from titanlm.errors import TitanError
from titanlm.runs import write_atomic

JSON: TypeAlias = Any
"""What ``json`` reads and writes: numbers, strings, lists, dicts by string, booleans, None."""

TUNED = "tuned.json"
FORMAT = 1


class Tuned:
    """The choices of a run, the same on every rank; rank 0 reads and writes them.

    ``other`` is the folder of a run whose choices become those of one that has none yet.
    ``tell`` gets a line before and after each new choice, since measuring may
    take a while. Every method but ``get`` is collective. Raises TitanError on every rank when the file is damaged or is
    not one of these.
    """

    def __init__(self, folder: Path, peers: Peers, tell: Callable[[str], object], other: Path | None = None) -> None:
        self.path, self.peers, self.tell = folder / TUNED, peers, tell
        # As rank 0 reads them: a file system may show the others an older file.
        self._choices: dict[str, JSON] = peers.gather(peers.first(lambda: self._begin(other)))[0]

    def get(self, key: str) -> JSON:
        """What was chosen, or None."""
        return self._choices.get(key)

    def choice(self, key: str, decide: Callable[[], JSON]) -> JSON:
        """What was chosen; if nothing was, what ``decide`` says on rank 0, which is kept. A TitanError in it is every rank's."""
        if key in self._choices:
            return self._choices[key]
        self.tell(f"measuring, which may take a minute: {key}")
        return self.keep(key, self.peers.first(decide))

    def keep(self, key: str, value: JSON) -> JSON:
        """Rank 0's ``value``, from now on what was chosen; for decisions that all ranks take part in. As it will be read again: tuples are lists."""
        value = json.loads(json.dumps(self.peers.gather(value)[0]))
        self._choices[key] = value
        self.peers.first(lambda: self._write(self._choices))
        self.tell(f"chosen by measurement: {key} = {json.dumps(value)}")
        return value

    def _begin(self, other: Path | None) -> dict[str, JSON]:
        if other is None or self.path.exists():
            return read(self.path)
        choices = read(other / TUNED)
        if choices:
            self._write(choices)  # so that a resume does without the other run
            self.tell(f"choices made before by {other}: {len(choices)}")
        return choices

    def _write(self, choices: dict[str, JSON]) -> None:
        try:
            write_atomic(self.path, json.dumps({"format": FORMAT, "choices": choices}, indent=1) + "\n")
        except OSError as error:
            raise TitanError(f"{self.path}: cannot be written: {error.strerror}; without it a resumed run might choose otherwise") from error


def read(path: Path) -> dict[str, JSON]:
    """The choices in a file, none when there is no file. Raises TitanError."""
    remedy = "delete or move it, and what it held is measured and chosen anew"
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise TitanError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError too
        raise TitanError(f"{path}: damaged, no JSON ({error}); {remedy}") from error
    if not isinstance(stored, dict) or not isinstance(stored.get("choices"), dict):
        raise TitanError(f"{path}: holds no choices of a run; {remedy}")
    if stored.get("format") != FORMAT:
        raise TitanError(f"{path}: is of format {stored.get('format')!r}, and this version reads {FORMAT}; {remedy}")
    choices: dict[str, JSON] = stored["choices"]
    return choices
