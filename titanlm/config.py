"""RunConfig: TOML and overrides in, one typed, frozen object out.

A config passes through four steps: the file and the files it ``extends`` are
merged as plain tables, overrides from the command line are laid over them,
modules named in ``imports`` are imported, and pydantic turns the tables into
dataclasses. What is ours is what no library gives: slots that name a component
and carry only its settings, ``extends``, and errors that say file, line and
the name that was probably meant. Every mistake is reported at once.

Component modules are imported only when a config names them, so loading a
config costs what its components cost to import.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, dataclass_transform, get_args, get_origin, get_type_hints

from titanlm.config_sources import LISTS, KeyPath, Origins, Tables, import_modules, override, parse, read_file, where
from titanlm.constraints import Decay, NonNegativeFew, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Size
from titanlm.datasets.mixture import Source
from titanlm.errors import ConfigError, RegistryError
from titanlm.initial_load import InitialLoad
from titanlm.registry import PYDANTIC_CONFIG, Component, Slot, did_you_mean, known, lookup

MAX_PROBLEMS = 100
"""As many are reported at once."""
MAX_ITEMS = 100
"""Of a list of components or tables."""
DEFAULT_ROWS = 8
"""A forward pass, where a config says nothing of it."""
SUMMARY = "summary"
"""What is logged as if it were a validation set: the mean over those that count."""

# ---------------------------------------------------------------- sections
_T = TypeVar("_T", bound=type)


@dataclass_transform(frozen_default=True, kw_only_default=True)
def section(cls: _T) -> _T:
    """A frozen, keyword-only dataclass that is validated strictly."""
    cls.__pydantic_config__ = PYDANTIC_CONFIG  # type: ignore[attr-defined]
    dataclass(frozen=True, kw_only=True)(cls)  # changes the class in place
    return cls


@section
class Run:
    """Where a run lives."""

    name: str = ""
    """Folder below ``dir``; empty: the config file's name without ``.toml``."""
    dir: str = "runs"
    """Folder that holds the run folders."""


@section
class Train:
    """The step, its shape and how it is executed."""

    steps: PositiveInt = 1000
    """Optimizer steps of the whole run, resumed ones included."""
    max_wallclock_s: PositiveFloat | None = None
    """Seconds of training, resumed ones included and validation and saving excluded, after which the run ends if `steps` does not end it before."""
    priming_steps: NonNegativeInt = 0
    """Steps run before the clock starts, in every phase of the run, so that all is compiled; weights, optimizers and data are then put back."""
    seq_len: Size = 1024
    """Positions a row; of validation, and of stages of a curriculum that say no other."""
    global_batch: Size = 32
    """Rows a step over all ranks; of stages of a curriculum that say no `batch`, of each of its parts."""
    micro_batch: Size | None = None
    """Rows a forward pass on each rank; gradient accumulation is global_batch / (micro_batch × ranks). None: 8, or as `micro_batch_tokens` says.
    In stages of a curriculum at most so many: as many as divide a rank's rows."""
    micro_batch_tokens: Literal["auto"] | Size | None = None
    """In place of `micro_batch`, positions a forward pass, a multiple of `seq_len`; auto: as many as a probe at the start finds to fit the device.
    In stages of a curriculum at most so many, in rows that divide a rank's."""
    clip: NonNegativeFloat = 1.0
    """Largest gradient norm; 0 leaves gradients as they are. Stages of a curriculum may say another."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of activations and matrix products; parameters and optimizer state stay fp32 either way."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    compile: Literal["none", "auto", "block", "model"] = "none"
    """What torch.compile sees: nothing, each block by itself (quick to compile), or the whole model; auto: a shallow model whole, a deep one by block."""
    compile_cache: str = "run"
    """What was compiled is kept in the run folder and loaded again: `run`; `off`: neither; or a run folder, or such a file, to load it from at first. Such
    a file runs code: load only your own. What a folder's run chose by measuring is taken over too."""
    kernels: Literal["fused", "plain"] = "fused"
    """fused: titanlm's own Triton kernels, and QuACK's products, where they serve, in bf16 on Hopper and data-centre Blackwell GPUs; plain: torch alone."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """Recompute in backward: nothing, all but matrix products and attention, or whole blocks."""
    seed: NonNegativeInt = 42
    deterministic: bool = False
    """Only deterministic kernels: equal runs are then bitwise equal."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """At a loss or gradient that is not finite: end the run before the update, or pass over the step, whose documents are written down."""
    max_skipped: PositiveInt = 10
    """With on_nonfinite = "skip": more steps in a row end the run."""
    threads: NonNegativeFew = 0
    """CPU threads of torch; 0 leaves torch's choice."""
    gc_every: NonNegativeInt = 100
    """Steps between collections of Python's garbage; between them the collector is off. 0 leaves it to Python."""
    log_every: PositiveInt = 10
    """Steps between log lines; only those wait for the device."""
    validate_every: NonNegativeInt = 0
    """Steps between validations; 0 validates only at the end."""
    sample_every: NonNegativeInt = 0
    """Steps between sample texts; 0 prints none."""
    sample_prompt: str = ""
    """What sample texts continue."""

    def __post_init__(self) -> None:
        if self.micro_batch is not None and self.micro_batch_tokens is not None:
            raise ValueError("micro_batch_tokens: excludes `micro_batch`; give one of them")
        if self.micro_batch is None and self.micro_batch_tokens is None:
            object.__setattr__(self, "micro_batch", DEFAULT_ROWS)

    def rows(self, seq_len: int) -> int | None:
        """Rows of so many positions a forward pass on each rank; None where a probe has yet to say."""
        if self.micro_batch_tokens is None:
            return self.micro_batch
        return None if self.micro_batch_tokens == "auto" else max(1, self.micro_batch_tokens // seq_len)


@section
class Parallel:
    """How the ranks of a run share its work. Launch them with `torchrun`."""

    strategy: Literal["none", "replicate", "fsdp2", "hsdp"] = "none"
    """none: one process. replicate: the whole model on every rank. fsdp2: a part of every parameter, gradient and moment on each.
    hsdp: parts within groups of `shards` ranks, copies over the groups."""
    shards: PositiveInt | None = None
    """hsdp: ranks that share one copy; None: those of one host."""
    reshard_after_forward: bool = True
    """Let a block's parameters go after its forward pass and gather them again for backward; false trades memory for traffic."""
    gather_dtype: Literal["fp32", "compute", "float8"] = "fp32"
    """What a block's parameters are gathered in: fp32 gives the numbers of one process; compute halves the traffic of a bf16 run and its kept
    casts, but rounds norms too; float8 halves it again where quantizer `float8` multiplies with one scale a tensor, with the same numbers."""
    prefetch_blocks: NonNegativeInt = 0
    """Blocks gathered ahead of the one that runs; 0 leaves it to FSDP2, which gathers one ahead."""
    cpu_offload: bool = False
    """Parameters, gradients and moments live in host memory, and the optimizer runs there."""
    timeout_s: NonNegativeFloat = 300.0
    """Seconds without progress after which a rank counts as hanging and the run ends; 0 waits for ever."""
    init_timeout_s: NonNegativeFloat = 1800.0
    """The same for the start and the first step, also of another shape, which may have to compile."""


@section
class Qat:
    """Quantization-aware training: when quantizers with `qat = true` round the weights that a step computes with."""

    start_fraction: Decay = 0.0
    """Share of the run, by steps or by `train.max_wallclock_s`, after which they do; 0: from the first step on, 0.95: late."""


@section
class Spike:
    """Rollback when the loss jumps and does not come back. Looked for at log steps."""

    sigmas: NonNegativeFloat = 0.0
    """Standard deviations above the mean of the last healthy log steps; 0: no rollback."""
    window: PositiveInt = 128
    """Healthy log steps that the mean is taken over."""
    patience: PositiveInt = 2
    """Log steps in a row that must lie above."""
    max_rollbacks: PositiveInt = 3
    """More end the run."""


@section
class Data:
    """How documents become batches."""

    source: tuple[Source, ...] = ()
    """Datasets that are mixed, in place of `dataset`."""
    n_streams: Size = 64
    """Logical streams, each with its own cursor and packing buffer; ranks and workers share them out."""
    epochs: NonNegativeInt = 0
    """Training ends after so many passes over the data, if `train.steps` does not end it before; 0 repeats it as long as steps need."""
    on_error: Literal["raise", "skip"] = "raise"
    """At rows that cannot be read: stop, or pass over them, counted and named."""
    document_mask: bool = True
    """Attention, positions and labels stop at document boundaries; false: plain causal over the row."""
    boundary_label: Literal["ignore", "next"] = "ignore"
    """With document_mask, what a document's last token predicts: nothing, or the first token of the next (for data whose BOS is the only separator)."""
    workers: NonNegativeFew = 0
    """Processes that tokenise and pack, on each rank; 0: the trainer's own. Token shards need none."""
    prefetch: NonNegativeFew = 2
    """Steps built ahead by a background thread; 0 builds each when it is asked for."""
    n_tokens: PositiveInt | None = None
    """Tokens of one pass over the training data; plans and checks count epochs by it. None: as token shards say themselves, else unknown."""
    start: str = ""
    """Where a new run takes up the data: a run or checkpoint folder of the same data, or a file of `titanlm data state --import`."""


@section
class Checkpoint:
    """What is saved and taken up again."""

    every: NonNegativeInt = 100
    """Steps between checkpoints; the last step and an interrupted one are always saved. 0: only those."""
    keep_last: PositiveInt = 2
    """Newest checkpoints kept."""
    best: str = ""
    """Metric of a validation set, or of their summary, by which the best checkpoint is kept besides, such as `validation/held_out/bits_per_byte`; less is
    better."""
    keep_every: NonNegativeInt = 0
    """Checkpoints of steps that are multiples of this are kept for good; 0: none."""
    asynchronous: bool = True
    """Write in the background: training waits only while the state is copied to host memory, which costs room for one more copy there."""
    save_only_model: bool = False
    """Save weights and average alone, about a third of the bytes; such a run cannot be resumed, only taken up with `initial_load`."""
    initial_load: InitialLoad | None = None
    """Weights that a new run begins with, from another run, a checkpoint, an artifact or safetensors; optimizer, data and step are fresh."""
    copy_to: str = ""
    """Folder or URL (s3://bucket/run) that gets a copy of every checkpoint; a start takes the newest copy where it is newer than what the run folder has."""
    resume: Literal["auto", "never"] = "auto"
    """auto: go on from the newest valid checkpoint of the run folder; never: refuse a folder that has one."""
    allow_changes: tuple[str, ...] = ()
    """Settings, or whole sections, that may differ from the checkpoint's although the run will then not go on as it began."""


@section
class Validation:
    """One validation set; scored with raw and, where there is an averager, averaged weights."""

    name: str = "validation"
    """Heads the metrics of this set."""
    dataset: Annotated[Component, Slot("dataset")] | None = None
    """None: the run's own dataset, or its sources one after the other."""
    file: str | None = None
    """Short for a dataset that is all of one file, chosen by its end: .parquet, .jsonl, .jsonl.gz, .txt or .bin."""
    split: Literal["train", "validation"] = "validation"
    packer: Annotated[Component, Slot("packer")] | None = None
    """None: the run's. With `sliding` rows overlap, so that labels have more before them."""
    max_tokens: NonNegativeInt = 0
    """Stop after so many scored positions; 0 scores the whole split."""
    seq_len: Size | None = None
    """Positions a row; None: `train.seq_len`."""
    micro_batch: Size | None = None
    """Rows a forward pass; None: as many as in training, by `train.micro_batch` or `train.micro_batch_tokens`."""
    every: NonNegativeInt | None = None
    """Steps between scorings of this set; None: `train.validate_every`, 0: none. The end of a run always scores it."""
    weight: NonNegativeFloat = 1.0
    """How much the set counts in the mean over sets, beside the other weights; 0: it has no part in it."""

    def __post_init__(self) -> None:
        if self.name == SUMMARY:
            raise ValueError(f"name: {SUMMARY!r} is what the mean over sets is called; take another")
        if self.file is not None and self.dataset is not None:
            raise ValueError("file: excludes `dataset`; give one of them")
        if self.file is None and self.split == "train" and not self.max_tokens:
            raise ValueError("max_tokens: the split 'train' never ends; say how many tokens of it to score")
        if self.file is not None and not self.file.endswith(tuple(FILE_DATASETS)):
            raise ValueError(f"file: {self.file!r} ends in none of {', '.join(FILE_DATASETS)}; name its dataset with [validation.dataset]")


@section
class Profile:
    """A torch.profiler window, written to the run folder."""

    start: PositiveInt = 10
    """First profiled step."""
    steps: PositiveInt = 3


FILE_DATASETS = {".parquet": "parquet", ".jsonl": "jsonl", ".jsonl.gz": "jsonl", ".txt": "text", ".bin": "token_shards"}
"""What reads a file that stands alone, by its end."""

DEFAULTS = {
    "tokenizer": "byte",
    "dataset": "python_stdlib",
    "packer": "concat",
    "scheduler": "constant",
    "curriculum": "stage",
    "loss": "cross_entropy",
    "exporter": "artifact",
}
"""The component of a slot that a config leaves out, or sets without a name."""


def _default(kind: str) -> Any:
    return field(default_factory=lambda: Component.named(kind, DEFAULTS[kind]))


@section
class Export:
    """What is handed over."""

    at_end: bool = False
    """Export when training ends; `titanlm export RUN` does it at any time."""
    max_bytes: PositiveInt | None = None
    """Limit on the artifact, the code and a tokenizer that counts, together; in bytes, so 16 MB is 16_000_000."""
    tokenizer: Literal["embed", "beside"] = "embed"
    """Inside the artifact or as a file next to it."""
    count_tokenizer: bool = True
    """Whether a tokenizer beside the artifact counts against `max_bytes`; Parameter Golf does not count it. One inside always counts."""
    code: tuple[str, ...] = ()
    """Files, or globs of them, whose bytes as they are count against `max_bytes`: the program of a submission."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float16"
    """Of tensors that no quantizer takes."""
    calibration_tokens: PositiveInt = 262_144
    """Positions of the training data, padding included, from which quantizers with `rounding = "gptq"` learn what their matrices meet."""
    calibration_reserve_s: NonNegativeFloat = 0.0
    """Seconds of `train.max_wallclock_s` that training leaves to calibration, for challenges that count reading training data as training."""
    exporter: Annotated[Component, Slot("exporter")] = _default("exporter")

    def __post_init__(self) -> None:
        if self.tokenizer == "embed" and not self.count_tokenizer:
            raise ValueError('count_tokenizer: a tokenizer inside the artifact always counts; use tokenizer = "beside", or leave it at true')


@section
class RunConfig:
    """Everything a run is made of. Python code may build or replace one and call the same Trainer."""

    imports: tuple[str, ...] = ()
    """Modules imported before components are looked up; they register outside ones."""
    model: Annotated[Component, Slot("model")]
    optimizer: tuple[Annotated[Component, Slot("optimizer")], ...]
    """Each parameter goes to the first whose patterns match it."""
    run: Run = field(default_factory=Run)
    train: Train = field(default_factory=Train)
    parallel: Parallel = field(default_factory=Parallel)
    qat: Qat = field(default_factory=Qat)
    spike: Spike = field(default_factory=Spike)
    data: Data = field(default_factory=Data)
    tokenizer: Annotated[Component, Slot("tokenizer")] = _default("tokenizer")
    dataset: Annotated[Component, Slot("dataset")] | None = None
    """None with `data.source`; without it, the default dataset."""
    packer: Annotated[Component, Slot("packer")] = _default("packer")
    adapter: Annotated[Component, Slot("adapter")] | None = None
    quantizer: tuple[Annotated[Component, Slot("quantizer")], ...] = ()
    """At export each tensor goes to the first whose patterns match it; the rest keeps `export.dtype`."""
    scheduler: Annotated[Component, Slot("scheduler")] = _default("scheduler")
    curriculum: tuple[Annotated[Component, Slot("curriculum")], ...] = ()
    """Stages of the run, each a table or several by a name; none: every step has the shape that `train` says."""
    loss: Annotated[Component, Slot("loss")] = _default("loss")
    averager: Annotated[Component, Slot("averager")] | None = None
    fitter: Annotated[Component, Slot("fitter")] | None = None
    validation: tuple[Validation, ...] = (Validation(),)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    export: Export = field(default_factory=Export)
    logger: tuple[Annotated[Component, Slot("logger")], ...] = field(
        default_factory=lambda: (Component.named("logger", "console"), Component.named("logger", "jsonl"))
    )
    profile: Profile | None = None

    def __post_init__(self) -> None:
        if self.dataset is not None and self.data.source:
            raise ValueError("dataset: excludes `data.source`; move it there as one more [[data.source]]")
        if self.dataset is None and not self.data.source:
            object.__setattr__(self, "dataset", Component.named("dataset", DEFAULTS["dataset"]))
        if (limit := self.train.max_wallclock_s) is not None and self.export.calibration_reserve_s >= limit:
            raise ValueError(f"export.calibration_reserve_s: leaves nothing of train.max_wallclock_s = {limit:g} to train in")
        labels = [source.label for source in self.data.source]
        for label in sorted({label for label in labels if labels.count(label) > 1}):
            raise ValueError(f"data.source: two sources are called {label!r}; give each a `name` of its own")
        if self.validation and not any(entry.weight for entry in self.validation):
            raise ValueError("validation: every set has weight 0; give one that counts a weight above it")

    @property
    def sources(self) -> tuple[Source, ...]:
        """What is trained on: the mixed datasets, or the one dataset."""
        if self.data.source:
            return self.data.source
        assert self.dataset is not None
        return (Source(dataset=self.dataset),)

    @property
    def counted(self) -> tuple[Validation, ...]:
        """The validation sets that a summary is the mean of; none where fewer than two have a weight, and so no summary."""
        counted = tuple(entry for entry in self.validation if entry.weight)
        return counted if len(counted) > 1 else ()


# ---------------------------------------------------------------- public
def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The config of a file named by the user; honours its ``imports`` and ``extends``.

    ``overrides`` are ``--a.b=value`` strings. Raises ConfigError with every
    mistake found.
    """
    path = Path(path)
    origins: Origins = {}
    tables = read_file(path, origins, ())
    override(tables, overrides, origins)
    import_modules(tables.get("imports", []), origins, str(path))
    run = tables.setdefault("run", {})
    if isinstance(run, dict):
        run.setdefault("name", path.stem)
    return _decode(tables, str(path), origins)


def loads(text: str, source: str = "config", overrides: Sequence[str] = ()) -> RunConfig:
    """The config in a resolved text, as stored in runs, checkpoints and artifacts, with overrides laid over it.

    ``imports`` is kept as a record but not acted upon: stored text may come
    from others. A component it registered must already be importable by entry
    point or have been imported by the caller.
    """
    origins: Origins = {}
    tables = parse(text, source, origins)
    if "extends" in tables:
        raise ConfigError([f"{source}: extends: not allowed in a stored config, which is complete by itself"], source)
    override(tables, overrides, origins)
    try:
        return _decode(tables, source, origins)
    except ConfigError as error:
        modules = [module for module in tables.get("imports", ()) if isinstance(module, str)]
        if modules and any("named" in problem for problem in error.problems):
            error.problems.append(f"imports: a stored config imports nothing; if you trust them: {' '.join(f'--import {name}' for name in modules)}")
            raise ConfigError(error.problems, source) from None
        raise


def dump(config: RunConfig) -> str:
    """Resolved TOML; ``loads(dump(config)) == config``."""
    import tomli_w

    return tomli_w.dumps(to_tables(config))


def to_tables(value: Any) -> Any:
    """Dataclasses and components as the plain tables TOML knows; settings that are None are left out."""
    if isinstance(value, Component):
        return {"name": value.name, **to_tables(value.config)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        pairs = ((item.name, getattr(value, item.name)) for item in dataclasses.fields(value))
        return {name: to_tables(item) for name, item in pairs if item is not None}
    if isinstance(value, Mapping):
        return {name: to_tables(item) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return [to_tables(item) for item in value]
    return value


def flatten(config: RunConfig) -> dict[str, Any]:
    """Dotted path → value of the resolved config."""
    flat: dict[str, Any] = {}

    def walk(value: Any, path: str) -> None:
        items: Iterable[tuple[Any, Any]] = ()
        if isinstance(value, dict):
            items = value.items()
        elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
            items = enumerate(value)
        else:
            flat[path] = value
        for key, item in items:
            walk(item, f"{path}.{key}" if path else str(key))

    walk(to_tables(config), "")
    return flat


def diff(a: RunConfig, b: RunConfig) -> list[tuple[str, Any, Any]]:
    """(path, value in a, value in b) of every setting that differs; a missing one is None."""
    left, right = flatten(a), flatten(b)
    return [(key, left.get(key), right.get(key)) for key in dict.fromkeys([*left, *right]) if left.get(key) != right.get(key)]


# ---------------------------------------------------------------- decoding
def _decode(tables: Tables, source: str, origins: Origins) -> RunConfig:
    from pydantic import ValidationError

    export = tables.get("export")
    for slots in (tables, export if isinstance(export, dict) else {}):
        for kind in DEFAULTS.keys() & slots.keys():
            for slot in slots[kind] if isinstance(slots[kind], list) else (slots[kind],):
                if isinstance(slot, dict):
                    slot.setdefault("name", DEFAULTS[kind])
    misplaced = dict(_misplaced(tables, ()))
    found = list(misplaced.items())
    try:
        config = _adapter(RunConfig).validate_json(json.dumps(tables, default=str))
    except ValidationError as error:
        messages = (pair for pair in _joined(_messages(error, RunConfig, tables)) if pair[0] not in misplaced and (pair[0] or not found))
        found += islice(messages, MAX_PROBLEMS)
    if found:
        problems = list(dict.fromkeys(f"{where(path, origins)}{_dotted(path)}: {message}" for path, message in found[:MAX_PROBLEMS]))
        raise ConfigError(problems + (["… and more"] if len(found) >= MAX_PROBLEMS else []), source)
    return config


@functools.cache
def _adapter(cls: type) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(cls)


def _misplaced(value: Any, path: KeyPath) -> Iterable[tuple[KeyPath, str]]:
    """Values that TOML readers let through but no setting can hold."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _misplaced(item, (*path, key))
    elif isinstance(value, list):
        if len(value) > MAX_ITEMS and (path[-1] in LISTS or isinstance(value[0], dict)):
            yield path, f"{len(value)} items; at most {MAX_ITEMS}"
            del value[MAX_ITEMS:]  # a slot takes milliseconds to refuse
        for index, item in enumerate(value):
            yield from _misplaced(item, (*path, index))
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        yield path, "an integer of a config has at most 64 bits"
    elif isinstance(value, str) and not _unicode(value):
        yield path, f"not valid Unicode: {_shown(value)}"
    elif not isinstance(value, str | int | float | bool):
        yield path, f"a {type(value).__name__} has no place in a config"


def _unicode(text: str) -> bool:
    """False for what the command line makes of bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _dotted(path: KeyPath) -> str:
    return ".".join(str(part) for part in path) or "config"


def slot_schema(kind: str) -> Any:
    """How pydantic decodes a slot: a name, or a table of a name and that component's settings."""
    from pydantic import ValidationError
    from pydantic_core import InitErrorDetails, PydanticCustomError, core_schema

    def decode(value: Any) -> Component:
        if isinstance(value, Component):
            return value
        if isinstance(value, str):
            value = {"name": value}
        if not isinstance(value, dict):
            raise PydanticCustomError("slot", "{problem}", {"problem": f"expected the name of {_a(kind)} or a table, got {_shown(value)}"})
        name = value.get("name")
        if not isinstance(name, str):
            listing = ", ".join(known(kind))
            raise PydanticCustomError("slot", "{problem}", {"problem": f"which {kind}? give it a `name` (known: {listing})"})
        try:
            settings = lookup(kind, name).settings
        except RegistryError as error:
            problem = PydanticCustomError("slot", "{problem}", {"problem": str(error)})
            raise ValidationError.from_exception_data(kind, [InitErrorDetails(type=problem, loc=("name",), input=name)]) from None
        table = {key: item for key, item in value.items() if key != "name"}
        return Component(kind, name, _adapter(settings).validate_json(json.dumps(table)))

    return core_schema.no_info_plain_validator_function(decode, metadata={"titanlm_slot": kind})


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


NOT_YET = re.compile("tensor|pipeline|context|expert|sequence")
"""Kinds of parallelism that a user may look for."""

_EXPECTED = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a string",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a table",
    "dataclass_type": "a table",
}


def _messages(error: Any, root: type, tables: Any) -> Iterable[tuple[KeyPath, str]]:
    """(path, text) of every problem; pydantic's words only where ours say no more."""
    for item in error.errors(include_url=False):
        path: KeyPath = item["loc"]
        value, kind, context = item.get("input"), item["type"], item.get("ctx", {})
        if kind == "json_invalid":  # the text is ours, so only its depth can be wrong
            yield path, "nested too deeply"
        elif kind in ("extra_forbidden", "unexpected_keyword_argument"):
            owner, names = _fields_at(root, tables, path[:-1])
            planned = _planned(path, path[-1])
            yield path, planned or f"unknown key{owner}{did_you_mean(str(path[-1]), names)} (keys: {', '.join(names)})"
        elif kind in ("missing", "missing_argument"):
            if path and isinstance(path[-1], int):
                yield path[:-1], f"too short: item {path[-1]} is missing (counted from 0)"
            else:
                yield path, "missing; it has no default"
        elif kind == "too_long":
            yield path, f"expected {context['max_length']} items, got {context['actual_length']}"
        elif kind in _EXPECTED:
            yield path, f"expected {_EXPECTED[kind]}, got {_shown(value)}"
        elif kind == "literal_error":
            choices = re.findall(r"'([^']*)'", context["expected"])
            hint = did_you_mean(value, choices) if isinstance(value, str) else ""
            yield path, _planned(path, value) or f"expected {context['expected']}, got {_shown(value)}{hint}"
        elif kind == "value_error":
            for line in str(context["error"]).splitlines():
                name, colon, text = line.partition(": ")
                _, names = _fields_at(root, tables, path)
                yield ((*path, name), text) if colon and name in names else (path, line)
        else:
            text = item["msg"].removeprefix("Input should be ").replace("greater", "a number greater").replace("less", "a number less", 1)
            yield path, item["msg"] if text == item["msg"] else f"expected {text}, got {_shown(value)}"


_ALTERNATIVE = re.compile(r"literal\[.*\]|constrained-.*")
"""What pydantic adds to the path of a value that is none of several things."""


def _joined(messages: Iterable[tuple[KeyPath, str]]) -> Iterable[tuple[KeyPath, str]]:
    """What one value should have been, if it may be one of several things, as one message."""

    def value_of(pair: tuple[KeyPath, str]) -> tuple[KeyPath, bool]:
        path, _ = pair
        several = bool(path) and _ALTERNATIVE.fullmatch(str(path[-1])) is not None
        return (path[:-1] if several else path), several

    for (key, several), group in groupby(messages, value_of):
        if several:
            texts = [text.removeprefix("expected ").partition(", got ") for _, text in group]
            yield key, f"expected {' or '.join(wanted for wanted, _, _ in texts)}, got {texts[0][2]}"
        else:
            yield from group


def _planned(path: KeyPath, word: Any) -> str:
    """What to say to one who looks for a kind of parallelism that does not exist yet; nothing to others."""
    found = NOT_YET.search(str(word)) if path[:1] == ("parallel",) else None
    pointer = 'strategy = "fsdp2" shards over all ranks (docs/distributed.md says what there is)'
    return f"{found[0]} parallelism does not exist yet; {pointer}" if found else ""


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def _fields_at(root: type, tables: Any, path: KeyPath) -> tuple[str, list[str]]:
    """(" of model 'decoder'", names of the settings) at a path, following slots by the names in the tables."""
    current: Any = root
    owner = ""
    for part in path:
        if isinstance(tables, dict):
            tables = tables.get(part, {})
        elif isinstance(tables, list) and isinstance(part, int):
            tables = tables[part]
        else:
            tables = {}
        if isinstance(part, int):
            continue  # the annotation of the list already says what its items are
        hints = get_type_hints(current, include_extras=True) if dataclasses.is_dataclass(current) else {}
        current = hints.get(str(part))
        slot = _slot_of(current)
        if slot is not None:
            items = tables if isinstance(tables, list) else [tables]
            current, owner = (slot, items), ""
        else:
            current, owner = _dataclass_of(current), ""
        if isinstance(current, tuple):
            index = next((p for p in path[path.index(part) + 1 :][:1] if isinstance(p, int)), 0)
            item = items[index] if index < len(items) else {}
            name = item if isinstance(item, str) else item.get("name", "") if isinstance(item, dict) else ""
            try:
                current, owner = lookup(current[0].kind, name).settings, f" of {current[0].kind} {name!r}"
            except RegistryError:
                current = None
    names = [item.name for item in dataclasses.fields(current)] if dataclasses.is_dataclass(current) else []
    return owner, names


def _slot_of(annotation: Any) -> Slot | None:
    for item in (annotation, *get_args(annotation)):
        if isinstance(item, Slot):
            return item
        if item is not annotation and get_origin(item) is not None:
            inner = _slot_of(item)
            if inner is not None:
                return inner
    return None


def _dataclass_of(annotation: Any) -> Any:
    for item in (annotation, *get_args(annotation)):
        if isinstance(item, type) and dataclasses.is_dataclass(item):
            return item
    return None
