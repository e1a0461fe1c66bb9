"""Which device a process computes on."""

from __future__ import annotations

import torch

from titanlm.errors import TitanError


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The rank's device. Raises TitanError when CUDA is asked for and absent, or has fewer GPUs than the host has ranks."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise TitanError("no CUDA device is available here; use 'cpu' or 'auto' (`titanlm env` says what there is)")
    if local_rank >= torch.cuda.device_count():
        raise TitanError(f"local rank {local_rank} has no GPU of its own: there are {torch.cuda.device_count()}; lower --nproc-per-node")
    return torch.device("cuda", local_rank)
