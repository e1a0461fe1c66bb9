"""Finds the loss spike from which a run should go back.

A point is a spike when it lies more than ``sigmas`` standard deviations above
the mean of the last ``window`` healthy points. Spikes never enter the window,
so a diverged run cannot become its own measure and one NaN cannot poison it.
Trend is left in: a falling loss widens the deviation and errs on the side of
silence, where a fitted slope would take the flattening of the curve for a
spike.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Any

FLOOR = 0.002
"""Least deviation, as a share of the mean, or of one nat where the mean is less: a flat loss has noise of that size."""


class SpikeDetector:
    """``observe`` the loss of every log point; ``patience`` spikes in a row make a finding.

    Half a window of healthy points is needed before one is judged; until then
    only a loss that is not finite counts as a spike. ``sigmas`` 0 finds nothing.
    """

    def __init__(self, sigmas: float, window: int, patience: int) -> None:
        self.sigmas, self.patience = sigmas, patience
        self._enough = max(2, window // 2)
        self._losses: deque[float] = deque(maxlen=window)
        self._healthy_step: int | None = None
        self._in_a_row = 0
        self._phase: str | None = None

    def observe(self, step: int, loss: float, phase: str = "") -> int | None:
        """The step of the last healthy point, after which the spike began, when one is found. None also while there was no healthy point yet.

        Where ``phase`` is another than before the loss changes for a known
        reason, and what is healthy has to be learned anew.
        """
        if not self.sigmas:
            return None
        if phase != self._phase:
            if self._phase is not None:
                healthy = self._healthy_step  # still where to go back to
                self.reset()
                self._healthy_step = healthy
            self._phase = phase
        if not self._is_spike(loss):
            self._losses.append(loss)
            self._healthy_step, self._in_a_row = step, 0
            return None
        self._in_a_row += 1
        if self._in_a_row < self.patience:
            return None
        self._in_a_row = 0
        return self._healthy_step

    def _is_spike(self, loss: float) -> bool:
        if not math.isfinite(loss):
            return True
        if len(self._losses) < self._enough:
            return False
        mean = statistics.fmean(self._losses)
        deviation = math.sqrt(statistics.fmean((healthy - mean) ** 2 for healthy in self._losses))
        return loss > mean + self.sigmas * max(deviation, FLOOR * max(1.0, abs(mean)))

    def reset(self) -> None:
        """Forget everything."""
        self._losses.clear()
        self._healthy_step, self._in_a_row, self._phase = None, 0, None

    def state(self) -> dict[str, Any]:
        """As JSON; a restored detector judges exactly as this one would."""
        return {"losses": list(self._losses), "healthy_step": self._healthy_step, "in_a_row": self._in_a_row, "phase": self._phase}

    def restore(self, state: dict[str, Any]) -> None:
        self.reset()
        self._losses.extend(state["losses"])
        self._healthy_step, self._in_a_row, self._phase = state["healthy_step"], state["in_a_row"], state.get("phase")  # older ones do not say
