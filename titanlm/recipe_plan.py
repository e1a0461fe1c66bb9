"""`titanlm recipe plan`: what the stages of a recipe are, and what its train stages take, before there is a device or data.

Everything here is computed. Models are built on the meta device, where tensors
have shapes and no memory; moments are counted by letting each optimizer make a
step there (``titanlm.state_bytes``), activations by a forward and backward pass
(``titanlm.pass_memory``). What is not known is said to be unknown rather than guessed.

Memory and traffic follow torch's algorithms, for N devices of which S share
one copy (`fsdp2`: all, `hsdp`: a group):

* a sharded parameter is cut by rows, ⌈rows / S⌉ to a device, the last padded;
* in a ring each device sends (n−1)/n of a tensor for a gather or a
  reduce-scatter among n, and receives as much; an all-reduce is both;
* `replicate` all-reduces the gradients once a step. FSDP2 gathers the root unit
  once a micro-batch, a block once or, when it lets go of it after the forward
  pass, twice, and reduce-scatters the gradients once a step. Until then, if
  there are several micro-batches, each device adds up whole gradients. `hsdp`
  adds an all-reduce of the parts over the N/S groups.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from titanlm.check import build_model, parallel_problems
from titanlm.config import RunConfig
from titanlm.course import horizon_of, legs_of, phases_of
from titanlm.curriculum import curriculum_problems, stage_rows, stages_from
from titanlm.datasets.files import offline
from titanlm.distributed.code_gather import CodeGather
from titanlm.distributed.strategy import shards_of
from titanlm.distributed.world import World
from titanlm.epochs import epoch_of, read_again
from titanlm.errors import ConfigError, TitanError
from titanlm.loggers.text import printable
from titanlm.losses.chunked import chunk_size
from titanlm.metrics import GIB, PEAK_FLOPS, memory_of, peak_flops_of
from titanlm.pass_memory import begin_on_meta, pass_bytes
from titanlm.precision import DTYPES
from titanlm.progress import enter
from titanlm.recipe import ScaledRecipe
from titanlm.registry import did_you_mean
from titanlm.state_bytes import optimizer_bytes

HOST_DEVICES = 8
"""Devices of a host, where `hsdp` takes the group to be a host's."""
MFUS = (0.2, 0.35, 0.5)
"""Shares of a device's peak that hours are given for, from small models to large, well-tuned ones."""
SHARDED = ("fsdp2", "hsdp")


@dataclass(frozen=True)
class Memory:
    """Bytes by part, for the first device, which has the largest parts."""

    device: dict[str, int]
    host: dict[str, int]
    """What `parallel.cpu_offload` keeps in host memory instead."""


@dataclass(frozen=True)
class Traffic:
    """Bytes that each device sends in a step, and receives, by what they are."""

    gathers: float = 0
    """Of parameters."""
    scatters: float = 0
    """Of gradients, added up over the devices that share a copy."""
    reduces: float = 0
    """Of gradients, or of their parts, over the copies."""

    @property
    def total(self) -> float:
        return self.gathers + self.scatters + self.reduces


# ---------------------------------------------------------------- numbers
def planned_model(config: RunConfig) -> Any:
    """The model on the meta device, for a vocabulary of ``model.vocab_size`` or, where that is unset, the tokenizer's.

    Raises TitanError when neither says it, ValueError for settings that make no model.
    """
    vocab_size = getattr(config.model.config, "vocab_size", None)
    if vocab_size is None:
        try:
            with offline():
                vocab_size = config.tokenizer.build().vocab_size
        except (TitanError, ValueError, OSError) as error:
            raise TitanError(f"model.vocab_size is unset, and the tokenizer cannot say it yet: {str(error).splitlines()[0]}") from error
    return build_model(config, SimpleNamespace(vocab_size=vocab_size))


class Layout:
    """How a model's parameters lie on the devices of a world."""

    def __init__(self, config: RunConfig, model: Any, world: World) -> None:
        self.config, self.model, self.world = config, model, world
        self.strategy = config.parallel.strategy
        self.shards = {"fsdp2": world.size, "hsdp": shards_of(config.parallel, world)}.get(self.strategy, 1)
        self.phases = phases_of(config, world, horizon_of(config))
        self.accumulation = None if config.train.micro_batch_tokens == "auto" else max(phase.accumulation for _, phase in self.phases.stages)
        """Of the stage with the most. None where a probe has yet to say: memory is then that of several micro-batches, traffic of one."""
        self.parameters = list(model.parameters())
        self.trained = [parameter for parameter in self.parameters if parameter.requires_grad]
        self.blocks = [list(block.parameters()) for block in model.blocks]
        in_blocks = {id(parameter) for block in self.blocks for parameter in block}
        self.root = [parameter for parameter in self.parameters if id(parameter) not in in_blocks]
        compute = config.train.precision == "bf16" and config.parallel.gather_dtype != "fp32"
        self.gathered_bytes = 2 if compute else 4
        """Of a number of a block's parameters, gathered."""

    def part(self, parameter: Tensor) -> int:
        """Numbers of a parameter on the first device."""
        rows = parameter.shape[0] if parameter.ndim else 1
        return parameter.numel() if self.shards == 1 or not rows else -(-rows // self.shards) * (parameter.numel() // rows)

    def memory(self) -> Memory:
        parallel = self.config.parallel
        moments = optimizer_bytes(self.config, self.model)  # first: an optimizer may halve the weights, and keep the rest itself
        parts = sum(self.part(parameter) * parameter.element_size() for parameter in self.parameters)
        kept = {"weights": parts, "moments": sum(-(-moments[id(p)] * self.part(p) // p.numel()) for p in self.trained if p.numel())}
        if self.config.averager is not None:
            kept["average"] = sum(4 * self.part(parameter) for parameter in self.parameters)
        whole = self.strategy in SHARDED and self.accumulation != 1
        gradients = {"gradients": sum((p.numel() if whole else self.part(p)) * p.grad_dtype.itemsize for p in self.trained)}
        gathered = {}
        if self.shards > 1:
            sizes = sorted(sum(p.numel() for p in block) for block in self.blocks)
            held = sizes if not parallel.reshard_after_forward else sizes[-1 - (parallel.prefetch_blocks or 1) :]
            gathered["gathered"] = 4 * sum(p.numel() for p in self.root) + self.gathered_bytes * sum(held)
        if self.strategy in SHARDED and parallel.cpu_offload:
            return Memory(device=(gradients if whole else {}) | gathered, host=kept | ({} if whole else gradients))
        return Memory(device=kept | gradients | gathered, host={})

    def traffic(self) -> Traffic:
        size = self.world.size
        gradients = sum(self.part(parameter) * parameter.grad_dtype.itemsize for parameter in self.trained)
        if self.strategy == "none":
            return Traffic()
        if self.strategy == "replicate":
            return Traffic(reduces=2 * (size - 1) / size * gradients)
        others, groups = self.shards - 1, size // self.shards
        times = 2 if self.config.parallel.reshard_after_forward else 1
        in_root = sum(self.part(parameter) for parameter in self.root)
        if self.config.parallel.gather_dtype == "float8":  # where a run would measure, as if FP8 had been faster
            begin_on_meta(self.config, self.model, self.config.train.seq_len)
            in_blocks = sum(CodeGather(block).sent_bytes(self.shards) for block in self.model.blocks)
        else:
            in_blocks = self.gathered_bytes * sum(self.part(parameter) for block in self.blocks for parameter in block)
        return Traffic(
            gathers=(self.accumulation or 1) * others * (times * in_blocks + 4 * in_root),
            scatters=others * gradients,
            reduces=2 * (groups - 1) / groups * gradients,
        )


def peak_of(device_name: str) -> float:
    """Dense bf16 FLOP/s. Raises TitanError with the names there are."""
    peak = peak_flops_of(device_name)
    if peak is None:
        names = [name for pattern in PEAK_FLOPS for name in re.sub(r"\(\?!.*?\)", "", pattern).split("|")]
        raise TitanError(f"--device-name {device_name!r}: its peak is not known{did_you_mean(device_name, names)} (known: {', '.join(names)})")
    return peak


# ---------------------------------------------------------------- text
class _Training:
    """What a train stage computes. Raises ValueError for settings that make no model."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.legs = legs_of(config)
        self.tokens = sum(leg.tokens for leg in self.legs)
        self.model, self.unknown = None, ""
        try:
            self.model = planned_model(config)
        except TitanError as error:
            self.unknown = str(error)

    @property
    def flops(self) -> float:
        return 0.0 if self.model is None else sum(self.model.flops_per_token(leg.seq_len) * leg.tokens for leg in self.legs)


def plan(scaled: ScaledRecipe, *, n_devices: int = 1, device_name: str | None = None) -> str:
    """The stages with their commands, and what train stages take on so many devices, each and, where they are several, together.

    Raises ConfigError with the mistakes of all configs, TitanError for a device
    whose peak is not known.
    """
    peak = None if device_name is None else peak_of(device_name)
    world = World(size=n_devices, local_size=min(n_devices, HOST_DEVICES))
    configs, problems = scaled.configs(), []
    n_stages = len(scaled.stages)
    lines = [f"{scaled.recipe.path}: scale {scaled.scale}, {n_stages} stage{'s' * (n_stages != 1)} in {scaled.out}"]
    trainings: dict[str, _Training] = {}
    for number, stage in enumerate(scaled.stages, 1):
        lines += ["", f"{number}. {stage.name}", f"   {stage.command}"]
        rows = [("output", stage.output)] if stage.output else []
        if stage.trains:
            config = configs[stage.name]
            wrong = list(parallel_problems(config, world)) if n_devices > 1 else []
            try:
                for entry in config.curriculum:
                    stages_from(entry)
                wrong += curriculum_problems(config) if config.curriculum else ()
                if alike := next((name for name, other in trainings.items() if _alike(config, other.config)), None):
                    trainings[stage.name] = trainings[alike]
                    rows.append(("takes", f"what {alike} does"))
                elif not wrong:
                    trainings[stage.name] = _Training(config)
                    rows += _rows(trainings[stage.name], world, device_name, peak)
            except ValueError as error:
                wrong += str(error).splitlines()
            problems += [f"stage {stage.of!r}: {problem}" for problem in wrong]
        lines += _table(rows)
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)), str(scaled.recipe.path))
    if len(trainings) > 1:
        lines += ["", f"{', '.join(trainings)} together", *_table(_together(list(trainings.values()), world, device_name, peak))]
    return "\n".join(lines)


def _table(rows: Iterable[tuple[str, str]]) -> Iterator[str]:
    return (f"   {name:<16} {text}" for name, text in rows)


def _alike(one: RunConfig, other: RunConfig) -> bool:
    """Whether two runs differ in no more than seed, name and folder."""
    return replace(one, run=other.run, train=replace(one.train, seed=other.train.seed)) == other


def _rows(training: _Training, world: World, device_name: str | None, peak: float | None) -> Iterator[tuple[str, str]]:
    """(name, text) of what a train stage takes."""
    config, train, model, tokens = training.config, training.config.train, training.model, training.tokens
    if model is None:
        yield "parameters", f"unknown: {training.unknown}"
    else:
        parameters = sum(parameter.numel() for parameter in model.parameters())
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        yield "parameters", f"{parameters:,}" + (f", {trained:,} of them trained" if trained != parameters else "")
    if config.curriculum:
        yield from stage_rows(config, None if model is None else model.flops_per_token)
        yield "tokens", f"{tokens:,} in {train.steps:,} steps"
    else:
        yield "tokens", f"{training.legs[0].step_tokens:,} a step, {tokens:,} in {train.steps:,} steps"
    if (epoch := epoch_of(config)) is not None:
        yield "epochs", f"{tokens / epoch.tokens:.3f} of {epoch.of}"
    elif config.curriculum:
        yield "epochs", "unknown: say in data.n_tokens how many tokens one pass over the training data has"
    if again := read_again(config):
        yield "", f"WARNING: {again}"
    if model is None:
        return
    flops = training.flops
    each = "" if config.curriculum else f"{model.flops_per_token(train.seq_len):,.0f} a token, "
    yield "FLOPs", f"{each}{flops:.3g} in all (forward and backward)"
    layout = Layout(config, model, world)
    yield "devices", f"{world.size}, parallel.strategy {layout.strategy!r}" + (f", groups of {layout.shards}" if layout.strategy == "hsdp" else "")
    held = layout.memory()
    for place, parts in (("memory", held.device), ("host memory", held.host)):
        if parts:
            text = " + ".join(f"{name} {size / GIB:.3f}" for name, size in parts.items())
            yield place, f"{sum(parts.values()) / GIB:.3f} GiB a device, computed: {text}"
    if layout.accumulation is not None:
        yield "largest pass", _largest_pass(layout)
    else:
        yield "micro-batches", 'of as many rows as a probe at the start finds to fit (train.micro_batch_tokens = "auto"): not known here'
    yield from _room(layout, held.device, device_name)
    if world.size > 1:
        traffic = layout.traffic()
        named = {"gathering parameters": traffic.gathers, "scattering gradients": traffic.scatters, "adding up gradients": traffic.reduces}
        text = " + ".join(f"{name} {size / 1e9:.3f}" for name, size in named.items() if size)
        least = "at least " if layout.accumulation is None and traffic.gathers else "up to " if config.curriculum and traffic.gathers else ""
        yield "communication", f"{least}{traffic.total / 1e9:.3f} GB a step sent by each device, computed: {text}"
        yield "", "what optimizers exchange among themselves (muon) comes on top and is not counted"
    if peak is None:
        yield "hours", "computed with --device-name, such as H200"
        return
    yield "hours", _hours(flops, world, device_name, peak)
    if train.precision == "fp32":
        yield "", 'train.precision is "fp32": that peak is out of reach'
    if (limit := train.max_wallclock_s) is not None:
        needed = flops / (limit * peak * world.size)
        yield "", f"train.max_wallclock_s ends it after {limit / 3600:.2f} hours; all steps within them take {needed:.0%} MFU"


def _largest_pass(layout: Layout) -> str:
    """The forward pass with the most tokens on a device, and its logits, which a large vocabulary makes large."""
    config, vocab_size = layout.config, getattr(layout.model, "vocab_size", None)
    rows, seq_len = layout.phases.largest_pass(True)
    text = f"{rows:,} rows × {seq_len:,} on a device"
    if vocab_size is None:
        return text
    n, width = rows * seq_len, vocab_size * DTYPES[config.train.precision].itemsize / GIB
    chunk = chunk_size(n, config.loss.config.chunk_tokens)
    whole = f", of all at once {n * width:.3f}" if chunk < n else ""
    return f"{text}; logits of {chunk:,} tokens {chunk * width:.3f} GiB{whole}, computed"


def _room(layout: Layout, held: dict[str, int], device_name: str | None) -> Iterator[tuple[str, str]]:
    """(name, text) of what a pass takes beside what a device holds, and whether it has room for all of it."""
    from titanlm.micro_batch import SHARE  # which counts with layouts itself

    train = layout.config.train
    primed = sum(held.get(name, 0) for name in ("weights", "moments", "average")) if train.priming_steps else 0
    if primed:
        yield "priming", f"{primed / GIB:.3f} GiB for a while, one more copy of weights, moments and average"
    rows, seq_len = layout.phases.largest_pass(True)
    enter(layout.phases.stages[-1][1], layout.model)  # weights that are rounded late cost memory
    try:
        taken = None if layout.accumulation is None else pass_bytes(layout.config, layout.model, rows, seq_len)
    except (RuntimeError, ImportError) as error:
        taken = None
        yield "", f"a pass cannot be followed without numbers: {printable(str(error).splitlines()[0])}"
    if taken is None:
        yield "", "activations come on top and are not counted"
        return
    yield "activations", f"{taken / GIB:.3f} GiB at most, computed: {rows:,} rows of {seq_len:,} forward and backward, uncompiled"
    memory = None if device_name is None else memory_of(device_name)
    if memory is None:
        return
    whole = sum(held.values()) + primed + taken
    remedy = "" if whole <= SHARE * memory else "; lower train.micro_batch_tokens or loss.chunk_tokens, or set train.activation_checkpointing"
    said = f"{whole / GIB:.3f} GiB, {whole / memory:.0%} of what {device_name} has"
    yield "in all", f"{said}: {'does not fit' if remedy else 'fits'} in the {SHARE:.0%} that can be planned with{remedy}"


def _together(trainings: Sequence[_Training], world: World, device_name: str | None, peak: float | None) -> Iterator[tuple[str, str]]:
    """(name, text) of what several train stages take, one after the other."""
    yield "tokens", f"{sum(training.tokens for training in trainings):,}"
    if any(training.model is None for training in trainings):
        return
    flops = sum(training.flops for training in trainings)
    yield "FLOPs", f"{flops:.3g}"
    if peak is not None:
        yield "hours", _hours(flops, world, device_name, peak)
        limits = [limit for training in trainings if (limit := training.config.train.max_wallclock_s) is not None]
        if len(limits) == len(trainings):
            yield "", f"train.max_wallclock_s ends them after {sum(limits) / 3600:.2f} hours"


def _hours(flops: float, world: World, device_name: str | None, peak: float) -> str:
    hours = ", ".join(f"{flops / (share * peak * world.size) / 3600:,.2f} at {share:.0%}" for share in MFUS)
    return f"{hours} MFU, computed, on {world.size} × {device_name} of {peak / 1e12:,.0f} TFLOP/s (dense bf16)"
