"""Every scheduler against its closed form, written out here in another way."""

from __future__ import annotations

import math

import pytest
import torch

from titanlm.progress import Progress
from titanlm.registry import Component


def factors(name: str, total: int, **settings: object) -> list[float]:
    scheduler = Component.named("scheduler", name, **settings).build(total_steps=total)
    return [scheduler.factor(Progress(step=step)) for step in range(total)]


def test_constant_with_warmup() -> None:
    assert factors("constant", 6, warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert factors("constant", 3) == [1.0, 1.0, 1.0]


def test_linear_equals_torch_linear_lr() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    reference = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=0.1, total_iters=20)
    expected = []
    for _ in range(20):
        expected.append(reference.get_last_lr()[0])
        optimizer.step()
        reference.step()
    assert factors("linear", 20, min_factor=0.1) == pytest.approx(expected, abs=1e-12)


def test_cosine_equals_torch_cosine_annealing_after_warmup() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=25, eta_min=0.1)
    expected = []
    for _ in range(25):
        expected.append(reference.get_last_lr()[0])
        optimizer.step()
        reference.step()
    got = factors("cosine", 30, warmup_steps=5, min_factor=0.1)
    assert got[:5] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert got[5:] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("shape", "form"),
    [("linear", lambda u: 1 - u), ("sqrt", lambda u: 1 - u**0.5), ("cosine", lambda u: math.cos(math.pi * u / 2) ** 2)],
)
def test_wsd(shape: str, form) -> None:
    got = factors("wsd", 20, warmup_steps=2, decay_steps=8, shape=shape, min_factor=0.2)
    assert got[:12] == [0.5] + [1.0] * 11
    assert got[12:] == pytest.approx([0.2 + 0.8 * form(k / 8) for k in range(8)], abs=1e-12)


def test_wsd_stable_part_does_not_depend_on_the_length() -> None:
    assert factors("wsd", 100, warmup_steps=5, decay_steps=10)[:50] == factors("wsd", 1000, warmup_steps=5, decay_steps=10)[:50]


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "wsd"])
def test_never_zero_at_the_first_step_nor_above_one(name: str) -> None:
    values = factors(name, 50, warmup_steps=7)
    assert values[0] > 0
    assert max(values) == 1.0


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "wsd"])
def test_warmup_longer_than_the_run_is_an_error(name: str) -> None:
    with pytest.raises(ValueError, match=r"warmup_steps.*20"):
        factors(name, 20, warmup_steps=21)


def test_phases_longer_than_the_run_are_an_error() -> None:
    with pytest.raises(ValueError, match="decay_steps 15"):
        factors("wsd", 20, warmup_steps=6, decay_steps=15)
