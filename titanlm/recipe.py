"""Recipes: what takes several verbs, as one TOML file of stages.

A stage is a `titanlm` command. It may name a config beside the recipe and the
outputs of stages before it, as ``{config}`` and ``{tokenizer.output}``; there
are no other variables, no conditions and no shell, so that what will run can be
printed before anything runs. What differs between two cores and a cluster is
said by scale: stages that exist at some scales only, and a config or overrides
of a stage at a scale.

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
_STAGE_KEYS = ("name", "scales", "run", "config", "overrides", "output")
_SCALE_KEYS = ("config", "overrides")
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
_PLACEHOLDER = re.compile(r"\{([A-Za-z0-9_.-]+)\}")
"""With a blank or an equals sign in it, it is an inline table of TOML."""
_UNQUOTABLE = re.compile(r"""["'\\{}\x00-\x1f]""")

T = TypeVar("T")


@dataclass(frozen=True)
class Stage:
    """A stage at a scale, its placeholders filled in."""

    name: str
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
        """Stage → its config, of those that have one. Raises ConfigError with the mistakes of all."""
        from titanlm.config import load

        configs, problems = {}, []
        for stage in self.stages:
            if stage.config is None:
                continue
            try:
                configs[stage.name] = load(stage.config, stage.overrides)
            except ConfigError as error:
                problems += [f"stage {stage.name!r}: {problem}" for problem in error.problems]
        if problems:
            raise ConfigError(problems, str(self.recipe.path))
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
    config: dict[str, Path]
    """By scale."""
    overrides: dict[str, tuple[str, ...]]
    """By scale."""


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
            raise ConfigError(problems, str(self.path))
        if overrides and not any(stage.trains for stage in stages):
            raise TitanError(f"{overrides[0]}: overrides change train stages, and {self.path} has none at scale {scale}")
        if moved := next((word for word in overrides if word.startswith(("--run.name=", "--run.dir="))), None):
            raise TitanError(f"{moved}: where a stage writes is the recipe's to say, since later ones read it there; --output DIR moves all of them")
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
        for position, entry in enumerate(entries):
            if any(entry.name == other.name and set(entry.scales) & set(other.scales) for other in entries[:position]):
                self.problem(("stage", entry.index, "name"), f"two stages are called {entry.name!r} at one scale; give each a name of its own")
        for scale in scales:
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
        config, overrides = {}, {}
        for scale in scales:
            special = self._get(table, (*at, scale), dict, {}, "a table") if scale not in _STAGE_KEYS else {}
            if special and scale not in own:
                self.problem((*at, scale), f"the stage is not at scale {scale!r}; its scales are {', '.join(own)}")
            self._known(special, (*at, scale), _SCALE_KEYS)
            place: KeyPath = (*at, scale, "config") if "config" in special else (*at, "config")
            if file := self._get(special if "config" in special else table, place, str, "", "a string"):
                config[scale] = self._beside(file, place)
            overrides[scale] = (*self._texts(table, (*at, "overrides")), *self._texts(special, (*at, scale, "overrides")))
        return _Entry(index, name, own, run, self._get(table, (*at, "output"), str, "", "a string"), config, overrides)

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
    outputs: dict[str, str] = {}
    for position, entry in enumerate(here):
        values = {"out": str(out)} | outputs
        if scale in entry.config:
            values["config"] = str(entry.config[scale])

        def filled(text: str, key: KeyPath, values: Mapping[str, str] = values, later: Sequence[_Entry] = here[position:]) -> str:
            for name in dict.fromkeys(_PLACEHOLDER.findall(text)):
                if name not in values:
                    problem(key, f"{{{name}}}: {_why_not(name, values, entries, later, scale)}")
            return _PLACEHOLDER.sub(lambda match: values.get(match[1], match[0]), text)

        at: KeyPath = ("stage", entry.index)
        added = tuple(overrides) if entry.run[0] == "train" else ()
        words = (*(filled(word, (*at, "run")) for word in entry.run), *(filled(word, (*at, "overrides")) for word in entry.overrides[scale]), *added)
        if "config" in values and not any("{config}" in word for word in (*entry.run, *entry.overrides[scale])):
            problem((*at, "config"), "`run` does not name it; write {config} where the file goes")
        output = filled(entry.output, (*at, "output"))
        # Known by its name even if it is wrong, so that one mistake is not told again by every later stage.
        outputs |= {f"{entry.name}.output": output} if entry.output else {}
        arguments = arguments_of(words)
        if isinstance(arguments, str):
            problem((*at, "run"), f"titanlm {' '.join(takewhile(str.isalpha, entry.run))}: {arguments}")
            continue
        files = [value for name in ("file", "config") if isinstance(value := getattr(arguments, name, None), Path)]
        yield Stage(entry.name, words, output, files[0] if files else entry.config.get(scale), tuple(arguments.overrides))


def _why_not(name: str, values: Mapping[str, str], entries: Sequence[_Entry], later: Sequence[_Entry], scale: str) -> str:
    """Why a placeholder stands for nothing."""
    stage = name.removesuffix(".output")
    if name == "config":
        return f"the stage has no config at scale {scale!r}"
    if stage != name and stage == later[0].name:
        return "a stage cannot name its own output"
    if stage != name and any(entry.name == stage for entry in later):
        return f"stage {stage!r} comes later"
    if stage != name and any(entry.name == stage and scale in entry.scales for entry in entries):
        return f"stage {stage!r} says no output"
    if stage != name and any(entry.name == stage for entry in entries):
        return f"stage {stage!r} is not at scale {scale!r}"
    return f"stands for nothing{did_you_mean(name, values)} (here: {', '.join(values)})"
