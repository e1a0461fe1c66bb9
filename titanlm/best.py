"""The best checkpoint so far by a validation metric; `best.json` in the run folder says which."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from titanlm.runs import write_atomic


@dataclass(frozen=True)
class Best:
    """Less is better. ``step`` is None while nothing has been scored; ``metric`` is empty when none is asked for."""

    folder: Path
    metric: str
    value: float = math.inf
    step: int | None = None
    of: str = ""
    """What the metric is taken from: values of other sets or weights are not compared with these."""

    @classmethod
    def stored(cls, folder: Path) -> Best:
        """What a run folder says, by whatever metric."""
        path = folder / "best.json"
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            return cls(folder, str(stored["metric"]), float(stored["value"]), int(stored["step"]), str(stored.get("of", "")))
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError) as error:
            print(f"WARNING: {path} is damaged ({error!r}); which checkpoint was best is forgotten", file=sys.stderr)
        return cls(folder, "")

    @classmethod
    def read(cls, folder: Path, metric: str, of: str = "") -> Best:
        """What an earlier start of the run left, if it went by the same metric of the same."""
        stored = cls.stored(folder)
        if (stored.metric, stored.of) == (metric, of):
            return stored
        if metric and stored.metric == metric:
            print(f"WARNING: step {stored.step} was best by {metric} of other validation sets or weights; the best is chosen anew", file=sys.stderr)
        return cls(folder, metric, of=of)

    def beaten_by(self, metrics: Mapping[str, float]) -> bool:
        return bool(self.metric) and metrics.get(self.metric, math.nan) < self.value

    def now(self, metrics: Mapping[str, float], step: int) -> Best:
        """The step is the best."""
        return replace(self, value=metrics[self.metric], step=step)

    def forget(self) -> None:
        """That checkpoint is no longer of this run."""
        (self.folder / "best.json").unlink(missing_ok=True)

    def write(self) -> None:
        """To be read by the next start; its checkpoint is there already."""
        write_atomic(self.folder / "best.json", json.dumps({"metric": self.metric, "value": self.value, "step": self.step, "of": self.of}))
