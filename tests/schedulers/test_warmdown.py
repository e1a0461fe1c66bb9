"""The way down against the rules of the records, written out here as they stand there."""

from __future__ import annotations

import math

import pytest

from titanlm.progress import Horizon, Progress
from titanlm.registry import Component


def build(total: int, limit_s: float | None = None, **settings: object):
    return Component.named("scheduler", "warmdown", **settings).build(total_steps=total, horizon=Horizon(total, limit_s))


def record(step: int, elapsed_ms: float, *, iterations: int, warmdown: int, cap_ms: float | None) -> float:
    """The baseline's ``lr_mul``."""
    if cap_ms is None:
        start = max(iterations - warmdown, 0)
        return max((iterations - step) / max(warmdown, 1), 0.0) if start <= step < iterations else 1.0
    step_ms = elapsed_ms / max(step, 1)
    warmdown_ms, remaining_ms = warmdown * step_ms, max(cap_ms - elapsed_ms, 0.0)
    return remaining_ms / max(warmdown_ms, 1e-9) if remaining_ms <= warmdown_ms else 1.0


def test_by_steps() -> None:
    scheduler = build(20, warmdown_steps=8)
    got = [scheduler.factor(Progress(step)) for step in range(20)]
    assert got == [record(step, 0.0, iterations=20, warmdown=8, cap_ms=None) for step in range(20)]
    assert got[:13] == [1.0] * 13
    assert got[13:] == [7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]
    assert [scheduler.factor(Progress(step)) for step in (20, 25)] == [0.0, 0.0]


def test_by_steps_under_a_limit_in_seconds() -> None:
    """Steps of changing length, so that pace and clock differ; 20,000 steps are never reached."""
    scheduler, elapsed_s, below = build(20_000, 600.0, warmdown_steps=3000), 0.0, 0
    for step in range(0, 12_000, 25):
        expected = record(step, 1000 * elapsed_s, iterations=20_000, warmdown=3000, cap_ms=600_000.0)
        assert scheduler.factor(Progress(step, elapsed_s=elapsed_s)) == pytest.approx(expected, abs=1e-12)
        below += expected < 1
        elapsed_s += 25 * (0.055 + 0.01 * math.sin(step / 500))
    assert below > 100
    assert elapsed_s > 600


def test_the_steps_may_end_before_the_seconds() -> None:
    scheduler = build(100, 1000.0, warmdown_steps=10)
    assert [scheduler.factor(Progress(step, elapsed_s=step * 1.0)) for step in (89, 90, 95, 99)] == [1.0, 1.0, 0.5, 0.1]


@pytest.mark.parametrize("fraction", [0.2, 0.72, 1.0])
def test_by_fraction_with_a_floor(fraction: float) -> None:
    scheduler = build(1000, 50.0, warmdown_fraction=fraction, min_factor=0.1)
    for step, elapsed_s in ((0, 0.0), (100, 4.0), (100, 30.0), (600, 29.9), (850, 1.0), (990, 1.0), (990, 49.9)):
        done = max(step / 1000, elapsed_s / 50)
        expected = max((1 - done) / fraction, 0.1) if done >= 1 - fraction else 1.0
        assert scheduler.factor(Progress(step, elapsed_s=elapsed_s)) == pytest.approx(expected, abs=1e-12)


def test_cosine() -> None:
    linear, cosine = build(40, warmdown_steps=30), build(40, warmdown_steps=30, shape="cosine")
    for step in range(41):
        u = linear.factor(Progress(step))
        assert cosine.factor(Progress(step)) == pytest.approx(math.sin(math.pi * u / 2) ** 2, abs=1e-12)
    assert build(40, warmdown_steps=30, shape="cosine", min_factor=0.3).factor(Progress(39)) == 0.3


def test_warmup_and_way_down_may_meet() -> None:
    scheduler = build(10, warmdown_steps=8, warmup_steps=5)
    assert [scheduler.factor(Progress(step)) for step in range(10)] == [0.2, 0.4, 0.6, 0.8, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]


def test_edges() -> None:
    by_clock = build(1000, 60.0, warmdown_steps=100)
    assert by_clock.factor(Progress()) == 1.0
    assert by_clock.factor(Progress(step=300, elapsed_s=60.0)) == 0.0
    assert by_clock.factor(Progress(step=300, elapsed_s=75.0)) == 0.0
    longer_than_the_run = build(10, warmdown_steps=40)
    assert [longer_than_the_run.factor(Progress(step)) for step in (0, 5, 10)] == [0.25, 0.125, 0.0]
    for settings in ({"warmdown_steps": 0}, {"warmdown_fraction": 0.0}):
        assert [build(10, **settings).factor(Progress(step)) for step in (0, 9)] == [1.0, 1.0]


@pytest.mark.parametrize("settings", [{"warmdown_steps": 400}, {"warmdown_fraction": 0.6}])
@pytest.mark.parametrize("shape", ["linear", "cosine"])
@pytest.mark.parametrize("limit_s", [None, 20.0])
def test_never_rises_at_an_even_pace(settings: dict[str, object], shape: str, limit_s: float | None) -> None:
    scheduler = build(500, limit_s, shape=shape, min_factor=0.05, **settings)
    got = [scheduler.factor(Progress(step, elapsed_s=0.05 * step)) for step in range(501)]
    assert all(later <= earlier for earlier, later in zip(got, got[1:]))
    assert (got[0], got[-1]) == (1.0, 0.05)


@pytest.mark.parametrize("settings", [{}, {"warmdown_steps": 3, "warmdown_fraction": 0.5}])
def test_exactly_one_length(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="warmdown_steps: give either this or warmdown_fraction"):
        build(10, **settings)


def test_a_warmup_longer_than_the_run_is_refused() -> None:
    with pytest.raises(ValueError, match="warmup_steps"):
        build(10, warmdown_steps=3, warmup_steps=11)
