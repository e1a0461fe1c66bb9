"""The same Python in fewer bytes: no comments, docstrings and annotations, a blank for each level, and none that is for the eye.

Names are ``joined``'s affair.
"""

from __future__ import annotations

import ast
import copy
import io
import itertools
import re
import tokenize
from collections.abc import Iterator


def stripped(statement: ast.stmt) -> ast.stmt:
    """A copy without annotations that nothing reads."""
    return _unannotated(copy.deepcopy(statement))


def bare(statement: ast.stmt) -> ast.stmt:
    """Without such annotations and documentation; the statement itself is changed."""
    made: ast.stmt = _Undocumented().visit(_unannotated(statement))
    return made


def quoted(node: ast.AST) -> Iterator[str]:
    """Names that the annotation of a node mentions in quotes, which whoever reads it looks up; and words of its literals."""
    for annotation in (getattr(node, "annotation", None), getattr(node, "returns", None)):
        for part in ast.walk(annotation) if annotation is not None else ():
            if isinstance(part, ast.Constant) and isinstance(part.value, str):
                yield from re.findall(r"\w+", part.value)


def last_name(decorator: ast.expr) -> str:
    """``register`` of ``@kinds.register("optimizer", "muon")``."""
    function = decorator.func if isinstance(decorator, ast.Call) else decorator
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


_BLIND = frozenset({
    "abstractmethod", "cache", "cached_property", "classmethod", "contextmanager", "inference_mode", "lru_cache", "no_grad", "override", "property", "setter",
    "staticmethod", "wraps",
})  # fmt: skip
"""Decorators that read no annotations."""


def _is_read(node: ast.FunctionDef) -> bool:
    return any(last_name(decorator) not in _BLIND for decorator in node.decorator_list)


def _unannotated(statement: ast.stmt) -> ast.stmt:
    made: ast.stmt = _Unannotated().visit(statement)
    return made


def squeezed(body: list[ast.stmt]) -> str:
    """Statements as text: a blank for each level, and neither blanks nor brackets that Python can do without."""
    text = ast.unparse(ast.fix_missing_locations(ast.Module(body, [])))
    tree, lines = ast.parse(text), text.split("\n")
    starts = list(itertools.accumulate((len(line) + 1 for line in lines), initial=0))
    brackets = set(_idle_brackets(tree, lines))
    # By what is cut out, since newer tokenizers take strings with expressions in them apart.
    cuts: list[tuple[int, int]] = []
    level, before = 0, 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        start, end = starts[token.start[0] - 1] + token.start[1], starts[token.end[0] - 1] + token.end[1]
        match token.type:
            case tokenize.INDENT:
                level += 1
            case tokenize.DEDENT:
                level -= 1
            case tokenize.NEWLINE:
                before = 0
            case tokenize.NL:  # an empty line
                cuts.append((start, end))
            case tokenize.ENDMARKER:
                break
            case _ if token.start in brackets:
                cuts.append((start, end))
            case _:
                if not before:
                    cuts.append((start - token.start[1] + level, start))
                elif not (_is_word(text[before - 1]) and _is_word(text[start])):
                    cuts += [(place, place + 1) for place in range(before, start) if text[place] == " "]
                before = end
    cuts.sort()
    kept = zip([0, *(stop for _, stop in cuts)], [*(start for start, _ in cuts), len(text)], strict=True)
    short = "".join(text[start:stop] for start, stop in kept)
    if ast.dump(ast.parse(short)) != ast.dump(tree):
        raise AssertionError("shortening changed what the text means")
    return short


def _is_word(letter: str) -> bool:
    return letter.isalnum() or letter == "_"


def _idle_brackets(tree: ast.AST, lines: list[str]) -> Iterator[tuple[int, int]]:
    """(line, column) of round brackets that ``ast.unparse`` writes and nobody needs."""
    for node in ast.walk(tree):
        # The place of a generator or tuple has its brackets in it, that of others has not.
        match node:
            case ast.Call(args=[ast.GeneratorExp() as inner], keywords=[]) if _letter(lines, inner.lineno, inner.col_offset - 1) == "(":
                around = 0
            case ast.Assign(value=ast.Tuple(elts=[first, *_]) as inner) | ast.Return(value=ast.Tuple(elts=[first, *_]) as inner) if (
                first.lineno,
                first.col_offset,
            ) > (inner.lineno, inner.col_offset):
                around = 0
            case ast.If(test=ast.NamedExpr() as inner) | ast.While(test=ast.NamedExpr() as inner) if _letter(lines, inner.lineno, inner.col_offset - 1) == "(":
                around = 1
            case _:
                continue
        assert inner.end_lineno is not None
        assert inner.end_col_offset is not None
        for line, column in ((inner.lineno, inner.col_offset - around), (inner.end_lineno, inner.end_col_offset - 1 + around)):
            yield line, len(lines[line - 1].encode()[:column].decode())  # trees count bytes, tokens letters


def _letter(lines: list[str], line: int, column: int) -> str:
    return chr(lines[line - 1].encode()[column])


class _Unannotated(ast.NodeTransformer):
    """Takes annotations from functions where nothing reads them; decorators may, and of factories `register` does."""

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        registered = any(last_name(decorator) == "register" for decorator in node.decorator_list)
        node.body = [item if registered and getattr(item, "name", "") == "__init__" else self.visit(item) for item in node.body]
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
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
        if _is_read(node):
            return node
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
