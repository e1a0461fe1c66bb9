"""Weights by name: what a model stores, and putting it back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from titanlm.distributed.slices import SlicedCopies
from titanlm.errors import CheckpointError


def initialise(model: Any, seed: int) -> None:
    """Draw the weights of a materialised model, sharded or not, then those its adapter added."""
    with torch.no_grad(), SlicedCopies():
        model.init_weights(seed)
        if model.adapter is not None:
            model.adapter.init_weights(seed)


def unique_names(model: Any) -> list[str]:
    """Names of what a model's state holds, a tied parameter under its first name only."""
    parameters = [name for name, _ in model.named_parameters()]
    stored = model.state_dict().keys()
    return parameters + [name for name, _ in model.named_buffers() if name in stored]


def load_weights(model: Any, weights: dict[str, Tensor], source: str) -> None:
    """Copy weights into a model. Raises CheckpointError listing every difference of names and shapes."""
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    kept = {name: own[name] for name in unique_names(model)}
    problems = [f"{name}: missing" for name in kept.keys() - weights.keys()]
    problems += [f"{name}: not part of the model" for name in weights.keys() - kept.keys()]
    for name in kept.keys() & weights.keys():
        if kept[name].shape != weights[name].shape:
            problems.append(f"{name}: shape {list(weights[name].shape)}, the model has {list(kept[name].shape)}")
    if problems:
        raise CheckpointError(f"{source}: the weights do not fit the model:\n  " + "\n  ".join(sorted(problems)))
    with torch.no_grad(), SlicedCopies():
        for name, tensor in kept.items():
            tensor.copy_(weights[name])
