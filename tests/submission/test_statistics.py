"""Student's t against printed tables, closed forms and numerical integration; the summary against numbers of record runs."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest

from titanlm.submission.statistics import MARGIN_NATS, beta_regularised, summary, t_survival

# Upper quantiles as printed in tables of Student's t: (df, t, P(T > t)).
TABLE = [
    (1, 6.314, 0.05), (1, 31.82, 0.01), (2, 2.920, 0.05), (2, 6.965, 0.01), (2, 9.925, 0.005), (3, 4.541, 0.01), (4, 3.747, 0.01),
    (5, 2.015, 0.05), (9, 1.383, 0.10), (10, 2.228, 0.025), (20, 2.845, 0.005), (30, 2.750, 0.005), (120, 1.658, 0.05),
]  # fmt: skip


@pytest.mark.parametrize(("df", "t", "p"), TABLE)
def test_survival_is_the_tables(df: int, t: float, p: float) -> None:
    assert t_survival(t, df) == pytest.approx(p, rel=2e-3)  # four printed digits of t
    assert t_survival(-t, df) == pytest.approx(1 - p, rel=2e-3)


@pytest.mark.parametrize("t", [-40.0, -2.5, -1e-4, 0.0, 1e-4, 0.7, 1.0, 3.0, 25.0, 1e4])
def test_survival_is_the_closed_form(t: float) -> None:
    # The first form for t >= 0 is 1/2 - t / (2 √(2 + t²)) without its cancellation.
    cauchy = math.atan2(1, t) / math.pi
    two = 1 / (2 + t * t + t * math.sqrt(2 + t * t)) if t >= 0 else 0.5 - t / (2 * math.sqrt(2 + t * t))
    assert t_survival(t, 1) == pytest.approx(cauchy, rel=1e-12)
    assert t_survival(t, 2) == pytest.approx(two, rel=1e-12)


@pytest.mark.parametrize(("df", "t"), [(4, 2.0), (7, 0.3), (29, 3.5)])
def test_survival_is_the_integral_of_the_density(df: int, t: float) -> None:
    x = np.linspace(0, t, 200_001)
    constant = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    density = constant * (1 + x**2 / df) ** (-(df + 1) / 2)
    assert t_survival(t, df) == pytest.approx(0.5 - (density.sum() - (density[0] + density[-1]) / 2) * x[1], rel=1e-8)


def test_beta_is_the_binomial_tail() -> None:
    # I_x(a, b) = P(at least a of a + b - 1 trials succeed) for whole a and b.
    for a, b, x in [(1, 1, 0.3), (3, 5, 0.2), (8, 2, 0.9), (40, 60, 0.41)]:
        n = a + b - 1
        tail = math.fsum(math.comb(n, k) * x**k * (1 - x) ** (n - k) for k in range(a, n + 1))
        assert beta_regularised(x, a, b) == pytest.approx(tail, rel=1e-11)
    assert [beta_regularised(x, 2, 3) for x in (0.0, 1.0)] == [0.0, 1.0]


def test_mean_and_deviation_of_pull_request_369() -> None:
    scores = [1.13189429, 1.13196492, 1.13444261]
    found = summary(scores)
    assert found.mean == pytest.approx(1.13277, abs=5e-6)
    assert found.sd == pytest.approx(0.00145, abs=5e-6)
    assert found.sd == pytest.approx(statistics.stdev(scores), rel=1e-12)
    assert (found.n, found.t, found.p, found.beats_record) == (3, None, None, False)


def test_a_record_is_beaten_only_by_the_margin() -> None:
    losses = [1.9000, 1.9004, 1.8996]  # sd 0.0004, standard error 0.000231
    just_lower, enough = summary(losses, 1.9040), summary(losses, 1.9080)
    assert just_lower.t == pytest.approx(-0.0010 / (0.0004 / math.sqrt(3)), rel=1e-9)
    assert just_lower.p is not None
    assert just_lower.p > 0.9
    # t = 0.003 / 0.000231 = 12.99 with 2 degrees of freedom, by the closed form 0.0029.
    assert enough.t == pytest.approx(12.99, abs=0.01)
    assert enough.p == pytest.approx(0.5 - 12.9904 / (2 * math.sqrt(2 + 12.9904**2)), rel=1e-3)
    assert (just_lower.beats_record, enough.beats_record) == (False, True)
    assert enough.margin == MARGIN_NATS


def test_what_cannot_be_tested_is_not() -> None:
    one, equal = summary([1.9], 2.0), summary([1.9, 1.9, 1.9], 2.0)
    assert (one.sd, one.t, one.p, one.beats_record) == (None, None, None, False)
    assert (equal.t, equal.p, equal.beats_record) == (None, None, False)
    for wrong in ([], [1.0, math.nan], [math.inf]):
        with pytest.raises(ValueError, match="one finite number a seed"):
            summary(wrong)
    with pytest.raises(ValueError, match="the record"):
        summary([1.0], math.nan)
