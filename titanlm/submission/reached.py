"""Which statements of titanlm a function reaches, and modules made of these alone.

The unit is the top-level statement. Every name that a kept statement mentions
is followed to the statement that binds it, through module-level and
function-level imports alike, until nothing new comes. Annotations of functions
are not followed, since nothing evaluates them; those of classes and of
decorated functions are (settings, factories, torch operators). A statement that
belongs to a name (``Name.attribute = …``, ``@name.register_fake``) comes with
it. One that binds nothing, changes what is imported, or registers something
elsewhere (``@torch.library.register_fake("a::b")``) runs for its effect and
stays. Imports for their effect alone are not followed.

What is left out is reached too, but only called when a setting is used. Its
names are served as classes that refuse to be called.

Names that are put together at run time (``getattr(module, f"…")``) are not seen.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from titanlm.errors import TitanError
from titanlm.submission.shorter import last_name, quoted, stripped

LEFT_OUT: dict[str, tuple[str, tuple[object, ...]]] = {
    "titanlm.checkpoint_copy": ("checkpoint.copy_to", ("", None)),
    "titanlm.cli": ("", ()),
    "titanlm.data_state": ("data.start", ("", None)),
    "titanlm.distributed.fsdp2": ("parallel.strategy", ("none", "replicate")),
    "titanlm.generate": ("train.sample_every", (0,)),
    "titanlm.initial_load": ("checkpoint.initial_load.path", (None,)),
    "titanlm.registry.registrations": ("", ()),  # of components in files, and here are none
    "titanlm.workers.Workers": ("data.workers", (0,)),
}
"""Module, or definition of one → a setting, and its values with which nothing of it is called; no setting: a bundle never does."""

WHERE_USED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "titanlm.check._check_stages": ("curriculum*", lambda stages: stages != []),
    "titanlm.check._gather_problems": ("parallel.gather_dtype", lambda dtype: dtype != "fp32"),
    "titanlm.check._halving_problems": ("optimizer.*.weight_dtype", lambda dtype: dtype == "bf16"),
    "titanlm.check._refused": ("model.attention_backend", lambda name: name not in ("auto", "sdpa", "math")),
    "titanlm.calibration": ("quantizer.*.rounding", lambda rounding: rounding == "gptq"),
    "titanlm.curriculum": ("curriculum*", lambda stages: stages != []),
    "titanlm.datasets.files._remote": ("*", lambda value: "://" in str(value)),
    "titanlm.datasets.files.filesystem_of": ("*", lambda value: "://" in str(value)),
    "titanlm.datasets.mixture.Mixture": ("data.source*", lambda source: source != []),
    "titanlm.datasets.python_stdlib": ("*", lambda value: value == "python_stdlib"),
    "titanlm.datasets.shard_sequence.tokens_of": ("curriculum*", lambda stages: stages != []),
    "titanlm.distributed.activation_checkpointing._checkpointed": ("train.activation_checkpointing", lambda mode: mode != "none"),
    "titanlm.distributed.activation_checkpointing._policy": ("train.activation_checkpointing", lambda mode: mode == "selective"),
    "titanlm.distributed.compile_cache": ("train.compile_cache", lambda kept: kept != "off"),
    "titanlm.distributed.code_gather": ("parallel.gather_dtype", lambda dtype: dtype == "float8"),
    "titanlm.micro_batch": ("train.micro_batch_tokens", lambda tokens: tokens == "auto"),
    "titanlm.optimizers.adamw.CompactAdamW": ("optimizer.*.moments", lambda moments: moments != "fp32"),
    "titanlm.optimizers.split_weights": ("optimizer.*.weight_dtype", lambda dtype: dtype == "bf16"),
    "titanlm.pass_memory": ("parallel.gather_dtype", lambda dtype: dtype == "float8"),
    "titanlm.kernels.flash2": ("model.attention_backend", lambda name: name == "varlen"),
    "titanlm.kernels.flash3": ("model.attention_backend", lambda name: name == "flash3"),
    "titanlm.kernels.flash4.flash4_forward": ("model.attention_backend", lambda name: name == "flash4"),
    "titanlm.kernels.lengths.cumulative_lengths": ("model.attention_backend", lambda name: name in ("flash3", "flash4", "varlen")),
    "titanlm.kernels.refusals.refusals": ("model.attention_backend", lambda name: name not in ("auto", "sdpa", "math")),
    "titanlm.kernels.refusals.require": ("model.attention_backend", lambda name: name not in ("auto", "sdpa", "math")),
    "titanlm.quantizers.gptq": ("quantizer.*.rounding", lambda rounding: rounding == "gptq"),
}
"""Module, or definition of one → a pattern of settings, and with which values of theirs it is called; it is in where one has such a value."""

UNSAID = frozenset({"titanlm.attention_choice.settle_attention", "titanlm.check.summary", "titanlm.config_sources._key_lines"})
"""Functions that yield nothing here instead of refusing.

In which line a key stands says nothing of a config that its user has no file
of; what a submission computes with is not measured where it counts; and what
its config takes was asked before it became one.
"""

_ROOT = Path(__file__).parents[1]


def path_of(module: str) -> Path:
    path = _ROOT.joinpath(*module.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def is_module(name: str) -> bool:
    return name.partition(".")[0] == "titanlm" and path_of(name).is_file()


def left_out(flat: Mapping[str, Any]) -> dict[str, str]:
    """What a bundle of a flattened config does without, and why. Raises TitanError when the config needs what none can have."""
    reasons = dict.fromkeys(UNSAID, "")
    for what, (setting, unused) in LEFT_OUT.items():
        if setting and flat.get(setting) not in unused:
            raise TitanError(f"{setting} = {flat[setting]!r}: {what} is left out of a submission, so it must be {' or '.join(map(repr, unused))}")
        reasons[what] = f"{setting} was {unused[0]!r}" if setting else "a submission has no use for it"
    for what, (pattern, used) in WHERE_USED.items():
        if not any(used(value) for path, value in flat.items() if fnmatchcase(path, pattern)):
            reasons[what] = "no setting asked for it" if pattern == "*" else f"no {pattern} asked for it"
    return reasons


@dataclass
class _Module:
    """The top-level statements of a module, and who binds what."""

    name: str
    text: str
    body: list[ast.stmt]
    bound: dict[str, list[int]] = field(default_factory=dict)
    """Name → the statements that define it or belong to it, by position."""
    imported: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Name → (module, name in it; empty: the module itself), titanlm's only."""
    foreign: dict[str, str] = field(default_factory=dict)
    """Name → the top-level package that an import statement takes it from."""
    kept: set[int] = field(default_factory=set)
    absent: set[str] = field(default_factory=set)
    """Definitions that are left out of it."""
    used: set[str] = field(default_factory=set)
    """Names of imports that a kept statement mentions."""


class Reached:
    """Grows by ``need``; ``sources`` gives it as text, without what ``left_out`` names."""

    def __init__(self, left_out: Mapping[str, str]) -> None:
        self.left_out = left_out
        self.modules: dict[str, _Module] = {}
        self.absent: dict[str, set[str]] = {}
        self.packages: set[str] = set()
        self._waiting: list[tuple[_Module, int]] = []
        self._busy = False

    def need(self, module: str, name: str) -> None:
        """Keep what binds ``name`` in ``module``, and all that it mentions."""
        if module in self.left_out:
            self.absent.setdefault(module, set()).add(name)
            self._module(module.rpartition(".")[0])
        elif is_module(f"{module}.{name}"):
            self._module(f"{module}.{name}")
        else:
            self._keep(self._module(module), name)
        while self._waiting and not self._busy:
            self._busy = True
            own, index = self._waiting.pop()
            self._follow(own, own.body[index])
            self._busy = False

    def _module(self, name: str) -> _Module:
        if name not in self.modules:
            if package := name.rpartition(".")[0]:
                self._module(package)
            text = path_of(name).read_text(encoding="utf-8")
            own = self.modules[name] = _Module(name, text, ast.parse(text).body)
            for index, statement in enumerate(own.body):
                self._enter(own, index, statement)
        return self.modules[name]

    def _enter(self, own: _Module, index: int, statement: ast.stmt) -> None:
        """Note what a top-level statement binds, or that it runs for what it does."""
        match statement:
            case ast.Import() | ast.ImportFrom():
                for name, module, member in _imports(statement):
                    if module.partition(".")[0] == "titanlm":
                        own.imported[name] = (f"{module}.{member}", "") if member and is_module(f"{module}.{member}") else (module, member)
                    own.foreign[name] = module.partition(".")[0]
            case ast.If(test=ast.Name(id="TYPE_CHECKING")) | ast.If(test=ast.Compare(left=ast.Name(id="__name__"))):
                pass
            case ast.Expr(value=ast.Constant()):
                pass  # a docstring
            case _:
                names = _bound_by(statement)
                if own.foreign.keys() & names or _registers(statement, own):
                    self._mark(own, index)
                for name in names:
                    own.bound.setdefault(name, []).append(index)
                owner = _registered_with(statement)
                if owner in own.bound and owner not in names:
                    own.bound[owner].append(index)  # `@operator.register_fake` and the like
                elif not names or names == ["_"]:
                    self._mark(own, index)

    def _keep(self, own: _Module, name: str) -> None:
        if f"{own.name}.{name}" in self.left_out:
            own.absent.add(name)
            return
        for index in own.bound.get(name, ()):
            self._mark(own, index)
        if name in own.foreign:
            own.used.add(name)
        if name in own.imported:
            self._arrive(*own.imported[name])

    def _arrive(self, module: str, name: str) -> None:
        if name:
            self.need(module, name)
        elif module not in self.left_out:
            self._module(module)

    def _mark(self, own: _Module, index: int) -> None:
        if index not in own.kept:
            own.kept.add(index)
            self._waiting.append((own, index))

    def _follow(self, own: _Module, statement: ast.stmt) -> None:
        """Everything that a kept statement mentions."""
        local: dict[str, tuple[str, str]] = {}
        nodes = list(ast.walk(stripped(statement)))
        for node in nodes:
            for name in quoted(node):
                self._keep(own, name)
            if isinstance(node, ast.Import | ast.ImportFrom):
                for name, module, member in _imports(node):
                    if module.partition(".")[0] != "titanlm":
                        self.packages.add(module.partition(".")[0])
                    elif not member or is_module(f"{module}.{member}"):
                        local[name] = f"{module}.{member}".rstrip("."), ""
                    else:
                        self._arrive(module, member)
        owners = {id(node.value): node.attr for node in nodes if isinstance(node, ast.Attribute)}
        for node in nodes:
            if isinstance(node, ast.Name):
                self._keep(own, node.id)
                module, member = local.get(node.id) or own.imported.get(node.id, ("", ""))
                if module and not member:
                    if id(node) not in owners or is_module(f"{module}.{owners[id(node)]}"):
                        raise TitanError(f"{node.id} of line {node.lineno}: a module as a value, of which anything may be used; import names from it")
                    self.need(module, owners[id(node)])

    # ------------------------------------------------------------ as text
    def sources(self) -> dict[str, str]:
        """Module → its kept statements; packages that are nothing but folders are empty."""
        texts = {name: _text(own) + self._stand_ins(name, own.absent) for name, own in self.modules.items()}
        for own in self.modules.values():
            self.packages |= {own.foreign[name] for name in own.used} - {"titanlm", "__future__"}
        texts |= {module: self._stand_ins(module, names) for module, names in self.absent.items()}
        return dict(sorted(texts.items()))

    def _stand_ins(self, module: str, names: set[str]) -> str:
        """Functions that find nothing, and classes that refuse: annotations may read these."""
        made = []
        for name in sorted(names):
            if (what := f"{module}.{name}") in UNSAID:
                made.append(f"def {name}(*a, **k):\n    return ()\n")
                continue
            why = f"{what} is left out: {self.left_out.get(module) or self.left_out[what]}"
            made.append(f"@dataclass(frozen=True)\nclass {name}:\n    def __new__(cls, *a, **k):\n        raise ImportError({why!r})\n")
        return "from dataclasses import dataclass\n" * bool(made) + "".join(made)


def _text(own: _Module) -> str:
    lines = own.text.splitlines()
    parts: list[str] = []
    for index, statement in enumerate(own.body):
        if isinstance(statement, ast.Import | ast.ImportFrom):
            kept = copy.copy(statement)
            future = isinstance(statement, ast.ImportFrom) and statement.module == "__future__"
            kept.names = [alias for alias in statement.names if future or (alias.asname or alias.name.partition(".")[0]) in own.used]
            if kept.names:
                parts.append(ast.unparse(kept))
        elif index in own.kept or (index == 0 and isinstance(statement, ast.Expr)):  # its docstring
            parts.append(_verbatim(lines, own.body, index))
    if not own.kept:
        return ""
    return "\n".join(parts) + "\n"


def _verbatim(lines: list[str], body: list[ast.stmt], index: int) -> str:
    """The statement's lines, with the comments before and the docstring behind it."""
    statement = body[index]
    first = min([statement.lineno, *(node.lineno for node in getattr(statement, "decorator_list", ()))]) - 1
    last = statement.end_lineno or statement.lineno
    while first and lines[first - 1].startswith("#"):
        first -= 1
    following = body[index + 1] if index + 1 < len(body) else None
    if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
        last = following.end_lineno or last
    return ("\n\n" if hasattr(statement, "body") else "") + "\n".join(lines[first:last])


def _imports(statement: ast.stmt) -> Iterator[tuple[str, str, str]]:
    """(bound name, module, member) of an import; the member is empty for `import module`. Raises TitanError for forms that are not followed."""
    if isinstance(statement, ast.ImportFrom) and (statement.level or statement.names[0].name == "*"):
        raise TitanError(f"{ast.unparse(statement)}: name the module in full, and what is taken from it")
    if isinstance(statement, ast.Import):
        for alias in statement.names:
            yield (alias.asname, alias.name, "") if alias.asname else (alias.name.partition(".")[0], alias.name.partition(".")[0], "")
    elif isinstance(statement, ast.ImportFrom):
        for alias in statement.names:
            yield alias.asname or alias.name, statement.module or "", alias.name


def _registers(statement: ast.stmt, own: _Module) -> bool:
    """Whether a decorator that is no titanlm's keeps it: ``@atexit.register``, ``@torch.library.impl(...)``."""
    for decorator in getattr(statement, "decorator_list", ()):
        root = decorator
        while isinstance(root, ast.Call | ast.Attribute):
            root = root.func if isinstance(root, ast.Call) else root.value
        if getattr(root, "id", "") in own.foreign.keys() - own.imported.keys() and last_name(decorator).startswith(("register", "impl")):
            return True
    return False


def _bound_by(statement: ast.stmt) -> list[str]:
    """Names that a definition or assignment binds; for `x.y = z` the x, whose part it is."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [statement.name]
    if isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        return list(dict.fromkeys(root for target in targets for root in _roots(target)))
    return []


def _roots(target: ast.expr) -> Iterator[str]:
    match target:
        case ast.Name():
            yield target.id
        case ast.Attribute() | ast.Subscript() | ast.Starred():
            yield from _roots(target.value)
        case ast.Tuple() | ast.List():
            for item in target.elts:
                yield from _roots(item)


def _registered_with(statement: ast.stmt) -> str:
    """``operator`` for ``@operator.register_fake def _(...)`` and ``operator.register_autograd(...)``."""
    node: Any = statement.value if isinstance(statement, ast.Expr) else next(iter(getattr(statement, "decorator_list", ())), None)
    node = node.func if isinstance(node, ast.Call) else node
    return node.value.id if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) else ""
