"""Fully sharded data parallelism: each rank keeps a part of every parameter, gradient and moment (torch's FSDP2).

Each block is a unit that is gathered when it runs. Embedding, last norm and
head belong to the root unit, the TrainModule, because the embedding may be
tied to the head and the loss runs the head: they are gathered once a step and
kept for the backward pass.

What travels: by default fp32, so that the numbers are those of one process
(every module casts its own weights, and norms stay fp32). `gather_dtype =
"compute"` halves traffic and lets the cast copies go between forward and
backward, at the price of rounding every parameter of a block, the gains of
norms too, before it is used. `"float8"` does the same and sends what products in
FP8 make of their weights (``CodeGather``). Gradients are summed in fp32 always.

Alternatives: one unit for the whole model gathers everything at once and saves
memory only for gradients and moments; units smaller than a block send messages
too small for the wire.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from titanlm.distributed.code_gather import CodeGather
from titanlm.distributed.strategy import Strategy, shards_of
from titanlm.distributed.world import World

if TYPE_CHECKING:
    from titanlm.config import Parallel


class Fsdp2(Strategy):
    """`fsdp2`, and `hsdp`: sharded within groups of ranks, replicated over the groups."""

    def __init__(self, config: Parallel, world: World, device: torch.device, compute_dtype: torch.dtype) -> None:
        self.config, self.compute_dtype, self.gathers = config, compute_dtype, list[CodeGather]()
        if config.strategy == "hsdp":
            shards = shards_of(config, world)
            self.mesh = init_device_mesh(device.type, (world.size // shards, shards), mesh_dim_names=("replicate", "shard"))
        else:
            self.mesh = init_device_mesh(device.type, (world.size,), mesh_dim_names=("shard",))

    def shard(self, module: nn.Module) -> None:
        config = self.config
        offload = CPUOffloadPolicy(pin_memory=self.mesh.device_type == "cuda") if config.cpu_offload else OffloadPolicy()
        common: dict[str, Any] = {"mesh": self.mesh, "offload_policy": offload}
        in_blocks = torch.float32 if config.gather_dtype == "fp32" else self.compute_dtype
        blocks: list[Any] = list(module.model.blocks)  # type: ignore[union-attr, arg-type]
        for block in blocks:
            policy = MixedPrecisionPolicy(param_dtype=in_blocks, reduce_dtype=torch.float32, cast_forward_inputs=False)
            fully_shard(block, mp_policy=policy, reshard_after_forward=config.reshard_after_forward, **common)
            if config.gather_dtype == "float8":
                self.gathers.append(CodeGather(block))
                block.set_custom_all_gather(self.gathers[-1])
        fully_shard(module, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False), **common)
        self.root: Any = module
        self.units: list[Any] = [each for each in module.modules() if isinstance(each, FSDPModule)]
        for unit in self.units:
            # Sums, where the default averages: the loss is already divided by the labels of all ranks.
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
        if ahead := config.prefetch_blocks:
            for index, block in enumerate(blocks):
                block.set_modules_to_forward_prefetch(blocks[index + 1 : index + 1 + ahead])
                block.set_modules_to_backward_prefetch(blocks[max(0, index - ahead) : index][::-1])

    def notes(self) -> list[str]:
        if not self.gathers:
            return []
        spans = [span for gather in self.gathers for span in gather.spans(1)]
        share = sum(span.end - span.start for span in spans if span.codes) / sum(span.end - span.start for span in spans)
        nothing = "" if share else '; set "compute", or the quantizer\'s select'
        return [
            f'{"" if share else "WARNING: "}parallel.gather_dtype = "float8": {share:.1%} of the numbers of blocks travel as one byte, the rest as two{nothing}'
        ]

    def parameter_device(self, device: torch.device) -> torch.device:
        return torch.device("cpu") if self.config.cpu_offload else device

    def synchronise(self, on: bool) -> None:
        self.root.set_requires_gradient_sync(on)

    def settle(self) -> None:
        for unit in self.units:
            unit.reshard()

    @contextmanager
    def gathered(self) -> Iterator[None]:
        self.root.unshard()
        try:
            yield
        finally:
            self.settle()
