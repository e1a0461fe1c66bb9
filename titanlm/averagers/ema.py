"""Exponential moving average of the weights."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from titanlm.averagers.swapping import swapped_in
from titanlm.constraints import Decay
from titanlm.progress import Progress
from titanlm.registry import register


@dataclass(frozen=True)
class EmaConfig:
    decay: Decay = 0.997
    """Share of the average kept at each step; the horizon is 1 / (1 − decay) steps."""
    ramp: bool = True
    """Begin with min(decay, (1 + n) / (10 + n)) at update n, so that a short run is not mostly its initial weights."""


@register("averager", "ema")
class Ema:
    """e ← d·e + (1 − d)·p after every step, in fp32, from the initial weights.

    Without ``ramp`` nothing corrects for that beginning: after n steps the
    initial weights still weigh dⁿ, 1.1 % at d = 0.997 and n = 1,500, so it
    matters in runs shorter than some five horizons. The records of
    openai/parameter-golf average so.

    fp32 whatever the weights are: at d = 0.997 a bf16 average would round most
    updates away. Buffers are copied, not averaged. A parameter that is tied
    under two names is averaged once.
    """

    def __init__(self, config: EmaConfig, *, model: nn.Module) -> None:
        self.config = config
        self.updates = 0
        self.parameters = dict(model.named_parameters())
        self.average = {name: parameter.detach().float().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def update(self, progress: Progress) -> None:
        decay = self.config.decay
        if self.config.ramp:
            decay = min(decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        torch._foreach_lerp_(list(self.average.values()), [p.detach().float() for p in self.parameters.values()], 1.0 - decay)

    def swap(self) -> AbstractContextManager[None]:
        """The model holds the averaged weights inside, its own again after."""
        return swapped_in(self.parameters, self.average)

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]
        for name, average in self.average.items():
            average.copy_(state["average"][name])
