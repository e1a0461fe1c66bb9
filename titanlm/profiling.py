"""A torch.profiler window over a few steps, written as a Chrome trace."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from titanlm.config import Profile


class ProfileWindow:
    """Records steps ``start`` to ``start + steps − 1`` (counted from 1) into ``run_dir/profile``."""

    def __init__(self, settings: Profile | None, run_dir: Path) -> None:
        self.settings, self.folder = settings, run_dir / "profile"
        self._profile: profile | None = None
        self._step = 0

    def before_step(self, step: int) -> None:
        """``step`` is the number of the step about to run, from 1."""
        if self.settings is not None and step == self.settings.start:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            self._profile = profile(activities=activities, record_shapes=True)
            self._profile.start()

    def after_step(self, step: int) -> Path | None:
        """The trace, once the last step of the window is done."""
        self._step = step
        if self.settings is None or step < self.settings.start + self.settings.steps - 1:
            return None
        return self.close()

    def close(self) -> Path | None:
        """Write what has been recorded so far, if anything; a run may end inside the window."""
        if self._profile is None or self.settings is None:
            return None
        self._profile.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        trace = self.folder / f"steps-{self.settings.start}-{self._step}.json"
        self._profile.export_chrome_trace(str(trace))
        self._profile = None
        return trace
