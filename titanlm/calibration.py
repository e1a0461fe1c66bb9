"""Second moments of what the matrices of a model meet: what ``rounding = "gptq"`` knows of the data.

A matrix W in y = W x is as good as another with the same outputs on the inputs
that occur, and of those a quadratic error needs Σ x xᵀ alone. It is collected
in the forward passes of a trained model, from every use of the matrix: that of
a block that runs twice, and of a tied embedding what the head is given.

A table that is looked up has no such inputs: an untied embedding, the table of
BigramHash. Its rows are each met alone, and rounding to nearest is the best
there is. Where a factorised embedding is tied, its matrices have inputs in the
head, and those count.

Products are taken in fp32 (fp64 for fp64 inputs), some thousand positions at a
time, and summed in fp64: the sum then hardly depends on how positions came in
batches. TF32, where someone turned it on, has the inputs of a bf16 run exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from titanlm.errors import TitanError
from titanlm.models.layers.head import Head
from titanlm.models.layers.linear import Linear
from titanlm.models.layers.product import plain_product
from titanlm.models.layers.rounding import in_use

if TYPE_CHECKING:
    from titanlm.batch import Batch
    from titanlm.train_module import TrainModule

_CHUNK = 8192


@torch.no_grad()
def hessians(module: TrainModule, names: Collection[str], batches: Iterable[Batch]) -> dict[str, Tensor]:
    """Σ x xᵀ over the inputs x of each named parameter of ``module.model`` that multiplies inputs; others are left out.

    (n, n) float64 for a parameter (..., n), on the module's device, where
    ``batches`` must be too. Every position counts, labelled or not, padding
    included. With several ranks each gives the sum over its own batches, to be
    added up. The module must not be compiled: compiled code calls no hooks. It
    computes as for scoring and is left in the mode it was in.

    Takes a forward pass a batch, a product of n² for every position and matrix,
    and 8 n² bytes a matrix: where that is too much, some names at a time.
    Raises TitanError naming a parameter that the model does not have, or whose
    inputs were never seen.
    """
    parameters = dict(module.model.named_parameters())
    if unknown := [name for name in names if name not in parameters]:
        raise TitanError(f"calibration: the model has no parameter {', '.join(unknown)}")
    wanted = {id(parameters[name]): name for name in names}
    moments: dict[str, Tensor | None] = {}
    hooks = []
    for owner in module.model.modules():
        held = dict(owner.named_parameters(recurse=False)) if isinstance(owner, Linear | nn.Linear | Head) else {}
        own: dict[str, str] = {key: wanted[id(held[key])] for key in ("weight", "projection") if key in held and id(held[key]) in wanted}
        if own:
            moments |= dict.fromkeys(own.values())
            hooks.append(owner.register_forward_pre_hook(_collector(own, moments)))
    was_training = module.training
    module.eval()
    try:
        for batch in batches:
            module(batch)
    finally:
        module.train(was_training)
        for hook in hooks:
            hook.remove()
    seen = {name: moment for name, moment in moments.items() if moment is not None}
    if unseen := [name for name in moments if name not in seen]:
        raise TitanError(f"calibration: nothing reached {', '.join(unseen)}; give a batch or more, and a module that is not compiled")
    return seen


def _collector(own: dict[str, str], moments: dict[str, Tensor | None]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    """Adds what a module is called with to the moments of its parameters, names in the module → names in the model."""

    def collect(owner: nn.Module, args: tuple[Any, ...]) -> None:
        for key, x in _inputs(owner, args[0].detach()).items():
            if key in own:
                moment = moments[own[key]]
                if moment is None:
                    moment = moments[own[key]] = torch.zeros(x.shape[-1], x.shape[-1], dtype=torch.float64, device=x.device)
                for chunk in x.reshape(-1, x.shape[-1]).split(_CHUNK):
                    wide = chunk.to(torch.promote_types(x.dtype, torch.float32))
                    moment += wide.T @ wide

    return collect


def _inputs(owner: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What each of the module's matrices is multiplied with when the module is called with ``x``."""
    if not isinstance(owner, Head) or owner.projection is None:
        return {"weight": x}
    return {"projection": x, "weight": plain_product(x, in_use(owner, "projection").to(x.dtype))}
