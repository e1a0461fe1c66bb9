"""Keeps a non-finite loss or gradient out of the weights, without waiting for the device.

Reading one number back stalls a GPU at every step. Instead a flag on the
device goes up at the first bad step and stays up; optimizers whose kernels
take such a flag (torch's fused ones) leave parameters and moments alone while
it is up. The host looks at it where it waits anyway: at log steps, before a
checkpoint or a validation, and at the end. An optimizer without the flag costs
one synchronisation a step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from titanlm.errors import NonFiniteError


class FiniteGuard:
    """``observe`` before the optimizers, ``check`` where the host waits anyway."""

    def __init__(self, optimizers: Sequence[Any], device: torch.device, remember: int) -> None:
        self.bad = torch.zeros((), dtype=torch.float32, device=device)
        self.first = torch.full((), -1, dtype=torch.int64, device=device)
        self.history: deque[tuple[int, tuple[int, ...]]] = deque(maxlen=remember)
        self.flagless = False
        for optimizer in optimizers:
            if getattr(optimizer, "_step_supports_amp_scaling", False) and optimizer.defaults.get("fused"):
                optimizer.found_inf, optimizer.grad_scale = self.bad, None
            else:
                self.flagless = True

    def observe(self, step: int, document_ids: tuple[int, ...], loss: Tensor, grad_norm: Tensor) -> None:
        """Note a step's loss and gradient norm, both 0-d on the device."""
        bad = (~(torch.isfinite(loss) & torch.isfinite(grad_norm))).float()
        self.first.copy_(torch.where((bad > self.bad), step, self.first))
        self.bad.copy_(torch.maximum(self.bad, bad))
        self.history.append((step, document_ids))
        if self.flagless:
            self.check()

    def check(self) -> None:
        """Raise NonFiniteError naming the step and its documents. Waits for the device."""
        first = int(self.first.item())
        if first >= 0:
            documents = dict(self.history).get(first, ())
            shown = ", ".join(str(document) for document in documents[:20]) + ("…" if len(documents) > 20 else "")
            raise NonFiniteError(
                f"step {first + 1}: loss or gradient is not finite; the weights were not updated by it and nothing was saved after it. "
                f"Documents of the step: {shown}. Lower the learning rate, raise warm-up or look at these documents; "
                "the run goes on from its last checkpoint when started again."
            )
