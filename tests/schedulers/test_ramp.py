"""``ramp`` against the closed form of the golf records' momentum, and numpy's interpolation."""

from __future__ import annotations

import numpy as np
import pytest

from titanlm.progress import Progress
from titanlm.registry import Component


def ramp(total_steps: int = 10, **settings: float) -> object:
    return Component.named("scheduler", "ramp", **settings).build(total_steps=total_steps)


def test_momentum_of_the_records() -> None:
    """0.92 to 0.99 over 1,500 steps: (1 − f)·0.92 + f·0.99, f the share of the steps that are done."""
    scheduler = ramp(start_factor=0.92 / 0.99, steps=1500)
    for step, momentum in [(0, 0.92), (375, 0.9375), (750, 0.955), (1499, 0.99 - 0.07 / 1500), (1500, 0.99), (9000, 0.99)]:
        assert 0.99 * scheduler.factor(Progress(step=step)) == pytest.approx(momentum, abs=1e-12)


@pytest.mark.parametrize(("start", "steps"), [(0.0, 1), (0.3, 7), (1.0, 4)])
def test_is_the_line_between_two_points(start: float, steps: int) -> None:
    scheduler = ramp(start_factor=start, steps=steps)
    got = [scheduler.factor(Progress(step=step)) for step in range(20)]
    np.testing.assert_allclose(got, np.interp(range(20), [0, steps], [start, 1.0]), rtol=0, atol=1e-15)


def test_it_may_outlast_the_run() -> None:
    assert ramp(total_steps=3, start_factor=0.5, steps=4).factor(Progress(step=2)) == 0.75
