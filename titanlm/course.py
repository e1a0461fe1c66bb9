"""The course of a run as its config has it: where it ends, its phases, what follows a schedule."""

from __future__ import annotations

from dataclasses import replace

from titanlm.config import RunConfig
from titanlm.distributed.world import World
from titanlm.progress import Horizon, Phase, Phases
from titanlm.registry import Component


def horizon_of(config: RunConfig) -> Horizon:
    """Where training ends; the calibration that follows may have a share of its time."""
    limit_s = config.train.max_wallclock_s
    return Horizon(config.train.steps, None if limit_s is None else limit_s - config.export.calibration_reserve_s)


def limit_settings(config: RunConfig) -> str:
    """What the seconds of the horizon are made of."""
    return "train.max_wallclock_s" + " less export.calibration_reserve_s" * bool(config.export.calibration_reserve_s)


def phases_of(config: RunConfig, world: World, horizon: Horizon) -> Phases:
    """The shapes and switches of a run's steps, in order."""
    train = config.train
    rows = train.rows(train.seq_len) or 1  # until a probe has said how many
    first = Phase(train.seq_len, rows, train.global_batch // (rows * world.size), clip=train.clip or None)
    if not any(getattr(quantizer.config, "qat", False) for quantizer in config.quantizer):
        return Phases([(0, first)], horizon)
    rounding, start = replace(first, switches=(("qat", True),)), config.qat.start_fraction
    if not start:
        return Phases([(0, rounding)], horizon)
    return Phases([(0, replace(first, switches=(("qat", False),))), (start, rounding)], horizon)


def schedules_of(config: RunConfig, optimizer: Component) -> dict[str, Component]:
    """What of an optimizer's groups follows a schedule: ``lr``, and each setting that has a scheduler in a ``_schedule`` beside it."""
    ending, settings = "_schedule", vars(optimizer.config)
    extra = {name.removesuffix(ending): value for name, value in settings.items() if name.endswith(ending) and isinstance(value, Component)}
    return {"lr": config.scheduler, **extra}
