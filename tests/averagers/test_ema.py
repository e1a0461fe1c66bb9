from __future__ import annotations

import pytest
import torch
from torch import nn

from titanlm.progress import Progress
from titanlm.registry import Component


def run(n: int, dtype: torch.dtype = torch.float32, **settings):
    torch.manual_seed(1)
    model = nn.Linear(3, 2).to(dtype)
    averager = Component.named("averager", "ema", **settings).build(model=model)
    history = [model.weight.detach().double().clone()]
    for step in range(n):
        with torch.no_grad():
            model.weight.add_(torch.randn_like(model.weight))
        averager.update(Progress(step=step + 1))
        history.append(model.weight.detach().double().clone())
    return model, averager, history


def test_equals_the_weighted_sum() -> None:
    """e_n = d^n p_0 + Σ (1 − d) d^(n−k) p_k, written out."""
    d, n = 0.9, 12
    _, averager, history = run(n, decay=d, ramp=False)
    expected = d**n * history[0] + sum((1 - d) * d ** (n - k) * history[k] for k in range(1, n + 1))
    assert torch.allclose(averager.average["weight"].double(), expected, atol=1e-6)


def test_ramp() -> None:
    _, averager, history = run(5, decay=0.997, ramp=True)
    expected = history[0]
    for n, weights in enumerate(history[1:]):
        d = min(0.997, (1 + n) / (10 + n))
        expected = d * expected + (1 - d) * weights
    assert torch.allclose(averager.average["weight"].double(), expected, atol=1e-6)


def test_kept_in_fp32_for_bf16_weights() -> None:
    _, averager, _ = run(3, dtype=torch.bfloat16)
    assert averager.average["weight"].dtype == torch.float32


def test_swap_and_back() -> None:
    model, averager, _ = run(4)
    own = model.weight.detach().clone()
    with averager.swap():
        assert torch.equal(model.weight, averager.average["weight"])
    assert torch.equal(model.weight, own)
    with pytest.raises(RuntimeError), averager.swap():
        raise RuntimeError
    assert torch.equal(model.weight, own)


def test_state_round_trip_goes_on_equally() -> None:
    model, averager, _ = run(4)
    other = Component.named("averager", "ema").build(model=model)
    state = averager.state_dict()
    other.load_state_dict({"updates": state["updates"], "average": {k: v.clone() for k, v in state["average"].items()}})
    for each in (averager, other):
        each.update(Progress(step=5))
    assert torch.equal(averager.average["weight"], other.average["weight"])
    assert other.updates == 5
