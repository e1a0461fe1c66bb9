"""Loss spikes: found where they are, not elsewhere, and the same after a restart."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator

import pytest

from titanlm.spikes import SpikeDetector


def curve(n: int, seed: int, noise: float = 0.02) -> Iterator[float]:
    """A training loss: steep at first, flat later, with noise whose neighbours resemble one another and whose tails are heavier than normal."""
    rng, drift = random.Random(seed), 0.0
    for step in range(n):
        drift = 0.9 * drift + rng.gauss(0, 0.3 * noise)
        heavy = rng.gauss(0, noise) / math.sqrt(rng.gammavariate(4, 0.25))  # Student's t with 8 degrees of freedom
        yield 2.5 + 8.5 / (1 + step / 20) + drift + heavy


def found(detector: SpikeDetector, losses: list[float], first_step: int = 1) -> list[tuple[int, int]]:
    """(step of the finding, step to go back to)."""
    results = [(step, detector.observe(step, loss)) for step, loss in enumerate(losses, start=first_step)]
    return [(step, back) for step, back in results if back is not None]


@pytest.mark.parametrize("noise", [0.002, 0.02, 0.1])
def test_e3_no_false_alarm_on_curves_of_real_shape(noise: float) -> None:
    alarms = [seed for seed in range(20) if found(SpikeDetector(8, 128, 1), list(curve(1000, seed, noise)))]
    assert not alarms


def test_e3_no_false_alarm_at_six_deviations_with_patience() -> None:
    assert not [seed for seed in range(50) if found(SpikeDetector(6, 128, 2), list(curve(1000, seed)))]


@pytest.mark.parametrize("losses", [[2.0] * 300, [2.0 + 1e-3 * (step % 7) for step in range(300)], [1e-4] * 100 + [4e-3] * 100])
def test_e3_flat_losses_have_a_floor(losses: list[float]) -> None:
    assert not found(SpikeDetector(6, 128, 1), losses)


def test_e3_slow_drift_upwards_is_no_spike() -> None:
    assert not found(SpikeDetector(3, 64, 1), [2 + 0.01 * step for step in range(1000)])


@pytest.mark.parametrize("seed", range(20))
def test_e3_a_spike_of_ten_deviations_is_found_at_once(seed: int) -> None:
    rng = random.Random(seed)
    losses = [rng.gauss(3, 0.02) for _ in range(200)]
    losses[150] = 3 + 10 * 0.02 + 0.03
    assert found(SpikeDetector(6, 128, 1), losses) == [(151, 150)]


def test_e3_three_in_a_row() -> None:
    losses = [3 + 0.01 * (-1) ** step for step in range(100)]
    losses[60:63] = [4, 5, 6]
    assert found(SpikeDetector(6, 64, 3), losses) == [(63, 60)]
    assert found(SpikeDetector(6, 64, 1), losses) == [(61, 60), (62, 60), (63, 60)]
    losses[61] = 3  # not in a row
    assert found(SpikeDetector(6, 64, 3), losses) == []


def test_e3_a_diverged_run_does_not_become_its_own_measure() -> None:
    losses = [3 + 0.01 * (-1) ** step for step in range(100)] + [8.0] * 300
    assert found(SpikeDetector(6, 128, 2), losses) == [(step, 100) for step in range(102, 401, 2)]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_e3_what_is_not_finite_is_a_spike_and_never_enters_the_window(bad: float) -> None:
    detector = SpikeDetector(6, 8, 1)
    assert detector.observe(1, bad) is None  # there is nothing healthy to go back to
    assert found(detector, [3.0, bad, 3.0], first_step=2) == [(3, 2)]
    assert not found(detector, [3.0] * 20, first_step=5)
    assert detector.observe(30, 9.0) == 24
    assert all(map(math.isfinite, detector.state()["losses"]))


def test_nothing_is_judged_before_half_a_window() -> None:
    assert not found(SpikeDetector(6, 8, 1), [3.0] * 3 + [9.0])
    assert found(SpikeDetector(6, 8, 1), [3.0] * 4 + [9.0]) == [(5, 4)]
    assert not found(SpikeDetector(6, 1, 1), [3.0, 9.0])  # one point has no deviation


def test_zero_sigmas_find_nothing_and_keep_nothing() -> None:
    detector = SpikeDetector(0, 8, 1)
    assert not found(detector, [3.0] * 20 + [math.nan, 1e9])
    assert detector.state()["losses"] == []


@pytest.mark.parametrize("cut", [0, 1, 30, 61, 62, 63, 110, 299])
def test_e3_a_restored_detector_judges_as_the_straight_one(cut: int) -> None:
    losses = list(curve(300, seed=5))
    losses[60:63], losses[200:202] = [9, 9, 9], [math.nan, 30]
    straight, stopped, resumed = (SpikeDetector(4, 32, 2) for _ in range(3))
    expected = found(straight, losses)
    before = found(stopped, losses[:cut])
    resumed.restore(json.loads(json.dumps(stopped.state(), allow_nan=False)))
    assert before + found(resumed, losses[cut:], first_step=cut + 1) == expected
    assert resumed.state() == straight.state()
    assert len(expected) == 2


def test_reset_begins_anew() -> None:
    detector = SpikeDetector(6, 8, 1)
    found(detector, [3.0] * 20 + [9.0])
    detector.reset()
    assert detector.state() == SpikeDetector(6, 8, 1).state()
    assert not found(detector, [9.0] * 20)


def test_a_shorter_window_keeps_the_newest_points() -> None:
    detector, shorter = SpikeDetector(6, 8, 1), SpikeDetector(6, 4, 1)
    found(detector, [float(loss) for loss in range(8, 0, -1)])
    shorter.restore(detector.state())
    assert shorter.state()["losses"] == [4.0, 3.0, 2.0, 1.0]


def test_a_new_phase_is_judged_by_its_own_losses() -> None:
    detector = SpikeDetector(sigmas=3.0, window=8, patience=1)
    for step in range(8):
        assert detector.observe(step, 2.0 + 0.01 * (step % 2), "a") is None
    again = SpikeDetector(sigmas=3.0, window=8, patience=1)
    again.restore(detector.state())
    assert again.observe(8, 9.0, "a") == 7
    assert detector.observe(8, 9.0, "b") is None
    older = {name: value for name, value in detector.state().items() if name != "phase"}
    again.restore(older)
    assert again.observe(9, 9.0, "b") is None
    assert again.state()["losses"] == [9.0, 9.0], "what an older checkpoint holds is of the phase it goes on in"


def test_a_new_phase_keeps_where_to_go_back_to() -> None:
    """Its losses are learned anew, and a run that is broken at once still has a healthy step behind it."""
    detector = SpikeDetector(4.0, 8, 2)
    for step in range(10):
        assert detector.observe(step, 3.0, "a") is None
    assert detector.observe(10, math.nan, "b") is None
    assert detector.observe(11, math.nan, "b") == 9
