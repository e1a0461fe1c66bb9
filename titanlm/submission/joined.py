"""Several modules as the text of one: no imports between them, and short names for all that nobody else can know by name.

Modules follow one another as Python would import them, so every definition
finds what it needs when it is made; imports of others come before them all.
What two modules call alike gets two names, classes such as are still read
(``Norm``, ``Norm2``), since they are printed.

Renamed is what can be followed to every place that mentions it:

* functions and values of modules, not classes, whose names are printed;
* variables of functions, comprehensions and lambdas;
* parameters of functions that are called and nothing else, if no call in all
  of the modules passes anything under that name;
* private attributes and methods of a class without bases and heirs, if nobody
  but the class's own ``self`` reaches them.

A name that is also the text of a string constant is left alone, since it may
be looked up (``getattr``), and so are names with two underscores in front.
Names that are put together (``getattr(self, f"_{kind}")``) are not seen.
"""

from __future__ import annotations

import ast
import builtins
import itertools
import keyword
import string
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence

from titanlm.errors import TitanError
from titanlm.submission.scopes import Place, Scope, Variable, scopes_of
from titanlm.submission.shorter import bare, quoted, squeezed

_SEE_NAMES = {"locals": 1, "globals": 1, "vars": 1, "dir": 1, "eval": 2, "exec": 2}
"""Builtin → with how many arguments it looks at nobody's variables, at least."""

Meaning = tuple[str, str]
"""Module and name in it; an empty name: the module itself."""


def joined(sources: Mapping[str, str], first: Sequence[str], entry: Meaning) -> tuple[str, str]:
    """The text of a module that does what importing ``first`` does, in that order, and its name for ``entry``.

    ``sources`` are the modules that are joined, by name; others are imported.
    Raises TitanError where one is used as a value or written to, where an import
    would mean something else, and where a call sees variables by their names.
    """
    trees = {name: [bare(node) for node in ast.parse(text).body if not _is_text(node)] for name, text in sources.items()}
    while _drop_uncalled([node for body in trees.values() for statement in body for node in ast.walk(statement)]):
        pass
    return _Joined(trees).text(first, entry)


def _drop_uncalled(nodes: Sequence[ast.AST]) -> bool:
    """Take out methods that nobody names, and what protocols ask for; whether there was any."""
    classes = [node for node in nodes if isinstance(node, ast.ClassDef)]
    bases = _bases(nodes)
    named = {node.attr for node in nodes if isinstance(node, ast.Attribute)} | _looked_up(nodes)
    for item in [item for node in classes for item in node.body]:  # a class's body may name its methods bare
        parts = [*item.decorator_list, *item.args.defaults, *filter(None, item.args.kw_defaults)] if isinstance(item, ast.FunctionDef) else [item]
        for part in parts:
            named |= {node.id for node in ast.walk(part) if isinstance(node, ast.Name)}
    found = False
    for node in classes:
        if [getattr(base, "id", "") for base in node.bases] == ["Protocol"] and not node.decorator_list and node.name not in bases:
            kept: list[ast.stmt] = [item for item in node.body if isinstance(item, ast.Assign | ast.AnnAssign) and item.value]
        else:
            whole = node.bases or node.name in bases  # what a base that is none of ours calls is not known
            kept = [item for item in node.body if whole or not _is_method(item) or item.name in named]  # type: ignore[attr-defined]
        if len(kept) < len(node.body) and not isinstance(node.body[0], ast.Pass):
            node.body, found = kept or [ast.Pass()], True
    return found


def _bases(nodes: Sequence[ast.AST]) -> set[str]:
    """Every name that bases of classes mention."""
    inner = [part for node in nodes if isinstance(node, ast.ClassDef) for base in node.bases for part in ast.walk(base)]
    return _or_imported(nodes, {part.id for part in inner if isinstance(part, ast.Name)} | {part.attr for part in inner if isinstance(part, ast.Attribute)})


def _or_imported(nodes: Sequence[ast.AST], names: set[str]) -> set[str]:
    """The names, and what is imported or assigned as one of them."""
    imported = {node.name for node in nodes if isinstance(node, ast.alias) and node.asname in names}
    assigned = [node for node in nodes if isinstance(node, ast.Assign) and isinstance(node.value, ast.Name)]
    return names | imported | {node.value.id for node in assigned if any(getattr(target, "id", "") in names for target in node.targets)}  # type: ignore[attr-defined]


def _looked_up(nodes: Sequence[ast.AST]) -> set[str]:
    """Names that are none in the text: string constants, those that quoted annotations mention, and keywords of patterns."""
    texts = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    texts |= {word for node in nodes for word in quoted(node)}
    return texts | {name for node in nodes if isinstance(node, ast.MatchClass) for name in node.kwd_attrs}


def _is_method(node: ast.stmt) -> bool:
    """One that only its name can call: neither Python nor a decorator does."""
    if not isinstance(node, ast.FunctionDef) or node.name.startswith("__"):
        return False
    return all(getattr(decorator, "id", "") in ("property", "staticmethod", "classmethod") for decorator in node.decorator_list)


class _Joined:
    """``trees`` are changed on the way."""

    def __init__(self, trees: dict[str, list[ast.stmt]]) -> None:
        self.trees = trees
        self.nodes = [node for body in trees.values() for statement in body for node in ast.walk(statement)]
        self.modules = {name: scopes_of(body) for name, body in trees.items()}
        self.scopes = [scope for module, _ in self.modules.values() for scope in _within(module)]
        self.sources = {id(alias): source for node in self.nodes for alias, source in _imports(node)}
        for statement in [node for body in trees.values() for node in body if isinstance(node, ast.Try | ast.If | ast.With)]:
            for node in ast.walk(statement):
                self.sources.pop(id(node), None)  # imported on a condition: a definition like any other
        self.globals: dict[Meaning, list[Variable]] = {}
        """What is the same in all modules → its variables there."""
        self.replaced: dict[int, ast.Name] = {}
        """Attribute of a module, by id → the name that stands for it."""
        self.moved: set[Meaning] = set()
        """Mentioned where something else may have their name."""
        self.absorbed: set[Variable] = set()
        """Imported by a function, and there without it now."""
        self._look_around()

    def _look_around(self) -> None:
        """What stands in the way of renaming, before anything is renamed. Raises TitanError where everything does."""
        for node in self.nodes:
            if isinstance(node, ast.Call) and len(node.args) < _SEE_NAMES.get(getattr(node.func, "id", ""), 0):
                raise TitanError(f"{ast.unparse(node)}: sees variables by names, which are others in one file; say which namespace, or do without")
        attributes = [node for node in self.nodes if isinstance(node, ast.Attribute)]
        self.attribute_of = {id(node.value): node for node in attributes}
        self.texts = _looked_up(self.nodes)
        self.keywords = {node.arg for node in self.nodes if isinstance(node, ast.keyword)}
        # Who passes `**mapping` may pass any name.
        called = {id(node.func) for node in self.nodes if isinstance(node, ast.Call) and all(given.arg for given in node.keywords)}
        handed_on = {node.attr for node in attributes if id(node) not in called}
        handed_on |= {node.id for node in self.nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and id(node) not in called}
        handed_on = _or_imported(self.nodes, handed_on) | self.texts
        methods_of_heirs = {id(item) for node in self.nodes if isinstance(node, ast.ClassDef) and node.bases for item in node.body}
        self.ours = {
            id(node) for node in self.nodes
            if isinstance(node, ast.FunctionDef) and not node.decorator_list and not node.name.startswith("__")
            and node.name not in handed_on and id(node) not in methods_of_heirs
        }  # fmt: skip
        """Functions that nobody else calls, by id; lambdas are handed on."""
        words = (getattr(node, name, None) for node in self.nodes for name in ("id", "attr", "arg", "name", "asname", "rest"))
        self.spelled = {word for word in words if isinstance(word, str)} | set(keyword.kwlist) | set(dir(builtins))
        self.fresh = self._fresh()

    def text(self, first: Sequence[str], entry: Meaning) -> tuple[str, str]:
        order = self._order(first)
        self._meet()
        self._name_attributes()
        self._name_globals()
        for module, _ in self.modules.values():
            self._name_locals(module)
        rewritten = _Rewritten(self.replaced, {id(node) for variable in self.absorbed for node, _, _ in variable.places})
        body = [rewritten.visit(node) for name in order for node in self.trees[name] if not isinstance(node, ast.Import | ast.ImportFrom)]
        for node in [part for statement in body for part in ast.walk(statement)]:
            for _, (source, member) in _imports(node):
                if source in self.trees:
                    raise TitanError(f"{source}.{member}: imported on a condition, in a class's body, or as a name that is bound again; import it otherwise")
        return squeezed([*self._imported(), *body]), self.globals[entry][0].name

    # ------------------------------------------------------------ modules
    def _order(self, first: Sequence[str]) -> list[str]:
        """Each module after those it imports; what only functions import comes last."""
        order: dict[str, None] = {}
        begun: set[str] = set()

        def visit(name: str) -> None:
            if name in begun or name not in self.trees:
                return
            begun.add(name)
            visit(name.rpartition(".")[0])  # packages come before what is in them
            for statement in self.trees[name]:
                for node in _at_import(statement):
                    for _, (module, member) in _imports(node):
                        visit(module)
                        visit(f"{module}.{member}")
            order[name] = None

        for name in [*first, *sorted(self.trees)]:
            visit(name)
        return list(order)

    def _meaning(self, module: str, name: str) -> Meaning:
        """Of ``from module import name``, where that may have imported it itself."""
        if f"{module}.{name}" in self.trees:
            return f"{module}.{name}", ""
        variable = self.modules[module][0].variables.get(name) if module in self.modules else None
        source = variable and self._source(variable)
        return self._meaning(*source) if source else (module, name)

    def _source(self, variable: Variable) -> Meaning | None:
        """What a variable is imported from, if all that binds it is imports of the same."""
        found = {self.sources.get(id(node)) for node, _, _ in variable.places if not isinstance(getattr(node, "ctx", None), ast.Load)}
        return found.pop() if len(found) == 1 else None

    def _meet(self) -> None:
        """Find out which variables are one; imports that this makes idle are marked."""
        for name, (module, _) in self.modules.items():
            for variable in module.variables.values():
                if self._source(variable) is None and any(id(node) in self.sources for node, _, _ in variable.places):
                    raise TitanError(f"{name}: {variable.name} is imported, and bound again; give one of them another name")
                self.globals.setdefault(self._meaning(*(self._source(variable) or (name, variable.name))), []).append(variable)
        for scope in self.scopes:
            for variable in scope.variables.values() if scope.kind not in ("module", "class") else ():
                source = self._source(variable)
                meaning = source and self._meaning(*source)
                if meaning and (meaning in self.globals or meaning[0] in self.trees):
                    self.globals.setdefault(meaning, []).append(variable)
                    self.absorbed.add(variable)
        for (own, name), variables in self.globals.items():
            snapshots = [variable for variable in variables if variable not in self.absorbed]
            if len(snapshots) > 1 and any(isinstance(node, ast.Global) for variable in snapshots for node, _, _ in variable.places):
                raise TitanError(f"{own}.{name}: set anew by a function, and imported as a value that stays; import the module instead")
        for meaning in [(module, member) for module, member in self.globals if module in self.trees and not member]:
            for variable in self.globals.pop(meaning):
                self._attributes_become_names(meaning[0], variable)

    def _attributes_become_names(self, module: str, variable: Variable) -> None:
        for node, _, _ in variable.places:
            if isinstance(node, ast.alias):
                continue
            attribute = self.attribute_of.get(id(node))
            if attribute is None:
                raise TitanError(f"{variable.name}: a module as a value, of which anything may be used; import names from it")
            if not isinstance(attribute.ctx, ast.Load):
                raise TitanError(f"{module}.{attribute.attr}: set from another module; let a function of {module} do it")
            name = self.replaced[id(attribute)] = ast.Name(attribute.attr, ast.Load())
            meaning = self._meaning(module, attribute.attr)
            if meaning in self.globals:  # else it is one that Python gives to modules
                self.globals[meaning].append(Variable(attribute.attr, [(name, "id", None)]))
                self.moved.add(meaning)

    # ------------------------------------------------------------ names
    def _fresh(self) -> Iterator[str]:
        """Names that are nowhere yet; with one letter in front of all, which repeats well."""
        for n in itertools.count(1):
            for letters in itertools.product(string.ascii_uppercase + string.digits, repeat=n):
                if (name := "A" + "".join(letters)) not in self.spelled:
                    yield name

    def _name_attributes(self) -> None:
        bases = _bases(self.nodes)
        own: dict[Scope, dict[str, list[Place]]] = {}
        by_self: set[int] = set()
        for scope in self.scopes:
            if not isinstance(scope.node, ast.ClassDef):
                continue
            found = dict[str, list[Place]]()
            for method in scope.inner:
                first = _first_of(method)
                for place, _, _ in first.places if first else ():
                    if node := self.attribute_of.get(id(place)):
                        found.setdefault(node.attr, []).append((node, "attr", None))
            for name, variable in scope.variables.items():
                found.setdefault(name, []).extend(variable.places)
            fields = {name for name, variable in scope.variables.items() if not all(isinstance(node, ast.FunctionDef) for node, _, _ in variable.places)}
            if not scope.node.bases and scope.node.name not in bases:
                own[scope] = {name: places for name, places in found.items() if name not in fields}
                by_self |= {id(node) for places in own[scope].values() for node, _, _ in places}
        kept = {node.attr for node in self.nodes if isinstance(node, ast.Attribute) and id(node) not in by_self} | self.texts
        # What an heir has in its place is called by that name too.
        kept |= {name for scope in self.scopes if scope.kind == "class" and scope not in own for name in scope.variables}
        for scope, found in own.items():
            letters = (f"_{letter}" for letter in itertools.chain(string.ascii_letters, self.fresh) if f"_{letter}" not in found.keys() | scope.variables)
            for name, places in found.items():
                if name.startswith("_") and not name.startswith("__") and name not in kept:
                    Variable(name, places).rename(next(letters))

    def _name_globals(self) -> None:
        outside = {name for _, around in self.modules.values() for name in around.variables}
        claims = Counter(name for variables in self.globals.values() for name in {variable.name for variable in variables})

        def mentions(item: tuple[Meaning, list[Variable]]) -> int:
            return sum(len(variable.places) for variable in item[1])

        for meaning, variables in sorted(self.globals.items(), key=mentions, reverse=True):
            names = {variable.name for variable in variables}
            is_class = any(isinstance(node, ast.ClassDef) for variable in variables for node, _, _ in variable.places)
            is_fixed = any(variable.fixed for variable in variables if variable not in self.absorbed)
            if meaning in self.moved or len(names) > 1 or any(claims[name] > 1 or name in outside for name in names):
                if is_fixed:  # one name for two things, or two for one
                    raise TitanError(f"{meaning[0]}: {min(names)} is a name of a class's body too; call one of them otherwise")
            elif meaning[0] not in self.trees or is_class or is_fixed or names & self.texts or any(name.startswith("__") for name in names):
                continue
            if is_class:  # whose names are printed
                name = next(other for n in itertools.count(2) if (other := f"{meaning[1]}{n}") not in self.spelled)
                self.spelled.add(name)
            else:
                name = next(self.fresh)
            for variable in variables:
                variable.rename(name)

    def _name_locals(self, scope: Scope) -> None:
        if scope.kind in ("function", "lambda", "comprehension"):
            own = set(scope.variables.values()) - self.absorbed
            free = [variable for variable in scope.variables.values() if variable in own and self._is_free(variable)]
            taken = {variable.name for variable in [*scope.all_used(), *own] if variable not in free}
            letters = (letter for letter in itertools.chain(string.ascii_letters, self.fresh) if letter not in taken)
            for variable in free:
                variable.rename(next(letters))
        for inner in scope.inner:
            self._name_locals(inner)

    def _is_free(self, variable: Variable) -> bool:
        if variable.fixed or variable.name.startswith("__"):
            return False
        is_self = variable.name in ("self", "cls")  # which repeat better than letters
        return variable.parameter is None or not (is_self or id(variable.parameter) not in self.ours or variable.name in self.keywords | self.texts)

    # ------------------------------------------------------------ as statements
    def _imported(self) -> Iterator[ast.stmt]:
        yield ast.ImportFrom("__future__", [ast.alias("annotations")], 0)
        members: dict[str, list[ast.alias]] = {}
        # `import a.b` binds a, and its b is there for whoever has it.
        plain = [alias.name for node in self.nodes if isinstance(node, ast.Import) for alias in node.names if not alias.asname]
        modules: dict[str, str | None] = {name: None for name in plain if "." in name}
        for (module, member), variables in sorted(self.globals.items()):
            name = variables[0].name
            if module in self.trees or module == "__future__":
                continue
            if member:
                members.setdefault(module, []).append(ast.alias(member, name if name != member else None))
            else:
                modules[module] = name if name != module else None
        yield from (ast.ImportFrom(module, aliases, 0) for module, aliases in members.items())
        if modules:
            yield ast.Import([ast.alias(module, name) for module, name in modules.items()])


class _Rewritten(ast.NodeTransformer):
    """Without idle imports, and with names for attributes of modules."""

    def __init__(self, replaced: Mapping[int, ast.Name], absorbed: Collection[int]) -> None:
        self.replaced, self.absorbed = replaced, absorbed

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        return self.replaced.get(id(node)) or self.generic_visit(node)

    def visit_Import(self, node: ast.Import | ast.ImportFrom) -> ast.AST:
        node.names = [alias for alias in node.names if id(alias) not in self.absorbed]
        return node if node.names else ast.Pass()

    visit_ImportFrom = visit_Import  # type: ignore[assignment]


def _at_import(statement: ast.AST) -> Iterator[ast.AST]:
    """A statement and those in it, without what only calls run."""
    yield statement
    for node in ast.iter_child_nodes(statement) if not isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) else ():
        yield from _at_import(node)


def _imports(node: ast.AST) -> Iterator[tuple[ast.alias, Meaning]]:
    if isinstance(node, ast.Import):
        yield from ((alias, (alias.name if alias.asname else alias.name.partition(".")[0], "")) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield from ((alias, (node.module or "", alias.name)) for alias in node.names)


def _within(scope: Scope) -> Iterator[Scope]:
    yield scope
    for inner in scope.inner:
        yield from _within(inner)


def _first_of(method: Scope) -> Variable | None:
    """What the class itself or an object of it is passed as."""
    node = method.node
    if not isinstance(node, ast.FunctionDef) or any(getattr(decorator, "id", "") == "staticmethod" for decorator in node.decorator_list):
        return None
    named = [*node.args.posonlyargs, *node.args.args]
    return method.variables[named[0].arg] if named else None


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
