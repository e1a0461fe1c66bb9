"""What is summed up between two log steps, over all ranks; part of the state, so that a resumed run logs the same numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from titanlm.data import StepData
from titanlm.guard import FiniteGuard


class Interval:
    """Sums since the last log step. Losses are added up on the device and read once."""

    def __init__(self, n_sources: int, device: torch.device) -> None:
        self.n_sources, self.device = n_sources, device
        self.reset()

    def reset(self) -> None:
        self.loss = torch.zeros((), device=self.device)
        """Σ over steps of the mean loss of a label."""
        self.nll = torch.zeros(self.n_sources, device=self.device)
        self.skipped = torch.zeros((), device=self.device)
        """Steps among ``steps`` whose loss was not finite and counts nowhere."""
        self.steps = self.n_bytes = 0
        self.source_tokens = np.zeros(self.n_sources, dtype=np.int64)

    def add(self, data: StepData, loss: Tensor, nll: Tensor, guard: FiniteGuard) -> None:
        """A step: its counts, its loss () and nll (M,), as far as the guard lets them count."""
        self.loss += guard.clean(loss)
        self.nll += guard.clean(nll)
        self.skipped += guard.bad
        self.steps += 1
        self.n_bytes += data.n_bytes
        self.source_tokens += data.source_tokens

    def mean_loss(self) -> float:
        """Waits for the device; nan when no step was finite."""
        counted = self.steps - int(self.skipped)
        return float(self.loss) / counted if counted else float("nan")

    def state(self) -> dict[str, Any]:
        counts = {"steps": self.steps, "bytes": self.n_bytes, "source_tokens": self.source_tokens.tolist()}
        return {"loss": self.loss, "nll": self.nll, "skipped": self.skipped, **counts}

    def restore(self, state: dict[str, Any]) -> None:
        self.loss, self.nll, self.skipped = (state[name].to(self.device) for name in ("loss", "nll", "skipped"))
        self.steps, self.n_bytes = state["steps"], state["bytes"]
        self.source_tokens = np.array(state["source_tokens"], dtype=np.int64)
