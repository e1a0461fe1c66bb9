"""JSON Schema of a config file, so that an editor completes and checks it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from titanlm.config import RunConfig
from titanlm.config_sources import LISTS
from titanlm.describe import settings_in
from titanlm.registry import known, lookup


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 7) of a config file with every known component.

    Components that cannot be imported (a broken outside package) are left out.
    """
    from pydantic import TypeAdapter
    from pydantic.json_schema import GenerateJsonSchema

    class Generator(GenerateJsonSchema):
        def function_plain_schema(self, schema: Any) -> Any:
            kind = schema.get("metadata", {}).get("titanlm_slot")
            return super().function_plain_schema(schema) if kind is None else {_SLOT: kind}

    definitions: dict[str, Any] = {}

    def resolve(value: Any) -> Any:
        """Replace slot marks by references, defining each kind once."""
        if isinstance(value, list):
            return [resolve(item) for item in value]
        if not isinstance(value, dict):
            return value
        kind = value.get(_SLOT)
        if not isinstance(kind, str):
            return {key: resolve(item) for key, item in value.items()}
        if f"slot.{kind}" not in definitions:
            definitions[f"slot.{kind}"] = {}  # stops the recursion of slots inside settings
            definitions[f"slot.{kind}"] = define(kind)
        return {"$ref": f"#/$defs/slot.{kind}"}

    def define(kind: str) -> Any:
        names, tables = [], []
        for name in known(kind):
            try:
                entry = lookup(kind, name)
            except Exception:  # an outside package may fail in any way; the others are still worth a schema
                continue
            table = TypeAdapter(entry.settings).json_schema(schema_generator=Generator, ref_template=f"#/$defs/{kind}.{name}.{{model}}")
            for key, item in table.pop("$defs", {}).items():
                definitions[f"{kind}.{name}.{key}"] = resolve(item)
            _note_inherited(table, entry.settings)
            table["properties"] = {"name": {"const": name}, **table.get("properties", {})}
            table["additionalProperties"] = False
            table["description"] = (entry.factory.__doc__ or "").strip().partition("\n")[0]
            names.append(name)
            tables.append(resolve(table))
        return {"anyOf": [{"type": "string", "enum": names}, *tables]}

    schema = resolve(TypeAdapter(RunConfig).json_schema(schema_generator=Generator))
    schema.setdefault("$defs", {}).update(definitions)
    for key in LISTS:
        several = schema["properties"][key]
        schema["properties"][key] = {"anyOf": [several, several["items"]], "description": several.pop("description", "")}
    schema["properties"]["extends"] = {"type": "string", "description": "A config file this one is laid over, relative to it."}
    # A file that extends another may leave out what the other gives; `titanlm config check` knows what is missing.
    for table in (schema, *schema["$defs"].values(), *(table for slot in definitions.values() for table in slot.get("anyOf", ()))):
        table.pop("required", None)
    return {"$schema": "http://json-schema.org/draft-07/schema#", **schema, "title": "titanlm config"}


_SLOT = "x-titanlm-slot"


def _note_inherited(table: dict[str, Any], settings: type) -> None:
    """Notes of fields that a settings class has from another: pydantic reads those of a class's own source alone."""
    path = getattr(sys.modules.get(settings.__module__), "__file__", None)
    for setting in settings_in(Path(path), settings.__name__) if path else ():
        if setting.note and setting.name in table.get("properties", {}):
            table["properties"][setting.name].setdefault("description", setting.note)
