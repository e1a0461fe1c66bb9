"""AdamW: Adam with decoupled weight decay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch

from titanlm.constraints import Decay, NonNegativeFloat, PositiveFloat
from titanlm.patterns import NamedParam, matches
from titanlm.registry import Component, Slot, register


@dataclass(frozen=True)
class AdamWConfig:
    lr: PositiveFloat = 3e-4
    """Peak learning rate; the scheduler multiplies it."""
    params: tuple[str, ...] = ("*",)
    """Name globs and @roles of the parameters it takes."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """Decay of the first and second moment."""
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.1
    """Applied as p ← p·(1 − lr·weight_decay), to `decay_params` only."""
    weight_decay_schedule: Annotated[Component, Slot("scheduler")] | None = None
    """Multiplies `weight_decay`, as the run's scheduler does the learning rate."""
    decay_params: tuple[str, ...] = ("@matrix", "@head")
    """What decays: by default no norm, bias, gain or embedding."""


@register("optimizer", "adamw")
def adamw(config: AdamWConfig, *, named_params: list[NamedParam]) -> torch.optim.AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter, 2019), torch's fused kernel.

    Moments are kept in the parameters' dtype (fp32 masters). The fused kernel
    takes a device flag that turns a step into no step, which is how a
    non-finite gradient is kept out without waiting for the device.
    """
    groups: dict[bool, list[torch.nn.Parameter]] = {True: [], False: []}
    for name, parameter, role in named_params:
        groups[matches(config.decay_params, name, role)].append(parameter)
    return torch.optim.AdamW(
        [{"params": members, "weight_decay": config.weight_decay if decays else 0.0} for decays, members in groups.items() if members],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=all(parameter.device.type in ("cpu", "cuda") for _, parameter, _ in named_params),
    )
