"""Products and attention where nothing else is set: on a CPU, with and without instructions for bf16."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from titanlm import precision
from titanlm.models.layers.attention import attend_by_torch
from titanlm.models.layers.embedding import Embedding
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
    monkeypatch.setattr(precision, "CPU_MULTIPLIES_BF16", has_bf16)
    generator = torch.Generator().manual_seed(0)
    x, weight, g = (torch.randn(shape, generator=generator).bfloat16() for shape in ((5, 3, 7), (11, 7), (5, 3, 11)))
    dtypes: list[torch.dtype] = []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda x, weight: dtypes.append(x.dtype) or linear(x, weight))
    rows, gradients = x.double().flatten(0, 1), g.double().flatten(0, 1)
    exact = [x.double() @ weight.double().T, g.double() @ weight.double(), gradients.T @ rows]
    for ours, true in zip(passes(x, weight, g), exact, strict=True):
        assert ours.dtype == torch.bfloat16
        # Sums that cancel are as exact as fp32, and their bf16 is finer than that.
        torch.testing.assert_close(ours.double(), true, rtol=2**-8, atol=1e-6)
    assert dtypes == [torch.bfloat16 if has_bf16 else torch.float32]


@pytest.mark.parametrize("has_bf16", [False, True])
@pytest.mark.parametrize("backend", ["sdpa", "math"])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_in_bf16_is_near_the_exact_one_whatever_the_cpu_can_do(has_bf16: bool, backend: str, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four heads, two of keys, beside the same inputs in float64, forward and backward; where bf16 is multiplied in fp32, to half a unit in the last place."""
    monkeypatch.setattr(precision, "CPU_MULTIPLIES_BF16", has_bf16)
    generator = torch.Generator().manual_seed(0)
    q, k, v, g = (torch.randn(2, 9, heads, 8, generator=generator).bfloat16() for heads in (4, 2, 2, 4))
    ids = torch.arange(9) // 4
    mask = ((ids[:, None] == ids) & torch.ones(9, 9, dtype=torch.bool).tril())[None, None] if masked else None

    def attended(dtype: torch.dtype) -> list[Tensor]:
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        y = attend_by_torch(backend, *inputs, mask)
        assert y.dtype == dtype
        return [y.detach(), *torch.autograd.grad(y, inputs, g.to(dtype))]

    near = {"rtol": 0.05, "atol": 0.03} if has_bf16 else {"rtol": 2**-8, "atol": 1e-6}
    for ours, exact in zip(attended(torch.bfloat16), attended(torch.float64), strict=True):
        torch.testing.assert_close(ours.double(), exact, **near)


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


@pytest.mark.parametrize("has_bf16", [False, True])
def test_a_factorised_embedding_multiplies_as_matrices_do(has_bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "CPU_MULTIPLIES_BF16", has_bf16)
    embedding = Embedding(11, 24, rank=8)
    for parameter in embedding.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    embedding.compute_dtype = torch.bfloat16
    tokens = torch.arange(11)
    x, projection = (parameter.detach().bfloat16() for parameter in embedding.parameters())
    dtypes: set[torch.dtype] = set()
    monkeypatch.setattr(Tensor, "__matmul__", lambda a, b: dtypes.add(a.dtype) or torch.matmul(a, b))
    y = embedding(tokens)
    assert dtypes == {torch.bfloat16 if has_bf16 else torch.float32}
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), torch.matmul(x.double(), projection.double()), rtol=2**-8, atol=1e-6)
