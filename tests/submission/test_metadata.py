"""submission.json: what is written is what the challenge's files hold, and what is read is checked."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from typing import Any

import pytest

from titanlm.errors import TitanError
from titanlm.submission.metadata import CORE, OPTIONAL, SEED_RESULT, Record, Score, SeedResult, Submission, dump, load, metadata, number, problems

BPB = {2024: 1.13189429, 1337: 1.13196492, 42: 1.13444261}


def result(seed: int, bpb: float, artifact_bytes: int = 15_700_000) -> SeedResult:
    stages = {"raw": bpb + 0.014, "averaged": bpb + 0.013, "after round trip": bpb + 0.02, "sliding": bpb}
    scores = {name: Score(value * 1.6885, value) for name, value in stages.items()}
    return SeedResult(seed, 10_342, 58.0, 599.8, 178.0, artifact_bytes, scores, {"prune_fraction": 0.12})


def submission(**changes: Any) -> Submission:
    given: dict[str, Any] = {
        "name": "Eleven layers", "author": "A. Author", "github_id": "author", "blurb": "A model.", "date": "2026-04-01", "track": "10min_16mb",
        "hardware": "8xH100 80GB SXM", "pytorch_version": "2.11.0", "bytes_code": 60_000,
        "results": tuple(result(seed, bpb, 15_700_000 + seed) for seed, bpb in BPB.items()),
    }  # fmt: skip
    return Submission(**given | changes)


def test_what_is_written_has_the_keys_and_types_of_the_records() -> None:
    document = json.loads(dump(metadata(submission())))
    assert document.keys() >= CORE.keys()
    assert document.keys() <= CORE.keys() | OPTIONAL.keys()
    assert document["seed_results"].keys() == {"2024", "1337", "42"}
    assert all(values.keys() == SEED_RESULT.keys() | {"prune_fraction"} for values in document["seed_results"].values())
    assert problems(document, complete=True) == []


def test_the_score_is_the_mean_and_the_bytes_are_of_the_best() -> None:
    document = metadata(submission())
    assert document["val_bpb"] == pytest.approx(statistics.mean(BPB.values()), abs=1e-8)
    assert document["val_bpb_std"] == pytest.approx(statistics.stdev(BPB.values()), abs=1e-8)
    assert document["val_loss"] == pytest.approx(1.6885 * statistics.mean(BPB.values()), abs=1e-8)
    assert document["bytes_total"] == 60_000 + 15_700_000 + 2024
    assert document["artifact_bytes_max"] == 15_700_000 + 2024
    assert document["seed_results"]["42"] == {
        "val_loss": round(1.6885 * 1.13444261, 8), "val_bpb": 1.13444261, "artifact_bytes": 15_700_042, "steps": 10_342, "step_avg_ms": 58.0,
        "eval_time_s": 178.0, "prune_fraction": 0.12,
    }  # fmt: skip


def test_one_seed_has_no_deviation() -> None:
    document = metadata(submission(results=(result(7, 1.13),)))
    assert (document["val_bpb"], document["seeds"]) == (1.13, [7])
    assert not {"val_bpb_std", "val_loss_std", "record_test"} & document.keys()


def test_the_test_against_a_record_is_told() -> None:
    one = submission(record=Record("PR 180", 1.6885 * 1.1427))
    test = metadata(one)["record_test"]
    assert test.keys() == {"record", "val_loss", "margin_nats", "t", "p"}
    assert test["t"] == one.losses.t
    assert one.losses.t is not None
    # (1.6885 · 1.1427 - 0.005 - mean) / (sd / √3), in nats
    losses = [1.6885 * value for value in BPB.values()]
    assert one.losses.t == pytest.approx((1.6885 * 1.1427 - 0.005 - statistics.mean(losses)) / (statistics.stdev(losses) / 3**0.5), rel=1e-9)


def test_results_that_are_no_submission_are_refused() -> None:
    for results, said in [((), "no run is given"), ((result(1, 1.1), result(1, 1.2)), "more than one run has seed 1"),
                          ((replace(result(1, 1.1), scores={}),), "a run has no score")]:  # fmt: skip
        with pytest.raises(TitanError, match=said):
            submission(results=results)
    with pytest.raises(TitanError, match=r"no track '16mb' \(known: 10min_16mb, non_record_16mb\)"):
        submission(track="16mb")
    with pytest.raises(TitanError, match=r"submission\.json: date is not ISO 8601"):
        dump(metadata(submission(date="April")))
    with pytest.raises(TitanError, match="val_bpb = 12.5 is no plausible score"):
        dump(metadata(submission(results=(result(1, 12.5),))))


def test_null_is_taken_where_the_records_have_it() -> None:
    document = metadata(submission())
    assert problems(document | {"val_loss": None, "bytes_code": None}, complete=True) == []
    assert problems(document | {"name": None}, complete=True) == ["name is null, not a string"]
    assert problems({key: document[key] for key in ("author", "github_id", "name", "date", "val_bpb")}, complete=False) == []
    assert problems({}, complete=False) == [f"{key} is missing" for key in ("author", "github_id", "name", "date", "val_bpb")]
    assert problems(document | {"seeds": {"42": 1}, "date": "2026-04-01T12:00:00Z", "an_own_key": [1]}, complete=True) == []


@pytest.mark.parametrize(("key", "value"), [("bytes_total", 1.5), ("bytes_total", -1), ("bytes_code", True), ("compliance", "yes"), ("val_bpb_std", -0.1)])
def test_types_are_those_of_the_records(key: str, value: Any) -> None:
    (problem,) = problems(metadata(submission()) | {key: value}, complete=True)
    assert problem.startswith(f"{key} is ")


@pytest.mark.parametrize("data", [b"", b"\xff", b"[1]", b"3", b'{"a": Infinity}', b'{"a":' * 50_000, b'{"a": ' + b"1" * 5_000 + b"}"])
def test_what_is_no_object_is_refused(data: bytes) -> None:
    with pytest.raises(TitanError, match="not "):
        load(data)


def test_numbers() -> None:
    assert [number(value) for value in (1, 1.5, True, "1", None, float("nan"), float("inf"), 10**400)] == [1.0, 1.5, *[None] * 6]
