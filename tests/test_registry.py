"""Registration, lookup and entry points, with fake components; no torch."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from titanlm import registry
from titanlm.errors import RegistryError
from titanlm.registry import KINDS, Component, did_you_mean, known, lookup, register


@dataclass(frozen=True)
class GoodConfig:
    lr: float = 1.0
    params: tuple[str, ...] = ("*",)
    chunk_tokens: int = 0


@dataclass
class ThawedConfig:
    lr: float = 1.0


@dataclass(frozen=True)
class BareConfig:
    lr: float = 1.0


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    before = set(registry._entries)
    yield
    for key in set(registry._entries) - before:
        if not registry._entries[key].factory.__module__.startswith("titanlm."):
            del registry._entries[key]


def place_of(factory: Any) -> str:
    return f"{__file__}:{factory.__code__.co_firstlineno}"


def test_a_function_and_a_class_can_be_registered_and_built(monkeypatch: pytest.MonkeyPatch) -> None:
    def function(config: GoodConfig, *, named_params: list[str], extra: int = 3) -> tuple[Any, ...]:
        return config, named_params, extra

    assert register("optimizer", "fake")(function) is function
    monkeypatch.setattr(inspect, "findsource", None)  # parses the file, which of a submission is long

    @register("scheduler", "fake")
    class Thing:
        def __init__(self, config: GoodConfig, *, total_steps: int) -> None:
            self.config, self.total_steps = config, total_steps

    assert lookup("scheduler", "fake").place == f"{__file__}:{Thing.__init__.__code__.co_firstlineno - 2}"
    entry = lookup("optimizer", "fake")
    assert (entry.settings, entry.runtime, entry.place) == (GoodConfig, frozenset({"named_params"}), place_of(function))
    component = Component.named("optimizer", "fake", lr=2.0)
    assert component.build(named_params=["w"], total_steps=9) == (GoodConfig(lr=2.0), ["w"], 3)
    assert Component.named("scheduler", "fake").build(total_steps=9, named_params=[]).total_steps == 9


def test_text_annotations_are_resolved_in_the_authors_module() -> None:
    def function(config: GoodConfig) -> None: ...

    assert function.__annotations__["config"] == "GoodConfig"
    register("optimizer", "fake")(function)
    assert lookup("optimizer", "fake").settings is GoodConfig


def nothing() -> None: ...
def untyped(config) -> None: ...  # type: ignore[no-untyped-def]
def typed_otherwise(config: int) -> None: ...
def thawed(config: ThawedConfig) -> None: ...
def bare(config: BareConfig) -> None: ...
def unresolvable(config: Nowhere) -> None: ...  # type: ignore[name-defined]  # noqa: F821
def positional(config: GoodConfig, named_params: Any) -> None: ...
def greedy(config: GoodConfig, *, named_parms: Any) -> None: ...


@pytest.mark.parametrize(
    ("factory", "text"),
    [
        (nothing, "the factory takes no settings; its first parameter must be `config: FakeConfig`"),
        (untyped, "the first parameter must be annotated with a frozen dataclass, its settings"),
        (typed_otherwise, "the first parameter must be annotated with a frozen dataclass, its settings"),
        (thawed, "ThawedConfig must be @dataclass(frozen=True)"),
        (bare, "BareConfig lacks params, which the trainer reads from every optimizer"),
        (unresolvable, "cannot resolve the annotation 'Nowhere' of its settings"),
        (positional, "'named_params' must be keyword-only (put `*,` before it)"),
        (greedy, "asks for 'named_parms', which no optimizer is offered; did you mean 'named_params'? (offered: named_params)"),
    ],
)
def test_a_wrong_signature_is_refused_with_file_and_line(factory: Any, text: str) -> None:
    with pytest.raises(RegistryError) as caught:
        register("optimizer", "fake")(factory)
    assert str(caught.value).startswith(f"{place_of(factory)}: optimizer 'fake': ")
    assert text in str(caught.value)
    assert ("optimizer", "fake") not in registry._entries


def test_a_kind_without_runtime_names_says_so() -> None:
    with pytest.raises(RegistryError, match=r"\(offered: none\)"):
        register("loss", "fake")(greedy)


def test_kinds() -> None:
    with pytest.raises(RegistryError, match=r"no kind 'optimiser'; did you mean 'optimizer'\? \(kinds: tokenizer, "):
        register("optimiser", "fake")
    folder = Path(registry.__file__).parent
    for kind in KINDS.values():
        assert (folder / kind.folder / "__init__.py").is_file()


def test_a_taken_name_names_both_places() -> None:
    def first(config: GoodConfig) -> None: ...
    def second(config: GoodConfig) -> None: ...

    register("optimizer", "fake")(first)
    register("optimizer", "fake")(first)  # a module that is loaded twice
    register("averager", "fake")(second)  # another kind
    with pytest.raises(RegistryError) as caught:
        register("optimizer", "fake")(second)
    assert str(caught.value) == f"{place_of(second)}: optimizer 'fake' is already registered at {place_of(first)}"
    assert lookup("optimizer", "fake").factory is first


def test_a_built_in_name_cannot_be_taken_even_before_it_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_entries", {})  # nothing was imported
    name, origin = next(iter(known("scheduler").items()))
    with pytest.raises(RegistryError) as caught:
        register("scheduler", name)(typed := lookup_free)
    assert str(caught.value) == f"{place_of(typed)}: scheduler {name!r} is already built in at {origin.place}"


def lookup_free(config: GoodConfig) -> None: ...


def test_an_unknown_name_answers_with_the_right_ones() -> None:
    def fake(config: GoodConfig) -> None: ...

    register("averager", "swa_fake")(fake)
    with pytest.raises(RegistryError, match=r"no averager named 'swa_fke'; did you mean 'swa_fake'\? \(known: .*swa_fake"):
        lookup("averager", "swa_fke")
    for name in ("../../etc/passwd", "a.b", "", "__init__"):
        with pytest.raises(RegistryError):
            lookup("averager", name)
    assert did_you_mean("zzz", ["adamw"]) == ""


def test_files_that_register_nothing_are_no_components() -> None:
    assert "__init__" not in known("loss")
    assert "chunked" not in known("loss")  # the engine, beside the losses


# ---------------------------------------------------------------- entry points
LION = """
from dataclasses import dataclass
from titanlm.registry import register

@dataclass(frozen=True)
class LionConfig:
    lr: float = 1e-4
    params: tuple[str, ...] = ("*",)

@register("optimizer", "{name}")
def lion(config: LionConfig, *, named_params): ...
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Make a distribution with entry points of kind optimizer that Python finds."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(distribution: str, module: str, source: str, **points: str) -> None:
        info = tmp_path / f"{distribution}-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1\n")
        (info / "entry_points.txt").write_text("[titanlm.optimizer]\n" + "".join(f"{name} = {value}\n" for name, value in points.items()))
        (tmp_path / f"{module}.py").write_text(source)

    yield make
    for name in [name for name in sys.modules if name.startswith("outside_")]:
        del sys.modules[name]


def test_an_entry_point_is_listed_unimported_and_imported_when_named(install: Any) -> None:
    install("outside-lion", "outside_lion", LION.format(name="lion_ep"), lion_ep="outside_lion")
    origin = known("optimizer")["lion_ep"]
    assert (origin.source, origin.place) == ("entry point", "outside_lion (outside-lion)")
    assert "outside_lion" not in sys.modules
    assert lookup("optimizer", "lion_ep").place.endswith("outside_lion.py:10")


def test_a_broken_entry_point_breaks_only_who_names_it(install: Any) -> None:
    install("outside-broken", "outside_broken", "raise ZeroDivisionError", broken_ep="outside_broken", lost_ep="outside_nowhere")
    assert {"broken_ep", "lost_ep"} <= known("optimizer").keys()
    with pytest.raises(ZeroDivisionError):  # its author's error, with its traceback
        lookup("optimizer", "broken_ep")
    with pytest.raises(ModuleNotFoundError):
        lookup("optimizer", "lost_ep")
    with pytest.raises(RegistryError, match="no optimizer named 'absent_ep'"):
        lookup("optimizer", "absent_ep")


def test_an_entry_point_that_registers_another_name_says_so(install: Any) -> None:
    install("outside-misnamed", "outside_misnamed", LION.format(name="lion_other"), lion_ep2="outside_misnamed")
    with pytest.raises(RegistryError, match="the entry point outside_misnamed of outside-misnamed registers no optimizer named 'lion_ep2'"):
        lookup("optimizer", "lion_ep2")


def test_a_built_in_component_keeps_its_name(install: Any) -> None:
    builtin = next(name for name, origin in known("optimizer").items() if origin.source == "built-in")
    install("outside-thief", "outside_thief", LION.format(name=builtin), **{builtin: "outside_thief"})
    names = known("optimizer")
    assert names[builtin].source == "built-in"
    (shadowed,) = [origin for origin in names.values() if origin.shadowed_by]
    assert (shadowed.place, shadowed.shadowed_by) == ("outside_thief (outside-thief)", names[builtin].place)
    with pytest.raises(RegistryError) as caught:
        lookup("optimizer", f"{builtin}x")
    assert f"(known: {builtin})" in str(caught.value).replace(", ", ")")  # named once
