"""Config sources: TOML files, ``extends`` and command-line overrides as one set of tables.

Beside the tables goes a record of where each key was written (``run.toml:8``
or ``--model.n_layers``), because an error is only mended quickly when it says
where. Python's TOML readers give positions for syntax errors alone, so a second
pass over the tokens of the text finds the lines of its keys.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli

from titanlm.errors import ConfigError, RegistryError
from titanlm.registry import did_you_mean

MAX_FILE_BYTES = 1 << 20
MAX_KEY_PARTS = 32

LISTS = frozenset({"optimizer", "quantizer", "curriculum", "validation", "logger"})
"""Top-level keys that hold lists; a single table or name counts as a list of one."""

ALTERNATIVES = (("train", "micro_batch"), ("train", "micro_batch_tokens"))
"""Keys that exclude one another: one that is laid over the other takes its place."""

Tables = dict[str, Any]
KeyPath = tuple[str | int, ...]
Origins = dict[KeyPath, str]
"""Where each key was written."""


# Possessive, and never starting inside a word, so that the work stays linear in the text.
_TOO_DEEP = re.compile(rf"""(?<![A-Za-z0-9_-])(?:(?:"[^"\n]*+"|'[^'\n]*+'|[A-Za-z0-9_-]++)[ \t]*+\.[ \t]*+){{{MAX_KEY_PARTS}}}""")
_TOKEN = re.compile(
    r"""
      \"{3}(?:\\.|[^\\])*?\"{3,5} | '{3}.*?'{3,5} | \"(?:\\.|[^\"\\])*+\" | '[^']*+'  # strings
    | \#[^\n]*+                                                                         # comments
    | [A-Za-z0-9_-]++                                                                   # words and numbers
    | [\n\[\]{},=]                                                                      # what gives structure
    | [^A-Za-z0-9_\n\[\]{},=\"'\#-]++                                                   # blanks, dots and the rest
    """,
    re.DOTALL | re.VERBOSE,
)


def read_file(path: Path, origins: Origins, chain: tuple[Path, ...]) -> Tables:
    """The tables of a file laid over those it extends."""
    try:
        resolved = path.resolve()
        if resolved in chain:
            cycle = " → ".join(link.name for link in (*chain, resolved))
            raise ConfigError([f"{path}: extends: a file extends itself: {cycle}"], str(path))
        if not path.is_file():
            raise FileNotFoundError
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise ConfigError([f"{path}: {size} bytes; a config holds at most {MAX_FILE_BYTES}"], str(path))
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        near = did_you_mean(path.name, [file.name for file in path.parent.glob("*.toml")] if path.parent.is_dir() else [])
        what = "is a directory" if path.is_dir() else "no such file"
        raise ConfigError([f"{path}: {what}{near}"], str(path)) from None
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path}: not UTF-8 at byte {error.start}"], str(path)) from None
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read: {error.strerror}"], str(path)) from None
    except (RuntimeError, ValueError) as error:  # a loop of symbolic links; a zero byte in the name
        raise ConfigError([f"{str(path)!r}: cannot be read: {error}"], repr(str(path))) from None
    own: Origins = {}
    tables = parse(text, str(path), own)
    parent = tables.pop("extends", None)
    if parent is None:
        origins.update(own)
        return tables
    if not isinstance(parent, str):
        raise ConfigError([f"{own.get(('extends',), path)}: extends: expected the name of one file, got {parent!r}"], str(path))
    base = read_file(path.parent / parent, origins, (*chain, resolved))
    merged = _merge(base, tables, (), origins)
    origins.update(own)
    return merged


def parse(text: str, source: str, origins: Origins) -> Tables:
    """TOML to tables; ``origins`` receives ``source:line`` of every key."""
    text = text.replace("\r\n", "\n")
    # Before the parser sees it: its work on nested keys grows with the square of their depth.
    deep = _TOO_DEEP.search(text)
    if deep is not None:
        line = text.count("\n", 0, deep.start()) + 1
        raise ConfigError([f"{source}:{line}: a key of more than {MAX_KEY_PARTS} parts"], source)
    try:
        tables = tomli.loads(text)
    except tomli.TOMLDecodeError as error:
        lineno = getattr(error, "lineno", 0)
        raise ConfigError([f"{source}:{lineno}: not valid TOML: {getattr(error, 'msg', error)}"], source) from None
    except RecursionError:
        raise ConfigError([f"{source}: not valid TOML: nested too deeply"], source) from None
    except ValueError:  # Python's own limit on the digits of an integer
        raise ConfigError([f"{source}: an integer has too many digits"], source) from None
    for path, line in _key_lines(text):
        origins[path] = f"{source}:{line}"
    for key in LISTS & tables.keys():
        if not isinstance(tables[key], list):
            tables[key] = [tables[key]]
            for path in [path for path in origins if path[0] == key]:
                origins[key, 0, *path[1:]] = origins[path]
    return tables


def _key_lines(text: str) -> Iterator[tuple[KeyPath, int]]:
    """(path, line) of every header and key of a valid TOML text, those in inline tables included."""
    table: KeyPath = ()  # of the last header
    counts: dict[KeyPath, int] = {}  # last index of each array of tables
    brackets: list[str] = []  # of the header being read
    parts: list[str] = []  # of the key or header being read
    reading_key, path, line = True, table, 1
    around: list[tuple[KeyPath, int]] = []  # arrays and inline tables the value is in: path, index of the item (-1: a table)
    for token in _TOKEN.findall(text):
        if token == "\n" and not around:
            reading_key, parts, brackets = True, [], []
        elif token == "{" and not reading_key:
            around.append((path, -1))
            reading_key, parts = True, []
        elif token in ("]", "}") and around:
            path, reading_key = around.pop()[0], False
        elif token == "[" and not reading_key:
            around.append((path, 0))
            path = (*path, 0)
        elif token == "," and around:
            path, index = around.pop()
            reading_key, parts = index < 0, []
            around.append((path, index if reading_key else index + 1))
            path = path if reading_key else (*path, index + 1)
        elif reading_key and token == "[":
            brackets.append(token)
        elif reading_key and token == "]" and brackets:
            table = ()
            for position, part in enumerate(parts, 1):
                table = (*table, part)
                if position == len(parts) and len(brackets) == 2:
                    counts[table] = counts.get(table, -1) + 1
                if table in counts:
                    table = (*table, counts[table])
            yield table, line
            brackets, parts = [], []
        elif reading_key and token == "=":
            path = (*(around[-1][0] if around else table), *parts)
            reading_key = False
            yield path, line
        elif reading_key and (token[0] in "\"'_-" or token[0].isalnum()):
            parts.append(_unquoted(token))
        line += token.count("\n")


def _unquoted(key: str) -> str:
    if key[0] not in "\"'":
        return key
    return str(tomli.loads(f"key = {key}")["key"]) if "\\" in key else key[1:-1]


def _merge(base: Any, over: Any, path: KeyPath, origins: Origins) -> Any:
    """Tables of the same component merge; another component, a list or a value replaces, and takes its origins along."""
    if isinstance(base, str) and isinstance(over, dict) and over.get("name", base) == base:
        return {"name": base, **over}
    tables = isinstance(base, dict) and isinstance(over, dict)
    # `run.name` names a folder, not a component.
    if not tables or (path != ("run",) and over.get("name", base.get("name")) != base.get("name", over.get("name"))):
        _forget(path, origins)
        return over
    _make_way(base, over, path, origins)
    return {**base, **{key: _merge(base[key], value, (*path, key), origins) if key in base else value for key, value in over.items()}}


def _make_way(base: Any, over: Any, path: KeyPath, origins: Origins) -> None:
    """Take out of a table what one of the keys laid over it excludes."""
    if any((*path, key) in ALTERNATIVES for key in over):
        for *table, key in ALTERNATIVES:
            if tuple(table) == path and key not in over and base.pop(key, None) is not None:
                _forget((*path, key), origins)


def _forget(path: KeyPath, origins: Origins) -> None:
    for below in [key for key in origins if key[: len(path)] == path]:
        del origins[below]


def override(tables: Tables, overrides: Sequence[str], origins: Origins) -> None:
    """Lay ``--a.b=value`` strings over the tables; the right side is TOML if it can be, else a string."""
    problems = []
    for override in overrides:
        match = re.fullmatch(r"--((?:[A-Za-z0-9_-]+\.)*[A-Za-z0-9_-]+)=(.*)", override, re.DOTALL)
        if match is None:
            problems.append(f"{_short(override)}: an override is written --section.key=value")
            continue
        parts: list[str | int] = [int(part) if re.fullmatch(r"[0-9]{1,9}", part) else part for part in match[1].split(".")]
        if len(parts) > MAX_KEY_PARTS or len(match[2]) > MAX_FILE_BYTES or _TOO_DEEP.search(match[2]):
            problems.append(f"{_short(override)}: a key of more than {MAX_KEY_PARTS} parts, or a value of more than {MAX_FILE_BYTES} bytes")
            continue
        if parts[0] == "extends":
            problems.append(f"{_short(override)}: only a file extends another")
            continue
        try:
            parsed = tomli.loads(f"value = {match[2]}")
            value = parsed["value"] if len(parsed) == 1 else match[2]
        except (ValueError, RecursionError):
            value = match[2]
        if len(parts) == 1 and parts[0] in LISTS and not isinstance(value, list):
            value = [value]
        try:
            _set(tables, parts, value)
        except LookupError as error:
            problems.append(f"{_short(override)}: {error.args[0]}")
        else:
            if tuple(parts) in ALTERNATIVES:
                _make_way(tables[str(parts[0])], parts[1:], tuple(parts[:1]), origins)
        _forget(tuple(parts), origins)
        origins[tuple(parts)] = f"--{match[1]}"
    if problems:
        raise ConfigError(problems, "command line")


def _short(override: str) -> str:
    return override if len(override) <= 80 else f"{override[:77]}..."


def _set(tables: Any, parts: Sequence[str | int], value: Any) -> None:
    """Put a value at a path; ``model = "decoder"`` opens into a table on the way."""
    here: Any = parts[0]
    rest = parts[1:]
    if isinstance(tables, list):
        if not isinstance(here, int):
            raise LookupError(f"this is a list of {len(tables)}: write its number before {here!r}, counted from 0")
        if here >= len(tables):
            raise LookupError(f"no item {here}: the list has {len(tables)}")
    elif isinstance(here, int):
        here = str(here)
    if not rest:
        tables[here] = value
        return
    # `--validation.0.max_tokens=…` also where the file leaves the list to its default.
    missing: Any = [{}] if here in LISTS and isinstance(rest[0], int) else {}
    child = tables[here] if isinstance(tables, list) else tables.get(here, missing)
    if isinstance(child, str):
        child = {"name": child}
    if not isinstance(child, dict | list):
        raise LookupError(f"{here!r} holds a value, not a table")
    tables[here] = child
    _set(child, rest, value)


def import_modules(modules: Any, origins: Origins, source: str) -> None:
    """Import the named modules; an error inside one is its author's and keeps its traceback."""
    if not isinstance(modules, list):
        return  # reported with its type by the decoder
    problems = []
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as `python -m` does; the console script does not
    for index, module in enumerate(modules):
        place = where(("imports", index), origins)
        if not isinstance(module, str) or not all(part.isidentifier() for part in module.split(".")):
            problems.append(f"{place}imports.{index}: expected a dotted module name such as 'my_pkg.lion', got {module!r}")
            continue
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not (module == error.name or module.startswith(f"{error.name}.")):
                raise
            problems.append(f"{place}imports.{index}: no module named {error.name!r}; install its package or run where it can be imported")
        except RegistryError as error:
            problems.append(f"{place}imports.{index}: {error}")
    if problems:
        raise ConfigError(problems, source)


def where(path: KeyPath, origins: Mapping[KeyPath, str]) -> str:
    """``run.toml:8: `` of the key, of the first key below it, or of the nearest table around it."""
    if path and path not in origins:
        below = next((place for key, place in origins.items() if key[: len(path)] == path), None)
        if below is not None:
            return f"{below}: "
    for length in range(len(path), -1, -1):
        if path[:length] in origins:
            return f"{origins[path[:length]]}: "
    return ""
