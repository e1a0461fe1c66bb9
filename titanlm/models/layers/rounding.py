"""Weights rounded where they are used: the model's side of quantization-aware training.

A quantizer's ``prepare`` hands its round trip to the modules that hold the
parameters it claimed (:func:`round_in_training`), and a phase turns ``qat`` on
and off there. From then on the forward pass sees what an artifact would hold,
the gradient passes straight through (Bengio et al. 2013, arXiv:1308.3432), and
the optimizer goes on moving the unrounded fp32 master.

A module supports it by reading the parameter as ``in_use(self, "weight")`` and
listing its name in a class attribute beside ``forward``: ``rounds = ("weight",)``.

The switch is an attribute of the instances, which torch.compile guards: each
state gets a graph of its own. An attribute of the class, set on the class and
read through the instance, is folded into the first graph and not looked at
again (seen with torch 2.13); "late QAT" in several records of
openai/parameter-golf was dead code for such a reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn

T = TypeVar("T")


def in_use(module: nn.Module, name: str) -> Tensor:
    """The module's parameter as its forward pass is to use it, in the parameter's shape and dtype.

    With ``qat`` on it equals the quantizer's round trip to the bit: w' + (w − w),
    with the gradient on the first w of the bracket. The usual w + (w' − w) has
    the same gradient, but misses w' where a quantizer clips w to less than half.
    """
    weight: Tensor = getattr(module, name)
    round_trip = getattr(module, "round_trips", {}).get(name) if is_rounding(module) else None
    if round_trip is None:
        return weight
    fixed = weight.detach()
    rounded: Tensor = round_trip(fixed) + (weight - fixed)
    return rounded


def is_rounding(module: nn.Module) -> bool:
    """Whether any of the module's parameters is rounded now."""
    return bool(getattr(module, "qat", False))


@contextmanager
def rounded_once(module: nn.Module) -> Iterator[dict[str, Tensor]]:
    """The module's parameters by name as they are in use now, with gradients; inside, it takes what it is lent by ``functional_call`` as it is.

    For who calls a module many times with the same weights.
    """
    rounding: list[Any] = [each for each in module.modules() if is_rounding(each)]
    weights = {name: in_use(module.get_submodule(path), own) for name, _ in module.named_parameters() for path, _, own in [name.rpartition(".")]}
    try:
        for each in rounding:
            each.qat = False
        yield weights
    finally:
        for each in rounding:
            each.qat = True


def round_in_training(model: nn.Module, params: Sequence[str], round_trip: Callable[[Tensor], Tensor]) -> None:
    """Give every module that holds one of the named parameters its round trip, and the switch ``qat``, off.

    A tied parameter is rounded by all who hold it. ``round_trip`` maps a tensor
    to one of its shape and dtype without looking at values on the host. Names,
    state and values stay as they are. Raises ValueError naming the parameters
    that are held by a module that does not round.
    """
    names = {parameter: name for name, parameter in model.named_parameters() if name in set(params)}
    holders: list[tuple[Any, str]] = []
    problems = [f"{name}: the model has no such parameter" for name in params if name not in names.values()]
    for module in model.modules():
        for own, parameter in module.named_parameters(recurse=False):
            if parameter in names and own in declared(module, "rounds", ()):
                holders.append((module, own))
            elif parameter in names:
                problems.append(
                    f"{names[parameter]}: {type(module).__name__} does not round its {own} in training; "
                    "leave it out of the quantizer's `params`, set qat = false, or let the module read it through titanlm.models.layers.rounding.in_use"
                )
    if problems:
        raise ValueError("\n".join(problems))
    for module, own in holders:
        module.round_trips = {**getattr(module, "round_trips", {}), own: round_trip}
        module.qat = False


def declared(module: nn.Module, attribute: str, default: T) -> T:
    """What the class whose ``forward`` runs says in this attribute: a subclass with a forward pass of its own has to say so itself."""
    owner = next(cls for cls in type(module).__mro__ if "forward" in vars(cls))
    said: T = vars(owner).get(attribute, default)
    return said
