"""Mean of the weights of the last part of a run (stochastic weight averaging)."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from titanlm.averagers.swapping import swapped_in
from titanlm.constraints import Fraction, PositiveInt
from titanlm.progress import Horizon, Progress
from titanlm.registry import register


@dataclass(frozen=True)
class SwaConfig:
    start_fraction: Fraction = 0.75
    """Share of the run, of its steps or its seconds, that is done before the first sample."""
    every: PositiveInt = 50
    """Weights are taken after steps that are multiples of this."""


@register("averager", "swa")
class Swa:
    """m ← m + (p − m)/n with the n-th sample, in fp32: all samples count the same (Izmailov et al. 2018, arXiv:1803.05407).

    Before the first sample the average is the weights of the moment. Buffers
    are left alone. A parameter that is tied under two names is averaged once.
    """

    def __init__(self, config: SwaConfig, *, model: nn.Module, horizon: Horizon) -> None:
        self.config, self.horizon = config, horizon
        self.n = 0
        self.parameters = dict(model.named_parameters())
        self.mean = {name: torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False) for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def update(self, progress: Progress) -> None:
        if progress.step % self.config.every == 0 and self.horizon.fraction(progress) >= self.config.start_fraction:
            self.n += 1
            torch._foreach_lerp_(list(self.mean.values()), [parameter.detach().float() for parameter in self.parameters.values()], 1.0 / self.n)

    def swap(self) -> AbstractContextManager[None]:
        """The model holds the mean inside, its own weights again after."""
        return swapped_in(self.parameters, self.mean if self.n else self.parameters)

    def state_dict(self) -> dict[str, Any]:
        """``n`` samples and their ``mean``, zeros while n is 0."""
        return {"n": self.n, "mean": self.mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.n = state["n"]
        for name, mean in self.mean.items():
            mean.copy_(state["mean"][name])
