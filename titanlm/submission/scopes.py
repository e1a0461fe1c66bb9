"""Which names of a syntax tree are one variable: Python's scopes, as far as renaming needs them.

A ``Variable`` is one binding of one scope with every place that spells it, so
that giving it another name is setting those places. Names of a class's body are
attributes and stay; so do names that Python or an import spells.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["module", "class", "function", "lambda", "comprehension"]
Place = tuple[ast.AST, str, int | None]
"""A node, its field that has the name, and the position where that is a list."""


@dataclass(eq=False)
class Variable:
    name: str
    places: list[Place] = field(default_factory=list)
    parameter: ast.AST | None = None
    """The function or lambda that it is a parameter of."""
    fixed: bool = False
    """Not to be renamed."""

    def rename(self, name: str) -> None:
        for node, attribute, index in self.places:
            if index is None:
                setattr(node, attribute, name)
            else:
                getattr(node, attribute)[index] = name
        self.name = name


@dataclass(eq=False)
class Scope:
    kind: Kind
    node: ast.AST | None = None
    """What opens it."""
    parent: Scope | None = None
    variables: dict[str, Variable] = field(default_factory=dict)
    """Bound here, in the order of their binding."""
    inner: list[Scope] = field(default_factory=list)
    used: list[Variable] = field(default_factory=list)
    """Mentioned in this scope itself, its own among them."""
    elsewhere: dict[str, Literal["global", "nonlocal"]] = field(default_factory=dict)
    """Names that are declared to be another scope's."""

    def all_used(self) -> Iterator[Variable]:
        """By it and by what lies in it."""
        yield from self.used
        for scope in self.inner:
            yield from scope.all_used()


def scopes_of(body: list[ast.stmt]) -> tuple[Scope, Scope]:
    """The module's scope and the one around it, whose variables nobody in the module binds."""
    reader = _Reader()
    for statement in body:
        reader.visit(statement)
    return reader.module, reader.resolved()


class _Reader(ast.NodeVisitor):
    """Binds in the order of the text; mentions are resolved at the end, since what they mean may be bound later."""

    def __init__(self) -> None:
        self.module = self.here = Scope("module")
        self._mentions: list[tuple[Scope, str, Place]] = []

    def resolved(self) -> Scope:
        outside = Scope("module")
        for scope, name, place in self._mentions:
            found = self._meant(scope, name) or outside
            variable = found.variables.setdefault(name, Variable(name))
            variable.places.append(place)
            scope.used.append(variable)
            if found.kind == "class" and isinstance(getattr(place[0], "ctx", None), ast.Load):
                # Until it is bound there, the name means a variable further out.
                further = self._meant(found.parent, name)
                if further is not None:
                    further.variables[name].fixed = True
        return outside

    def _meant(self, scope: Scope | None, name: str) -> Scope | None:
        """Where a name of ``scope`` is bound; None: by nobody here."""
        own, first = scope, True
        while own is not None:
            where = own.elsewhere.get(name)
            if where == "global":
                return self.module
            if where is None and name in own.variables and (first or own.kind != "class"):
                return own
            own, first = own.parent, False
        return None

    # ------------------------------------------------------------ bindings
    def _bind(self, name: str, place: Place, *, parameter: ast.AST | None = None, fixed: bool = False) -> None:
        scope = self.here
        if name not in scope.elsewhere:
            variable = scope.variables.setdefault(name, Variable(name, parameter=parameter))
            variable.fixed |= fixed or scope.kind == "class"
        self._mentions.append((scope, name, place))

    def _enter(self, kind: Kind, node: ast.AST) -> None:
        inner = Scope(kind, node, self.here)
        self.here.inner.append(inner)
        self.here = inner

    def _leave(self) -> None:
        assert self.here.parent is not None
        self.here = self.here.parent

    # ------------------------------------------------------------ names
    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Load):
            self._mentions.append((self.here, node.id, (node, "id", None)))
        else:
            self._bind(node.id, (node, "id", None))

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self.visit(node.value)
        here = self.here
        while self.here.kind == "comprehension":
            self._leave()
        self.visit(node.target)
        self.here = here

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> None:
        if node.name:
            self._bind(node.name, (node, "name", None))
        self.generic_visit(node)

    visit_MatchAs = visit_MatchStar = visit_ExceptHandler  # type: ignore[assignment]

    def visit_MatchMapping(self, node: ast.MatchMapping) -> None:
        if node.rest:
            self._bind(node.rest, (node, "rest", None))
        self.generic_visit(node)

    def visit_alias(self, node: ast.alias) -> None:
        self._bind(node.asname or node.name.partition(".")[0], (node, "asname", None), fixed=self.here.kind != "module")

    def visit_Global(self, node: ast.Global) -> None:
        for index, name in enumerate(node.names):
            self.here.elsewhere[name] = "global"
            self.module.variables.setdefault(name, Variable(name))
            self._mentions.append((self.here, name, (node, "names", index)))

    def visit_Nonlocal(self, node: ast.Nonlocal) -> None:
        for index, name in enumerate(node.names):
            self.here.elsewhere[name] = "nonlocal"
            self._mentions.append((self.here, name, (node, "names", index)))

    # ------------------------------------------------------------ scopes
    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self._bind(node.name, (node, "name", None))
        self._all(node.decorator_list, node.returns)
        self._function(node, "function", node.body)

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self._function(node, "lambda", [node.body])

    def _function(self, node: Any, kind: Kind, body: list[Any]) -> None:
        arguments: ast.arguments = node.args
        self._all(arguments.defaults, arguments.kw_defaults)
        named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        rest = [argument for argument in (arguments.vararg, arguments.kwarg) if argument is not None]
        self._all([argument.annotation for argument in named + rest])
        self._enter(kind, node)
        for argument in named + rest:
            self._bind(argument.arg, (argument, "arg", None), parameter=node if argument in named else None)
        self._all(body)
        self._leave()

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._bind(node.name, (node, "name", None))
        self._all(node.decorator_list, node.bases, node.keywords)
        self._enter("class", node)
        self._all(node.body)
        self._leave()

    def _comprehension(self, node: Any) -> None:
        first, *others = node.generators
        self.visit(first.iter)
        self._enter("comprehension", node)
        self._all([first.target], first.ifs, others)
        self._all([node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt])
        self._leave()

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = _comprehension

    def _all(self, *groups: Any) -> None:
        for group in groups:
            for node in group if isinstance(group, list) else [group]:
                if node is not None:
                    self.visit(node)
