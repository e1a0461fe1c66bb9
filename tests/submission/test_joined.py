"""Modules joined into one: the same results, no imports between them, and short names only where nobody can tell."""

import ast
import symtable
from collections import Counter
from pathlib import Path

import pytest

from titanlm.errors import TitanError
from titanlm.submission.joined import joined
from titanlm.submission.scopes import scopes_of
from titanlm.submission.shorter import squeezed

ROOT = Path(__file__).parents[2]


def run(entry: str = "main", **sources: str):
    """The joined text of modules t.NAME, and what its ``main()`` of t.a returns."""
    sources = {"t": "", **{f"t.{name.replace('__', '.')}": text for name, text in sources.items()}}
    text, name = joined(sources, ["t.a"], ("t.a", entry))
    names: dict = {"__name__": __name__, "__file__": __file__}
    exec(text, names)
    return text, names[name]


TANGLED = '''
import math
LIMIT = 3
def work(items, *, scale: float = 2.0, **options):
    """Says what it does."""
    global LAST
    total: float = 0.0
    empty: int
    try:
        raise ValueError("x")
    except ValueError as total_error:
        reason = str(total_error)
    squares = [item * item for item in items if (half := item / 2) >= 0]
    def inner(step=1):
        nonlocal total
        total += step * scale
        shadow = sum(squares)
        return (lambda value, other=shadow: value + other)(total)
    match options:
        case {"mode": mode, **others}:
            pass
        case _:
            mode, others = None, {}
    first, *remaining = squares
    with open(__file__) as handle:
        length = len(handle.name) > 0
    LAST = inner()
    for number, letter in enumerate("ab"):
        total += number
    text = f"""
    {total:>{LIMIT}} {first=}
        {letter!r}"""
    return total, LAST, half, reason, mode, others, remaining, length, text, math.pi, inner(step=5), {key: number for key in "xy"}
'''


def test_shortening_changes_no_result():
    text, short = run("work", a=TANGLED)
    for gone in ("Says what", "float", "squares", "shadow", "remaining", "total_error", "options=", "**others"):
        assert gone not in text
    names = {"__file__": __file__}
    exec(TANGLED, names)
    assert short([1, 2, 3], mode="m", extra=1) == names["work"]([1, 2, 3], mode="m", extra=1)


def test_modules_meet_in_one():
    text, main = run(
        a="""
        import math
        from t import b
        from t.b import VALUE as value, again
        from t.c import name, open
        def main():
            from t.d import late
            from t.c import helper
            VALUE = 7  # not b's
            helping = b.helper(1)
            return [b.VALUE, value, VALUE, name(), open(), late(), helper(), helping, again, math.floor(2.5), _same(), b.same()]
        def _same(): return "a"
        """.replace("\n        ", "\n"),
        b="from t.c import again\nVALUE = 3\ndef helper(x): return x + VALUE\ndef _same(): return 'b'\ndef same(): return _same()\n",
        c="import json as name_of\nagain = 5\ndef name(): return name_of.loads('4')\ndef helper(): return 'c'\ndef open(): return 'mine'\n",
        d="import t\nfrom t.a import main as start\ndef late(): return [start.__name__ != '', open(__file__).close()]\n",
    )
    assert main() == [3, 3, 7, 4, "mine", [True, None], "c", 4, 5, 2, "a", "b"]
    assert "from t" not in text
    assert "import t" not in text


def test_modules_come_in_the_order_of_their_imports():
    text, main = run(
        a="from t.b import made\ndef main(): return made\n",
        b="from t.z import register\nmade = []\n@register(made)\ndef component(): ...\n",
        z="def register(made):\n    made.append(1)\n    return lambda function: function\n",
    )
    assert main() == [1]
    assert text.index("append") < text.index("@")


def test_modules_as_values_are_refused():
    with pytest.raises(TitanError, match="b: a module as a value"):
        run(a="from t import b\ndef main(): return vars(b)\n", b="def f(): ...\n")


def test_imports_on_a_condition_stay_where_they_are():
    text, main = run(a="try:\n    import no_such_package as it\nexcept ImportError:\n    it = None\ndef main(): return it\n")
    assert main() is None
    assert text.index("try") < text.index("no_such_package")


def test_parameters_keep_names_that_callers_may_know():
    text, main = run(
        a="""
def main():
    settings = {"unpacked": 5}
    return called(1, keyword=2), handed(print), Thing(3).method(4), anyone(**settings), later(passed)(5), [decorated(6)]
def called(positional, keyword): return positional + keyword
def handed(function_given): return function_given is print
def passed(somebody_s): return somebody_s
def later(function_given): return lambda argument: function_given(somebody_s=argument)
def anyone(unpacked): return unpacked
class Thing:
    def __init__(self, initial): self.initial = initial
    def method(self, argued): return self.initial + argued
class Heir(Thing):
    def step(self, closure): return closure
from t.b import named_so as other
def by_other_name(): return passed(other)
import functools
@functools.cache
def decorated(number_of_it): return number_of_it
""",
        b="def named_so(behind_alias): return behind_alias\n",
    )
    assert main() == (3, True, 7, 5, 5, [6])
    for kept in ("behind_alias", "keyword", "unpacked", "somebody_s", "initial", "closure", "number_of_it"):
        assert kept in text
    for gone in ("positional", "function_given", "argued"):
        assert gone not in text


def test_private_attributes_are_short_where_only_self_has_them():
    text, main = run(
        a="""
from dataclasses import dataclass
class Own:
    def __init__(self): self._count = self._shown = 1; self._looked_up = 2; self._by_others = 3
    def total(self):
        def inner(): return self._count
        return inner() + self._helper() + self._static(1) + getattr(self, "_looked_up") + self._made().total_of()
    def _helper(self): return 10
    @staticmethod
    def _static(self): return self
    @classmethod
    def _made(cls): return cls()
    def total_of(self): return self._count
class Base:
    def _hook(self): return 1
class Heir(Base):
    def _hook(self): return self._own() + super()._hook()
    def _own(self): return 1
    def hook(self): return self._hook()
@dataclass
class Data:
    _field: int = 1
    def get(self): return self._field
def main(): return Own().total(), Own()._by_others, Heir().hook(), Data(_field=4).get(), repr(Data())
"""
    )
    assert main() == (1 + 10 + 1 + 2 + 1, 3, 2, 4, "Data(_field=1)")
    for kept in ("_looked_up", "_by_others", "_hook", "_own", "_field"):
        assert kept in text
    for gone in ("_count", "_helper", "_static", "_made"):
        assert gone not in text


def test_methods_that_nobody_names_are_gone():
    text, main = run(
        a="""
from typing import Protocol
class Shape(Protocol):
    def asked(self) -> int: ...
class Thing:
    def used(self): return 1
    def unused(self): return self.only_there()
    def only_there(self): return 2
    def by_text(self): return 3
    def __len__(self): return 4
    @property
    def set_alone(self): return 6
    @set_alone.setter
    def set_alone(self, value): ...
    def matched(self): return 7
class Foreign(list):
    def flushed(self): return 5
def match(thing):
    match thing:
        case Thing(matched=value): return value
KINDS = [Shape]
def main(): return Thing().used(), getattr(Thing(), "by_text")(), len(Thing()), len(KINDS), len(Foreign())
"""
    )
    assert main() == (1, 3, 4, 1, 0)
    for kept in ("flushed", "set_alone", "matched"):
        assert kept in text
    for gone in ("asked", "unused", "only_there"):
        assert gone not in text


# ---------------------------------------------------------------- what a legal change may bring
def test_heirs_by_another_name_still_replace_what_they_replace():
    text, main = run(
        a="""
import io
class Base:
    def step(self): return self._hook()
    def _hook(self): return "base"
    def own(self): return self._count()
    def _count(self): return 1
Alias = Base
def made(base):
    class Heir(base):
        def _hook(self): return "heir"
    return Heir
class Mixin:
    def readable(self): return True  # io asks
    def unused(self): return 1
Mixed = Mixin
class Stream(Mixed, io.RawIOBase):
    def readinto(self, buffer): return 0
class Direct(Alias):
    def _count(self): return 2
def main(): return made(Base)().step(), Direct().own(), io.BufferedReader(Stream()).read()
"""
    )
    assert main() == ("heir", 2, b"")


def test_parameters_of_what_is_looked_up_and_of_lambdas_keep_their_names():
    _, main = run(
        a="""
class Hooks:
    def on_start(self, given): return given
def called(action, options): return action(**options)
class Options:
    given = 3
def main():
    options = {name: value for name, value in vars(Options).items() if name[0] != "_"}
    return getattr(Hooks(), "on_start")(**options), called(lambda given: given + 1, options), (lambda given: given + 2)(**options)
"""
    )
    assert main() == (3, 4, 5)


def test_first_parameters_are_self_in_methods_alone():
    _, main = run(
        a="""
class Other:
    _size = 5
class Thing:
    size_of = staticmethod(lambda other: other._size)
    def __init__(self): self._size = 1
    def compare(*things, other): return len(things), other._size
    def size(self): return self._size
def main(): return Thing().size(), Thing.size_of(Other()), Thing().compare(other=Other())
"""
    )
    assert main() == (1, 5, (1, 5))


def test_methods_named_in_defaults_and_values_of_protocols_stay():
    _, main = run(
        a="""
from typing import Protocol
class Shape(Protocol):
    LIMIT = 3
    SIDES: int = 4
    def asked(self): ...
class Thing:
    def initial(self): return 2
    def value(self, of=initial): return of(self)
def main(): return Shape.LIMIT, Shape.SIDES, Thing().value()
"""
    )
    assert main() == (3, 4, 2)


def test_quoted_annotations_are_still_found():
    text, main = run(
        a="""
from dataclasses import dataclass
from typing import Literal, get_type_hints
LowRank = int
Unquoted = int
@dataclass
class Settings:
    rank: "LowRank | None" = None
    mode: Literal["a", "b"] = "a"
    other: Unquoted = 1
def main(): return get_type_hints(Settings, main.__globals__)["rank"]
"""
    )
    assert main() == int | None
    assert "Unquoted" not in text


def test_annotations_that_decorators_read_stay():
    _, main = run(
        a="""
from functools import singledispatchmethod, cache
class Shown:
    @singledispatchmethod
    def show(self, value): return "any"
    @show.register
    def _(self, value: int): return "int"
    @cache
    def cached(self, value: NoSuchType): return value
def main():
    from functools import singledispatch
    @singledispatch
    def inner(value): return "any"
    @inner.register
    def _(value: str): return "str"
    return Shown().show(1), Shown().show(""), inner(""), Shown().cached(2)
"""
    )
    assert main() == ("int", "any", "str", 2)


def test_classes_of_one_name_are_told_apart_and_known_by_it():
    text, main = run(
        a="from t.b import Norm as Other\nclass Norm: ...\nclass Norm2: ...\ndef main(): return [kind.__name__ for kind in (Norm, Other, Norm2)]\n",
        b="class Norm: ...\n",
    )
    assert sorted(main()) == ["Norm2", "Norm3", "Norm4"]


def test_a_field_that_is_called_like_its_default():
    _, main = run(a="from dataclasses import dataclass\nlimit = 3\n@dataclass\nclass Settings:\n    limit: int = limit\ndef main(): return Settings().limit\n")
    assert main() == 3


def test_packages_come_before_what_is_in_them():
    names: dict = {}
    sources = {
        "t": "made = ['t']\n",
        "t.a": "from t.b.c import found\ndef main(): return found\n",
        "t.b": "from t import made\nmade.append('t.b')\n",
        "t.b.c": "from t import made\nfound = list(made)\n",
    }
    text, name = joined(sources, ["t.a"], ("t.a", "main"))
    exec(text, names)
    assert names[name]() == ["t", "t.b"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("from t import b\ndef main(): b.LEVEL = 3\n", r"t\.b\.LEVEL: set from another module"),
        ("from t.b import LEVEL\ndef main(): return LEVEL\n", r"t\.b\.LEVEL: set anew by a function"),
        ("class A:\n    from t.b import level\ndef main(): return A.level()\n", "t.b.level: imported .* in a class's body"),
        ("try:\n    from t.b import level\nexcept ImportError:\n    level = None\ndef main(): return level\n", "t.b.level: imported on a condition"),
        ("def main():\n    from t.b import level\n    level = level or 1\n    return level\n", "t.b.level: imported .* bound again"),
        ("import math\nmath = [math]\ndef main(): return math\n", "t.a: math is imported, and bound again"),
        ("def main():\n    width = 3\n    return '{width}'.format(**locals())\n", r"locals\(\): sees variables by names"),
        ("def main():\n    width = 3\n    return eval('width')\n", r"eval\('width'\): sees"),
    ],
)
def test_what_cannot_be_followed_is_refused(source, message):
    b = "LEVEL = 1\ndef level(): return LEVEL\ndef louder():\n    global LEVEL\n    LEVEL += 1\n"
    with pytest.raises(TitanError, match=message):
        run(a=source, b=b)


def test_what_a_function_sets_is_what_others_see():
    b = "LEVEL = 1\ndef louder():\n    global LEVEL\n    LEVEL += 1\n"
    _, main = run(a="from t import b\ndef main():\n    b.louder()\n    from t.b import LEVEL\n    return b.LEVEL, LEVEL\n", b=b)
    assert main() == (2, 2)


@pytest.mark.parametrize(
    ("source", "short"),
    [
        ("if (x := f((a for a in b))) and c:\n    y", "if(x:=f(a for a in b))and c:\n y"),
        ("def f():\n    if (y := 1):\n        return (y, 2)\n    x = (1, -2)\n    return ()", "def f():\n if y:=1:\n  return y,2\n x=1,-2\n return()"),
        ("x = (a + b) * 2, (c,)", "x=(a+b)*2,(c,)"),
        ("x = 1 if y else 2.0 .real", "x=1 if y else 2.0.real"),
        ("assert not 'a' in 'é' or x", "assert not'a'in'é'or x"),
    ],
)
def test_blanks_and_brackets(source, short):
    assert squeezed(ast.parse(source).body) == short


def test_blanks_of_texts_stay():
    source = "def f(x, y):\n    return f'''\n    {x + 1:>{y}} {{a  b}}\n      {x!r}''' + 'a  b'"
    names, short = {}, {}
    exec(source, names)
    exec(squeezed(ast.parse(source).body), short)
    assert names["f"](1, 5) == short["f"](1, 5)


@pytest.mark.parametrize("path", sorted((ROOT / "titanlm").rglob("*.py"))[::7], ids=lambda path: path.stem)
def test_scopes_are_pythons(path):
    """Against symtable, which is the compiler's own."""
    source = path.read_text(encoding="utf-8")
    found = Counter()
    for scope in within(scopes_of(ast.parse(source).body)[0]):
        found[frozenset(scope.variables)] += scope.kind != "module"
    expected = Counter()

    def visit(table: symtable.SymbolTable) -> None:
        for child in table.get_children():
            names = {symbol.get_name() for symbol in child.get_symbols() if symbol.is_local()}
            expected[frozenset(names - {".0", "__class__", "__classdict__"})] += 1
            visit(child)

    visit(symtable.symtable(source, str(path), "exec"))
    assert found - expected == expected - found == Counter()


def within(scope):
    yield scope
    for inner in scope.inner:
        yield from within(inner)
