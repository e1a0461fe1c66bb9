"""Connecting the ranks, and letting go of them.

One default process group serves tensors on GPUs through NCCL and on the host
through gloo. A run of one process needs it only when its strategy does (FSDP2
on one GPU, say); then nobody is waited for.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from titanlm.distributed.world import World
from titanlm.errors import TitanError

BEHIND_S = 60.0
"""How much longer a collective waits than the watchdog, which knows which rank is to blame."""

IDLE_S = 0.1
"""In which the threads of a process group, after its last collective, have long finished."""


@contextmanager
def connected(world: World, device: torch.device, *, timeout_s: float, init_timeout_s: float) -> Iterator[Any]:
    """The default process group inside, and the store behind it, through which ranks leave word for one another.

    ``init_timeout_s`` bounds the wait for the other ranks to come up. A
    collective waits for longer than it and ``timeout_s`` (one is 0: a day), so
    that the watchdog ends it. Raises TitanError when they do not.
    """
    if dist.is_initialized():
        raise TitanError("torch.distributed is initialised already; leave it to the trainer, or unset what did it")
    store: Any = dist.HashStore()
    if "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        try:
            store, _, _ = next(dist.rendezvous("env://", world.rank, world.size, timeout=_seconds(init_timeout_s)))
        except (RuntimeError, ValueError, OSError) as error:
            raise TitanError(f"rank {world.rank} of {world.size} cannot reach the others through {where}: {error}") from error
    elif world.size > 1:
        raise TitanError(f"WORLD_SIZE is {world.size}, but MASTER_ADDR and MASTER_PORT do not say where the ranks meet; launch with torchrun")
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("titanlm", store),
            rank=world.rank,
            world_size=world.size,
            timeout=_seconds(timeout_s and init_timeout_s and max(timeout_s, init_timeout_s) + BEHIND_S),
            device_id=device if device.type == "cuda" else None,
        )
    except (RuntimeError, ValueError) as error:
        raise TitanError(f"rank {world.rank} of {world.size}: the process group ({backend}) cannot be made: {error}") from error
    try:
        yield store
    finally:
        # After a failure the other ranks may be gone, and tearing down would wait for them.
        if world.size == 1 or sys.exc_info()[0] is None:
            # gloo's threads need Python's lock to let go of a collective's tensors. What destroys the group (here, or
            # with DistributedDataParallel whoever holds it last) has that lock and waits for the threads, so they go first.
            time.sleep(IDLE_S)
            dist.destroy_process_group()


def _seconds(seconds: float) -> timedelta:
    return timedelta(seconds=seconds) if seconds else timedelta(days=1)
