"""What a submission says about itself: the results of its seeds, and submission.json.

The challenge publishes no schema. The keys and types here are those of the 55
files in its records folder: ``CORE`` are in most of them, ``REQUIRED`` in
nearly all, ``OPTIONAL`` in several. Other keys are everyone's own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from titanlm.errors import TitanError
from titanlm.submission.statistics import Statistics, summary

MAX_BYTES = 16_000_000
"""Of code and artifact together; decimal."""
TIME_LIMIT_S = 600.0
"""Of training, and again of evaluation, on eight H100."""
TRACKS = ("10min_16mb", "non_record_16mb")

_NUMBER = (int, float)
REQUIRED: dict[str, tuple[type, ...]] = {"author": (str,), "github_id": (str,), "name": (str,), "date": (str,), "val_bpb": _NUMBER}
CORE: dict[str, tuple[type, ...]] = REQUIRED | {"blurb": (str,), "val_loss": _NUMBER, "bytes_total": (int,), "bytes_code": (int,)}
OPTIONAL: dict[str, tuple[type, ...]] = {
    "track": (str,), "seeds": (list, dict), "seed_results": (dict,), "hardware": (str,), "val_bpb_std": _NUMBER, "val_loss_std": _NUMBER,
    "pytorch_version": (str,), "pre_quant_val_bpb": _NUMBER, "pre_quant_val_loss": _NUMBER, "step_stop": (int,), "wallclock_seconds": _NUMBER,
    "eval_time_seconds": _NUMBER, "artifact_bytes_mean": _NUMBER, "artifact_bytes_max": (int,), "train_steps_mean": _NUMBER, "compliance": (dict,),
    "attribution": (dict,),
}  # fmt: skip
NULLABLE = frozenset({"val_loss", "bytes_code"})
SEED_RESULT: dict[str, tuple[type, ...]] = {
    "val_loss": _NUMBER, "val_bpb": _NUMBER, "artifact_bytes": (int,), "steps": (int,), "step_avg_ms": _NUMBER, "eval_time_s": _NUMBER,
}  # fmt: skip
PLAUSIBLE_BPB = (0.3, 9.0)
"""Text takes more, and a uniform guess among bytes 8 bits a byte."""


# ---------------------------------------------------------------- what is written
@dataclass(frozen=True)
class Score:
    """Of one validation set."""

    val_loss: float
    """Nats a token."""
    val_bpb: float
    """Bits a byte."""


@dataclass(frozen=True)
class SeedResult:
    """One run from start to score."""

    seed: int
    steps: int
    step_avg_ms: float
    train_time_s: float
    eval_time_s: float
    artifact_bytes: int
    scores: Mapping[str, Score]
    """By stage, in order: "raw", "averaged", "after round trip", "sliding"; the last one counts."""
    chosen: Mapping[str, float] = field(default_factory=dict)
    """What the fitter settled on for this seed: {"prune_fraction": 0.12}."""

    @property
    def final(self) -> Score:
        return list(self.scores.values())[-1]


@dataclass(frozen=True)
class Record:
    """What a submission is tested against."""

    name: str
    val_loss: float
    """Mean of its seeds, nats a token of the same tokenizer."""


@dataclass(frozen=True)
class Submission:
    """Everything that README.md and submission.json tell.

    Raises TitanError for an unknown track, no result, a result without a score and a seed that is there twice.
    """

    name: str
    author: str
    github_id: str
    blurb: str
    date: str
    """ISO 8601."""
    track: str
    """One of ``TRACKS``."""
    hardware: str
    pytorch_version: str
    bytes_code: int
    """Of train_gpt.py."""
    results: tuple[SeedResult, ...]
    record: Record | None = None

    def __post_init__(self) -> None:
        if self.track not in TRACKS:
            raise TitanError(f"submission: no track {self.track!r} (known: {', '.join(TRACKS)})")
        seeds = [result.seed for result in self.results]
        twice = sorted({seed for seed in seeds if seeds.count(seed) > 1})
        if not seeds or twice or not all(result.scores for result in self.results):
            wrong = f"more than one run has seed {twice[0]}" if twice else "a run has no score" if seeds else "no run is given"
            raise TitanError(f"submission: {wrong}; name finished runs of different seeds")

    @property
    def best(self) -> SeedResult:
        """The seed whose artifact is handed in."""
        return min(self.results, key=lambda result: result.final.val_bpb)

    @property
    def bytes_total(self) -> int:
        """Of code and of the artifact that is handed in."""
        return self.bytes_code + self.best.artifact_bytes

    @property
    def bits(self) -> Statistics:
        """Of the seeds' final scores, bits a byte."""
        return summary([result.final.val_bpb for result in self.results])

    @property
    def losses(self) -> Statistics:
        """Of the seeds' final scores, nats a token; tested against the record."""
        return summary([result.final.val_loss for result in self.results], None if self.record is None else self.record.val_loss)


def metadata(submission: Submission) -> dict[str, Any]:
    """The document of submission.json; val_loss and val_bpb are the seeds' means, bytes_total is of the files in the folder."""
    results, bits, losses = submission.results, submission.bits, submission.losses
    sizes = [result.artifact_bytes for result in results]
    document: dict[str, Any] = {key: getattr(submission, key) for key in ("author", "github_id", "name", "blurb", "date", "track")}
    document |= {"val_loss": round(losses.mean, 8), "val_bpb": round(bits.mean, 8), "bytes_total": submission.bytes_total, "bytes_code": submission.bytes_code}
    if bits.sd is not None and losses.sd is not None:
        document |= {"val_loss_std": round(losses.sd, 8), "val_bpb_std": round(bits.sd, 8)}
    document |= {
        "seeds": [result.seed for result in results],
        "seed_results": {
            str(result.seed): {
                "val_loss": round(result.final.val_loss, 8),
                "val_bpb": round(result.final.val_bpb, 8),
                "artifact_bytes": result.artifact_bytes,
                "steps": result.steps,
                "step_avg_ms": round(result.step_avg_ms, 3),
                "eval_time_s": round(result.eval_time_s, 3),
                **{name: round(value, 6) for name, value in result.chosen.items()},
            }
            for result in results
        },
        "artifact_bytes_mean": sum(sizes) / len(sizes),
        "artifact_bytes_max": max(sizes),
        "train_steps_mean": sum(result.steps for result in results) / len(results),
        "wallclock_seconds": round(max(result.train_time_s for result in results), 3),
        "eval_time_seconds": round(max(result.eval_time_s for result in results), 3),
        "hardware": submission.hardware,
        "pytorch_version": submission.pytorch_version,
    }
    if losses.p is not None and submission.record is not None:
        document["record_test"] = {"record": submission.record.name, "val_loss": losses.record, "margin_nats": losses.margin, "t": losses.t, "p": losses.p}
    return document


def dump(document: Mapping[str, Any]) -> str:
    """The text of submission.json. Raises TitanError for what ``problems`` finds."""
    found = problems(document, complete=True)
    if found:
        raise TitanError("submission.json: " + "; ".join(found))
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


# ---------------------------------------------------------------- what is read
def load(data: bytes) -> dict[str, Any]:
    """The document of a stranger's submission.json. Raises TitanError when it is not one JSON object."""
    try:
        document = json.loads(data.decode("utf-8"), parse_constant=_constant)
    except (ValueError, RecursionError) as error:
        raise TitanError(f"not valid JSON: {error}") from error
    if not isinstance(document, dict):
        raise TitanError("not a JSON object")
    return document


def _constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def problems(document: Mapping[str, Any], *, complete: bool) -> list[str]:
    """What is wrong with a document; with ``complete`` all of ``CORE`` has to be there, else ``REQUIRED``."""
    found = [f"{key} is missing" for key in (CORE if complete else REQUIRED) if key not in document]
    for key, types in (CORE | OPTIONAL).items():
        if key in document and not (key in NULLABLE and document[key] is None):
            found += _mismatch(key, document[key], types)
    for seed, result in document["seed_results"].items() if isinstance(document.get("seed_results"), dict) else ():
        if not isinstance(result, dict):
            found.append(f"seed_results.{seed} is {_kind(result)}, not an object")
            continue
        for key in SEED_RESULT.keys() & result.keys():
            found += _mismatch(f"seed_results.{seed}.{key}", result[key], SEED_RESULT[key])
    if isinstance(document.get("date"), str) and not _is_date(document["date"]):
        found.append("date is not ISO 8601, such as 2026-03-21")
    low, high = PLAUSIBLE_BPB
    if number(document.get("val_bpb")) is not None and not low <= document["val_bpb"] <= high:
        found.append(f"val_bpb = {document['val_bpb']:.6g} is no plausible score (from {low} to {high} bits a byte)")
    return found


def number(value: Any) -> float | None:
    """A JSON number that is finite, else None."""
    try:
        return float(value) if isinstance(value, _NUMBER) and not isinstance(value, bool) and math.isfinite(value) else None
    except OverflowError:
        return None


def _mismatch(key: str, value: Any, types: tuple[type, ...]) -> list[str]:
    if isinstance(value, bool) or not isinstance(value, types):
        return [f"{key} is {_kind(value)}, not {'a number' if float in types else ' or '.join(_NAMES[kind] for kind in types)}"]
    if isinstance(value, _NUMBER) and (number(value) is None or value < 0):
        return [f"{key} is not a number from 0 on"]
    return []


_NAMES: dict[type, str] = {
    str: "a string", int: "a whole number", float: "a number", list: "a list", dict: "an object", bool: "true or false", type(None): "null",
}  # fmt: skip


def _kind(value: Any) -> str:
    return _NAMES[type(value)]


def _is_date(text: str) -> bool:
    try:
        datetime.fromisoformat(text)
    except ValueError:
        return False
    return True
