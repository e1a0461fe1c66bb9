"""AdamW: Adam with decoupled weight decay."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from titanlm.constraints import Decay, NonNegativeFloat, PositiveFloat
from titanlm.optimizers.compiled import compiled, scalar
from titanlm.optimizers.moments import Format, Grid, block_of, decode, encode, grid, stored, zeros
from titanlm.patterns import NamedParam, matches
from titanlm.registry import Component, Slot, register
from titanlm.state_tree import is_distributed


@dataclass(frozen=True)
class AdamWConfig:
    lr: PositiveFloat = 3e-4
    """Peak learning rate; the scheduler multiplies it."""
    params: tuple[str, ...] = ("*",)
    """Name globs and @roles of the parameters it takes."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """Decay of the first and second moment."""
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.1
    """Applied as p ← p·(1 − lr·weight_decay), to `decay_params` only."""
    weight_decay_schedule: Annotated[Component, Slot("scheduler")] | None = None
    """Multiplies `weight_decay`, as the run's scheduler does the learning rate."""
    decay_params: tuple[str, ...] = ("@matrix", "@head")
    """What decays: by default no norm, bias, gain or embedding."""
    moments: Format = "fp32"
    """How both moments are kept: 8 bytes a parameter in `fp32`, 4 in `bf16`, about 2 in `int8` and `fp8`, with a scale for 256 elements."""


class CompactAdamW(torch.optim.Optimizer):
    """``adamw`` with moments that are not fp32; the arithmetic is, and parameters are as they were.

    State of a parameter, made at once: ``step`` (0-d fp32 beside it), ``exp_avg``
    and ``exp_avg_sq`` (of its shape), and for 8-bit ones ``exp_avg_scale`` and
    ``exp_avg_sq_scale`` (..., columns / block). ``found_inf`` turns a step into
    no step where it is 1, as in torch's fused optimizers; ``grad_scale`` is not
    looked at. With ``compile_kernels``, which the trainer sets, a parameter's
    step is one compiled graph, shared by all of equal shape.
    """

    _step_supports_amp_scaling = True  # by this and "fused" FiniteGuard knows that found_inf is heeded
    state_at_once = True

    def __init__(self, config: AdamWConfig, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {"lr": config.lr, "weight_decay": config.weight_decay, "fused": True})
        self.config, self.compile_kernels = config, False
        for parameter in (parameter for group in self.param_groups for parameter in group["params"]):
            self.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                **zeros(parameter, config.moments, "exp_avg"),
                **zeros(parameter, config.moments, "exp_avg_sq"),
            }

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override] # no closure: nothing here evaluates a loss
        flag: Tensor | None = getattr(self, "found_inf", None)
        bad = None if flag is None else flag.bool()
        advance = compiled(advance_) if self.compile_kernels else advance_
        for group in self.param_groups:
            rate, decay = scalar(group["lr"]), scalar(1.0 - group["lr"] * group["weight_decay"])
            for parameter in group["params"]:
                if parameter.grad is not None:
                    grids = [grid(signed, parameter.device) for signed in (True, False)]
                    state = {name: _own(value) for name, value in self.state[parameter].items()}
                    advance(_own(parameter.detach()), _own(parameter.grad), state, grids, rate, decay, bad, self.config.betas, self.config.eps)


def advance_(
    parameter: Tensor,
    gradient: Tensor,
    state: dict[str, Tensor],
    grids: Sequence[Grid],
    rate: Tensor,
    decay: Tensor,
    bad: Tensor | None,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """One step of one parameter, in fp32 from moments as they were read to moments as they are stored; none where ``bad``."""
    signed, unsigned = grids
    first, second = stored(state, "exp_avg"), stored(state, "exp_avg_sq")
    step, gradient = state["step"] + 1.0, gradient.float()
    mean = decode(first, signed).lerp(gradient, 1.0 - betas[0])
    square = decode(second, unsigned).lerp(gradient.square(), 1.0 - betas[1])
    # 1 − βᵗ, without the digits that the difference loses.
    corrections = [-torch.expm1(step * math.log(beta)) if beta else torch.ones_like(step) for beta in betas]
    update = mean / corrections[0] / ((square / corrections[1]).sqrt() + eps)
    moved = parameter.float() * decay - update * rate
    new = [moved.to(parameter.dtype), step, *encode(mean, first, signed, signed=True), *encode(square, second, unsigned, signed=False)]
    for target, value in zip([parameter, state["step"], *first, *second], new, strict=True):
        target.copy_(value if bad is None else torch.where(bad, _bits(target), _bits(value)).view(target.dtype))


def _bits(values: Tensor) -> Tensor:
    """8-bit codes as integers: compiled, ``where`` knows no float8."""
    return values.view(torch.uint8) if values.dtype.itemsize == 1 else values


def _own(tensor: Any) -> Tensor:
    """What this rank holds of a tensor, sharing its memory."""
    return tensor.to_local() if is_distributed(tensor) else tensor


@register("optimizer", "adamw")
def adamw(config: AdamWConfig, *, named_params: list[NamedParam]) -> torch.optim.Optimizer:
    """Adam with decoupled weight decay (Loshchilov & Hutter, 2019), torch's fused kernel.

    Moments are kept in the parameters' dtype (fp32 masters). The fused kernel
    takes a device flag that turns a step into no step, which is how a
    non-finite gradient is kept out without waiting for the device.

    With ``moments`` other than `fp32` the step is titanlm's own and heeds the
    same flag. `int8` is the dynamic 8-bit code of Dettmers et al. (2021), `fp8`
    scaled float8_e4m3fn; parameters of one dimension, of fewer than 4096
    elements, or whose rows have no multiple of 32 elements keep fp32. Rounding
    is to the nearest: changes of less than half the spacing, up to 1/256 of a
    value in `bf16` and 1/16 in `fp8`, are lost, and betas near 1 make many such.
    Uncompiled, a step needs several fp32 copies of the largest parameter for a
    moment; compiled, none, and `fp8` a GPU that has it (compute capability 8.9).

    Raises ValueError for 8-bit moments of a parameter that is sharded within its rows.
    """
    groups: dict[bool, list[torch.nn.Parameter]] = {True: [], False: []}
    for name, parameter, role in named_params:
        groups[matches(config.decay_params, name, role)].append(parameter)
        cut = is_distributed(parameter) and any(placement.is_shard(parameter.ndim - 1) for placement in parameter.placements)  # type: ignore[attr-defined]
        if cut and config.moments in ("int8", "fp8") and block_of(parameter.shape) is not None:
            raise ValueError(f'moments: {name} is sharded within its rows, and blocks of {config.moments} lie there; take "bf16" or "fp32"')
    members = [{"params": members, "weight_decay": config.weight_decay if decays else 0.0} for decays, members in groups.items() if members]
    if config.moments != "fp32":
        return CompactAdamW(config, members)
    return torch.optim.AdamW(
        members,
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=all(parameter.device.type in ("cpu", "cuda") for _, parameter, _ in named_params),
    )
