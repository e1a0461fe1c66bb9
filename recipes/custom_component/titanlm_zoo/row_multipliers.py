"""A learned factor for every output of a matrix, folded into it at export.

Weight decay and learning rate together settle how large a matrix becomes; with
a factor for each row beside it the model can choose. With the matrices frozen
only the factors are trained, a few thousand numbers (as in IA³: Liu et al.
2022, arXiv:2205.05638).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titanlm.models.layers.linear import Linear
from titanlm.patterns import matches
from titanlm.registry import register


@dataclass(frozen=True)
class RowMultipliersConfig:
    params: tuple[str, ...] = ("@matrix",)
    """Name globs and @roles of the matrices that get factors."""
    freeze: tuple[str, ...] = ()
    """Name globs and @roles of parameters that are not trained; `["@matrix", "@embedding", "@head", "@norm"]` leaves only the factors."""


class MultipliedLinear(Linear):
    """``multiplier · (x Wᵀ)``; the matrix keeps its name."""

    def __init__(self, plain: Linear) -> None:
        nn.Module.__init__(self)
        self.weight = plain.weight
        self.multiplier = nn.Parameter(torch.ones(len(plain.weight), dtype=torch.float32, device=plain.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype)) * self.multiplier.to(x.dtype)

    @torch.no_grad()
    def merged(self) -> Linear:
        plain = Linear(self.weight.shape[1], self.weight.shape[0])
        plain.weight = nn.Parameter(self.weight * self.multiplier[:, None], requires_grad=False)
        return plain


@register("adapter", "row_multipliers")
class RowMultipliers:
    """Raises ValueError when the patterns match no matrix."""

    def __init__(self, config: RowMultipliersConfig, *, model: Any) -> None:
        self.config, self.model = config, model
        roles = dict(model.parameter_roles())
        linears = {name: module for name, module in model.named_modules() if type(module) is Linear}
        self.paths = [path for path in linears if matches(config.params, f"{path}.weight", roles.get(f"{path}.weight", "matrix"))]
        if not self.paths:
            raise ValueError(f"params: {list(config.params)} match no matrix of a linear layer (there are {', '.join(list(linears)[:8])}…)")
        for path in self.paths:
            model.set_submodule(path, MultipliedLinear(linears[path]))
        self.roles = roles | self.parameter_roles()

    def parameter_roles(self) -> dict[str, str]:
        return {f"{path}.multiplier": "gain" for path in self.paths}

    def trains(self, name: str) -> bool:
        return not matches(self.config.freeze, name, self.roles[name])

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        for path in self.paths:
            self.model.get_submodule(path).multiplier.fill_(1.0)

    def merge(self) -> None:
        """Multiply the factors into the matrices; plain linear layers are left."""
        for path in self.paths:
            self.model.set_submodule(path, self.model.get_submodule(path).merged())
