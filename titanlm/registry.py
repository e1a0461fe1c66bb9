"""The registry: kinds of component, ``@register``, lookup.

A component is a callable ``factory(config, *, runtime...)``. Its first
parameter is annotated with its settings, a frozen dataclass; the others are
keyword-only names out of the few that its kind offers at run time. There is no
base class. ``register`` checks the signature, so that the author of an outside
component errs at import, with file and line, and not after warm-up.

Three doors lead to a component: a file of the same name in the kind's folder
of this package, a module named in ``imports`` of a config, and an entry point
``titanlm.<kind>`` of an installed package. The last is listed without being
imported and imported only when a config names it.

This module needs nothing beyond the standard library and never imports torch.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

from titanlm.errors import RegistryError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor, nn

    from titanlm.batch import Batch, Document, Row
    from titanlm.curricula.stage import Stage
    from titanlm.exporters.encoding import Candidate, Encoded, ExportReport, ExportRequest
    from titanlm.progress import Progress
    from titanlm.tuned import Tuned

__all__ = ["KINDS", "Component", "Entry", "Kind", "Slot", "did_you_mean", "known", "lookup", "register"]


# ---------------------------------------------------------------- protocols
class Tokenizer(Protocol):
    """Text to ids and back, with an exact account of bytes; used by several threads at once."""

    vocab_size: int
    """Largest id + 1, special ids included."""
    bos_id: int | None
    """Put before every document when not None."""
    eos_id: int | None
    """Put after every document when not None; may equal ``bos_id``."""
    pad_id: int | None
    """Fills padded positions, never masks; optional: read by ``getattr(tokenizer, "pad_id", None)``, and may equal ``eos_id``."""
    lossless: bool
    """``decode(encode(text)) == text`` for every text; then Σ target_bytes is its UTF-8 length."""
    fingerprint: str
    """Changes whenever any text would get other ids."""

    def encode(self, text: str) -> np.ndarray: ...  # (n,) int32, no special ids
    def decode(self, ids: Sequence[int]) -> str: ...
    def target_bytes(self, ids: np.ndarray, prev_ids: np.ndarray) -> np.ndarray: ...  # (n,) int32, the caller's to keep and change
    def files(self) -> Mapping[str, bytes]: ...  # what an artifact must carry to rebuild it


class Dataset(Protocol):
    """One logical stream of documents; endless for split "train", one pass else."""

    fingerprint: str

    def __next__(self) -> Document: ...
    def __iter__(self) -> Iterator[Document]: ...
    def state(self) -> dict[str, Any]: ...  # int, str, list, dict and numpy arrays
    def restore(self, state: dict[str, Any]) -> None: ...


class Filter(Protocol):
    """A row has ``text``, ``place`` (where it is), ``n_tokens`` (of the text, by the run's tokenizer, counted when asked for) and the data's own columns."""

    columns: tuple[str, ...]
    """The data's columns that it reads, so that others stay on disk; may be absent: all are read."""

    def keep(self, row: Mapping[str, Any]) -> bool: ...


class Packer(Protocol):
    """Documents in, rows of exactly ``seq_len`` positions out; one whose rows overlap has ``stride(seq_len)`` too, positions from row to row."""

    def add(self, document: Document, target_bytes: np.ndarray) -> None: ...
    def pop(self, seq_len: int) -> Row | None: ...  # None: add more documents first
    def flush(self, seq_len: int) -> Row | None: ...  # end of data: a padded row; None: empty, or left out
    def state(self) -> dict[str, Any]: ...
    def restore(self, state: dict[str, Any]) -> None: ...


class Model(Protocol):
    """An ``nn.Module``; ``blocks`` is what is compiled and checkpointed one by one."""

    head: nn.Module
    blocks: Iterable[nn.Module]

    def forward(self, batch: Batch) -> Tensor: ...  # (B, T, D); may return (hidden, aux sums)
    def init_weights(self, seed: int) -> None: ...
    def flops_per_token(self, seq_len: int) -> float: ...
    def parameter_roles(self) -> Mapping[str, str]: ...  # name → embedding|head|matrix|norm|bias|gain


class Adapter(Protocol):
    """Changes the model when it is built; says what is trained; folds itself back in."""

    def trains(self, name: str) -> bool: ...
    def parameter_roles(self) -> Mapping[str, str]: ...  # of the parameters it added
    def init_weights(self, seed: int) -> None: ...  # of those, after the model's own
    def merge(self) -> None: ...  # the model then has the parameters it had before


class Quantizer(Protocol):
    """``prepare(model)`` before sharding and compile; ``encode``/``decode`` at export. Either may be absent.

    One that changes how matrices are multiplied by and not what they are says
    ``of_products = True``: it claims parameters apart from the others. What
    hangs on the device is for ``begin``, which may be absent too: called in
    training alone, on materialised and sharded parameters before anything is
    traced, it returns lines for the log. ``n_tokens`` are those of a forward
    pass, ``n_head_tokens`` those that the loss gives the head at once.

    May say which tensors are too small for it, ``takes(tensor) → bool``; one
    that says ``calibrated = True`` is given the second moments of what a matrix
    meets instead: ``encode_calibrated(tensor, hessian)`` (``titanlm.calibration``).
    """

    def prepare(self, model: nn.Module, params: Sequence[str]) -> None: ...  # names it claimed; names must keep
    def begin(
        self, model: nn.Module, params: Sequence[str], *, device: torch.device, n_tokens: int, n_head_tokens: int, compiled: bool, tuned: Tuned
    ) -> list[str]: ...
    def encode(self, tensor: Tensor) -> Encoded: ...
    def decode(self, encoded: Encoded) -> Tensor: ...


class Optimizer(Protocol):
    """A ``torch.optim.Optimizer``; the trainer sets ``lr`` of every group before each step."""

    param_groups: list[dict[str, Any]]
    state: Mapping[Any, Any]

    def step(self) -> Any: ...
    def zero_grad(self) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Scheduler(Protocol):
    def factor(self, progress: Progress) -> float: ...  # pure; multiplies the optimizer's lr


class Curriculum(Protocol):
    """The stages that it stands for, in order; what a factory of this kind gives is a tuple."""

    def __iter__(self) -> Iterator[Stage]: ...


class Loss(Protocol):
    """A per-token function of (z_y, lse, z̄); see ``titanlm.losses.chunked``."""

    chunk_tokens: int

    def per_token(self, z_y: Tensor, lse: Tensor, z_mean: Tensor | None) -> Tensor: ...


class Averager(Protocol):
    def update(self, progress: Progress) -> None: ...
    def swap(self) -> AbstractContextManager[None]: ...  # averaged weights inside, raw ones after
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Fitter(Protocol):
    """Changes tensors, or what quantizes them, until ``size_bytes(candidate)`` is within the limit."""

    def fit(self, candidate: Candidate, size_bytes: Callable[[Candidate], int]) -> Candidate: ...


class Exporter(Protocol):
    def size_bytes(self, tensors: Mapping[str, Encoded | Tensor], request: ExportRequest) -> int: ...
    def write(self, tensors: Mapping[str, Encoded | Tensor], request: ExportRequest) -> ExportReport: ...
    def read(self, path: Path) -> Mapping[str, Tensor]: ...  # decoded, from the file that was written


class Logger(Protocol):
    def start(self, step: int) -> None: ...  # steps after it will be logged (again, after a resume)
    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def message(self, text: str) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class Kind:
    """One row of the table of kinds."""

    name: str
    folder: str
    """Folder of this package with the built-in ones, a file each."""
    runtime: frozenset[str]
    """Names that a factory may ask for beside its settings."""
    settings: frozenset[str]
    """Fields that every settings class of this kind has, because the trainer reads them."""
    protocol: type
    summary: str


def _kind(name: str, protocol: type, summary: str, runtime: str = "", settings: str = "") -> Kind:
    folder = {"loss": "losses", "curriculum": "curricula"}.get(name, f"{name}s")
    return Kind(name, folder, frozenset(runtime.split()), frozenset(settings.split()), protocol, summary)


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        _kind("tokenizer", Tokenizer, "text to ids, ids to bytes"),
        _kind("dataset", Dataset, "a resumable stream of documents", "tokenizer split stream n_streams seed epochs on_error"),
        _kind("filter", Filter, "which rows of a dataset are kept"),
        _kind("packer", Packer, "documents to rows of equal length", "seq_len"),
        _kind("model", Model, "the network, without loss", "vocab_size max_seq_len"),
        _kind("adapter", Adapter, "LoRA and the like", "model"),
        _kind("quantizer", Quantizer, "fewer bits, in training and at export", settings="params"),
        _kind("optimizer", Optimizer, "updates the parameters its patterns claim", "named_params", "params lr"),
        _kind("scheduler", Scheduler, "learning-rate factor over a run", "total_steps horizon"),
        _kind("curriculum", Curriculum, "row lengths, batches and learning rates by stages of a run"),
        _kind("loss", Loss, "what is minimised, per token", settings="chunk_tokens"),
        _kind("averager", Averager, "averages of the weights", "model horizon"),
        _kind("fitter", Fitter, "makes an artifact fit its limit", "max_bytes"),
        _kind("exporter", Exporter, "writes and reads what a run hands over", "model tokenizer run_dir"),
        _kind("logger", Logger, "where metrics go", "run_dir"),
    )
}


# ---------------------------------------------------------------- entries and slots
@dataclass(frozen=True)
class Entry:
    """A registered component."""

    kind: str
    name: str
    factory: Callable[..., Any]
    settings: type
    runtime: frozenset[str]
    """The run-time names this factory asks for."""
    place: str
    """``file:line`` of the factory."""


@dataclass(frozen=True)
class Component:
    """A component chosen by a config: its kind, its name and its settings."""

    kind: str
    name: str
    config: Any

    @classmethod
    def named(cls, kind: str, name: str, **settings: Any) -> Component:
        """The component of that name with the given settings, the rest at their defaults."""
        return cls(kind, name, lookup(kind, name).settings(**settings))

    def build(self, **runtime: Any) -> Any:
        """Call the factory with those of ``runtime`` that it asks for; what is not given has the factory's default."""
        entry = lookup(self.kind, self.name)
        return entry.factory(self.config, **{name: value for name, value in runtime.items() if name in entry.runtime})


@dataclass(frozen=True)
class Slot:
    """Marks a setting that holds a component: ``Annotated[Component, Slot("packer")]``."""

    kind: str

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        # Imported here so that this module and every component file stay free of pydantic.
        from titanlm.config import slot_schema

        return slot_schema(self.kind)


_F = TypeVar("_F", bound=Callable[..., Any])
_entries: dict[tuple[str, str], Entry] = {}


def register(kind: str, name: str) -> Callable[[_F], _F]:
    """Register the decorated factory (a class or a function) as ``name`` of ``kind``.

    Raises RegistryError when the kind is unknown, the name is taken, or the
    signature is not ``factory(config: FrozenDataclass, *, runtime...)``.
    """
    if kind not in KINDS:
        raise RegistryError(f"no kind {kind!r}{did_you_mean(kind, KINDS)} (kinds: {', '.join(KINDS)})")

    def decorate(factory: _F) -> _F:
        entry = _inspect(KINDS[kind], name, factory, _place(factory, sys._getframe(1)))
        taken = _entries.get((kind, name))
        if taken is not None and taken.place != entry.place:
            raise RegistryError(f"{entry.place}: {kind} {name!r} is already registered at {taken.place}")
        builtin = _builtin_file(KINDS[kind], name)
        if builtin is not None and not entry.place.startswith(f"{builtin}:"):
            raise RegistryError(f"{entry.place}: {kind} {name!r} is already built in at {builtin}")
        _entries[kind, name] = entry
        return factory

    return decorate


def _place(factory: Callable[..., Any], caller: FrameType) -> str:
    """File and line of a function, or of where a class is registered, which for a decorated one is its own.

    Before Python 3.13 `inspect` parses the whole file to find a class: half a
    second a time in a submission, which is one file.
    """
    code = getattr(inspect.unwrap(factory), "__code__", None)
    return f"{caller.f_code.co_filename}:{caller.f_lineno}" if code is None else f"{code.co_filename}:{code.co_firstlineno}"


def _inspect(kind: Kind, name: str, factory: Callable[..., Any], place: str) -> Entry:
    here = f"{place}: {kind.name} {name!r}"
    parameters = list(inspect.signature(factory).parameters.values())
    if not parameters:
        raise RegistryError(f"{here}: the factory takes no settings; its first parameter must be `config: {name.title()}Config`")
    settings = parameters[0].annotation
    if isinstance(settings, str):
        try:
            settings = eval(settings, vars(sys.modules[factory.__module__]))  # the author's own words
        except Exception as error:
            raise RegistryError(f"{here}: cannot resolve the annotation {settings!r} of its settings: {error}") from error
    if not (isinstance(settings, type) and dataclasses.is_dataclass(settings)):
        raise RegistryError(f"{here}: the first parameter must be annotated with a frozen dataclass, its settings")
    if not settings.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        raise RegistryError(f"{here}: {settings.__name__} must be @dataclass(frozen=True)")
    missing = kind.settings - {field.name for field in dataclasses.fields(settings)}
    if missing:
        raise RegistryError(f"{here}: {settings.__name__} lacks {', '.join(sorted(missing))}, which the trainer reads from every {kind.name}")
    asked = set()
    for parameter in parameters[1:]:
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            if parameter.default is inspect.Parameter.empty:
                raise RegistryError(f"{here}: {parameter.name!r} must be keyword-only (put `*,` before it)")
            continue
        if parameter.name not in kind.runtime:
            if parameter.default is not inspect.Parameter.empty:
                continue
            offered = ", ".join(sorted(kind.runtime)) or "none"
            hint = did_you_mean(parameter.name, kind.runtime)
            raise RegistryError(f"{here}: asks for {parameter.name!r}, which no {kind.name} is offered{hint} (offered: {offered})")
        asked.add(parameter.name)
    # Read by pydantic when a config is loaded; a plain dict, so that nothing is imported here.
    settings.__pydantic_config__ = PYDANTIC_CONFIG  # type: ignore[attr-defined]
    return Entry(kind.name, name, factory, settings, frozenset(asked), place)


PYDANTIC_CONFIG: dict[str, Any] = {
    "strict": True,
    "extra": "forbid",
    "allow_inf_nan": False,
    "use_attribute_docstrings": True,
    "validate_default": False,
}


# ---------------------------------------------------------------- lookup
@dataclass(frozen=True)
class Origin:
    """Where a name comes from, known without importing it."""

    source: Literal["built-in", "entry point", "imports"]
    place: str
    """A file for built-in ones, ``module (distribution)`` for entry points, ``file:line`` else."""
    shadowed_by: str = ""
    """Set when an entry point lost its name to a built-in component."""


def lookup(kind: str, name: str) -> Entry:
    """The component, imported now if it was not.

    Raises RegistryError with the right names when there is none.
    """
    if (kind, name) not in _entries:
        if _builtin_file(KINDS[kind], name) is not None:
            importlib.import_module(f"titanlm.{KINDS[kind].folder}.{name}")
        else:
            for point in importlib.metadata.entry_points(group=f"titanlm.{kind}", name=name):
                point.load()
                if (kind, name) not in _entries:
                    owner = point.dist.name if point.dist is not None else "unknown distribution"
                    raise RegistryError(f"the entry point {point.value} of {owner} registers no {kind} named {name!r}")
    if (kind, name) not in _entries:
        names = [known_name for known_name, origin in known(kind).items() if not origin.shadowed_by]
        listing = ", ".join(names) or "none"
        raise RegistryError(f"no {kind} named {name!r}{did_you_mean(name, names)} (known: {listing})")
    return _entries[kind, name]


def known(kind: str) -> dict[str, Origin]:
    """Every name of a kind and where it comes from; nothing is imported."""
    folder = Path(__file__).parent / KINDS[kind].folder
    names = {path.stem: Origin("built-in", str(path)) for path in sorted(folder.glob("*.py")) if _builtin_file(KINDS[kind], path.stem) is not None}
    for point in importlib.metadata.entry_points(group=f"titanlm.{kind}"):
        owner = point.dist.name if point.dist is not None else "unknown distribution"
        origin = Origin("entry point", f"{point.value} ({owner})")
        if point.name in names:
            origin = dataclasses.replace(origin, shadowed_by=names[point.name].place)
            names[f"{point.name} "] = origin  # listed, never found
        else:
            names[point.name] = origin
    for (entry_kind, name), entry in _entries.items():
        if entry_kind == kind and name not in names:
            names[name] = Origin("imports", entry.place)
    return names


def _builtin_file(kind: Kind, name: str) -> Path | None:
    """The file that registers a built-in component; helpers in the same folder register nothing."""
    if not name.isidentifier() or len(name.encode()) > 200:  # file systems refuse longer names with an error
        return None
    path = Path(__file__).parent / kind.folder / f"{name}.py"
    return path if path.is_file() and _registers(path, kind.name, name) else None


@functools.cache
def _registers(path: Path, kind: str, name: str) -> bool:
    # The text first: most helpers need not be parsed.
    return "register(" in path.read_text(encoding="utf-8") and any(True for _ in registrations(path, kind, name))


def registrations(path: Path, kind: str, name: str) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    """The definitions in a source file that carry ``@register(kind, name)``, read without importing."""
    for node in parsed(path).body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            continue
        for decorator in node.decorator_list:
            if not (isinstance(decorator, ast.Call) and len(decorator.args) == 2):
                continue
            function = decorator.func
            called = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
            values = [arg.value for arg in decorator.args if isinstance(arg, ast.Constant)]
            if called == "register" and values == [kind, name]:
                yield node


@functools.cache
def parsed(path: Path) -> ast.Module:
    """The syntax tree of a source file."""
    return ast.parse(path.read_text(encoding="utf-8"))


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """``; did you mean 'attention'?`` or nothing."""
    close = difflib.get_close_matches(word, list(words), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""
