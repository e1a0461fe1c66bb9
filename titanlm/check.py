"""Everything that can be known to be wrong before a device is touched.

``check`` builds what a run is made of on the meta device and on the CPU:
tokenizer, dataset, model shape, schedules, parameter claims. ``titanlm config
check`` prints what it finds, and the trainer runs it first.
"""

from __future__ import annotations

import glob
import math
import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from titanlm.config import SUMMARY, RunConfig, Train, Validation
from titanlm.course import horizon_of, legs_of, longest_row, schedules_of
from titanlm.curriculum import curriculum_problems, curriculum_warnings, stage_rows, stages_from
from titanlm.datasets.files import OfflineError, offline
from titanlm.datasets.python_stdlib import files_of
from titanlm.distributed.strategy import shards_of
from titanlm.distributed.world import World
from titanlm.epochs import read_again
from titanlm.errors import DataError, TitanError
from titanlm.patterns import Claims, NamedParam, claim
from titanlm.progress import Progress
from titanlm.registry import Component, did_you_mean, lookup
from titanlm.runs import require_name


@dataclass
class Report:
    problems: list[str] = field(default_factory=list)
    """Dotted path first."""
    warnings: list[str] = field(default_factory=list)
    summary: str = ""
    tokenizer: Any = None
    model: Any = None
    """On the meta device."""
    data: list[str] = field(default_factory=list)
    """Documents of each split."""
    streams: list[Any] = field(default_factory=list)
    """Kept, because a listing lives as long as a stream that uses it, and the trainer needs it next."""
    checkpoint_bytes: int = 0
    """About what a checkpoint takes on disk; 0 where there are problems."""

    def attempt(self, path: str, build: Callable[[], Any]) -> Any:
        """The result, or None with the problem noted under ``path``."""
        try:
            return build()
        except OfflineError as error:
            self.warnings.append(f"{path}: not looked at: {error}")
            return None
        except (TitanError, ValueError, OSError) as error:
            for line in str(error).splitlines():
                # A message may name a key of this table, with the table's name before it or without.
                table = path.rpartition(".")[2]
                problem = f"{path}.{line.removeprefix(f'{table}.')}" if _names_field(line) else f"{path}: {line}"
                if problem not in self.problems:  # the same dataset may serve training and validation
                    self.problems.append(problem)
            return None


def _names_field(line: str) -> bool:
    head, colon, _ = line.partition(": ")
    return bool(colon) and head.replace("_", "").replace(".", "").isalnum() and " " not in head and head.islower()


def check(config: RunConfig, *, network: bool = False) -> Report:
    """Every problem of a config, without touching a device, nor a network unless ``network`` says that data behind URLs is looked at too."""
    with nullcontext() if network else offline():
        return _check(config)


def _check(config: RunConfig) -> Report:
    report = Report()
    train = config.train
    sound = config
    if config.curriculum:
        config, sound = _check_stages(config, report)
    else:
        report.problems += micro_batch_problems(train)
    if train.compile != "none" and train.compile_cache not in ("run", "off"):
        from titanlm.distributed.compile_cache import COMPILE_CACHE, cache_file

        if not (Path(config.run.dir) / config.run.name / COMPILE_CACHE).exists():  # which comes first
            report.attempt("train", lambda: cache_file(train.compile_cache))
    if train.sample_every and not train.sample_prompt:
        report.warnings.append("train.sample_prompt: empty; samples start from an empty document")
    if config.profile is not None and config.profile.start > train.steps:
        report.warnings.append(f"profile.start: {config.profile.start} lies after the last step, {train.steps}; nothing will be profiled")
    world = report.attempt("parallel", World.from_environment)
    if world is not None:
        report.problems += parallel_problems(config, world)
    _check_data(config, report)
    if report.tokenizer is not None:
        report.model = report.attempt("model", lambda: build_model(sound, report.tokenizer))
    if report.model is not None:
        _check_model(config, report)
    run = {"total_steps": train.steps, "horizon": horizon_of(config)}
    scheduler = report.attempt("scheduler", partial(config.scheduler.build, **run))
    if scheduler is not None:
        highest = max(scheduler.factor(Progress(step)) for step in range(0, train.steps, -(-train.steps // 1000)))
        if highest < 0.9:
            report.warnings.append(f"scheduler: its factor never exceeds {highest:.2g} in {train.steps} steps, so no learning rate comes near its peak")
    for index, entry in enumerate(config.optimizer):
        for setting, scheduler in schedules_of(config, entry).items():
            if scheduler is not config.scheduler:
                report.attempt(f"optimizer.{index}.{setting}_schedule", partial(scheduler.build, **run))
    report.warnings += clock_warnings(config)
    rounding = any(getattr(quantizer.config, "qat", False) for quantizer in config.quantizer)
    if config.qat.start_fraction and not rounding:
        report.warnings.append("qat.start_fraction: no quantizer has `qat = true`, so no weight is rounded in training")
    if rounding and config.adapter is not None:
        report.problems.append("adapter: training would round the weights without it, and export those with it merged in; leave out one of adapter and qat")
    if config.parallel.gather_dtype != "fp32":
        report.problems += [f"parallel.gather_dtype: {why}" for why in _gather_problems(config, rounding)]
    if any(quantizer.name == "float8" for quantizer in config.quantizer):
        if train.precision != "bf16":
            report.problems.append(
                f"train.precision: quantizer 'float8' takes bf16 activations to FP8, and it is {train.precision!r}; set 'bf16', or leave the quantizer out"
            )
        if train.compile == "none" and train.device != "cpu":
            report.warnings.append("train.compile: 'none', and casts to FP8 that nothing fuses cost more than FP8 gains; use 'block' or 'model'")
    report.attempt("loss", lambda: config.loss.build())
    if config.fitter is not None:
        if config.export.max_bytes is None:
            report.problems.append(f"fitter: {config.fitter.name!r} fits an artifact to export.max_bytes, which is not set")
        elif config.fitter.name == "clip_dial" and not any(hasattr(quantizer.config, "coarser") for quantizer in config.quantizer):
            report.problems.append("fitter: 'clip_dial' turns quantizers such as 'sdclip', and the config has none; use one, or a fitter that prunes")
        else:
            report.attempt("fitter", lambda: _fitter(config))
    report.warnings += artifact_warnings(config)
    if config.export.code:
        from titanlm.export import code_files  # which builds on this module

        report.attempt("export.code", lambda: code_files(config.export))
    for index, optimizer in enumerate(config.optimizer):
        if optimizer.config.lr < 1e-5:
            report.warnings.append(f"optimizer.{index}.lr: {optimizer.config.lr:g} is low for pretraining; 1e-4 to 1e-2 is usual")
    if config.spike.sigmas and config.checkpoint.save_only_model:
        report.problems.append("spike.sigmas: nothing can be wound back to checkpoints of weights alone; set checkpoint.save_only_model = false")
    if config.checkpoint.copy_to:
        from titanlm.checkpoint_copy import RemoteCopies

        report.attempt("checkpoint.copy_to", lambda: RemoteCopies(config.checkpoint.copy_to))
    names = [entry.name for entry in config.validation]
    if (best := config.checkpoint.best) and best not in (metrics := validation_metrics(config)):
        report.problems.append(f"checkpoint.best: no validation set reports {best!r}{did_you_mean(best, metrics)} (metrics: {', '.join(metrics)})")
    elif best and not 0 < scored_every(config, best) < train.steps:
        report.warnings.append(f"checkpoint.best: {best!r} is known at the end alone, whose step is kept anyway; set train.validate_every or the sets' `every`")
    for name in sorted({name for name in names if names.count(name) > 1}):
        report.problems.append(f"validation: two sets are named {name!r}; give each a `name` of its own")
    return report


def _check_stages(config: RunConfig, report: Report) -> tuple[RunConfig, RunConfig]:
    """The config without a curriculum that cannot be built, and without one that is wrong: what else is wrong shows all the same, and once."""
    without = replace(config, curriculum=())
    if None in [report.attempt(f"curriculum.{index}", partial(stages_from, entry)) for index, entry in enumerate(config.curriculum)]:
        return without, without
    if problems := list(curriculum_problems(config)):
        report.problems += problems
        return config, without
    report.warnings += curriculum_warnings(config)
    if again := read_again(config):
        report.warnings.append(f"curriculum: {again}")
    return config, config


def artifact_warnings(config: RunConfig) -> Iterator[str]:
    """What does not work well together when an artifact is made."""
    calibrated = any(getattr(quantizer.config, "rounding", "nearest") == "gptq" for quantizer in config.quantizer)
    reserve_s = config.export.calibration_reserve_s
    if calibrated and config.train.max_wallclock_s is not None and not reserve_s:
        yield "export.calibration_reserve_s: 0, so what 'gptq' reads of the training data comes after train.max_wallclock_s; Parameter Golf counts it"
    if reserve_s and config.train.max_wallclock_s is not None and not calibrated:
        yield f"export.calibration_reserve_s: training ends {reserve_s:g} s early for a calibration that no quantizer asks for; set it to 0"
    if config.fitter is None:
        return
    if config.fitter.name == "clip_dial":
        if any(hasattr(quantizer.config, "coarser") and getattr(quantizer.config, "qat", False) for quantizer in config.quantizer):
            yield "fitter: 'clip_dial' moves the levels that qat trained; set the quantizer's k before training instead"
        finest = config.fitter.config.finest
        least = min(1.0, max((quantizer.config.least_k / quantizer.config.k for quantizer in config.quantizer if quantizer.name == "sdclip"), default=0.0))
        if finest < least:
            yield f"fitter.finest: {finest:g} takes 'sdclip' to where finer steps gain less than clipping costs; raise it to {math.ceil(100 * least) / 100:g}"
        return
    if calibrated:
        yield "fitter: quantizers with rounding = 'gptq' fill the zeros that it makes, and each trial rounds anew; use one of both"
    if any(quantizer.name == "sdclip" for quantizer in config.quantizer):
        yield "fitter: with quantizer 'sdclip' many weights are 0 already and pruning moves its grid; use fitter 'clip_dial'"


def clock_warnings(config: RunConfig) -> Iterator[str]:
    """What will surprise in a run that ends by the clock, or in averages and schedules that never come to act."""
    train, name = config.train, config.scheduler.name
    if train.max_wallclock_s is not None:
        if train.compile != "none" and not train.priming_steps:
            yield "train.priming_steps: 0, so compiling counts as training and slows the pace that schedules go by; 20 is usual"
        if "horizon" not in lookup("scheduler", name).runtime and name != "constant":
            yield f"scheduler: {name!r} goes by train.steps, which train.max_wallclock_s may end before; 'warmdown' goes by both"
        if config.curriculum:
            yield "curriculum: its stages go by steps, which train.max_wallclock_s may end before the last of them"
    average = config.averager
    if average is not None and average.name == "swa":
        last = train.steps // average.config.every * average.config.every
        if last < average.config.start_fraction * train.steps:
            yield f"averager.every: no multiple of {average.config.every} steps lies in what start_fraction leaves of {train.steps}; nothing is averaged"


def validation_metrics(config: RunConfig) -> list[str]:
    """Names of what validation reports."""
    from titanlm.evaluate import SCORES

    prefixes = ["", "averaged_"] if config.averager is not None else [""]
    names = [*(entry.name for entry in config.validation), *([SUMMARY] if config.counted else [])]
    return [f"validation/{name}/{prefix}{score}" for name in names for prefix in prefixes for score in SCORES]


def scored_every(config: RunConfig, metric: str) -> int:
    """Steps between values of a validation metric, which for the summary is where all its sets are scored; 0: only at the end."""
    name = metric.removeprefix("validation/").rpartition("/")[0]
    sets = config.counted if name == SUMMARY else [entry for entry in config.validation if entry.name == name]
    return math.lcm(*(config.train.validate_every if entry.every is None else entry.every for entry in sets))


def _fitter(config: RunConfig) -> Any:
    assert config.fitter is not None
    return config.fitter.build(max_bytes=config.export.max_bytes)


def _check_data(config: RunConfig, report: Report) -> None:
    from titanlm.evaluate import open_set
    from titanlm.stream import streams_of

    tokenizer = report.tokenizer = report.attempt("tokenizer", config.tokenizer.build)
    if tokenizer is None:
        return
    train, data = config.train, config.data

    def first_row(stream: Any, what: str, seq_len: int = train.seq_len) -> None:
        report.streams.append(stream)
        if stream.n_rows is not None:
            report.data.append(f"{stream.n_rows:,} {what}")
        if stream.next_row(seq_len) is None:
            raise DataError("no text: every row is empty, unreadable or refused by dataset.filter")

    def source(one: Any, what: str) -> None:
        # The first of the run's streams: datasets may cut their files by the number of streams.
        stream = streams_of(config, tokenizer, sources=(one,), seq_len=train.seq_len, only=(0,))[0]
        first_row(stream, what)
        if stream.n_rows is not None and stream.n_rows < data.n_streams:
            remedy = "give more or shorter documents, or lower it"
            report.warnings.append(f"data.n_streams: {data.n_streams} streams read {stream.n_rows} documents, several the same at once; {remedy}")

    lengths = sorted({leg.seq_len for leg in legs_of(config)})
    for seq_len in lengths if config.curriculum else ():
        report.attempt("packer", partial(config.packer.build, seq_len=seq_len))
    for index, one in enumerate(config.sources):
        if one.dataset.name == "token_spans" and data.document_mask:
            report.problems.append("data.document_mask: dataset 'token_spans' does not tell documents apart; set it to false")
        if one.dataset.name == "token_spans" and getattr(config.model.config, "smear_gate", "") == "masked":
            report.warnings.append("model.smear_gate: 'masked' shuts where documents begin, and dataset 'token_spans' tells only where spans do")
        for seq_len in lengths if one.dataset.name == "token_spans" and config.packer.name == "none" else ():
            if rest := one.dataset.config.span_tokens % seq_len:
                padded, rows = (seq_len - rest) / (one.dataset.config.span_tokens + seq_len - rest), "train.seq_len =" if not config.curriculum else "rows of"
                report.warnings.append(f"dataset.span_tokens: no multiple of {rows} {seq_len}, so {padded:.0%} of all positions are padding")
        report.attempt(f"data.source.{index}.dataset" if data.source else "dataset", partial(source, one, one.name or "train"))
    for index, entry in enumerate(config.validation):
        own = f"validation.{index}" if entry.dataset is None else f"validation.{index}.dataset"
        if entry.dataset is None and entry.file is None and entry.split == "validation":
            own = "data.source" if data.source else "dataset"
        seq_len = entry.seq_len or train.seq_len
        if entry.packer is None or report.attempt(f"validation.{index}", partial(entry.packer.build, seq_len=seq_len)) is not None:
            report.attempt(own, partial(lambda entry, seq_len: first_row(open_set(entry, config, tokenizer), entry.name, seq_len), entry, seq_len))
        if trained := _trained_on(config, entry):
            where = "file" if entry.file is not None else "dataset.validation_paths"
            report.problems.append(f"validation.{index}.{where}: {trained} is training data too; a score on it would say nothing")
        report.problems += (f"validation.{index}.dataset.{problem}" for problem in _held_out_too_much(config, entry))
    if data.workers > data.n_streams:
        report.warnings.append(f"data.workers: {data.workers} processes, but data.n_streams is {data.n_streams}; so many work")
    if config.train.sample_every:
        from titanlm.generate import prompt_ids

        longest = getattr(config.model.config, "max_positions", None)
        report.attempt("train.sample_prompt", lambda: prompt_ids(tokenizer, config.train.sample_prompt, longest))
    report.attempt("run", lambda: require_name(config.run.name))


def micro_batch_problems(train: Train) -> Iterator[str]:
    """What is wrong with the rows of a forward pass, however they are given."""
    tokens, rows = train.micro_batch_tokens, train.rows(train.seq_len) or 1
    key = "train.micro_batch" if tokens is None else "train.micro_batch_tokens"
    if isinstance(tokens, int) and tokens % train.seq_len:
        yield f"{key}: {tokens} is no multiple of train.seq_len = {train.seq_len}"
    elif train.global_batch % rows:
        yield f"{key}: {rows} rows do not divide train.global_batch = {train.global_batch}"


def parallel_problems(config: RunConfig, world: World) -> Iterator[str]:
    """What does not fit together with so many ranks."""
    parallel, train, n_streams = config.parallel, config.train, config.data.n_streams
    micro_batch, steps = train.rows(train.seq_len) or 1, {train.global_batch: None}
    if config.curriculum:
        micro_batch, steps = 1, dict.fromkeys(leg.rows for leg in legs_of(config))
    if parallel.strategy == "none" and world.size > 1:
        yield f"parallel.strategy: 'none' trains with one process and there are {world.size}; use 'replicate', or 'fsdp2' for models that fill a GPU"

    def shared(n: int) -> bool:
        return n_streams % n == 0 and all(rows % (micro_batch * n) == 0 for rows in steps)

    if world.size > 1 and not shared(world.size):
        legal = [n for n in range(1, min(*steps, n_streams) + 1) if shared(n)]
        rows = f"{train.global_batch} rows in micro-batches of {micro_batch}, and {n_streams} streams of data"
        if config.curriculum:
            rows = f"steps of {', '.join(map(str, steps))} rows in the stages of the curriculum, and {n_streams} streams of data"
        yield f"parallel: {rows}, cannot be shared out evenly among {world.size} ranks; {', '.join(map(str, legal)) or 'no number of'} ranks can"
    shards = shards_of(parallel, world)
    if parallel.strategy == "hsdp" and world.size % shards:
        yield f"parallel.shards: groups of {shards} ranks cannot be made of {world.size}"
    if parallel.shards is not None and parallel.strategy != "hsdp":
        yield f"parallel.shards: only strategy 'hsdp' has groups, and it is {parallel.strategy!r}"
    if parallel.cpu_offload and parallel.strategy not in ("fsdp2", "hsdp"):
        yield f"parallel.cpu_offload: only strategies 'fsdp2' and 'hsdp' move parameters to host memory, and it is {parallel.strategy!r}"


def _trained_on(config: RunConfig, entry: Validation) -> str | None:
    """A file of a validation set that the paths of the training data lead to as well. By name only: `titanlm data inspect --overlap` compares texts."""
    own = (entry.file,) if entry.file is not None else getattr(getattr(entry.dataset, "config", None), "validation_paths", ())
    held_out = {os.path.realpath(os.path.expanduser(path)): path for path in own if "://" not in path and "\0" not in path}
    trained = {path for source in config.sources for path in _found(source.dataset)} if held_out else set()  # a glob of many files takes time
    return next((said for file, said in held_out.items() if _within(file, trained)), None)


def _held_out_too_much(config: RunConfig, entry: Validation) -> Iterator[str]:
    """Where a set takes more of some files for validation than training leaves out, or others: those are trained on. Less is a part of it."""
    if entry.dataset is None or entry.split != "validation":
        return
    fraction = getattr(entry.dataset.config, "validation_fraction", 0.0)
    own = set(_found(entry.dataset)) if fraction else set()
    for source in config.sources if own else ():
        left = getattr(source.dataset.config, "validation_fraction", fraction)
        if _apart(source.dataset, entry.dataset):
            continue
        theirs, mine = source.dataset.config, entry.dataset.config
        other = next((key for key in ("column", "template") if getattr(theirs, key, "") != getattr(mine, key, "")), None)
        trained = set(_found(source.dataset)) if left < fraction or other else set()
        shared = next((path for some, others in ((own, trained), (trained, own)) for path in some if _within(path, others)), None)
        if shared is not None and left < fraction:
            yield f"validation_fraction: {fraction:g}, but training leaves out {left:g} of {shared} and reads the rest; leave out as much there"
        elif shared is not None:
            yield f"{other}: rows are held out by the hash of their text, and training makes other texts of {shared}; have the same there"
    for source in config.sources if entry.dataset.name == "python_stdlib" else ():
        if source.dataset.name == entry.dataset.name and (both := sorted(files_of(source.dataset.config)[0] & files_of(entry.dataset.config)[1])):
            n = f"{len(both)} of its files" if len(both) > 1 else "a file of it"
            yield f"validation_files: {n}, such as {both[0]!r}, would be trained on too; hold out as much in the training data's dataset.validation_files"


def _apart(one: Component, other: Component) -> bool:
    """Whether filters `one_of` let through no value of a column in both."""
    chosen = [
        {each.config.column: set(each.config.values) for each in getattr(dataset.config, "filter", ()) if each.name == "one_of"} for dataset in (one, other)
    ]
    return any(values.isdisjoint(chosen[1].get(column, values)) for column, values in chosen[0].items())


def _found(dataset: Component) -> Iterator[str]:
    """Real paths of what a dataset's local paths lead to; folders as they are."""
    for path in getattr(dataset.config, "paths", ()):
        if "://" not in path and "\0" not in path:
            path = os.path.expanduser(path)
            yield from map(os.path.realpath, [path] if os.path.exists(path) else glob.glob(path, recursive=True))


def _within(path: str, paths: set[str]) -> bool:
    """Whether it is one of them or below one."""
    return path in paths or not paths.isdisjoint(map(str, Path(path).parents))


def build_model(config: RunConfig, tokenizer: Any) -> Any:
    """The model on the meta device, changed by the adapter and prepared by quantizers that have a training side.

    Raises ValueError with a line for each bad setting.
    """
    import torch

    with torch.device("meta"):
        model = config.model.build(vocab_size=tokenizer.vocab_size, max_seq_len=longest_row(config))
        model.adapter = None
        if config.adapter is not None:
            adapter = config.adapter.build(model=model)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(adapter.trains(name))
            # Not a submodule even when the adapter is an nn.Module: its parameters live in the model.
            object.__setattr__(model, "adapter", adapter)
        for quantizer, names in zip(config.quantizer, quantizer_claims(config, model).claimed, strict=True):
            prepare = getattr(quantizer.build(), "prepare", None)
            if prepare is not None:
                stored = set(model.state_dict())
                prepare(model, names)
                if changed := sorted(stored ^ set(model.state_dict())):
                    # They would start from whatever lies in memory, and an artifact would not hold them.
                    raise ValueError(f"quantizer {quantizer.name!r}: prepare() changed what the model stores: {', '.join(changed[:5])}")
    return model


def roles_of(model: Any) -> dict[str, str]:
    """Role of every trained parameter, the adapter's included. Raises ValueError when some are left without."""
    roles = all_roles(model)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    missing = [name for name in names if name not in roles]
    if missing:
        raise ValueError(f"parameter_roles() of the model leaves out {', '.join(missing[:5])}{'…' if len(missing) > 5 else ''}")
    return {name: roles[name] for name in names}


def all_roles(model: Any) -> dict[str, str]:
    """What model and adapter say of their parameters; the adapter's word wins."""
    added = {} if model.adapter is None else dict(model.adapter.parameter_roles())
    return dict(model.parameter_roles()) | added


def optimizer_claims(config: RunConfig, model: Any) -> Claims:
    return claim(roles_of(model), [optimizer.config.params for optimizer in config.optimizer])


def quantizer_claims(config: RunConfig, model: Any) -> Claims:
    """Those of products apart from those of weights: a matrix may be multiplied by in FP8 and stored as integers."""
    roles = all_roles(model)
    names = {name: roles[name] for name, _ in model.named_parameters() if name in roles}
    groups = [getattr(quantizer.build(), "of_products", False) for quantizer in config.quantizer]
    return claim(names, [quantizer.config.params for quantizer in config.quantizer], groups)


def _gather_problems(config: RunConfig, rounding: bool) -> Iterator[str]:
    """Why blocks may not be gathered in other numbers than fp32."""
    how, sharded = config.parallel.gather_dtype, config.parallel.strategy in ("fsdp2", "hsdp")
    if rounding and config.train.precision == "bf16":
        yield f"{how!r} gathers bf16 weights, whose grid is not the export's; with a quantizer's qat set 'fp32'"
    if how == "float8" and sharded and not any(quantizer.name == "float8" and quantizer.config.recipe == "tensorwise" for quantizer in config.quantizer):
        yield "'float8' sends what quantizer 'float8' with recipe 'tensorwise' multiplies by, and there is none; set 'compute'"


def _halving_problems(config: RunConfig, halved: list[str], in_training: set[str]) -> Iterator[str]:
    """Why an optimizer may not keep these parameters in bf16, and the rest of them itself."""
    if (strategy := config.parallel.strategy) != "none":
        yield f'{halved[0]} would be bf16, and strategy {strategy!r} would sum its gradients in that; keep "fp32" with several processes'
    if (precision := config.train.precision) != "bf16":
        yield f'{halved[0]} would be bf16, and products in {precision} would miss the rest of it; set train.precision = "bf16", or keep "fp32"'
    if both := [name for name in halved if name in in_training]:
        yield f'{both[0]} would be bf16, and a quantizer with qat = true rounds whole weights in training; leave one of them out, or keep "fp32"'


def _check_model(config: RunConfig, report: Report) -> None:
    model = report.model
    claims = report.attempt("model", lambda: optimizer_claims(config, model))
    if claims is None:
        return
    report.problems += [f"optimizer.{problem}" for problem in claims.problems]
    parameters, roles = dict(model.named_parameters()), roles_of(model)
    dtypes = {str(parameter.dtype).removeprefix("torch.") for parameter in parameters.values()}  # before an optimizer halves some
    rounded = quantizer_claims(config, model)
    in_training = {name for entry, names in zip(config.quantizer, rounded.claimed, strict=False) if getattr(entry.config, "qat", False) for name in names}
    for index, (entry, names) in enumerate(zip(config.optimizer, claims.claimed, strict=True)):
        own, before = [NamedParam(name, parameters[name], roles[name]) for name in names], [parameters[name].dtype for name in names]
        report.attempt(f"optimizer.{index}", partial(entry.build, named_params=own) if own else lambda: None)
        halved = [name for name, dtype in zip(names, before, strict=True) if parameters[name].dtype != dtype]
        if halved:
            report.problems += [f"optimizer.{index}.weight_dtype: {why}" for why in _halving_problems(config, halved, in_training)]
    if claims.unclaimed:
        shown = ", ".join(claims.unclaimed[:5]) + ("…" if len(claims.unclaimed) > 5 else "")
        report.problems.append(f'optimizer: no entry claims {shown}; add an entry with params = ["*"] at the end')
    report.problems += [f"quantizer.{problem}" for problem in rounded.problems]
    if len(dtypes) > 1 and config.parallel.strategy in ("fsdp2", "hsdp"):
        remedy = 'keep them in one (golf: model.embedding_dtype = "float32"), or use strategy "replicate"'
        report.problems.append(
            f"parallel.strategy: {config.parallel.strategy!r} shards parameters of one dtype, and the model has {', '.join(sorted(dtypes))}; {remedy}"
        )
    if (backend := getattr(config.model.config, "attention_backend", "auto")) not in ("auto", "sdpa", "math"):
        report.problems += _refused(config, backend, model.head_dim)
    if report.problems:  # an optimizer that is to make a step may be among them
        return
    from titanlm.state_bytes import state_bytes  # which builds on this module

    held = state_bytes(config, model)
    report.checkpoint_bytes = sum(size for part, size in held.items() if part != "moments" or not config.checkpoint.save_only_model)
    report.summary = "\n".join(summary(config, report, held))


def _refused(config: RunConfig, backend: str, head_dim: int) -> Iterator[str]:
    """What the attention backend cannot do of what the config asks; of a machine only that it is to be a CPU."""
    import torch

    from titanlm.kernels.refusals import refusals
    from titanlm.precision import DTYPES

    device = torch.device("cpu") if config.train.device == "cpu" else None
    settings: dict[str, Any] = {"documents": config.data.document_mask, "dtype": DTYPES[config.train.precision], "deterministic": config.train.deterministic}
    for why in refusals(backend, head_dim, **settings, device=device):
        yield f"model.attention_backend: {why}"


def summary(config: RunConfig, report: Report, held: dict[str, int]) -> Iterator[str]:
    """Lines: parameters, FLOPs a token, tokens a step, bytes in memory, with ``held`` from ``state_bytes``, and on disk."""
    model = report.model
    parameters = sum(parameter.numel() for parameter in model.parameters())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    n_trained = sum(parameter.numel() for parameter in trained)
    train, legs = config.train, legs_of(config)
    tokens, flops = sum(leg.tokens for leg in legs), sum(model.flops_per_token(leg.seq_len) * leg.tokens for leg in legs)
    each = [f"{model.flops_per_token(seq_len):,.0f}" for seq_len in sorted({leg.seq_len for leg in legs})]
    memory = sum(held.values()) + sum(parameter.numel() * parameter.grad_dtype.itemsize for parameter in trained)
    *parts_held, last = "weights", "gradients", *list(held)[1:]
    rows = train.rows(train.seq_len)
    parts = "micro-batches of as many rows as a probe at the start finds to fit" if rows is None else f"{train.global_batch // rows} micro-batches"
    steps = [("tokens per step", f"{legs[0].step_tokens:,} = {train.global_batch} rows × {train.seq_len}, {parts}")]
    lines = [
        ("parameters", f"{parameters:,}" + (f" ({n_trained:,} trained)" if n_trained != parameters else "")),
        ("FLOPs per token", f"{' to '.join(dict.fromkeys([each[0], each[-1]]))} (forward and backward)"),
        *(stage_rows(config, model.flops_per_token) if config.curriculum else steps),
        ("whole run", f"{tokens:,} tokens, {flops:.3g} FLOPs"),
        ("memory", f"{memory / 2**30:.3f} GiB for {', '.join(parts_held)} and {last}; activations come on top"),
        ("checkpoint", f"{report.checkpoint_bytes / 2**30:.3f} GiB, and {config.checkpoint.keep_last} are kept"),
    ]
    if report.data:
        lines.append(("documents", ", ".join(report.data)))
    yield from (f"{name:<16} {text}" for name, text in lines)
