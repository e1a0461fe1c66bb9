"""Squared activations against float64 formulas, forward and backward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from titanlm.config import load
from titanlm.kernels.relu2 import relu2
from titanlm.models.golf import Golf
from titanlm.models.layers.feed_forward import FeedForward, default_width

ROOT = Path(__file__).parents[2]
U = torch.tensor([-3.0, -0.5, -0.0, 0.0, 0.25, 2.0], dtype=torch.float64)


def test_values_and_slopes_by_hand() -> None:
    for slope, values, slopes in (
        (0.5, [2.25, 0.0625, 0.0, 0.0, 0.0625, 4.0], [-1.5, -0.25, 0.0, 0.0, 0.5, 4.0]),
        (0.0, [0.0, 0.0, 0.0, 0.0, 0.0625, 4.0], [0.0, 0.0, 0.0, 0.0, 0.5, 4.0]),
    ):
        u = U.clone().requires_grad_()
        h = relu2(u, slope)
        assert h.tolist() == values
        assert torch.autograd.grad(h.sum(), u)[0].tolist() == slopes
        assert torch.autograd.gradcheck(lambda u, slope=slope: relu2(u, slope), torch.randn(40, dtype=torch.float64).requires_grad_())
    assert relu2(torch.tensor([torch.nan, -torch.inf]), 0.0).tolist()[1] == 0.0
    assert relu2(torch.tensor([torch.nan]), 0.5).isnan().all()


@pytest.mark.parametrize(("activation", "slope"), [("relu2", 0.0), ("leaky_relu2", 0.5)])
def test_a_network_is_torchs(activation: Any, slope: float) -> None:
    """Values and gradients in float64, from torch's own functions; relu² to the bit what relu and square give."""
    torch.manual_seed(0)
    made = FeedForward(12, 20, activation).double()
    x = torch.randn(3, 5, 12, dtype=torch.float64, requires_grad=True)
    weights = [made.up_proj.weight, made.down_proj.weight]
    with torch.no_grad():
        for weight in weights:
            weight.normal_()

    def outcome(y: Tensor) -> list[Tensor]:
        return [y, *torch.autograd.grad((y * torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)).sum(), [x, *weights])]

    u = x @ weights[0].T
    expected = outcome(F.linear(torch.where(u > 0, u, slope * u) ** 2, weights[1]))
    for got, wanted in zip(outcome(made(x)), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    if not slope:
        assert torch.equal(made(x), F.linear(F.relu(F.linear(x, weights[0])).square(), weights[1]))
    assert default_width(96, activation) == 384


def test_the_config_of_later_records_differs_in_the_activation_alone() -> None:
    """That of pull request 549; nothing is added to what is stored."""
    made = []
    for name, activation in (("pr369_logged", "relu2"), ("leaky_relu2", "leaky_relu2")):
        config = load(ROOT / f"train_configs/golf/{name}.toml")
        with torch.device("meta"):
            model = config.model.build(vocab_size=1024, max_seq_len=config.train.seq_len)
        assert isinstance(model, Golf)
        assert {block.feed_forward.slope for block in model.blocks} == {{"relu2": 0.0, "leaky_relu2": 0.5}[activation]}  # type: ignore[union-attr]
        made.append((vars(config.model.config) | {"activation": None}, config.train, config.optimizer, {n: p.shape for n, p in model.named_parameters()}))
    assert made[0] == made[1]
