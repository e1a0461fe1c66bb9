"""What modules multiply by their matrices with where nothing else is set."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from titanlm.models.layers import product
from titanlm.models.layers.product import plain_product


def passes(x: Tensor, weight: Tensor, g: Tensor) -> list[Tensor]:
    """Output and gradients, (5, 3, 7) and (11, 7) being multiplied."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = plain_product(x, weight)
    y.backward(g)
    assert x.grad is not None
    assert weight.grad is not None
    return [y.detach(), x.grad, weight.grad]


@pytest.mark.parametrize("has_bf16", [False, True])
def test_bf16_is_rounded_once_whatever_the_cpu_can_do(has_bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exact products of the rounded numbers, to within half a unit in the last place, forward and backward."""
    monkeypatch.setattr(product, "_CPU_MULTIPLIES_BF16", has_bf16)
    generator = torch.Generator().manual_seed(0)
    x, weight, g = (torch.randn(shape, generator=generator).bfloat16() for shape in ((5, 3, 7), (11, 7), (5, 3, 11)))
    rows, gradients = x.double().flatten(0, 1), g.double().flatten(0, 1)
    exact = [x.double() @ weight.double().T, g.double() @ weight.double(), gradients.T @ rows]
    for ours, true in zip(passes(x, weight, g), exact, strict=True):
        assert ours.dtype == torch.bfloat16
        # Sums that cancel are as exact as fp32, and their bf16 is finer than that.
        torch.testing.assert_close(ours.double(), true, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_dtypes_are_torchs_to_the_bit(dtype: torch.dtype) -> None:
    x, weight = torch.randn(4, 7, dtype=dtype), torch.randn(5, 7, dtype=dtype)
    assert torch.equal(plain_product(x, weight), F.linear(x, weight))


def test_other_devices_multiply_in_bf16() -> None:
    """No wide copy is made of operands that no CPU multiplies."""
    x, weight = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in ((4, 7), (5, 7)))
    with torch.profiler.profile() as profile:
        plain_product(x, weight)
    assert "aten::to" not in {event.key for event in profile.key_averages()}
