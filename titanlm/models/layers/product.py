"""How a module multiplies by its matrices: where a product in fewer bits takes the place of the plain one.

A module asks for the product it is to use, ``product_of(self, "weight")(x, weight)``,
and says in a class attribute beside ``forward`` by which parameters it
multiplies: ``multiplies = {"weight": 0}``, the number being the dimension of
the parameter that makes outputs. A quantizer such as ``float8`` then sets the
products of single modules (:func:`compute_with`). Classes, names and weights
stay as they are, so checkpoints and artifacts do not know of it, and weights
that are rounded (``rounding.in_use``) are rounded before they are multiplied.

The alternative, as torchao and others have it, is to exchange the modules for
others. Every model would have to be built of modules that can be exchanged, and
whoever holds one by its class, such as the head, would lose it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch.nn.functional as F
from torch import Tensor, nn

from titanlm.models.layers.rounding import declared
from titanlm.precision import multiplied_in

Product: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(..., n_in) and (n_out, n_in), of one dtype → (..., n_out) in that dtype: x Wᵀ, differentiable in both."""


def plain_product(x: Tensor, weight: Tensor) -> Tensor:
    """A ``Product``: torch's own, of a CPU in the dtype that ``multiplied_in`` says, forward and backward."""
    dtype = multiplied_in(x)
    if dtype is x.dtype:
        return F.linear(x, weight)
    return F.linear(x.to(dtype), weight.to(dtype)).to(x.dtype)


class Codes(NamedTuple):
    """What a product makes of a weight that has one scale, a byte a number, for who sends weights: an attribute ``codes`` of such a product.

    Of what it makes of the codes again the product makes the same codes.
    """

    encode: Callable[[Tensor, Tensor], Tensor]
    """(n,) bf16, a part of a matrix, and the largest magnitude of the whole, 0-d fp32 → (n,) uint8."""
    decode: Callable[[Tensor, Tensor, Tensor], None]
    """(..., n) uint8, the same magnitude, and where to write it, (..., n) bf16."""


def codes_of(module: nn.Module, name: str) -> Codes | None:
    """Of the product that the module multiplies by this parameter with; None where it has none."""
    return getattr(product_of(module, name), "codes", None)


def product_of(module: nn.Module, name: str, default: Product = plain_product) -> Product:
    """What the module is to multiply by this parameter with."""
    product: Product | None = getattr(module, "products", {}).get(name)
    return default if product is None else product


def shared_product(*modules: nn.Module) -> Product | None:
    """What all of these multiply by their ``weight`` with, for who joins their matrices; None where they differ, or where one does something else besides."""
    if any("weight" not in declared(module, "multiplies", {}) for module in modules):
        return None
    first = product_of(modules[0], "weight")
    return first if all(product_of(module, "weight") is first for module in modules[1:]) else None


def remade(module: nn.Module) -> list[nn.Module]:
    """Parts of which the module may make another matrix before it multiplies: it joins them, or scales their rows.

    Its class or one it is derived from says so by ``remakes = (("q_proj", "k_proj", "v_proj"),)``,
    a tuple for each matrix made, and does it where its parts share a product.
    """
    made: set[tuple[str, ...]] = {names for cls in type(module).__mro__ for names in vars(cls).get("remakes", ())}
    groups = ([module.get_submodule(name) for name in names] for names in made)
    return [part for parts in groups if shared_product(*parts) is not None for part in parts]


class Multiplier(NamedTuple):
    """A module that multiplies by a parameter."""

    name: str
    """The parameter's, in the model."""
    module: nn.Module
    own: str
    """The module's name for it."""
    n_in: int
    n_out: int


def multipliers(model: nn.Module, params: Sequence[str]) -> list[Multiplier]:
    """Who multiplies by the named parameters, in the order of the modules.

    A tied parameter may have several holders, of which one at least has to
    multiply: an embedding looks up what the head multiplies by. Raises
    ValueError naming the parameters by which nobody does.
    """
    names = {parameter: name for name, parameter in model.named_parameters() if name in set(params)}
    found: list[Multiplier] = []
    holders = dict.fromkeys(params, "the model has no such parameter")
    for module in model.modules():
        dimensions: dict[str, int] = declared(module, "multiplies", {})
        for own, parameter in module.named_parameters(recurse=False):
            if parameter not in names:
                continue
            holders[names[parameter]] = f"{type(module).__name__} does not multiply by its {own} through titanlm.models.layers.product.product_of"
            if own in dimensions:
                n_out, n_in = parameter.shape if dimensions[own] == 0 else parameter.shape[::-1]
                found.append(Multiplier(names[parameter], module, own, n_in, n_out))
    able = {each.name for each in found}
    if missing := [name for name in params if name not in able]:
        raise ValueError("\n".join(f"{name}: {holders[name]}; leave it out of the quantizer's `params`" for name in missing))
    return found


def compute_with(multiplier: Multiplier, product: Product) -> None:
    """Let the module use this product from now on; code compiled before is compiled again."""
    module = multiplier.module
    module.products = {**getattr(module, "products", {}), multiplier.own: product}  # type: ignore[assignment]


class Share(NamedTuple):
    """Of a model, by whose products are not the plain ones."""

    n_matrices: int
    parameters: float
    """Of all parameters."""
    flops: float
    """Of a token's, forward and backward, attention included."""

    def __str__(self) -> str:
        return f"{self.n_matrices} matrices, {self.parameters:.2%} of the parameters and {self.flops:.2%} of the FLOPs of a token"


def share_computed_with(model: Any, params: Sequence[str], seq_len: int, n_products: int = 3) -> Share:
    """What :func:`compute_with` has set for the named parameters; a tied one counts once, its FLOPs at every use.

    ``n_products`` of the three are computed so, forward and backward.
    """
    names, sizes, flops = set(params), dict[str, int](), 0
    of = {parameter: name for name, parameter in model.named_parameters() if name in names}
    for module in model.modules():
        for own, parameter in module.named_parameters(recurse=False):
            if parameter in of and own in getattr(module, "products", {}):
                sizes[of[parameter]] = parameter.numel()
                flops += 2 * n_products * parameter.numel()
    return Share(len(sizes), sum(sizes.values()) / sum(parameter.numel() for parameter in model.parameters()), flops / model.flops_per_token(seq_len))
