"""The course of a run as its config has it: where it ends, its stages and phases, what follows a schedule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from titanlm.config import RunConfig, Train
from titanlm.curricula.stage import Stage
from titanlm.distributed.world import World
from titanlm.progress import Horizon, Phase, Phases, Start, largest_divisor
from titanlm.registry import Component


def horizon_of(config: RunConfig) -> Horizon:
    """Where training ends; the calibration that follows may have a share of its time."""
    limit_s = config.train.max_wallclock_s
    return Horizon(config.train.steps, None if limit_s is None else limit_s - config.export.calibration_reserve_s)


def limit_settings(config: RunConfig) -> str:
    """What the seconds of the horizon are made of."""
    return "train.max_wallclock_s" + " less export.calibration_reserve_s" * bool(config.export.calibration_reserve_s)


@dataclass(frozen=True)
class Leg:
    """A stage as it is run: nothing is left to a default."""

    stage: Stage
    seq_len: int
    rows: int
    """A step, over all ranks."""
    clip: float | None
    steps: int
    """Until the next begins or `train.steps` are done."""

    @property
    def step_tokens(self) -> int:
        return self.rows * self.seq_len

    @property
    def tokens(self) -> int:
        return self.steps * self.step_tokens

    def rows_of_pass(self, train: Train, ranks: int) -> int:
        """Rows a forward pass on each of so many ranks: as many as `train` allows and a rank's rows can be cut into; 1 until a probe has said."""
        return largest_divisor(self.rows // ranks, train.rows(self.seq_len) or 1)


def legs_of(config: RunConfig) -> tuple[Leg, ...]:
    """The stages of a run in order; without a curriculum the whole run is one."""
    train = config.train
    stages = tuple(stage for entry in config.curriculum for stage in entry.build()) or (Stage(start_step=0),)
    ends = [stage.start_step for stage in stages[1:]] + [train.steps]
    return tuple(
        Leg(
            stage=stage,
            seq_len=stage.seq_len or train.seq_len,
            rows=(stage.batch or train.global_batch) * stage.accumulation,
            clip=(train.clip if stage.clip is None else stage.clip) or None,
            steps=max(0, min(end, train.steps) - stage.start_step),
        )
        for stage, end in zip(stages, ends)
    )


def flops_left(config: RunConfig, flops_per_token: Callable[[int], float], step: int) -> float:
    """Of forward and backward passes from this step to the end; ``flops_per_token`` is asked for each row length."""
    ahead = [(leg, leg.steps - max(0, step - leg.stage.start_step)) for leg in legs_of(config)]
    return sum(steps * leg.step_tokens * flops_per_token(leg.seq_len) for leg, steps in ahead if steps > 0)


def longest_row(config: RunConfig) -> int:
    """Positions of the longest row that the model has to take in training, or where `train.seq_len` is asked for."""
    return max(config.train.seq_len, *(leg.seq_len for leg in legs_of(config)))


def phases_of(config: RunConfig, world: World, horizon: Horizon) -> Phases:
    """The shapes and switches of a run's steps: those of its stages, twice where rounding sets in on the way."""

    def phase(leg: Leg) -> Phase:
        stage, rows = leg.stage, leg.rows_of_pass(config.train, world.size)
        return Phase(
            seq_len=leg.seq_len,
            micro_batch=rows,
            accumulation=leg.rows // (rows * world.size),
            clip=leg.clip,
            lr_multiplier=stage.lr_multiplier,
            rewarmup_steps=stage.rewarmup_steps,
            start_step=stage.start_step if stage.rewarmup_steps else 0,
        )

    stages = [(leg.stage.start_step, phase(leg)) for leg in legs_of(config)]
    if not any(getattr(quantizer.config, "qat", False) for quantizer in config.quantizer):
        return Phases(stages, horizon)
    share = config.qat.start_fraction
    rounding = [(Start(start, share) if start else share, replace(phase, switches=(("qat", True),))) for start, phase in stages]
    before = [(start, replace(phase, switches=(("qat", False),))) for start, phase in stages] if share else []
    return Phases([*before, *rounding], horizon)


def schedules_of(config: RunConfig, optimizer: Component) -> dict[str, Component]:
    """What of an optimizer's groups follows a schedule: ``lr``, and each setting that has a scheduler in a ``_schedule`` beside it."""
    ending, settings = "_schedule", vars(optimizer.config)
    extra = {name.removesuffix(ending): value for name, value in settings.items() if name.endswith(ending) and isinstance(value, Component)}
    return {"lr": config.scheduler, **extra}
