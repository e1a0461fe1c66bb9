"""Recipes: what takes several verbs, as one TOML file of stages.

A stage is a `titanlm` command. It may name a config beside the recipe and the
outputs of stages before it, as ``{config}`` and ``{tokenizer.output}``; there
are no other variables, no conditions and no shell, so that what will run can be
printed before anything runs. What differs between two cores and a cluster is
said by scale: stages that exist at some scales only, and a config or overrides
of a stage at a scale.

Runs that differ in one thing, such as the seeds of a submission, are one entry of
the file with ``each``, which becomes a stage for each of its values. A later
stage that names its output gets all of them, a word each.

A recipe is read with plain tables rather than pydantic, because `titanlm recipe
list` answers without it, and every mistake at every scale is reported at once,
whichever scale is asked for.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import titanlm
from titanlm.cli import arguments_of
from titanlm.config_sources import KeyPath, Origins, read_file, where
from titanlm.errors import ConfigError, TitanError
from titanlm.registry import did_you_mean

if TYPE_CHECKING:
    from titanlm.config import RunConfig

FILE = "recipe.toml"
_KEYS = ("description", "scales", "stage")
_STAGE_KEYS = ("name", "scales", "each", "run", "config", "overrides", "output")
_SCALE_KEYS = ("each", "config", "overrides")
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
_VALUE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""Of ``each``; part of names and paths."""
_PLACEHOLDER = re.compile(r"\{([A-Za-z0-9_.-]+)\}")
"""With a blank or an equals sign in it, it is an inline table of TOML."""
_UNQUOTABLE = re.compile(r"""["'\\{}\x00-\x1f]""")

_Values = Mapping[str, tuple[str, ...]]
"""Placeholder → what it stands for, which is several paths for the output of stages that differ in ``each``."""

T = TypeVar("T")


@dataclass(frozen=True)
class Stage:
    """A stage at a scale, its placeholders filled in."""

    name: str
    of: str
    """What the file calls it: ``name`` but for the value of ``each``, so stages that differ in that alone share it."""
    words: tuple[str, ...]
    """Its command, without `titanlm`."""
    output: str
    """The path that is there when it is done; empty: none is looked for."""
    config: Path | None
    """The file of settings that its command reads."""
    overrides: tuple[str, ...]
    """What its command lays over that file."""

    @property
    def command(self) -> str:
        return shlex.join(["titanlm", *self.words])

    @property
    def trains(self) -> bool:
        return self.words[0] == "train"


@dataclass(frozen=True)
class ScaledRecipe:
    """A recipe at one of its scales, in its folder."""

    recipe: Recipe
    scale: str
    out: Path
    stages: tuple[Stage, ...]

    def configs(self) -> dict[str, RunConfig]:
        """Stage → its config, of those that have one. Raises ConfigError with the mistakes of all, those of equal stages once."""
        from titanlm.config import load

        configs, problems = {}, []
        for stage in self.stages:
            if stage.config is None:
                continue
            try:
                configs[stage.name] = load(stage.config, stage.overrides)
            except ConfigError as error:
                problems += [f"stage {stage.of!r}: {problem}" for problem in error.problems]
        if problems:
            raise ConfigError(list(dict.fromkeys(problems)), str(self.recipe.path))
        return configs


@dataclass(frozen=True)
class _Entry:
    """A stage as the file has it."""

    index: int
    name: str
    """Two stages may share it, if they share no scale."""
    scales: tuple[str, ...]
    run: tuple[str, ...]
    output: str
    each: dict[str, tuple[str, ...]]
    """By scale; none at a scale where it is one stage."""
    config: dict[str, Path]
    """By scale."""
    overrides: dict[str, tuple[str, ...]]
    """By scale."""

    def stages(self, scale: str) -> dict[str, str]:
        """Name → value of ``each``, empty for the one stage that an entry without it is."""
        return {f"{self.name}-{value}": value for value in self.each[scale]} if scale in self.each else {self.name: ""}

    def names(self, scale: str) -> set[str]:
        """What its stages may be called by, singly and all at once."""
        return {self.name, *self.stages(scale)}

    def words(self, scale: str) -> Iterator[tuple[str, str]]:
        """(key, word) of the command, overrides included."""
        yield from (("run", word) for word in self.run)
        yield from (("overrides", word) for word in self.overrides[scale])


@dataclass(frozen=True)
class Recipe:
    """A recipe's file, read and found without mistakes."""

    name: str
    path: Path
    description: str
    scales: tuple[str, ...]
    """The first is the default."""
    entries: tuple[_Entry, ...]

    def at(self, scale: str | None = None, out: Path | None = None, overrides: Sequence[str] = ()) -> ScaledRecipe:
        """Its stages at a scale, the first one by default, with ``overrides`` laid over those of train stages.

        Raises TitanError for a scale that it has not, for a folder's name that
        no override could carry, and for overrides of nothing.
        """
        scale = self.scales[0] if scale is None else scale
        if scale not in self.scales:
            raise TitanError(f"--scale {scale}: {self.path} has no such scale{did_you_mean(scale, self.scales)} (scales: {', '.join(self.scales)})")
        out = Path("runs") / f"{self.name}-{scale}" if out is None else out
        if _UNQUOTABLE.search(str(out)):
            raise TitanError(f"--output {str(out)!r}: quotes, braces and backslashes in a folder's name would not survive in an override; choose another")
        problems: list[str] = []
        stages = tuple(_stages(self.entries, scale, out, overrides, lambda key, text: problems.append(text)))
        if problems:  # of the folder, for the file itself was checked
            raise ConfigError(list(dict.fromkeys(problems)), str(self.path))
        if overrides and not any(stage.trains for stage in stages):
            raise TitanError(f"{overrides[0]}: overrides change train stages, and {self.path} has none at scale {scale}")
        if moved := next((word for word in overrides if word.startswith(("--run.name=", "--run.dir="))), None):
            raise TitanError(f"{moved}: where a stage writes is the recipe's to say, since later ones read it there; --output DIR moves all of them")
        for entry in (entry for entry in self.entries if scale in entry.scales and entry.run[0] == "train"):
            differing = {word.partition("=")[0] for _, word in entry.words(scale) if "{each}" in word}
            if made_equal := next((word for word in overrides if word.partition("=")[0] in differing), None):
                raise TitanError(f"{made_equal}: would make the stages of {entry.name!r} equal, which differ in it; change `each` in {self.path}")
        return ScaledRecipe(self, scale, out, stages)


# ---------------------------------------------------------------- finding
def found() -> dict[str, Path]:
    """Name → file of the recipes in the working directory and in the checkout that titanlm runs from; the former win."""
    roots = (Path("recipes"), Path(titanlm.__file__).parent.parent / "recipes")
    files = [file for root in roots for file in sorted(root.glob(f"*/{FILE}"))]
    return {file.parent.name: file for file in reversed(files)}


def open_recipe(name: str) -> Recipe:
    """The recipe of a name, a file or a folder. Raises TitanError when there is none, ConfigError with all of its mistakes."""
    recipes = found()
    if name in recipes:
        return load(recipes[name])
    path = Path(name)
    if path.is_dir() and (path / FILE).is_file():
        return load(path / FILE)
    if path.suffix == ".toml":
        return load(path)
    raise TitanError(f"no recipe {name!r}{did_you_mean(name, recipes)} (recipes: {', '.join(sorted(recipes)) or 'none'}; or name a {FILE} or its folder)")


def listing() -> str:
    """A line for each recipe: name, scales, description."""
    rows = []
    for name, file in sorted(found().items()):
        try:
            recipe = load(file)
            rows.append((name, ", ".join(recipe.scales), recipe.description))
        except ConfigError as error:
            rows.append((name, "", f"cannot be used, {len(error.problems)} mistakes; titanlm recipe plan {shlex.quote(name)} names them"))
    if not rows:
        return f"no recipes: there is no recipes/*/{FILE} here"
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(f"{name:<{widths[0]}}  {scales:<{widths[1]}}  {text}".rstrip() for name, scales, text in rows)


# ---------------------------------------------------------------- reading
def load(path: Path) -> Recipe:
    """The recipe of a file. Raises ConfigError with every mistake at every scale."""
    reader = _Reader(path)
    recipe = reader.recipe()
    for scale in recipe.scales:
        list(_stages(recipe.entries, scale, Path("runs") / f"{recipe.name}-{scale}", (), reader.problem))
    if reader.problems:
        raise ConfigError(list(dict.fromkeys(reader.problems)), str(path))
    return recipe


class _Reader:
    """Tables to a recipe; notes what is wrong with them and goes on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.origins: Origins = {}
        self.problems: list[str] = []
        self.tables = read_file(path, self.origins, ())

    def problem(self, key: KeyPath, text: str) -> None:
        self.problems.append(f"{where(key, self.origins)}{'.'.join(map(str, key))}: {text}")

    def recipe(self) -> Recipe:
        name = self.path.resolve().parent.name if self.path.name == FILE else self.path.stem
        self._known(self.tables, (), _KEYS)
        scales = self._names(self.tables, ("scales",))
        if not scales:
            self.problem(("scales",), 'missing; name at least one, such as scales = ["smoke", "full"], the default first')
        tables = self._get(self.tables, ("stage",), list, [], "a list of tables, [[stage]]")
        if not tables:
            self.problem(("stage",), "missing; a recipe has at least one [[stage]]")
        entries = tuple(entry for index, table in enumerate(tables) if (entry := self._entry(index, table, scales)) is not None)
        for scale in scales:
            taken: set[str] = set()
            for entry in (entry for entry in entries if scale in entry.scales):
                for twice in sorted(taken & entry.names(scale)):
                    self.problem(("stage", entry.index, "name"), f"two stages are called {twice!r} at one scale; give each a name of its own")
                taken |= entry.names(scale)
            if entries and not any(scale in entry.scales for entry in entries):
                self.problem(("scales",), f"no stage is at scale {scale!r}")
        description = self._get(self.tables, ("description",), str, "", "a string")
        return Recipe(name, self.path, " ".join(description.split()), scales, entries)

    def _entry(self, index: int, table: Any, scales: tuple[str, ...]) -> _Entry | None:
        at: KeyPath = ("stage", index)
        if not isinstance(table, dict):
            self.problem(at, f"expected a table, got {table!r}")
            return None
        for key in scales:
            if key in _STAGE_KEYS:
                self.problem(("scales",), f"{key!r} is a key of stages; call the scale something else")
        self._known(table, at, (*_STAGE_KEYS, *scales))
        name = self._get(table, (*at, "name"), str, "", "a string")
        if not _NAME.fullmatch(name):
            self.problem((*at, "name"), f"{name!r}: a stage has a name of small letters, digits and -" if name else "missing; a stage has a name")
        own = self._names(table, (*at, "scales")) or scales
        for scale in own:
            if scale not in scales:
                self.problem((*at, "scales"), f"no scale {scale!r}{did_you_mean(scale, scales)} (scales: {', '.join(scales)})")
        run = self._texts(table, (*at, "run"))
        if not run:
            self.problem((*at, "run"), 'missing; the words after `titanlm`, such as run = ["train", "{config}"]')
        elif run[0] == "recipe":
            self.problem((*at, "run"), "a recipe runs no recipes; give their stages")
        each, config, overrides = {}, {}, {}
        for scale in scales:
            special = self._get(table, (*at, scale), dict, {}, "a table") if scale not in _STAGE_KEYS else {}
            if special and scale not in own:
                self.problem((*at, scale), f"the stage is not at scale {scale!r}; its scales are {', '.join(own)}")
            self._known(special, (*at, scale), _SCALE_KEYS)
            source, place = (special, (*at, scale, "each")) if "each" in special else (table, (*at, "each"))
            if values := self._each(source, place):
                each[scale] = values
            source, place = (special, (*at, scale, "config")) if "config" in special else (table, (*at, "config"))
            if file := self._get(source, place, str, "", "a string"):
                config[scale] = self._beside(file, place)
            overrides[scale] = (*self._texts(table, (*at, "overrides")), *self._texts(special, (*at, scale, "overrides")))
        return _Entry(index, name, own, run, self._get(table, (*at, "output"), str, "", "a string"), each, config, overrides)

    def _beside(self, file: str, key: KeyPath) -> Path:
        """A path that is relative to the recipe, relative to the working directory if it lies in it."""
        path = Path(os.path.normpath(self.path.parent / file))
        if not path.is_file():
            near = did_you_mean(path.name, [other.name for other in path.parent.glob("*.toml")])
            self.problem(key, f"{path}: no such file, relative to the recipe's folder{near}")
        full, here = Path(os.path.abspath(path)), Path.cwd()
        return full.relative_to(here) if full.is_relative_to(here) else full

    # ------------------------------------------------------------ values
    def _known(self, table: Mapping[str, Any], at: KeyPath, keys: Sequence[str]) -> None:
        for key in table:
            if key not in keys:
                self.problem((*at, key), f"unknown key{did_you_mean(key, keys)} (keys: {', '.join(keys)})")

    def _get(self, table: Mapping[str, Any], key: KeyPath, kind: type[T], default: T, expected: str) -> T:
        value = table.get(str(key[-1]), default)
        if isinstance(value, kind):
            return value
        self.problem(key, f"expected {expected}, got {value!r}")
        return default

    def _texts(self, table: Mapping[str, Any], key: KeyPath) -> tuple[str, ...]:
        values: list[Any] = self._get(table, key, list, [], "a list of strings")
        for index, value in enumerate(values):
            if not isinstance(value, str):
                self.problem((*key, index), f'expected a string, got {value!r}; write "{value}"')
        return tuple(value for value in values if isinstance(value, str))

    def _each(self, table: Mapping[str, Any], key: KeyPath) -> tuple[str, ...]:
        """The values of ``each``, as text."""
        values: list[Any] = self._get(table, key, list, [], "a list of whole numbers and strings")
        if not values and str(key[-1]) in table:
            self.problem(key, "has no value; name at least one, such as each = [1337, 42], or leave it out")
        texts = []
        for index, value in enumerate(values):
            if isinstance(value, bool) or not isinstance(value, int | str):
                self.problem((*key, index), f'expected a whole number or a string, got {value!r}; write "{value}"')
            elif not _VALUE.fullmatch(str(value)):
                self.problem((*key, index), f"{value!r}: it is part of the stage's name, and has letters, digits, and from the second on . _ and -")
            elif str(value) in texts:
                self.problem((*key, index), f"{value!r} is in it twice")
            else:
                texts.append(str(value))
        return tuple(texts)

    def _names(self, table: Mapping[str, Any], key: KeyPath) -> tuple[str, ...]:
        names = self._texts(table, key)
        for name in names:
            if not _NAME.fullmatch(name):
                self.problem(key, f"{name!r}: a scale is called by small letters, digits and -")
        return tuple(dict.fromkeys(names))


# ---------------------------------------------------------------- stages
def _stages(entries: Sequence[_Entry], scale: str, out: Path, overrides: Sequence[str], problem: Callable[[KeyPath, str], None]) -> Iterator[Stage]:
    """The stages at a scale. What is wrong with one goes to ``problem``; those after it are looked at all the same."""
    here = [entry for entry in entries if scale in entry.scales and entry.run]
    outputs: dict[str, tuple[str, ...]] = {}
    for position, entry in enumerate(here):
        at: KeyPath = ("stage", entry.index)
        common = {"out": (str(out),)} | outputs
        if scale in entry.config:
            common["config"] = (str(entry.config[scale]),)
            if not any("{config}" in word for _, word in entry.words(scale)):
                problem((*at, "config"), "`run` does not name it; write {config} where the file goes")
        if scale in entry.each:
            if not any("{each}" in word for _, word in entry.words(scale)):
                problem((*at, "each"), "`run` does not name it, so all stages would do the same; write {each} where they differ")
            if entry.output and "{each}" not in entry.output:
                problem((*at, "output"), "has no {each}, so all stages would write to one place")
        made: dict[str, tuple[str, ...]] = {}
        for name, value in entry.stages(scale).items():
            values = common | ({"each": (value,)} if scale in entry.each else {})

            def filled(text: str, key: str, at: KeyPath = at, values: _Values = values, later: Sequence[_Entry] = here[position:]) -> tuple[str, ...]:
                for wrong in _wrong(text, values, entries, later, scale):
                    problem((*at, key), wrong)
                return _filled(text, values)

            words = (*(word for key, text in entry.words(scale) for word in filled(text, key)), *(overrides if entry.run[0] == "train" else ()))
            output = filled(entry.output, "output")
            if len(output) > 1:
                problem((*at, "output"), f"{entry.output} is {len(output)} paths; an output is one")
            # Known by its name even if it is wrong, so that one mistake is not told again by every later stage.
            made |= {f"{name}.output": output[:1]} if entry.output else {}
            arguments = arguments_of(words)
            if isinstance(arguments, str):
                problem((*at, "run"), f"titanlm {' '.join(takewhile(str.isalpha, entry.run))}: {arguments}")
                continue
            files = [file for name in ("file", "config") if isinstance(file := getattr(arguments, name, None), Path)]
            yield Stage(name, entry.name, words, output[0], files[0] if files else entry.config.get(scale), tuple(arguments.overrides))
        outputs |= ({f"{entry.name}.output": tuple(path for (path,) in made.values())} if made else {}) | made


def _filled(text: str, values: _Values) -> tuple[str, ...]:
    """A text with its placeholders filled in; of one that is all of the text, every value is a text."""
    if (whole := _PLACEHOLDER.fullmatch(text)) and whole[1] in values:
        return values[whole[1]]
    return (_PLACEHOLDER.sub(lambda match: values.get(match[1], (match[0],))[0], text),)


def _wrong(text: str, values: _Values, entries: Sequence[_Entry], later: Sequence[_Entry], scale: str) -> Iterator[str]:
    """What is wrong with the placeholders of a text of ``later[0]``."""
    for name in dict.fromkeys(_PLACEHOLDER.findall(text)):
        if name not in values:
            yield f"{{{name}}}: {_why_not(name, values, entries, later, scale)}"
        elif len(paths := values[name]) > 1 and text != f"{{{name}}}":
            (one, *_) = (other for other, value in values.items() if value == paths[:1])
            yield f"{{{name}}}: {len(paths)} paths, which cannot stand inside {text!r}; make it a word by itself, or name one, such as {{{one}}}"


def _why_not(name: str, values: _Values, entries: Sequence[_Entry], later: Sequence[_Entry], scale: str) -> str:
    """Why a placeholder stands for nothing."""
    stage = name.removesuffix(".output")
    if name in ("config", "each"):
        return f"the stage has no {name} at scale {scale!r}"
    if stage != name and stage in later[0].names(scale):
        return "a stage cannot name its own output"
    if stage != name and any(stage in entry.names(scale) for entry in later):
        return f"stage {stage!r} comes later"
    if stage != name and any(stage in entry.names(scale) and scale in entry.scales for entry in entries):
        return f"stage {stage!r} says no output"
    if stage != name and any(stage in entry.names(other) for entry in entries for other in entry.scales):
        return f"stage {stage!r} is not at scale {scale!r}"
    return f"stands for nothing{did_you_mean(name, values)} (here: {', '.join(values)})"
