"""What the stages of a curriculum come to before a run: what is wrong with them, what will surprise, and how much each takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import Any

from titanlm.config import RunConfig, Train
from titanlm.course import Leg, legs_of
from titanlm.curricula.stage import Stage
from titanlm.epochs import epoch_of
from titanlm.registry import Component


def stages_from(entry: Component) -> tuple[Stage, ...]:
    """What an item of a curriculum stands for. Raises ValueError when that is something else than stages, which an outside component may give."""
    made: Any = entry.build()
    stages = tuple(made) if isinstance(made, Iterable) else (made,)
    if isinstance(made, Stage) or not stages or not all(isinstance(stage, Stage) for stage in stages):
        raise ValueError(f"{entry.name!r} gives {stages or 'nothing'}, and a curriculum gives a tuple of titanlm.curricula.stage.Stage")
    return stages


def curriculum_problems(config: RunConfig) -> Iterator[str]:
    """A line for each mistake, dotted path first; of a curriculum whose items ``stages_from`` takes."""
    train, longest = config.train, getattr(config.model.config, "max_positions", None)
    at, stages = places(config)
    if stages[0].start_step:
        yield f"{at[0]('start_step')}{stages[0].start_step:,}, and nothing says what comes before; the first stage starts at 0"
    for (_, before), (where, stage) in pairwise(zip(at, stages)):
        if stage.start_step <= before.start_step:
            yield f"{where('start_step')}{stage.start_step:,} does not come after {before.start_step:,}, where the stage before it starts; put stages in order"
    late = [f"{where('start_step')}{stage.start_step:,} is not before" for where, stage in zip(at, stages) if stage.start_step >= train.steps]
    if late:
        yield f"{late[0]} the end of the run; raise train.steps = {train.steps:,}, or end the curriculum with the stage before"
    for where, leg in zip(at, legs_of(config)):
        if longest is not None and leg.seq_len > longest:
            yield f"{where('seq_len')}rows of {leg.seq_len:,}, and model.max_positions is {longest:,}; raise that or shorten the rows"
        if isinstance(train.micro_batch_tokens, int) and leg.seq_len > train.micro_batch_tokens:
            yield f"{where('seq_len')}rows of {leg.seq_len:,} do not fit into passes of train.micro_batch_tokens = {train.micro_batch_tokens:,}; raise that"


def curriculum_warnings(config: RunConfig) -> Iterator[str]:
    """What a curriculum without mistakes makes of other settings."""
    train, (at, stages), legs = config.train, places(config), legs_of(config)
    for key in ("global_batch", "clip"):
        if getattr(train, key) != getattr(Train(), key) and all(getattr(stage, key.removeprefix("global_")) is not None for stage in stages):
            yield f"train.{key}: {getattr(train, key):g} is of no use, for every stage of the curriculum says its own"
    for where, stage, leg in zip(at, stages, legs):
        if stage.rewarmup_steps > leg.steps:
            yield f"{where('rewarmup_steps')}{stage.rewarmup_steps:,}, and the stage lasts {leg.steps:,} steps; the learning rate never reaches its height"
    own = getattr(config.scheduler.config, "warmup_steps", 0)
    if stages[0].rewarmup_steps and own:
        yield f"{at[0]('rewarmup_steps')}multiplies the {own:,} steps of scheduler.warmup_steps, so rates begin with the product of both; leave out one"
    for where, leg in zip(at, legs):
        allowed, got = min(train.rows(leg.seq_len) or 1, leg.rows), leg.rows_of_pass(train, 1)
        if 2 * got < allowed:
            yield f"{where('batch')}{leg.rows:,} rows a step are cut into passes of {got:,}, where {allowed:,} are allowed; take a number with more divisors"
    passes = [leg.rows_of_pass(train, 1) * leg.seq_len for leg in legs]
    if train.micro_batch_tokens is None and 2 * min(passes) < max(passes):
        remedy = 'train.micro_batch_tokens, a number or "auto", makes them alike'
        yield f"train.micro_batch: {train.micro_batch} rows are passes of {min(passes):,} to {max(passes):,} tokens in the stages of the curriculum; {remedy}"


def places(config: RunConfig) -> tuple[list[Callable[[str], str]], list[Stage]]:
    """How messages call a key of each stage, and the stages."""

    def of(index: int, name: str, number: int) -> Callable[[str], str]:
        if name == "stage":
            return lambda key: f"curriculum.{index}.{key}: "
        return lambda key: f"curriculum.{index}: stage {number} of {name!r}: {key} "

    found = [(of(i, entry.name, number), stage) for i, entry in enumerate(config.curriculum) for number, stage in enumerate(entry.build(), 1)]
    return [where for where, _ in found], [stage for _, stage in found]


def stage_rows(config: RunConfig, token_flops: Callable[[int], float] | None) -> Iterator[tuple[str, str]]:
    """(name, text) of each stage: steps, tokens, epochs where the data is known, and FLOPs where a model's for a length of rows are."""
    epoch = epoch_of(config)
    for number, leg in enumerate(legs_of(config), 1):
        shares = [] if epoch is None else [f"{leg.tokens / epoch.tokens:.3f} epochs"]
        yield f"stage {number}", ", ".join([_shape(leg), f"{leg.tokens:,} tokens", *shares, *_flops(leg, token_flops)])


def _shape(leg: Leg) -> str:
    return f"{leg.steps:,} steps of {leg.step_tokens:,} tokens ({leg.rows:,} rows × {leg.seq_len:,})"


def _flops(leg: Leg, token_flops: Callable[[int], float] | None) -> list[str]:
    if token_flops is None:
        return []
    each = token_flops(leg.seq_len)
    return [f"{each * leg.tokens:.3g} FLOPs ({each:,.0f} a token)"]
