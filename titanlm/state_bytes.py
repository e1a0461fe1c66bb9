"""Bytes of a run's state, out of its model on the meta device: for checks, plans, probes and the room that checkpoints need."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from titanlm.check import optimizer_claims, roles_of
from titanlm.config import RunConfig
from titanlm.patterns import NamedParam


def optimizer_bytes(config: RunConfig, model: Any) -> dict[int, int]:
    """id of a trained parameter → bytes that its optimizer keeps for it, found by a step on the meta device.

    An optimizer that cannot step there counts with two fp32 moments. Not for
    use while ranks are connected: a step may exchange something with them.
    Raises ValueError for parameters that no optimizer claims.
    """
    parameters, roles = dict(model.named_parameters()), roles_of(model)
    claims = optimizer_claims(config, model)
    if claims.problems or claims.unclaimed:
        raise ValueError(
            "\n".join([*(f"optimizer.{problem}" for problem in claims.problems), *(f"optimizer: none claims {name}" for name in claims.unclaimed)])
        )
    sizes: dict[int, int] = {}
    for component, names in zip(config.optimizer, claims.claimed, strict=True):
        optimizer = component.build(named_params=[NamedParam(name, parameters[name], roles[name]) for name in names])
        for name in names:
            parameters[name].grad = torch.empty_like(parameters[name], dtype=parameters[name].grad_dtype)
        try:
            optimizer.step()
        except Exception:  # it may look at values, which are not there
            sizes |= {id(parameters[name]): 8 * parameters[name].numel() for name in names}
        else:
            for name in names:
                state = optimizer.state.get(parameters[name], {}).values()
                sizes[id(parameters[name])] = sum(value.nbytes for value in state if isinstance(value, Tensor) and value.is_meta)
        for name in names:
            parameters[name].grad = None
    return sizes


def state_bytes(config: RunConfig, model: Any) -> dict[str, int]:
    """By part, of the whole model: what a checkpoint holds, and a device that holds it all. Raises ValueError as ``optimizer_bytes`` does."""
    parameters = list(model.parameters())
    moments = sum(optimizer_bytes(config, model).values())  # first: an optimizer may halve the weights, and keep the rest itself
    found = {"weights": sum(parameter.nbytes for parameter in parameters), "moments": moments}
    return found if config.averager is None else {**found, "average": sum(4 * parameter.numel() for parameter in parameters)}
