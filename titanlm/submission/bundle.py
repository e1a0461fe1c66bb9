"""One file that trains without titanlm installed: the definitions that a config's run reaches, and the config.

Roots are ``entry.main`` and the factories of the config's components
(``reached`` says how names are followed from there). What nobody reaches (the
command line, other components, data preparation) is left out without a list of
what to leave out.

Two forms that compute the same; the tests run both. In the *readable* one the
kept statements stand verbatim with their comments, and an importer serves them
as the modules they are from. The *compressed* one has them as a single module
with short names (``joined``, ``shorter``), packed with bz2.

What is packed stands in the file byte by byte, as a string literal of a source
in Latin-1, where only four bytes need a backslash: 1.2 % more, against 25 % for
base85. bz2 makes 4 % less of it than LZMA, and of the text backwards 0.5 % less still.
"""

from __future__ import annotations

import ast
import bz2
import dataclasses
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import linecache
import re
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import tomli_w

from titanlm.config import RunConfig, dump, flatten, loads, to_tables
from titanlm.errors import TitanError
from titanlm.registry import KINDS, Component, registrations
from titanlm.submission.joined import joined
from titanlm.submission.reached import Reached, is_module, left_out, path_of

ENTRY = ("titanlm.submission.entry", "main")
"""Module and function that the file runs."""


class Importer(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Serves ``titanlm`` out of a table of sources, and none from elsewhere: an installed one is never seen.

    Sources are in linecache too, so that tracebacks, ``inspect`` and Triton find them.
    """

    def __init__(self, sources: dict[str, str], file: str) -> None:
        self.sources, self.file = sources, file

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] != "titanlm":
            return None
        if fullname not in self.sources:
            raise ModuleNotFoundError(f"{fullname} is no part of {self.file}", name=fullname)
        package = any(name.startswith(f"{fullname}.") for name in self.sources)
        origin = f"{self.file}/{fullname.replace('.', '/')}{'/__init__' * package}.py"
        spec = importlib.util.spec_from_loader(fullname, self, origin=origin, is_package=package)
        assert spec is not None
        spec.has_location = True
        return spec

    def get_source(self, fullname: str) -> str:
        return self.sources[fullname]

    def exec_module(self, module: types.ModuleType) -> None:
        name, file = module.__name__, str(module.__file__)
        source = self.sources[name]
        linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file
        exec(compile(source, file, "exec", dont_inherit=True), module.__dict__)


_FRAME = """\
from __future__ import annotations

import importlib.abc
import importlib.util
import linecache
import os
import sys

FILE = os.path.abspath(__file__)
CONFIG = {config}
COMPONENTS = ({components}
)
SOURCES = {{}}

{sources}

{importer}

sys.meta_path.insert(0, Importer(SOURCES, FILE))
if __name__ == "__main__":
    for name in COMPONENTS:
        importlib.import_module(name)
    from {entry[0]} import {entry[1]}

    sys.exit({entry[1]}(sys.argv[1:], CONFIG, FILE))
"""

_JOINED = """\
import linecache
import os
import sys
import types

FILE = os.path.abspath(__file__)
CONFIG = {config}
SOURCE = {source}
place = FILE + "/titanlm/__init__.py"
linecache.cache[place] = len(SOURCE), None, SOURCE.splitlines(keepends=True), place
module = sys.modules["titanlm"] = types.ModuleType("titanlm")
module.__file__ = place
exec(compile(SOURCE, place, "exec"), module.__dict__)
if __name__ == "__main__":
    sys.exit(module.{entry}(sys.argv[1:], CONFIG, FILE))
"""


@dataclass(frozen=True)
class Bundle:
    """The text of ``train_gpt.py`` and what is in it."""

    content: bytes
    """In UTF-8, or in Latin-1, as the first line then says."""
    modules: tuple[str, ...]
    """Modules of titanlm with at least one statement in it, stand-ins included."""
    packages: tuple[str, ...]
    """Top-level names that these import and titanlm is not, the standard library's included."""

    @property
    def n_bytes(self) -> int:
        """What the challenge counts as code."""
        return len(self.content)


def bundle(config: RunConfig, form: Literal["readable", "compressed"] = "compressed") -> Bundle:
    """The file that trains, exports and scores ``config``.

    Raises TitanError when a component is none of titanlm's own, when a setting
    needs what a submission cannot have, and when the code has what cannot be
    followed (a module as a value, ``locals()``, a relative import).
    """
    components = sorted({(component.kind, component.name) for component in components_of(config)})
    modules = [f"titanlm.{KINDS[kind].folder}.{name}" for kind, name in components]
    reached = Reached(left_out(flatten(config)))
    reached.need(*ENTRY)
    for module, (kind, name) in zip(modules, components, strict=True):
        definition = next(iter(registrations(path_of(module), kind, name) if is_module(module) else ()), None)
        if definition is None:
            raise TitanError(f"{kind} {name!r} is none of titanlm's own components, and only those can be put into one file")
        if isinstance(definition, ast.ClassDef) and not any(getattr(item, "name", "") == "__init__" for item in definition.body):
            raise TitanError(f"{module}.{definition.name}: needs an __init__ of its own, since annotations of others, which registering reads, are not kept")
        reached.need(module, definition.name)
    sources = reached.sources()
    head = b'"""Trains, exports and scores one language model: `python train_gpt.py`, or by torchrun; `--eval ARTIFACT` scores again."""\n\n'
    if form == "compressed":
        text, entry = joined(sources, [*modules, ENTRY[0]], ENTRY)
        lean = tomli_w.dumps(_lean(config))
        if dump(loads(lean)) != dump(config):
            raise AssertionError("leaving out defaults changed what the config means")
        frame = _JOINED.format(config=_literal(lean), source=_literal(text), entry=entry)
        content = b"# coding: latin-1\n" + head + _packed(frame)
    else:
        frame = _FRAME.format(
            config=_literal(dump(config)),
            components="".join(f"\n    {module!r}," for module in modules),
            sources="\n\n".join(f"SOURCES[{name!r}] = {_literal(source)}" for name, source in sources.items()),
            importer=inspect.getsource(Importer),
            entry=ENTRY,
        )
        content = head + frame.encode()
    return Bundle(content, tuple(sources), tuple(sorted(reached.packages)))


def components_of(value: Any) -> Iterator[Component]:
    """Every component that a config names, those inside settings included."""
    if isinstance(value, Component):
        yield value
        yield from components_of(value.config)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for item in dataclasses.fields(value):
            yield from components_of(getattr(value, item.name))
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from components_of(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from components_of(item)


def _lean(value: Any) -> Any:
    """The tables of a config without settings that have their default, which the file's own definitions know."""
    if isinstance(value, Component):
        return {"name": value.name, **_lean(value.config)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        pairs = ((item, getattr(value, item.name)) for item in dataclasses.fields(value))
        defaults = ((item.name, own, item.default_factory() if callable(item.default_factory) else item.default) for item, own in pairs)
        return {name: _lean(own) for name, own, default in defaults if own is not None and own != default}
    if isinstance(value, tuple | list):
        return [_lean(item) for item in value]
    return to_tables(value)


def _packed(text: str) -> bytes:
    """A program that runs ``text``, out of a string whose letters are bytes."""
    content = bz2.compress(text.encode()[::-1])  # backwards, since what comes before a letter says more about it
    # In source, NUL and a carriage return cannot stand for themselves; neither can what ends the string, nor what escapes.
    for pattern, escaped in ((rb"\\", rb"\\\\"), (rb"\0(?=[0-7])", rb"\\x00"), (rb"\0", rb"\\0"), (rb"\r", rb"\\r"), (rb"'(?=''|\Z)", rb"\\'")):
        content = re.sub(pattern, escaped, content)
    return b"import bz2\n\nexec(compile(bz2.decompress('''%b'''.encode('latin-1'))[::-1], __file__, 'exec'))\n" % content


def _literal(text: str) -> str:
    """A string literal with the text as it is, where three quotes allow it."""
    if "'''" not in text and not text.endswith(("\\", "'")):
        return f"r'''{text}'''"
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'''{escaped}'''"
