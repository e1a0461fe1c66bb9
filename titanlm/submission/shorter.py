"""The same Python in fewer bytes: no comments, docstrings and annotations, local variables of one letter, a blank for each level.

Parameters keep their names, since callers may use them, and so does whatever
may be another thing in another scope of the same function.
"""

from __future__ import annotations

import ast
import builtins
import copy
import string


def stripped(statement: ast.stmt) -> ast.stmt:
    """A copy without annotations that nothing reads."""
    made = copy.deepcopy(statement)
    if isinstance(made, ast.FunctionDef) and made.decorator_list:
        return made
    return _Unannotated().visit(made)  # type: ignore[no-any-return]


def shortened(statement: ast.stmt, outside: set[str]) -> str:
    """A top-level statement as text, a blank for each level; ``outside`` are the module's names."""
    text = ast.unparse(ast.fix_missing_locations(_Renamed(outside).visit(_Undocumented().visit(stripped(statement)))))
    narrow = "\n".join(" " * ((len(line) - len(line.lstrip(" "))) // 4) + line.lstrip(" ") for line in text.split("\n"))
    # An f-string may run over lines, and its blanks are not indentation.
    return narrow if ast.dump(ast.parse(narrow)) == ast.dump(ast.parse(text)) else text


class _Unannotated(ast.NodeTransformer):
    """Takes annotations from functions, since nothing reads them, but for factories: `register` reads that of the settings."""

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        registered = any(isinstance(item, ast.Call) and getattr(item.func, "id", "") == "register" for item in node.decorator_list)
        return node if registered else self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return _WithoutTypes().visit(node)  # type: ignore[no-any-return]


class _WithoutTypes(ast.NodeTransformer):
    """Of all inside a function."""

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        self.generic_visit(node)
        if not isinstance(node.target, ast.Name):
            return node
        return ast.copy_location(ast.Assign([node.target], node.value) if node.value is not None else ast.Pass(), node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        return node  # its fields may be read


class _Undocumented(ast.NodeTransformer):
    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            node.body = [item for item in node.body if not (isinstance(item, ast.Expr) and isinstance(item.value, ast.Constant))] or [ast.Pass()]
        return node


class _Renamed(ast.NodeTransformer):
    """Gives a function's variables names of one letter: those that are bound in it alone and can be nothing else anywhere in it."""

    def __init__(self, outside: set[str]) -> None:
        self.outside = outside | set(dir(builtins))

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        taken, bound, fixed = set(self.outside), dict[str, None](), set[str]()
        for inner in ast.walk(node):
            match inner:
                case ast.Name():
                    taken.add(inner.id)
                    if isinstance(inner.ctx, ast.Store):
                        bound[inner.id] = None
                case ast.arg():
                    fixed.add(inner.arg)  # callers may give it by name
                case ast.Global() | ast.Nonlocal():
                    fixed |= set(inner.names)
                case ast.Import() | ast.ImportFrom():
                    fixed |= {alias.asname or alias.name.partition(".")[0] for alias in inner.names}
                case ast.FunctionDef() | ast.ClassDef() | ast.ExceptHandler() | ast.MatchAs() | ast.MatchStar():
                    fixed.add(inner.name or "")
                case ast.MatchMapping():
                    fixed.add(inner.rest or "")
        letters = (letter for letter in string.ascii_letters if letter not in taken | fixed)
        names = dict(zip((name for name in bound if len(name) > 1 and name not in fixed | self.outside), letters))
        for inner in ast.walk(node):
            if isinstance(inner, ast.Name):
                inner.id = names.get(inner.id, inner.id)
        return node
