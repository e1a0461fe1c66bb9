"""Keeps a non-finite loss or gradient out of the weights, without waiting for the device.

Reading one number back stalls a GPU at every step. Instead a flag on the
device goes up at a bad step; optimizers whose kernels take such a flag (torch's
fused ones) leave parameters, moments and step counters alone while it is up.
The host looks at it where it waits anyway: at log steps, before a checkpoint or
a validation, and at the end.

``stop``: the flag stays up, so that nothing moves between the bad step and the
moment the host stops the run. ``skip``: the flag is the present step's alone;
training goes on with the next, and only too many bad steps in a row stop it.

Where something moves that knows no flag, the host must decide at every step,
for one synchronisation each: an optimizer without it, and with ``skip`` an
averager or a module that counts steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from titanlm.errors import NonFiniteError

Step = tuple[int, tuple[int, ...]]
"""Steps done before it, and its document ids."""


class FiniteGuard:
    """``observe`` before the optimizers, ``check`` where the host waits anyway.

    ``needs_host``: something besides the optimizers must not move in a skipped
    step. After ``remember`` steps without a ``check`` the guard looks by itself.
    """

    def __init__(
        self,
        optimizers: Sequence[Any],
        device: torch.device,
        remember: int,
        on_nonfinite: Literal["stop", "skip"] = "stop",
        needs_host: bool = False,
        max_in_a_row: int = 0,
    ) -> None:
        self.bad = torch.zeros((), dtype=torch.float32, device=device)
        """1 where the present step is left out, else 0; with ``stop``, 1 from the first bad step on."""
        self.sticky, self.max_in_a_row = on_nonfinite == "stop", max_in_a_row
        self.n_skipped = 0
        """Over the whole run, as far as the host has looked."""
        self._flags = torch.zeros(remember, dtype=torch.float32, device=device)
        self._pending: list[Step] = []
        """Steps the host has not looked at; their flags are the first so many."""
        self._row: list[Step] = []
        """The bad steps in a row that end with the last one looked at."""
        self._found: list[Step] = []
        self._failure: str | None = None
        self._begun = self.sticky
        """Optimizers make their state in the first step that counts; fused SGD leaves it uninitialised in one that does not."""
        flagless = False
        for optimizer in optimizers:
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            # A flag on another device would be copied over while the kernel reads it.
            beside = all(parameter.device.type == torch.device(device).type for parameter in parameters)
            if getattr(optimizer, "_step_supports_amp_scaling", False) and optimizer.defaults.get("fused") and beside:
                optimizer.found_inf, optimizer.grad_scale = self.bad, None
            else:
                flagless = True
        self.host_decides = flagless or (needs_host and not self.sticky)

    def observe(self, step: int, document_ids: tuple[int, ...], loss: Tensor, grad_norm: Tensor) -> bool:
        """Note a step's loss and gradient norm, both 0-d on the device and equal on all ranks.

        False: the host knows that the step is bad, so neither optimizers nor
        hooks nor averagers may move; gradients are cleared as ever. Where the
        device decides, always True once a step was good.
        """
        if len(self._pending) == len(self._flags):
            self._look()
        bad = (~(torch.isfinite(loss) & torch.isfinite(grad_norm))).float()
        self.bad.copy_(torch.maximum(self.bad, bad) if self.sticky else bad)
        self._flags[len(self._pending)] = bad
        self._pending.append((step, document_ids))
        if not self.host_decides and self._begun:
            return True
        self._look()
        self._begun = self._begun or not self._row
        return not self._row

    def clean(self, values: Tensor) -> Tensor:
        """Zeros where the present step is left out, so that its losses can be summed with others."""
        return values.masked_fill(self.bad.bool(), 0)

    def check(self) -> list[Step]:
        """Steps found to be skipped since the last call. Waits for the device.

        Raises NonFiniteError naming steps and documents: with ``stop`` after the
        first bad step, with ``skip`` after more than ``max_in_a_row`` in a row.
        """
        self._look()
        found, self._found = self._found, []
        return found

    def _look(self) -> None:
        if self._pending and self._failure is None:
            flags = self._flags[: len(self._pending)].tolist()
            for entry, bad in zip(self._pending, flags, strict=True):
                if not bad:
                    self._row = []
                    continue
                self._row.append(entry)
                if self.sticky or len(self._row) > self.max_in_a_row:
                    self._failure = self._describe()
                    break
                self.n_skipped += 1
                self._found.append(entry)
            self._pending = []
        if self._failure is not None:
            raise NonFiniteError(self._failure)

    def _describe(self) -> str:
        remedy = "Lower the learning rate, raise warm-up or look at these documents; the run goes on from its last checkpoint when started again."
        if self.sticky:
            step, documents = self._row[0]
            what = "loss or gradient is not finite; the weights were not updated by it and nothing was saved after it"
            return f"step {step + 1}: {what}. Documents of the step: {_shown(documents)}. {remedy}"
        first, last = self._row[0][0] + 1, self._row[-1][0] + 1
        what = (
            f"loss or gradient is not finite in {len(self._row)} steps in a row, and {self.max_in_a_row} may be skipped; the weights were not updated by them"
        )
        listed = "".join(f"\n  step {step + 1}: documents {_shown(ids)}" for step, ids in self._row)
        return f"steps {first} to {last}: {what}. {remedy}{listed}"

    def state(self) -> dict[str, Any]:
        """As JSON; a restored guard stops where this one would. Waits for the device, and raises as ``check`` does."""
        self._look()
        return {"n_skipped": self.n_skipped, "row": [[step, list(documents)] for step, documents in self._row]}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a ``state``; what was observed since is forgotten."""
        self.n_skipped = state["n_skipped"]
        self._row = [(step, tuple(documents)) for step, documents in state["row"]]
        self._pending, self._found, self._failure, self._begun = [], [], None, self.sticky
        self.bad.zero_()


def _shown(documents: Sequence[int]) -> str:
    return ", ".join(str(document) for document in documents[:20]) + ("…" if len(documents) > 20 else "")
