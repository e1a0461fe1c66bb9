"""The mean of the weights of the last part of a run (Polyak and Juditsky 1992; Jain et al. 2018, arXiv:1610.03774)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from titanlm.constraints import NonNegativeInt, PositiveInt
from titanlm.progress import Progress
from titanlm.registry import register


@dataclass(frozen=True)
class TailMeanConfig:
    start: NonNegativeInt
    """The first step whose weights are taken in."""
    every: PositiveInt = 1
    """Steps from one taken in to the next."""


@register("averager", "tail_mean")
class TailMean:
    """All weights taken in count the same, in fp32; before the first the mean is the weights of the moment. Buffers are left alone."""

    def __init__(self, config: TailMeanConfig, *, model: nn.Module) -> None:
        self.config, self.parameters, self.count = config, dict(model.named_parameters()), 0
        self.mean = {name: parameter.detach().float().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def update(self, progress: Progress) -> None:
        since = progress.step - self.config.start
        if since >= 0 and since % self.config.every == 0:
            self.count += 1
            torch._foreach_lerp_(list(self.mean.values()), [parameter.float() for parameter in self.parameters.values()], 1 / self.count)

    @contextmanager
    def swap(self) -> Iterator[None]:
        own = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self._copy(self.mean if self.count else own)
        try:
            yield
        finally:
            self._copy(own)

    @torch.no_grad()
    def _copy(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "mean": self.mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]
        for name, mean in self.mean.items():
            mean.copy_(state["mean"][name])
