"""What an export has to say: scores side by side, the budget, what a fitter chose, the file."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

from torch import Tensor

from titanlm.evaluate import Scores
from titanlm.exporters.budget import Budget, measure
from titanlm.exporters.encoding import Encoded, ExportReport, ExportRequest


@dataclass(frozen=True)
class Exported:
    """An artifact that was written and read back."""

    report: ExportReport
    request: ExportRequest
    encoded: Mapping[str, Encoded | Tensor]
    """What was written."""
    roles: Mapping[str, str]
    """Of the parameters, by name."""
    sets: tuple[str, ...]
    """Validation sets that were scored."""
    rows: tuple[tuple[str, tuple[Scores, ...]], ...]
    """(which weights, their scores on each set), from raw to after round trip."""
    chosen: Mapping[str, float]
    """What the fitter settled on: {"prune_fraction": 0.12}; empty without one."""
    calibration_s: float | None
    """Seconds that reading training data for ``rounding = "gptq"`` took; None where nothing asked for it."""


def budget_of(exported: Exported) -> Budget | None:
    """Where the bytes go, which takes as long as compressing everything once more; None where the exporter does not say what it tried."""
    return measure(exported.encoded, exported.roles, exported.report, exported.request) if exported.report.trials else None


def describe(exported: Exported) -> str:
    """Scores side by side, then the bytes by kind of tensor, then what codecs made of them where several were tried, then the file."""
    return "\n".join(_lines(exported))


def _lines(exported: Exported) -> Iterator[str]:
    for index, name in enumerate(exported.sets):
        yield f"{name:<18} {'loss':>10} {'perplexity':>12} {'bits/byte':>10}"
        for which, scores in exported.rows:
            one = scores[index]
            yield f"  {which:<16} {one.loss:>10.4f} {one.perplexity:>12.3f} {one.bits_per_byte:>10.4f}"
    if (budget := budget_of(exported)) is not None:
        yield from budget.lines()
    report, limit = exported.report, exported.request.max_bytes
    smallest = {trial.codec: trial for trial in reversed(report.trials)}  # trials begin with the smallest
    for trial in sorted(smallest.values(), key=lambda trial: trial.n_bytes) if len(smallest) > 1 else ():
        seconds = sum(other.seconds for other in report.trials if other.codec == trial.codec)
        yield f"codec {trial.codec}: {trial.n_bytes:,} bytes of payload in {seconds:.1f} s"
    if exported.calibration_s is not None:
        yield f"calibration: {exported.calibration_s:.1f} s"
    for name, value in exported.chosen.items():
        yield f"fitter: {name.replace('_', ' ')} {value:.5g}"
    yield f"{report.path}: {report.n_bytes:,} bytes{f' of {limit:,} allowed' if limit is not None else ''} ({report.codec}, {report.layout})"


def as_json(exported: Exported) -> str:
    """The same for programs; a score that is not finite is null."""
    report, budget = exported.report, budget_of(exported)
    found = {
        "path": str(report.path),
        "n_bytes": report.n_bytes,
        "max_bytes": exported.request.max_bytes,
        "codec": report.codec,
        "layout": report.layout,
        "validation": {name: {which: _finite(scores[index]) for which, scores in exported.rows} for index, name in enumerate(exported.sets)},
        "budget": None if budget is None else budget.as_dict(),
        "trials": [asdict(trial) for trial in report.trials],
        "chosen": dict(exported.chosen),
        "calibration_s": exported.calibration_s,
    }
    return json.dumps(found)


def _finite(scores: Scores) -> dict[str, float | None]:
    values = {"loss": scores.loss, "perplexity": scores.perplexity, "bits_per_byte": scores.bits_per_byte}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
