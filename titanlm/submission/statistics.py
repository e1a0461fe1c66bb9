"""Mean and spread of a submission's seeds, and a one-sided t test against a record.

The challenge asks that a new record be lower by at least 0.005 nats at
p < 0.01. Of the record one number is known, so the test takes it as exact: with
n seeds of mean m and sample standard deviation s,

    H0: the true mean is not below record - margin
    t = (record - margin - m) / (s / √n),    p = P(T > t), T Student with n - 1 degrees of freedom.

The record's own scatter would make p larger; three seeds are few, and a p from
them is only as good as the normal distribution of scores that it assumes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

MARGIN_NATS = 0.005
"""By how much a record has to be beaten."""
LEVEL = 0.01
"""At which p."""

_TINY = 1e-300
"""In place of a zero denominator (Lentz's method)."""


@dataclass(frozen=True)
class Statistics:
    """Of one score a seed, all in the unit of the scores."""

    n: int
    mean: float
    sd: float | None
    """Sample standard deviation (n - 1); None for one seed."""
    record: float | None
    margin: float
    t: float | None
    """None without a record, for one seed, and for seeds that are all equal."""
    p: float | None
    """One-sided; None where ``t`` is."""

    @property
    def beats_record(self) -> bool:
        """Lower by the margin at ``LEVEL``."""
        return self.p is not None and self.p < LEVEL


def summary(scores: Sequence[float], record: float | None = None, margin: float = MARGIN_NATS) -> Statistics:
    """Statistics of final scores, lower is better; ``record`` and ``margin`` in their unit (the challenge's margin is nats of val_loss).

    Raises ValueError for no score and for one that is not finite.
    """
    if not scores or not all(math.isfinite(value) for value in (*scores, *([] if record is None else [record]))):
        raise ValueError(f"scores are one finite number a seed, the record one or none; found {list(scores)} and {record}")
    n = len(scores)
    mean = math.fsum(scores) / n
    sd = math.sqrt(math.fsum((score - mean) ** 2 for score in scores) / (n - 1)) if n > 1 else None
    t = p = None
    if record is not None and sd and min(scores) < max(scores):
        t = (record - margin - mean) / (sd / math.sqrt(n))
        p = t_survival(t, n - 1)
    return Statistics(n, mean, sd, record, margin, t, p)


def t_survival(t: float, df: float) -> float:
    """P(T > t) of Student's t with ``df`` degrees of freedom: half of I_x(df/2, 1/2) at x = df / (df + t²) for t ≥ 0 (DLMF 8.17)."""
    tail = 0.5 * beta_regularised(df / (df + t * t), df / 2, 0.5)
    return tail if t >= 0 else 1 - tail


def beta_regularised(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I_x(a, b), 0 ≤ x ≤ 1, a and b positive.

    By the continued fraction of DLMF 8.17.22, which converges fast below the
    mean; above it, by I_x(a, b) = 1 - I_{1-x}(b, a).
    """
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - beta_regularised(1 - x, b, a)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)) / a
    return front * _fraction(x, a, b)


def _fraction(x: float, a: float, b: float) -> float:
    """1 / (1 + d₁/(1 + d₂/(1 + …))), evaluated forwards by Lentz's method as Thompson and Barnett changed it (1986)."""
    value = c = 1.0
    d = 0.0
    for k in range(1, 500):
        m = k // 2
        if k % 2:
            coefficient = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            coefficient = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        d = 1 / ((1 + coefficient * d) or _TINY)
        c = (1 + coefficient / c) or _TINY
        value *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return 1 / value
