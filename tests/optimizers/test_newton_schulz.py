"""Newton-Schulz against a float64 loop, a singular value decomposition and the published rounded coefficients."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from titanlm import precision
from titanlm.optimizers.newton_schulz import TRIPLES, newton_schulz

ROUNDED = [
    (8.15655, -22.48329, 15.87877),
    (4.04293, -2.80892, 0.50002),
    (3.89167, -2.77248, 0.50606),
    (3.28575, -2.36813, 0.46449),
    (2.34654, -1.70978, 0.42324),
]
"""Polar Express, as the records of parameter golf print it."""


def reference(matrix: np.ndarray, steps: int, coefficients: str) -> np.ndarray:
    """The polynomial on the singular values, one at a time: no matrix is multiplied by itself."""
    u, singular, vh = np.linalg.svd(matrix / (np.sqrt((matrix**2).sum()) + 1e-7), full_matrices=False)
    triples = list(TRIPLES[coefficients])
    polynomials = (triples + [triples[-1]] * steps)[:steps]
    for index, s in enumerate(singular):
        for a, b, c in polynomials:
            s = a * s + b * s**3 + c * s**5
        singular[index] = s
    return (u * singular) @ vh


def test_digits() -> None:
    assert [tuple(round(value, 5) for value in triple) for triple in TRIPLES["polar_express"]] == ROUNDED
    assert TRIPLES["quintic"] == ((3.4445, -4.7750, 2.0315),)


@pytest.mark.parametrize("shape", [(6, 6), (5, 9), (9, 5), (1, 7), (7, 1), (1, 1)])
@pytest.mark.parametrize("coefficients", ["quintic", "polar_express"])
@pytest.mark.parametrize("steps", [1, 5, 7])
def test_equals_the_polynomial_of_the_singular_values(shape: tuple[int, int], coefficients: str, steps: int) -> None:
    matrix = np.random.default_rng(0).normal(size=shape)
    got = newton_schulz(torch.from_numpy(matrix), steps, coefficients).numpy()
    np.testing.assert_allclose(got, reference(matrix, steps, coefficients), rtol=0, atol=1e-11)


@pytest.mark.parametrize(("coefficients", "low", "high"), [("quintic", 0.66, 1.22), ("polar_express", 0.85, 1.15)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_singular_values_come_near_one(coefficients: str, low: float, high: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    directions = torch.linalg.qr(torch.randn(24, 24)).Q @ torch.diag(torch.logspace(0, -1.5, 24)) @ torch.linalg.qr(torch.randn(40, 24)).Q.T
    singular = torch.linalg.svdvals(newton_schulz(directions.to(dtype), 5, coefficients).float())
    assert low < singular.min()
    assert singular.max() < high


@pytest.mark.parametrize("has_bf16", [False, True])
@pytest.mark.parametrize("shape", [(2, 24, 40), (2, 40, 24)])
def test_bf16_is_rounded_once_a_product_whatever_the_cpu_can_do(has_bf16: bool, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside float64 products of the rounded numbers; sums in another order may round the other way, and singular values near 1 keep that small."""
    monkeypatch.setattr(precision, "CPU_MULTIPLIES_BF16", has_bf16)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    dtypes: set[torch.dtype] = set()
    bmm = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: dtypes.add(a.dtype) or bmm(a, b))
    got = newton_schulz(x, 5, "polar_express")
    assert dtypes == {torch.bfloat16 if has_bf16 else torch.float32}
    assert got.dtype == torch.bfloat16

    def rounded(exact: torch.Tensor) -> torch.Tensor:
        return exact.bfloat16().double()

    bank = x / (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) + 1e-7)
    want = (bank.mT if shape[1] > shape[2] else bank).double()
    for a, b, c in TRIPLES["polar_express"]:
        squares = rounded(want @ want.mT)
        want = rounded(a * want + rounded(b * squares + c * squares @ squares) @ want)
    torch.testing.assert_close(got.double(), want.mT if shape[1] > shape[2] else want, rtol=0, atol=0.01)
    assert (got.double() == (want.mT if shape[1] > shape[2] else want)).float().mean() > 0.5


def test_polar_express_is_nearer_to_the_polar_factor() -> None:
    torch.manual_seed(0)
    x = torch.randn(32, 48, dtype=torch.float64)
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    distance = {name: (newton_schulz(x, 5, name) - u @ vh).norm() for name in TRIPLES}
    assert distance["polar_express"] < 0.5 * distance["quintic"]


def test_any_leading_dimensions() -> None:
    """Of a bank each matrix is what it is alone, in its own scale; the input is left as it was."""
    torch.manual_seed(0)
    for shape in ((2, 3, 8, 5), (6, 5, 8), (0, 4, 6)):
        x = torch.randn(shape, dtype=torch.float64) * torch.logspace(-3, 3, 6, dtype=torch.float64)[: shape[0]].view(-1, *[1] * (len(shape) - 1))
        before = x.clone()
        got = newton_schulz(x, 5, "quintic")
        assert got.shape == x.shape
        for index in np.ndindex(shape[:-2]):
            torch.testing.assert_close(got[index], newton_schulz(x[index], 5, "quintic"), rtol=0, atol=1e-12)
        assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeros_stay_zero(dtype: torch.dtype) -> None:
    assert torch.equal(newton_schulz(torch.zeros(2, 3, 4, dtype=dtype), 5, "polar_express"), torch.zeros(2, 3, 4, dtype=dtype))
