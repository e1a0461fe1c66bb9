"""Lion: the sign of a momentum (Chen et al. 2023, arXiv:2302.06675)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from titanlm.constraints import Decay, NonNegativeFloat, PositiveFloat
from titanlm.patterns import NamedParam, matches
from titanlm.registry import register


@dataclass(frozen=True)
class LionConfig:
    lr: PositiveFloat = 1e-4
    """Peak learning rate: every weight moves by this much a step, so take a third to a tenth of Adam's."""
    params: tuple[str, ...] = ("*",)
    """Name globs and @roles of the parameters it takes."""
    betas: tuple[Decay, Decay] = (0.9, 0.99)
    """Share of the momentum in the update, and in the next momentum."""
    weight_decay: NonNegativeFloat = 1.0
    """Applied as p ← p·(1 − lr·weight_decay), to `decay_params` only; three to ten times Adam's."""
    decay_params: tuple[str, ...] = ("@matrix", "@head")
    """What decays."""


@register("optimizer", "lion")
class Lion(torch.optim.Optimizer):
    """p ← p·(1 − lr·λ) − lr·sign(β₁m + (1 − β₁)g), then m ← β₂m + (1 − β₂)g; one state tensor a parameter."""

    def __init__(self, config: LionConfig, *, named_params: list[NamedParam]) -> None:
        groups: dict[bool, list[torch.nn.Parameter]] = {True: [], False: []}
        for name, parameter, role in named_params:
            groups[matches(config.decay_params, name, role)].append(parameter)
        decays = [{"params": members, "weight_decay": config.weight_decay * decayed} for decayed, members in groups.items() if members]
        super().__init__(decays, {"lr": config.lr, "betas": config.betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            gradients = [parameter.grad for parameter in parameters]
            for parameter in parameters:
                if not self.state[parameter]:
                    self.state[parameter]["momentum"] = torch.zeros_like(parameter)
            momenta = [self.state[parameter]["momentum"] for parameter in parameters]
            (beta_update, beta_momentum), lr = group["betas"], group["lr"]
            updates = torch._foreach_lerp(momenta, gradients, 1 - beta_update)
            torch._foreach_sign_(updates)
            torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
            torch._foreach_add_(parameters, updates, alpha=-lr)
            torch._foreach_lerp_(momenta, gradients, 1 - beta_momentum)
