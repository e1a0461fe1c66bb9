"""GPTQ against a plain loop over columns, against nearest, and against the error that theory gives it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from titanlm.errors import ArtifactError, NonFiniteError
from titanlm.exporters.encoding import Encoded
from titanlm.quantizers.gptq import gptq
from titanlm.quantizers.rowwise import Rowwise
from titanlm.registry import Component

COARSE = ("sdclip", {"bits": 5, "k": 10.0})
"""Steps of 0.67 deviations, and nothing is clipped."""


def build(name: str = "int6", **settings: object) -> Rowwise:
    quantizer = Component.named("quantizer", name, **{"rounding": "gptq", **settings}).build()
    assert isinstance(quantizer, Rowwise)
    return quantizer


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def correlated(n: int, rho: float = 0.9) -> Tensor:
    """Covariance of a first-order autoregression: neighbours are alike, the determinant is (1 - ρ²)^(n-1)."""
    place = torch.arange(n, dtype=torch.float64)
    return rho ** (place[:, None] - place).abs()


def moments(n: int, n_inputs: int, seed: int = 1) -> Tensor:
    """Σ x xᵀ of drawn inputs that are correlated and of unequal variance."""
    mixing = (
        torch.linalg.cholesky(correlated(n)) * torch.linspace(3, 0.1, n).double()[torch.randperm(n, generator=torch.Generator().manual_seed(seed))][:, None]
    )
    x = drawn(n_inputs, n, seed=seed).double() @ mixing.T
    return x.T @ x


def loop(w: np.ndarray, scale: np.ndarray, hessian: np.ndarray, clip: int, damp: float) -> np.ndarray:
    """The records' description, a column at a time, all later columns corrected at once, by the inverse itself."""
    w, hessian = w.copy(), hessian.copy()
    dead = np.diag(hessian) == 0
    hessian[dead, dead] = np.diag(hessian)[~dead].mean()
    w[:, dead] = 0
    hessian += damp * np.diag(hessian).mean() * np.eye(len(hessian))
    order = np.argsort(-np.diag(hessian), kind="stable")
    w, hessian = w[:, order], hessian[order][:, order]
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    q = np.zeros_like(w)
    for j in range(w.shape[1]):
        q[:, j] = np.clip(np.round(w[:, j] / scale), -clip - 1, clip)
        error = (w[:, j] - q[:, j] * scale) / upper[j, j]
        w[:, j:] -= error[:, None] * upper[j, j:]
    undone = np.empty_like(q)
    undone[:, order] = q
    return undone


@pytest.mark.parametrize("n", [5, 128, 300])
@pytest.mark.parametrize("damp", [0.01, 0.3])
@pytest.mark.parametrize(("name", "settings", "clip"), [("int8", {}, 127), ("int6", {}, 31), ("int5", {"clip_quantile": 0.95}, 15), ("sdclip", {"k": 2.5}, 31)])
def test_matches_a_loop_over_columns(name: str, settings: dict, clip: int, damp: float, n: int) -> None:
    w, hessian = drawn(9, n), moments(n, 2 * n)
    dead = torch.tensor([1, 3])
    hessian[dead], hessian[:, dead] = 0, 0
    quantizer = build(name, gptq_damp=damp, **settings)
    encoded = quantizer.encode_calibrated(w, hessian)
    expected = loop(w.double().numpy(), encoded.parts["scale"].double().numpy(), hessian.numpy(), clip, damp)
    assert encoded.parts["values"].tolist() == expected.tolist()
    # Nothing else is different, so decoding is not.
    nearest = quantizer.encode(w)
    assert torch.equal(nearest.parts["scale"], encoded.parts["scale"])
    assert (nearest.bits, nearest.settings, nearest.quantizer) == (encoded.bits, encoded.settings, encoded.quantizer)
    assert not torch.equal(nearest.parts["values"], encoded.parts["values"])
    assert bool((encoded.parts["values"][:, dead] == 0).all())


@pytest.mark.parametrize(("name", "settings"), [("int5", {}), ("int6", {}), ("int8", {"clip_quantile": 0.9}), COARSE])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_inputs_without_correlation_leave_nothing_to_correct(name: str, settings: dict, dtype: torch.dtype) -> None:
    w = drawn(3, 4, 200).to(dtype)
    quantizer = build(name, **settings)
    for hessian in (torch.eye(200), torch.linspace(0.1, 9, 200).diag()):
        assert same(quantizer.encode_calibrated(w, hessian), quantizer.encode(w))


def same(a: Encoded, b: Encoded) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and all(torch.equal(part, b.parts[key]) for key, part in a.parts.items())


@pytest.mark.parametrize("rho", [0.5, 0.9, 0.99])
def test_the_change_of_outputs_is_that_of_theory(rho: float) -> None:
    """A remainder is uniform on a step. Nearest has s²/12 · tr H; GPTQ s²/12 · Σ var(input | those after it): 1 - ρ² each but for the last."""
    n = 400
    w, hessian = drawn(400, n), correlated(n, rho)
    quantizer = build(*COARSE[:1], **COARSE[1], gptq_damp=1e-9)

    def change(encoded: Encoded) -> float:
        error = (quantizer.decode(encoded) - w).double()
        step = encoded.parts["scale"].double()
        return float(((error @ hessian * error).sum(1) / (step.square() / 12)).mean())

    nearest, calibrated = change(quantizer.encode(w)), change(quantizer.encode_calibrated(w, hessian))
    assert nearest == pytest.approx(n, rel=0.05)
    assert calibrated == pytest.approx(1 + (n - 1) * (1 - rho**2), rel=0.02)


def test_outputs_on_the_calibration_inputs_change_less() -> None:
    """With inputs themselves, fewer than there are weights: row by row, not only in the mean."""
    w, x = drawn(50, 96), drawn(40, 96, seed=3) @ torch.linalg.cholesky(correlated(96)).float().T
    quantizer = build(*COARSE[:1], **COARSE[1])
    nearest, calibrated = (
        ((quantizer.decode(encoded) - w) @ x.T).square().sum(1) for encoded in (quantizer.encode(w), quantizer.encode_calibrated(w, x.T @ x))
    )
    assert bool((calibrated < nearest).all())
    assert float(calibrated.sum()) < 0.1 * float(nearest.sum())


def test_neither_the_unit_nor_the_order_of_inputs_matters() -> None:
    w, hessian, order = drawn(6, 150), moments(150, 300), torch.randperm(150, generator=torch.Generator().manual_seed(5))
    hessian[7], hessian[:, 7] = 0, 0
    quantizer = build()
    values = quantizer.encode_calibrated(w, hessian).parts["values"]
    for unit in (2.0**-30, 2.0**20):
        assert torch.equal(quantizer.encode_calibrated(w, hessian * unit).parts["values"], values)
    assert torch.equal(quantizer.encode_calibrated(w[:, order], hessian[order][:, order]).parts["values"], values[:, order])
    assert same(quantizer.encode_calibrated(w.view(2, 3, 150), hessian), quantizer.encode_calibrated(w.view(2, 3, 150), hessian.clone()))
    assert torch.equal(quantizer.encode_calibrated(w.view(2, 3, 150), hessian).parts["values"], values.view(2, 3, 150))


def test_rows_of_zeros_and_inputs_that_never_came() -> None:
    w = drawn(3, 20)
    w[1] = 0
    decoded = build().decode(build().encode_calibrated(w, moments(20, 40)))
    assert torch.equal(decoded[1], w[1])
    assert bool((build().encode_calibrated(w, torch.zeros(20, 20)).parts["values"] == 0).all())


# ---------------------------------------------------------------- numerics
def test_fewer_inputs_than_weights() -> None:
    """A singular matrix, damped by less and less, in float32: there is a factor, and the change of outputs goes towards none."""
    x = drawn(10, 64, seed=7)
    w, changes = drawn(30, 64), []
    for damp in (1e-1, 1e-2, 1e-3):
        quantizer = build("int5", gptq_damp=damp)
        changes.append(float(((quantizer.decode(quantizer.encode_calibrated(w, x.T @ x)) - w) @ x.T).square().sum()))
    assert changes[0] > changes[1] > changes[2]


def test_damping_is_raised_where_it_is_too_little_and_no_further_than_told() -> None:
    """The smallest eigenvalue is -0.005 of the mean of the diagonal: dampings of 1e-4 and 1e-3 do not do, 1e-2 does."""
    n = 40
    w, direction = drawn(4, n), torch.nn.functional.normalize(drawn(n, seed=2).double(), dim=0)
    hessian = torch.eye(n).double() - 1.005 * torch.outer(direction, direction)
    hessian *= n / hessian.trace()
    lowest = float(torch.linalg.eigvalsh(hessian)[0])
    assert -0.01 < lowest < -0.001
    raised, enough = build(gptq_damp=1e-4).encode_calibrated(w, hessian), build(gptq_damp=1e-2).encode_calibrated(w, hessian)
    assert same(raised, enough)
    with pytest.raises(ArtifactError, match="not positive definite with gptq_damp = 1e-06 and 10, 100, 1,000 times that; raise gptq_damp or calibrate"):
        build(gptq_damp=1e-6).encode_calibrated(w, hessian)


def test_what_is_no_second_moment_is_named() -> None:
    w = drawn(4, 6)
    with pytest.raises(ArtifactError, match=r"shape \(5, 5\) do not belong to rows of 6 weights, which need \(6, 6\)"):
        build().encode_calibrated(w, torch.eye(5))
    for bad in (math.nan, math.inf):
        with pytest.raises(NonFiniteError, match="second moments of its inputs hold nan or inf"):
            build().encode_calibrated(w, torch.full((6, 6), bad))
    with pytest.raises(NonFiniteError, match="first in row 2"):
        build().encode_calibrated(w.index_fill(0, torch.tensor(2), math.nan), torch.eye(6))


@pytest.mark.parametrize("shape", [(0, 6), (3, 0), (6,)])
def test_shapes_at_the_edge(shape: tuple[int, ...]) -> None:
    w = drawn(*shape)
    assert same(build().encode_calibrated(w, torch.eye(shape[-1])), build().encode(w))


@pytest.mark.gpu
def test_computed_where_the_moments_are() -> None:
    w, hessian = drawn(64, 300), moments(300, 600)
    there, here = build().encode_calibrated(w, hessian.cuda()), build().encode_calibrated(w, hessian)
    assert {part.device.type for part in there.parts.values()} == {"cpu"}
    assert torch.equal(there.parts["scale"], here.parts["scale"])
    assert float((there.parts["values"] != here.parts["values"]).float().mean()) < 1e-3


def test_who_wants_calibration() -> None:
    assert build().calibrated
    assert not build(rounding="nearest").calibrated


def test_the_rule_of_rounding_is_the_callers() -> None:
    """Any rounding may be made good for: here to even numbers, of scale 1."""
    w, hessian = 20 * drawn(5, 30), moments(30, 60)
    levels = gptq(w, torch.ones(5), hessian, lambda column: (2 * (column / 2).round()).clamp(-128, 126).to(torch.int8), damp=0.01)
    assert levels.dtype == torch.int8
    assert bool((levels % 2 == 0).all())
    error, nearest = (levels - w).double(), (2 * (w / 2).round() - w).double()
    assert float((error @ hessian * error).sum()) < 0.7 * float((nearest @ hessian * nearest).sum())
