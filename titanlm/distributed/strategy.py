"""How a train module is spread over the ranks.

``Strategy`` is also the plain case, one process that holds everything; the
others override what differs. The trainer goes through the same calls for all:

    shard (on the meta device) → materialise, init → compile → wrap → step
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from titanlm.distributed.world import World

if TYPE_CHECKING:
    from titanlm.config import Parallel


class Strategy:
    """`none`: one process, all of the model."""

    def shard(self, module: nn.Module) -> None:
        """Cut the parameters of a TrainModule on the meta device into what each rank keeps."""

    def parameter_device(self, device: torch.device) -> torch.device:
        """Where parameters live; activations are on ``device``."""
        return device

    def wrap(self, module: nn.Module) -> Any:
        """What the training step calls in place of the materialised and compiled module."""
        return module

    def notes(self) -> list[str]:
        """What the user should know once it is settled what modules multiply with."""
        return []

    def synchronise(self, on: bool) -> None:
        """Whether the next backward pass adds up the gradients of the ranks."""

    def settle(self) -> None:
        """Let go of what a forward pass without a backward pass left gathered; the parameters may then be changed in place."""

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Inside, the model may be called by itself, without its TrainModule. Every rank must."""
        yield


def build_strategy(config: Parallel, world: World, device: torch.device, compute_dtype: torch.dtype) -> Strategy:
    """The strategy of a config; all but `none` need the process group."""
    if config.strategy == "none":
        return Strategy()
    if config.strategy == "replicate":
        from titanlm.distributed.replicate import Replicate

        return Replicate()
    from titanlm.distributed.fsdp2 import Fsdp2

    return Fsdp2(config, world, device, compute_dtype)


def shards_of(config: Parallel, world: World) -> int:
    """Ranks that share one copy of the model between them under hsdp: by default those of a host."""
    return config.shards or world.local_size
