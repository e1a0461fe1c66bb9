"""The JSON Schema accepts what ``load`` accepts and refuses what it refuses, as far as a schema can."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli

from titanlm.config_schema import json_schema
from titanlm.config_sources import LISTS
from titanlm.registry import KINDS, known, lookup

ROOT = Path(__file__).parent.parent
SHIPPED = sorted(
    path
    for path in [*ROOT.glob("train_configs/**/*.toml"), *ROOT.glob("recipes/**/*.toml")]
    if not (path.parent / "pyproject.toml").exists()  # a package of its own: tested where it is installed
    and {"model", "extends", "optimizer"} & tomli.loads(path.read_text()).keys()  # a config, not a recipe
)
TYPES = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list, "object": dict}


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return json_schema()


def violations(value: Any, schema: dict[str, Any], root: dict[str, Any], path: str = "") -> Iterator[str]:
    """The part of JSON Schema that our schema uses; an unknown keyword is an error of this test."""
    for keyword, rule in schema.items():
        if keyword == "$ref":
            target: Any = root
            for part in rule.removeprefix("#/").split("/"):
                target = target[part]
            yield from violations(value, target, root, path)
        elif keyword == "type":
            if rule == "null" or not isinstance(value, TYPES[rule]) or (isinstance(value, bool) and rule in ("integer", "number")):
                yield f"{path}: not {rule}"
        elif keyword == "anyOf":
            if all(any(True for _ in violations(value, option, root, path)) for option in rule):
                yield f"{path}: none of anyOf"
        elif keyword in ("const", "enum"):
            if value not in (rule if keyword == "enum" else [rule]):
                yield f"{path}: not in {rule}"
        elif keyword == "properties" and isinstance(value, dict):
            for name in value.keys() & rule.keys():
                yield from violations(value[name], rule[name], root, f"{path}.{name}")
        elif keyword == "additionalProperties" and isinstance(value, dict):
            for name in value.keys() - schema.get("properties", {}).keys():
                if rule is False:
                    yield f"{path}.{name}: unknown"
                elif rule is not True:
                    yield from violations(value[name], rule, root, f"{path}.{name}")
        elif keyword == "items" and isinstance(value, list):
            for index, item in enumerate(value):
                yield from violations(item, rule, root, f"{path}.{index}")
        elif keyword == "prefixItems" and isinstance(value, list):
            for index, (item, own) in enumerate(zip(value, rule, strict=False)):
                yield from violations(item, own, root, f"{path}.{index}")
        elif keyword in ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum") and isinstance(value, int | float):
            holds = {"minimum": value >= rule, "exclusiveMinimum": value > rule, "maximum": value <= rule, "exclusiveMaximum": value < rule}
            if not holds[keyword]:
                yield f"{path}: {keyword} {rule}"
        elif keyword in ("minItems", "maxItems") and isinstance(value, list):
            if (len(value) < rule) if keyword == "minItems" else (len(value) > rule):
                yield f"{path}: {keyword} {rule}"
        else:
            assert keyword in {
                *("$schema", "$defs", "title", "description", "default", "properties", "additionalProperties", "items", "prefixItems"),
                *("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum", "minItems", "maxItems", "uniqueItems"),
            }, keyword


def broken(schema: dict[str, Any], text: str) -> list[str]:
    return list(violations(tomli.loads(text), schema, schema))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_it_accepts_shipped_configs(schema: dict[str, Any], path: Path) -> None:
    tables = tomli.loads(path.read_text())
    assert list(violations(tables, schema, schema)) == []


@pytest.mark.parametrize(
    "text",
    [
        'model = "decoder"\noptimizer = "adamw"',
        'optimizer = ["adamw", {name = "adamw", lr = 1}]\n[model]\nname = "decoder"\nn_layers = 3',
        'extends = "base.toml"\n[model]\nn_layers = 3\n[optimizer]\nlr = 1e-3',  # the name stands in base.toml
        'imports = ["a.b"]\n[[validation]]\nname = "x"\ndataset = "python_stdlib"\n[export.exporter]\nname = "artifact"',
        "quantizer = []\n[profile]\nstart = 3",
    ],
)
def test_it_accepts_every_form(schema: dict[str, Any], text: str) -> None:
    assert broken(schema, text) == []


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("trian = 3", ".trian: unknown"),
        ("[train]\nstep = 3", ".train.step: unknown"),
        ("[train]\nsteps = 'x'", ".train.steps: not integer"),
        ("[train]\nsteps = 1.5", ".train.steps: not integer"),
        ("[train]\nsteps = true", ".train.steps: not integer"),
        ("[train]\nsteps = 0", ".train.steps: exclusiveMinimum 0"),
        ("[train]\nprecision = 'fp31'", ".train.precision: not in "),
        ("model = 'decodr'", ".model: none of anyOf"),
        ("[model]\nname = 'decoder'\nn_layer = 3", ".model: none of anyOf"),
        ("[model]\nname = 'decoder'\nn_layers = 'x'", ".model: none of anyOf"),
        ("[optimizer]\nname = 'adamw'\nbetas = [1, 2, 3]", ".optimizer: none of anyOf"),
        ("optimizer = 3", ".optimizer: none of anyOf"),
        ("extends = ['a.toml']", ".extends: not string"),
    ],
)
def test_it_refuses_mistakes(schema: dict[str, Any], text: str, at: str) -> None:
    (found,) = broken(schema, text)
    assert found.startswith(at)


def test_it_knows_every_component_and_note(schema: dict[str, Any]) -> None:
    for kind in KINDS:
        slot = schema["$defs"].get(f"slot.{kind}")
        if slot is None:
            assert kind == "filter" or not known(kind)
            continue
        names = {name for name, origin in known(kind).items() if origin.source == "built-in"}
        assert names <= set(slot["anyOf"][0]["enum"])
        for table in slot["anyOf"][1:]:
            name = table["properties"]["name"]["const"]
            assert table["properties"].keys() == {"name", *lookup(kind, name).settings.__dataclass_fields__}
            assert table["additionalProperties"] is False
    assert schema["properties"]["optimizer"]["description"].startswith("Each parameter goes to the first")
    assert "Peak learning rate" in json.dumps(schema["$defs"]["slot.optimizer"])
    assert all("anyOf" in schema["properties"][key] for key in LISTS)


def test_a_component_that_cannot_be_imported_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "outside_schema-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside-schema\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[titanlm.optimizer]\nbroken_schema = outside_nowhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert "broken_schema" in known("optimizer")
    assert "broken_schema" not in json_schema()["$defs"]["slot.optimizer"]["anyOf"][0]["enum"]


def test_inherited_settings_keep_their_notes() -> None:
    (table,) = [table for table in json_schema()["$defs"]["slot.quantizer"]["anyOf"] if table.get("properties", {}).get("name", {}).get("const") == "int6"]
    assert "rounded" in table["properties"]["qat"]["description"]
    assert all("description" in setting for name, setting in table["properties"].items() if name not in ("name", "gptq_damp"))
