"""GPTQ: weights rounded one input at a time, each error made good by the inputs still to come.

Frantar et al. 2022, arXiv:2210.17323; order of columns and damping as in the
records of openai/parameter-golf (pull requests 535 to 1394). A row w meets
inputs x with second moments H = Σ x xᵀ. Rounded to w' it changes its outputs by
(w - w') H (w - w')ᵀ, which rounding each weight to the nearest level does not
make small where inputs are correlated. With U upper triangular and UᵀU = H⁻¹,
for j in order:

    q_j = nearest(w_j),    e_j = (w_j - q_j s) / U_jj,    w_j… -= e_j U_j,j…

Then w - w' = e U, and the change is Σ e_j²: the remainder of each rounding,
times the variance of its input given those after it, where nearest has its full
variance. Inputs with much of it come first, when most can still be made good.
Blocks of columns change nothing but the speed: what a block owes to the columns
behind it is paid in one matrix product.

An input that was always 0 has nothing to say about its weights: they become 0,
as in the records. The records set its variance to 1 before they take the mean
for the damping, which depends on the unit of H; here the mean is of the others,
so a sum over inputs and their average give the same.

U is had without H⁻¹: with rows and columns reversed the lower Cholesky factor
of H is an upper one, H = R Rᵀ, and U = R⁻¹. All of it in float64.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from titanlm.errors import ArtifactError, NonFiniteError

_BLOCK = 128
_DAMPINGS = (1, 10, 100, 1000)
"""Multiples of the damping that are tried in turn."""


def gptq(rows: Tensor, scale: Tensor, hessian: Tensor, nearest: Callable[[Tensor], Tensor], *, damp: float) -> Tensor:
    """(R, n) weights → (R, n) int8 levels, so that levels · scale changes the rows' outputs little.

    ``scale`` is (R,), ``hessian`` (n, n) in any unit; ``nearest`` takes one
    weight of every row, (R,) float64, to its level, int8. ``damp`` times the
    mean of the diagonal is added to the diagonal, and up to a thousand times
    as much where the sum is not positive definite. Raises ArtifactError for a
    hessian of another shape, or not positive definite even then, and
    NonFiniteError for one with nan or inf.
    """
    n = rows.shape[1]
    if tuple(hessian.shape) != (n, n):
        raise ArtifactError(f"second moments of shape {tuple(hessian.shape)} do not belong to rows of {n} weights, which need {(n, n)}")
    if not torch.isfinite(hessian).all():
        raise NonFiniteError("the second moments of its inputs hold nan or inf, as activations on the calibration data must have")
    diagonal = hessian.diagonal()
    order = diagonal.argsort(descending=True, stable=True)
    order = order[diagonal[order] != 0]
    u = _inverse_factor(hessian.double()[order][:, order], damp)
    w, grid = rows.double().T[order], scale.double()  # what is read at a time lies together
    rounded = torch.empty_like(w, dtype=torch.int8)
    for start in range(0, len(w), _BLOCK):
        stop = min(start + _BLOCK, len(w))
        errors = torch.empty_like(w[start:stop])
        for j in range(start, stop):
            rounded[j] = nearest(w[j])
            errors[j - start] = (w[j] - rounded[j] * grid) / u[j, j]
            w[j:stop] -= u[j, j:stop, None] * errors[j - start]
        w[stop:] -= u[start:stop, stop:].T @ errors
    levels = torch.zeros_like(rows, dtype=torch.int8)
    levels[:, order] = rounded.T
    return levels


def _inverse_factor(hessian: Tensor, damp: float) -> Tensor:
    """Upper triangular U with UᵀU = (H + damp · mean(diag H) · 1)⁻¹, (n, n) float64."""
    one = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    for multiple in _DAMPINGS:
        factor, failed = torch.linalg.cholesky_ex((hessian + multiple * damp * hessian.diagonal().mean() * one).flip(0, 1))
        if not failed:
            return torch.linalg.solve_triangular(factor.flip(0, 1), one, upper=True)
    tried = f"gptq_damp = {damp:g} and {', '.join(f'{multiple:,}' for multiple in _DAMPINGS[1:])} times that"
    raise ArtifactError(f"the second moments of its inputs are not positive definite with {tried}; raise gptq_damp or calibrate on more data")
