"""The processes of a run, as torchrun announces them."""

from __future__ import annotations

import os
from dataclasses import dataclass

from titanlm.errors import TitanError


@dataclass(frozen=True)
class World:
    rank: int = 0
    size: int = 1

    @classmethod
    def from_environment(cls) -> World:
        """Rank and size from torchrun's variables; one process without them.

        Raises TitanError for more than one process, which this version cannot train with.
        """
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size > 1:
            raise TitanError(f"WORLD_SIZE is {size}: this version trains with one process; launch with --nproc-per-node 1")
        return cls(int(os.environ.get("RANK", "0")), size)
