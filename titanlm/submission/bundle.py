"""One file that trains without titanlm installed: the definitions that a config's run reaches, the config, and an importer.

Roots are ``entry.main`` and the factories of the config's components
(``reached`` says how names are followed from there). What nobody reaches (the
command line, other components, data preparation) is left out without a list of
what to leave out.

Two forms, with the same modules, importer and config: *readable*, where the
kept statements stand verbatim with their comments, and *compressed*, shortened
(``shorter``) and packed with LZMA and base85 behind one line that unpacks them.
They compute the same; the tests run both.
"""

from __future__ import annotations

import base64
import dataclasses
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import linecache
import lzma
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from titanlm.config import RunConfig, dump, flatten
from titanlm.errors import TitanError
from titanlm.registry import KINDS, Component, registrations
from titanlm.submission.reached import LEFT_OUT, Reached, is_module, path_of

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


@dataclass(frozen=True)
class Bundle:
    """The text of ``train_gpt.py`` and what is in it."""

    text: str
    modules: tuple[str, ...]
    """Modules of titanlm with at least one statement in it, stand-ins included."""
    packages: tuple[str, ...]
    """Top-level names that these import and titanlm is not, the standard library's included."""

    @property
    def n_bytes(self) -> int:
        """What the challenge counts as code."""
        return len(self.text.encode())


def bundle(config: RunConfig, form: Literal["readable", "compressed"] = "compressed") -> Bundle:
    """The file that trains, exports and scores ``config``.

    Raises TitanError when a component is none of titanlm's own, and when a
    setting needs what a submission cannot have.
    """
    flat = flatten(config)
    for what, (setting, unused) in LEFT_OUT.items():
        if setting and flat.get(setting) not in unused:
            raise TitanError(f"{setting} = {flat[setting]!r}: {what} is left out of a submission, so it must be {' or '.join(map(repr, unused))}")
    components = sorted({(component.kind, component.name) for component in components_of(config)})
    reached = Reached()
    reached.need(*ENTRY)
    for kind, name in components:
        module = f"titanlm.{KINDS[kind].folder}.{name}"
        definitions = [node.name for node in registrations(path_of(module), kind, name)] if is_module(module) else []
        if not definitions:
            raise TitanError(f"{kind} {name!r} is none of titanlm's own components, and only those can be put into one file")
        reached.need(module, definitions[0])
    sources = reached.sources(minified=form == "compressed")
    frame = _FRAME.format(
        config=_literal(dump(config)),
        components="".join(f"\n    {f'titanlm.{KINDS[kind].folder}.{name}'!r}," for kind, name in components),
        sources="\n\n".join(f"SOURCES[{name!r}] = {_literal(source)}" for name, source in sources.items()),
        importer=inspect.getsource(Importer),
        entry=ENTRY,
    )
    head = '"""Trains, exports and scores one language model: `python train_gpt.py`, or by torchrun; `--eval ARTIFACT` scores again."""\n\n'
    if form == "compressed":
        # No match is further away than the text is long; of text the upper bits of the byte before say more than the position.
        filters = [{"id": lzma.FILTER_LZMA1, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 22, "lc": 4, "lp": 0, "pb": 0}]
        packed = base64.b85encode(lzma.compress(frame.encode(), lzma.FORMAT_ALONE, filters=filters)).decode()
        frame = f'import base64\nimport lzma\n\nexec(compile(lzma.decompress(base64.b85decode("{packed}")), __file__, "exec"))\n'
    return Bundle(head + frame, tuple(sources), tuple(sorted(reached.packages)))


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


def _literal(text: str) -> str:
    """A string literal with the text as it is, where three quotes allow it."""
    if "'''" not in text and not text.endswith(("\\", "'")):
        return f"r'''{text}'''"
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'''{escaped}'''"
