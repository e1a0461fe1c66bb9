"""The processes of a run, as torchrun announces them, and what they tell one another on the host.

Tensors travel through the default process group (NCCL on GPUs). Small facts
travel between the hosts' CPUs through gloo, so that agreeing on something never
waits for a GPU: how many labels a step has, whether a rank got a signal, whether
a save worked.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from titanlm.errors import PeerError, TitanError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """Facts from the environment; nothing is connected by it."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """On this host."""
    local_size: int = 1
    """Processes on this host."""

    @classmethod
    def from_environment(cls) -> World:
        """Rank and size from torchrun's variables; one process without them.

        Raises TitanError when they contradict one another.
        """
        rank, size = _number("RANK", 0), _number("WORLD_SIZE", 1)
        local_rank, local_size = _number("LOCAL_RANK", 0), _number("LOCAL_WORLD_SIZE", size)
        if not (0 <= rank < size and 0 <= local_rank < local_size <= size):
            told = f"RANK={rank} WORLD_SIZE={size} LOCAL_RANK={local_rank} LOCAL_WORLD_SIZE={local_size}"
            raise TitanError(f"the environment contradicts itself: {told}; launch with torchrun, or unset these variables for one process")
        return cls(rank, size, local_rank, local_size)


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    try:
        return int(text) if text else default
    except ValueError:
        raise TitanError(f"the environment variable {name} is {text!r}, which is no whole number; launch with torchrun, or unset it") from None


class Peers:
    """The ranks of a run, each calling the same method at the same time.

    One of them belongs to one thread; ``apart`` gives another thread its own.
    Without other ranks every method returns at once.
    """

    def __init__(self, world: World | None = None, group: Any = None) -> None:
        self.world = World() if world is None else world
        self.rank, self.size = self.world.rank, self.world.size
        self._group = group

    def apart(self) -> Peers:
        """The same ranks over a connection of its own, for use by another thread. Collective."""
        if self.size == 1:
            return self
        import torch.distributed as dist

        # What takes long there, such as a save to a slow disk, is no failure.
        return Peers(self.world, dist.new_group(backend="gloo", timeout=timedelta(days=1)))

    def sum(self, values: Sequence[int]) -> list[int]:
        """Element-wise over the ranks; each gives as many. 64-bit integers."""
        return self._reduce(values, "SUM")

    def max(self, value: int) -> int:
        """The largest of the ranks' values."""
        return self._reduce([value], "MAX")[0]

    def _reduce(self, values: Sequence[int], operation: str) -> list[int]:
        if self.size == 1:
            return list(values)
        import torch
        import torch.distributed as dist

        numbers = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(numbers, getattr(dist.ReduceOp, operation), group=self._group)
        result: list[int] = numbers.tolist()
        return result

    def gather(self, value: Any) -> list[Any]:
        """What every rank gave, in order of rank; JSON, since pickle would run what a peer sends."""
        if self.size == 1:
            return [value]
        import torch
        import torch.distributed as dist

        own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        length = self.max(len(own))
        sent = torch.zeros(length, dtype=torch.uint8)
        sent[: len(own)] = own
        received = [torch.empty_like(sent) for _ in range(self.size)]
        dist.all_gather(received, sent, group=self._group)
        # A JSON text has no zero byte, so the padding is told from it.
        return [json.loads(bytes(part.tolist()).rstrip(b"\0")) for part in received]

    def first(self, action: Callable[[], T]) -> T | None:
        """Rank 0 acts while the others wait; None on those. A TitanError is every rank's."""
        return self.agree(lambda: action() if self.rank == 0 else None)

    def agree(self, action: Callable[[], T]) -> T:
        """What this rank's action gives, once every rank's has succeeded.

        Raises this rank's own TitanError, or PeerError when only others failed.
        """
        result, problem = None, None
        try:
            result = action()
        except TitanError as error:
            problem = error
        if self.max(int(problem is not None)):
            found = self.gather(None if problem is None else str(problem))
            if problem is None:
                raise PeerError(next(f"rank {rank}: {text}" for rank, text in enumerate(found) if text is not None))
            raise problem
        return result  # type: ignore[return-value]

    def add_(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over the ranks in place, on whatever device it is; the host does not wait."""
        if self.size > 1:
            import torch.distributed as dist

            dist.all_reduce(tensor, group=self._group)
        return tensor
