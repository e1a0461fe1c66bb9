"""Seconds of a step, on a GPU by its own clock and behind other work, as after a backward pass.

What launching costs shows only where it takes longer than that work, or has so
many kernels, about a thousand, that the device's queue is full.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

SIZE = 8192
N_PRODUCTS = 80
"""Of SIZE³ in bf16 before a step: about 0.1 s on an H200."""


class Clock:
    def __init__(self, device: str) -> None:
        on_cuda = torch.device(device).type == "cuda"
        self.work = torch.randn(2, SIZE, SIZE, device=device, dtype=torch.bfloat16) if on_cuda else None

    def seconds(self, step: Callable[[], Any]) -> float:
        """Of one call."""
        if self.work is None:
            start = time.perf_counter()
            step()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        for _ in range(N_PRODUCTS):
            torch.mm(self.work[0], self.work[0], out=self.work[1])
        begin.record()
        step()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000
