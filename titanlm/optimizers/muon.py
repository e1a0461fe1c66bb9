"""Muon: momentum whose every matrix is made orthogonal before it is applied.

Parameters stay one a layer, so names, patterns and checkpoints know nothing of
what follows. Inside a step those of equal shape are stacked into a bank, since
some thirty kernels over a bank of eleven layers cost what they cost over one.

Orthogonalising needs whole matrices and is nearly all of the arithmetic, so no
rank does more than its share of a bank:

* one process, or a group of one: all of it;
* ``replicate`` (plain parameters while the default process group has several
  ranks; gradients must be equal on all of them): ⌈n/W⌉ matrices a rank, and an
  all-gather of the results;
* FSDP2 (DTensors cut by rows): momentum stays cut. An all-to-all within the
  shard group brings the slices of ⌈n/W⌉ matrices together on each rank, a second
  one takes them back, so a rank sends what it owns twice and never holds a whole
  bank. Replicas of ``hsdp`` do the same work side by side.

What travels is rounded to `ns_dtype` first, as it would be anyway; results are
those of one process but for the order of sums inside the products. Every rank
makes the same collectives in the same order, because banks are formed from
shapes alone; a parameter must have a gradient on all ranks or on none.

A step with a non-finite gradient is kept out without asking the device: under
the flag gradients become −0.0, factors 1 and the update +0.0, and x·1 + (−0.0)
and x − (+0.0) are x to the bit, for zeros of either sign too.

Where the run is compiled, what lies before and what lies after Newton-Schulz is
one graph each for every bank shape. They read and write what they must once,
where the eager path goes over a bank some ten times, and sums are rounded the
same or better. Newton-Schulz itself is matrix products, which a compiler leaves
as they are, and stays outside, where ranks can exchange what they need.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from titanlm.constraints import Decay, NonNegativeFloat, PositiveFew, PositiveFloat
from titanlm.optimizers.compiled import compiled, scalar
from titanlm.optimizers.newton_schulz import Coefficients, newton_schulz
from titanlm.optimizers.split_weights import joined, split_, store
from titanlm.patterns import NamedParam
from titanlm.registry import Component, Slot, register
from titanlm.state_tree import is_distributed

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
MIN_ROW_NORM = 1e-7


@dataclass(frozen=True)
class MuonConfig:
    lr: PositiveFloat = 0.02
    """Peak learning rate; the scheduler multiplies it. A step moves weights by about lr/√columns (root mean square)."""
    params: tuple[str, ...] = ("@matrix",)
    """Name globs and @roles of the parameters it takes, all of them matrices."""
    momentum: Decay = 0.95
    """Share of the momentum that a step keeps."""
    nesterov: bool = True
    """Whether the update looks one step ahead: gradient + momentum · buffer in place of the buffer."""
    momentum_schedule: Annotated[Component, Slot("scheduler")] | None = None
    """Multiplies `momentum`, as the run's scheduler does the learning rate."""
    weight_decay: NonNegativeFloat = 0.0
    """Applied as p ← p·(1 − lr·weight_decay) before the update, to all its matrices."""
    weight_decay_schedule: Annotated[Component, Slot("scheduler")] | None = None
    """Multiplies `weight_decay`."""
    ns_steps: PositiveFew = 5
    """Newton-Schulz steps."""
    coefficients: Coefficients = "quintic"
    """Of the Newton-Schulz polynomials; `polar_express` brings singular values nearer to 1."""
    normalise: Literal["none", "rows"] = "none"
    """`rows`: each row of an update is divided by its L2 norm before Newton-Schulz (MuonEq-R)."""
    ns_dtype: Literal["bf16", "fp32"] = "bf16"
    """Of Newton-Schulz and of what ranks exchange."""
    momentum_dtype: Literal["fp32", "bf16"] = "fp32"
    """`bf16` halves the state; a step adds the gradient in fp32, and rounds what it keeps to the nearest."""
    weight_dtype: Literal["fp32", "bf16"] = "fp32"
    """`bf16`: the model keeps the numbers that it multiplies by, and the state the other 16 bits of each weight; for one process."""


class Muon(torch.optim.Optimizer):
    """``muon``, which see. Parameters have one dtype (fp32 masters, or their bf16 halves beside ``low_bits``), gradients that of masters.

    ``momentum_buffer`` has the gradients' dtype or bf16.

    ``lr``, ``momentum`` and ``weight_decay`` are read from the groups at every
    step; the rest is fixed. ``found_inf``, a 0-d float tensor beside the
    parameters, turns a step into no step where it is 1, as in torch's fused
    optimizers; ``grad_scale`` is not looked at. Parameters without a gradient
    are passed over. ``compile_kernels`` is set by the trainer.
    """

    _step_supports_amp_scaling = True  # by this and "fused" FiniteGuard knows that found_inf is heeded

    def __init__(self, config: MuonConfig, parameters: list[torch.nn.Parameter]) -> None:
        defaults = {"lr": config.lr, "momentum": config.momentum, "weight_decay": config.weight_decay, "fused": True}
        super().__init__(parameters, defaults)
        self.config, self.compile_kernels = config, False
        steps, coefficients = config.ns_steps, config.coefficients
        self.orthogonalise: Callable[[Tensor], Tensor] = partial(newton_schulz, steps=steps, coefficients=coefficients)
        self.state_at_once = config.weight_dtype == "bf16"
        for parameter in parameters if self.state_at_once else ():
            low_bits = split_(parameter)
            self.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter, dtype=self._momentum_dtype(parameter)), "low_bits": low_bits}

    def _momentum_dtype(self, parameter: Tensor) -> torch.dtype:
        return torch.bfloat16 if self.config.momentum_dtype == "bf16" else parameter.grad_dtype or parameter.dtype

    @torch.no_grad()
    def accept(self, parameter: Tensor, saved: dict[str, Any]) -> dict[str, Any]:
        """The state it goes on with: momentum in the dtype asked for; of weights that were kept in halves, those that it keeps whole are made whole."""
        state = dict(saved)
        if "momentum_buffer" in state:
            state["momentum_buffer"] = state["momentum_buffer"].to(self._momentum_dtype(parameter))
        if not self.state_at_once and "low_bits" in state:
            weight, low_bits = _local(parameter), _local(state.pop("low_bits"))
            weight.copy_(joined(weight.bfloat16(), low_bits.to(weight.device)))
        return state

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override] # no closure: nothing here evaluates a loss
        flag: Tensor | None = getattr(self, "found_inf", None)
        bad = None if flag is None else flag.bool()
        for group in self.param_groups:
            banks: dict[Hashable, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    banks[_layout(parameter)].append(parameter)
            for members in banks.values():
                self._update(members, bad, group["lr"], group["momentum"], group["weight_decay"])

    def _update(self, members: list[Tensor], bad: Tensor | None, lr: float, momentum: float, weight_decay: float) -> None:
        for parameter in members:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter, dtype=self._momentum_dtype(parameter))
        parameters = [_local(parameter) for parameter in members]
        gradients = [_local(parameter.grad) for parameter in members]
        buffers = [_local(self.state[parameter]["momentum_buffer"]) for parameter in members]
        lows = [self.state[parameter]["low_bits"] for parameter in members] if self.state_at_once else []
        rows, columns = members[0].shape
        decay, step_size = 1.0 - lr * weight_decay, lr * math.sqrt(max(1.0, rows / columns))
        if self.compile_kernels:
            how = (self.config.nesterov, self.config.normalise == "rows", DTYPES[self.config.ns_dtype])
            bank = compiled(look_ahead)(gradients, buffers, scalar(momentum), bad, *how)
            bank = self._orthogonal(bank, members[0])
            compiled(apply)([parameter.detach() for parameter in parameters], lows, bank, scalar(decay), scalar(step_size), bad)
            return
        update = torch.stack(gradients)
        if bad is not None:
            update.masked_fill_(bad, -0.0)

        def unless_bad(factor: float) -> float | Tensor:
            return factor if bad is None else torch.full_like(bad, factor, dtype=update.dtype).masked_fill_(bad, 1.0)

        moved = [buffer.to(update.dtype) for buffer in buffers]  # themselves, where they are of this dtype
        torch._foreach_mul_(moved, unless_bad(momentum))
        torch._foreach_add_(moved, update.unbind())
        if self.config.momentum_dtype == "bf16":
            torch._foreach_copy_(buffers, moved)
        ahead = torch.stack(moved)
        update = update.add_(ahead, alpha=momentum) if self.config.nesterov else ahead
        if self.config.normalise == "rows":
            update /= _row_norms(update)
        update.copy_(self._orthogonal(update.to(DTYPES[self.config.ns_dtype]), members[0]))
        if bad is not None:
            update.masked_fill_(bad, 0.0)
        weights = [joined(*both) for both in zip(parameters, lows, strict=True)] if lows else parameters
        if weight_decay:
            torch._foreach_mul_(weights, unless_bad(decay))
        torch._foreach_sub_(weights, update.unbind(), alpha=step_size)
        for weight, parameter, low in zip(weights, parameters, lows):
            store(weight, parameter, low)

    def _orthogonal(self, bank: Tensor, like: Tensor) -> Tensor:
        """A bank orthogonalised, of which this rank has as much as of the parameter ``like``."""
        if is_distributed(like):
            group = _shard_group(like)
            return bank_of_shards(bank, like.size(0), group, self.orthogonalise) if group is not None else self.orthogonalise(bank)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            return bank_of_replicas(bank, self.orthogonalise)
        return self.orthogonalise(bank)


@register("optimizer", "muon")
def muon(config: MuonConfig, *, named_params: list[NamedParam]) -> Muon:
    """Momentum, orthogonalised by Newton-Schulz (Jordan et al., 2024), for the matrices of a model.

    buffer ← μ·buffer + g; u = g + μ·buffer; p ← p·(1 − lr·weight_decay);
    p ← p − lr·√max(1, rows/columns)·NewtonSchulz(u). Embeddings, heads, norms,
    biases and gains belong to another entry, such as `adamw`.

    Raises ValueError for a parameter that is no matrix, or is sharded otherwise
    than by rows.
    """
    for name, parameter, _ in named_params:
        if parameter.ndim != 2:
            shape = tuple(parameter.shape)
            raise ValueError(f'params: {name} has shape {shape} and muon takes matrices only; leave it to an entry of adamw, by params = ["@matrix"] here, say')
        placements = parameter.placements if is_distributed(parameter) else ()  # type: ignore[attr-defined]
        cuts = [placement for placement in placements if not placement.is_replicate()]
        if cuts and not (len(cuts) == 1 and cuts[0].is_shard(0)):
            raise ValueError(f"params: {name} is placed as {placements}; muon takes parameters sharded by rows only, as FSDP2 does by itself")
    return Muon(config, [parameter for _, parameter, _ in named_params])


# ---------------------------------------------------------------- compiled
def look_ahead(
    gradients: list[Tensor], buffers: list[Tensor], momentum: Tensor, bad: Tensor | None, nesterov: bool, equal_rows: bool, dtype: torch.dtype
) -> Tensor:
    """What the eager path makes for Newton-Schulz, (n, rows, columns) in ``dtype``; ``buffers`` go on by a step unless ``bad``."""
    bank = []
    for gradient, buffer in zip(gradients, buffers, strict=True):
        moved = buffer.to(gradient.dtype) * momentum + gradient
        ahead = gradient + moved * momentum if nesterov else moved
        bank.append((ahead / _row_norms(ahead) if equal_rows else ahead).to(dtype))
        kept = moved.to(buffer.dtype)
        buffer.copy_(kept if bad is None else torch.where(bad, buffer, kept))
    return torch.stack(bank)


def apply(parameters: list[Tensor], lows: list[Tensor], bank: Tensor, decay: Tensor, step_size: Tensor, bad: Tensor | None) -> None:
    """Weight decay and the update, unless ``bad``; ``lows`` is empty where weights are whole."""
    for index, (parameter, direction) in enumerate(zip(parameters, bank.unbind(), strict=True)):
        weight = joined(parameter, lows[index]) if lows else parameter
        moved = weight * decay - direction.to(weight.dtype) * step_size
        kept = moved if bad is None else torch.where(bad, weight, moved)
        if lows:
            store(kept, parameter, lows[index])
        else:
            parameter.copy_(kept)


def _row_norms(matrices: Tensor) -> Tensor:
    return torch.linalg.vector_norm(matrices, dim=-1, keepdim=True).clamp_min(MIN_ROW_NORM)


# ---------------------------------------------------------------- banks over ranks
def bank_of_replicas(bank: Tensor, orthogonalise: Callable[[Tensor], Tensor]) -> Tensor:
    """``orthogonalise(bank)``, a share of it on each rank of the default group; ``bank`` (n, rows, columns) is equal on all. Collective."""
    size, rank, n = dist.get_world_size(), dist.get_rank(), len(bank)
    share = -(-n // size)
    own = bank[rank * share : (rank + 1) * share]
    padded = bank.new_zeros(share, *bank.shape[1:])  # the last ranks may have fewer, or none
    if len(own):
        padded[: len(own)] = orthogonalise(own)
    gathered = bank.new_empty(size * share, *bank.shape[1:])
    all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # torch 2.13 has the first and warns of the second
    all_gather(gathered, padded)
    return gathered[:n]


def bank_of_shards(bank: Tensor, rows: int, group: Any, orthogonalise: Callable[[Tensor], Tensor]) -> Tensor:
    """This rank's rows of the orthogonalised matrices of which ``bank`` (n, own rows, columns) has this rank's rows. Collective.

    ``rows``: of the whole matrices, shared out among the group's ranks as ``torch.chunk`` does, so the last may have fewer, or none.
    """
    size, rank, columns = dist.get_world_size(group), dist.get_rank(group), bank.size(-1)
    heights, counts = _shares(rows, size), _shares(len(bank), size)
    sent = [count * heights[rank] * columns for count in counts]
    received = [counts[rank] * height * columns for height in heights]
    slices = bank.new_empty(sum(received))
    dist.all_to_all_single(slices, bank.flatten(), received, sent, group)
    pieces = [piece.view(counts[rank], height, columns) for piece, height in zip(slices.split(received), heights, strict=True)]
    whole = torch.cat(pieces, dim=1)
    if len(whole):
        whole = orthogonalise(whole)
    back = torch.cat([piece.flatten() for piece in whole.split(heights, dim=1)])
    result = torch.empty_like(bank, memory_format=torch.contiguous_format)
    dist.all_to_all_single(result.view(-1), back, sent, received, group)
    return result


def _shares(n: int, size: int) -> list[int]:
    """How ``torch.chunk`` shares out ``n`` things among ``size`` ranks, zeros at the end included."""
    share = -(-n // size)
    return [max(0, min(share, n - rank * share)) for rank in range(size)]


def _shard_group(parameter: Any) -> Any:
    """The ranks that share one copy of a DTensor, or None when this one has it all."""
    axes = [axis for axis, placement in enumerate(parameter.placements) if placement.is_shard() and parameter.device_mesh.size(axis) > 1]
    return parameter.device_mesh.get_group(axes[0]) if axes else None


def _layout(parameter: Any) -> Hashable:
    """Equal for parameters that can be one bank."""
    return parameter.shape, parameter.dtype, parameter.device, *((parameter.device_mesh, parameter.placements) if is_distributed(parameter) else ())


def _local(tensor: Any) -> Tensor:
    """What this rank holds of a tensor, sharing its memory."""
    return tensor.to_local() if is_distributed(tensor) else tensor
