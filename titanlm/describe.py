"""``titanlm list`` and ``titanlm describe``: components as their source says, without importing them.

A component's file is parsed, not run, so a listing takes a tenth of a second
and needs neither torch nor a package that is only a name in an entry point.
Settings come out as TOML that can be pasted into a config: every key with its
default, its type and the note that stands under it in the source.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

from titanlm.errors import RegistryError
from titanlm.registry import KINDS, Origin, did_you_mean, known, lookup, parsed, registrations

_TABLES = {
    "optimizer": "[[optimizer]]",
    "quantizer": "[[quantizer]]",
    "logger": "[[logger]]",
    "curriculum": "[[curriculum]]",
    "filter": "[[dataset.filter]]",
    "exporter": "[export.exporter]",
}
"""Where a config names a component, for kinds that are not simply ``[kind]``."""

_TYPES = {
    "str": "string",
    "bool": "true or false",
    "int": "integer",
    "float": "number",
    "PositiveInt": "integer > 0",
    "NonNegativeInt": "integer >= 0",
    "PositiveFloat": "number > 0",
    "NonNegativeFloat": "number >= 0",
    "Fraction": "number 0 to 1",
    "Decay": "number 0 to < 1",
}


# ---------------------------------------------------------------- listing
def listing(kind: str | None = None) -> str:
    """Every component of a kind, or of all kinds that have one: name, first line of its docstring, origin."""
    if kind is not None:
        _require_kind(kind)
    parts = []
    for each in [KINDS[kind]] if kind is not None else KINDS.values():
        names = known(each.name)
        if names or kind is not None:
            width = max([16, *(len(name) for name in names)])
            lines = [f"  {name.strip():<{width}}  {_line(each.name, name.strip(), origin)}" for name, origin in names.items()]
            parts.append("\n".join([f"{each.name}: {each.summary}", *(lines or ["  none"])]))
    return "\n\n".join(parts)


def _line(kind: str, name: str, origin: Origin) -> str:
    if origin.shadowed_by:
        return f"entry point {origin.place}, not used: the name is taken by {origin.shadowed_by}"
    if origin.source == "entry point":
        return f"entry point {origin.place}"
    if origin.source == "imports":
        return f"{_first_line(lookup(kind, name).factory.__doc__)} [{origin.place}]"
    # A component is alone in its file, whose docstring says what it is; the factory's own has the details.
    return _first_line(ast.get_docstring(parsed(Path(origin.place))))


def _first_line(docstring: str | None) -> str:
    return (docstring or "").strip().partition("\n")[0]


# ---------------------------------------------------------------- one component
def describe(kind: str, name: str) -> str:
    """Docstring, place and settings (as TOML) of a component; an outside one is imported, a built-in one is not.

    Raises RegistryError with the right names when there is none.
    """
    _require_kind(kind)
    origin = known(kind).get(name)
    if origin is not None and origin.source == "built-in":
        path = Path(origin.place)
        node = next(registrations(path, kind, name))
        docstring, place = ast.get_docstring(node) or "", f"{path}:{node.lineno}"
        settings = list(settings_in(path, _settings_class(node)))
    else:
        entry = lookup(kind, name)
        docstring, place = inspect.getdoc(entry.factory) or "", entry.place
        # The settings' own module is asked, because ``place`` is no file for what was typed into an interpreter.
        path = Path(getattr(sys.modules.get(entry.settings.__module__), "__file__", None) or os.devnull)
        settings = list(settings_in(path, entry.settings.__name__))
    summary = (ast.get_docstring(parsed(path)) or "").partition("\n\n")[0]
    return "\n\n".join(part for part in (f"{kind} {name}\n{place}", summary, docstring, settings_toml(kind, name, settings)) if part)


def _require_kind(kind: str) -> None:
    if kind not in KINDS:
        raise RegistryError(f"no kind {kind!r}{did_you_mean(kind, KINDS)} (kinds: {', '.join(KINDS)})")


@dataclass(frozen=True)
class Setting:
    name: str
    type: str
    default: str | None
    """As TOML; None where there is none, or where none can be written."""
    required: bool
    note: str


def settings_toml(kind: str, name: str, settings: list[Setting]) -> str:
    """A table that parses as it stands; keys without a default are commented out."""
    lines = [_TABLES.get(kind, f"[{kind}]"), f"name = {json.dumps(name)}"]
    for setting in settings:
        note = f": {setting.note}" if setting.note else ""
        if setting.default is not None:
            lines.append(f"{setting.name} = {setting.default}  # {setting.type}{note}")
        else:
            lines.append(f"# {setting.name} = <{setting.type}, {'required' if setting.required else 'optional'}>{note}")
    return "\n".join(lines)


# ---------------------------------------------------------------- settings, read from source
def _settings_class(node: ast.FunctionDef | ast.ClassDef) -> str:
    """Name in the annotation of the factory's first parameter."""
    if isinstance(node, ast.ClassDef):
        init = next((item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__"), None)
        parameters = init.args.args[1:] if init is not None else []
    else:
        parameters = node.args.args
    annotation = parameters[0].annotation if parameters else None
    return ast.unparse(annotation).strip("\"'") if annotation is not None else ""


def settings_in(path: Path, class_name: str) -> Iterator[Setting]:
    """Fields of a dataclass in declaration order, those of its bases first."""
    path, node = _find(path, class_name)
    if not isinstance(node, ast.ClassDef):
        return
    own = {item.target.id for item in node.body if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)}
    for base in node.bases:
        yield from (setting for setting in settings_in(path, ast.unparse(base)) if setting.name not in own)
    for item, following in zip(node.body, [*node.body[1:], None], strict=True):
        if not (isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)) or ast.unparse(item.annotation).startswith("ClassVar"):
            continue
        if isinstance(item.annotation, ast.Name) and (inner := list(settings_in(path, item.annotation.id))):
            yield from (replace(setting, name=f"{item.target.id}.{setting.name}") for setting in inner)
            continue
        note = following.value.value if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant) else ""
        yield Setting(
            name=item.target.id,
            type=_type(item.annotation, path),
            default=_default(item.value, path),
            required=_required(item.value),
            note=" ".join(str(note).split()),
        )


def _find(path: Path, name: str) -> tuple[Path, ast.stmt | ast.expr | None]:
    """The class or assigned value of a name in a module, and where it is.

    Follows ``from titanlm.x import name``; other packages are not searched, since finding them would import them.
    """
    for item in parsed(path).body:
        if isinstance(item, ast.ClassDef) and item.name == name:
            return path, item
        if isinstance(item, ast.Assign) and ast.unparse(item.targets[0]) == name:
            return path, item.value
        if isinstance(item, ast.ImportFrom) and (item.module or "").startswith("titanlm.") and name in (alias.name for alias in item.names):
            source = Path(__file__).parent.joinpath(*str(item.module).split(".")[1:])
            return _find(source / "__init__.py" if source.is_dir() else source.with_suffix(".py"), name)
    return path, None


def _type(node: ast.expr, path: Path) -> str:
    """An annotation in the words of TOML."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return " or ".join(_type(side, path) for side in (node.left, node.right) if ast.unparse(side) != "None")
    if isinstance(node, ast.Subscript):
        outer = ast.unparse(node.value)
        inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        if outer == "Literal":
            return " | ".join(_toml(item.value) for item in inner if isinstance(item, ast.Constant))
        if outer == "Annotated":  # Annotated[Component, Slot("packer")]
            slot = next((item for item in inner if isinstance(item, ast.Call) and ast.unparse(item.func) == "Slot"), None)
            return f"a {ast.literal_eval(slot.args[0])}" if slot is not None else _type(inner[0], path)
        if outer in ("tuple", "list"):
            return f"[{', '.join(_type(item, path) if ast.unparse(item) != '...' else '...' for item in inner)}]"
        if outer in ("dict", "Mapping"):
            return f"table of {_type(inner[-1], path)}"
    text = ast.unparse(node)
    if text not in _TYPES and isinstance(node, ast.Name):
        source, alias = _find(path, text)
        if isinstance(alias, ast.expr):
            return _type(alias, source)
    return _TYPES.get(text, text)


def _required(node: ast.expr | None) -> bool:
    return node is None or (_is_field(node) and not {"default", "default_factory"} & {keyword.arg for keyword in node.keywords})


def _is_field(node: ast.expr | None) -> TypeGuard[ast.Call]:
    return isinstance(node, ast.Call) and ast.unparse(node.func) in ("field", "dataclasses.field")


def _default(node: ast.expr | None, path: Path) -> str | None:
    """A default as TOML; None when there is none, it is None, or the source alone does not tell."""
    if _is_field(node):
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        factory = keywords.get("default_factory")
        if factory is None:
            return _default(keywords.get("default"), path)
        empty = {"dict": "{}", "list": "[]", "tuple": "[]"}.get(ast.unparse(factory))
        return empty if empty is not None else _component(factory.body) if isinstance(factory, ast.Lambda) else None
    if node is None:
        return None
    try:
        return _toml(_value(node, path))
    except (ValueError, TypeError):
        return None


def _component(node: ast.expr) -> str | None:
    """``Component.named("packer", "concat", size=3)`` as TOML; None for anything else."""
    if not (isinstance(node, ast.Call) and ast.unparse(node.func) == "Component.named" and len(node.args) == 2):
        return None
    try:
        name = ast.literal_eval(node.args[1])
        settings = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in node.keywords}
        return _toml({"name": name, **settings} if settings else name)
    except (ValueError, TypeError):
        return None


def _value(node: ast.expr, path: Path) -> Any:
    """A literal, a constant of the module, or simple arithmetic of them. Raises ValueError for anything else."""
    if isinstance(node, ast.Name):
        source, constant = _find(path, node.id)
        return _value(constant, source) if isinstance(constant, ast.expr) else ast.literal_eval(node)
    if isinstance(node, ast.Tuple | ast.List):
        return [_value(item, path) for item in node.elts]
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left, path), _value(node.right, path)
        if isinstance(node.op, ast.LShift):
            return left << right
        if isinstance(node.op, ast.Mult):
            return left * right
        if isinstance(node.op, ast.Div):
            return left / right
        if isinstance(node.op, ast.Pow):
            return left**right
    return ast.literal_eval(node)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list | tuple):
        return f"[{', '.join(_toml(item) for item in value)}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {_toml(item)}" for key, item in value.items()) + "}"
    raise TypeError(f"{value!r} cannot be written in TOML")
