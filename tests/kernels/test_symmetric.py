"""Symmetric products against float64: on the CPU in triton's interpreter, in a process of its own, and on a GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from titanlm.optimizers.newton_schulz import fills

CHECK = """
import torch
from titanlm.kernels.symmetric import gram, plain_gram, polynomial, plain_polynomial
from titanlm.optimizers.newton_schulz import _step, _step_by_halves

def largest(matrices):
    return matrices.abs().amax((1, 2), keepdim=True)

def check(device, dtype, shapes):
    generator = torch.Generator().manual_seed(0)
    for shape in shapes:
        for transposed in (False, True):
            x = torch.randn(shape, generator=generator).to(device, dtype)
            x = x.mT.contiguous().mT if transposed else x
            exact = x.double() @ x.double().mT
            for product in (gram, plain_gram):
                got = product(x)
                assert got.dtype == dtype and ((got - exact).abs() <= torch.finfo(dtype).eps * largest(exact)).all(), (shape, transposed, product)
            unit = (x / torch.linalg.vector_norm(x.float(), dim=(1, 2), keepdim=True)).to(dtype)
            exact = _step(unit.double(), 4.0, -2.8, 0.5)
            assert ((_step_by_halves(unit, 4.0, -2.8, 0.5) - exact).abs() <= 2 * torch.finfo(dtype).eps * largest(exact)).all(), (shape, transposed)
            a = gram(x)
            rest = (slice(None), *torch.tril_indices(shape[1], shape[1], -1))
            assert torch.equal(a[rest], a.mT[rest])
            a = a / 64
            wide = a.double()
            exact = 3.5 * torch.eye(shape[1], device=device, dtype=torch.float64) - 4.75 * wide + 2.0 * wide @ wide
            for product in (polynomial, plain_polynomial):
                got = product(a, 3.5, -4.75, 2.0)
                assert got.dtype == dtype and ((got - exact).abs() <= torch.finfo(dtype).eps * largest(exact)).all(), (shape, transposed, product)
"""

SHAPES = [(2, 128, 64), (1, 200, 100), (3, 1, 7), (2, 130, 300), (0, 5, 5)]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_in_the_interpreter() -> None:
    """Tiles on and off the diagonal, cut ones, rows that lie apart, no matrices at all. It multiplies bf16 as if it were integers: fp16 here."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", f"{CHECK}\ncheck('cpu', torch.float16, {SHAPES})"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


def test_titanlm_imports_neither_triton_nor_the_compiler() -> None:
    names = "('triton', 'torch._inductor', 'torch._dynamo', 'titanlm.kernels.jit')"
    code = f"import sys, titanlm.train, titanlm.optimizers.muon; print([name for name in {names} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr[-2000:]


def test_they_serve_for_banks_that_fill_a_gpu() -> None:
    assert all(fills(n, rows) for n, rows in [(22, 512), (88, 256), (39, 384), (5, 1024), (1, 2048), (14, 3840)])
    assert not any(fills(n, rows) for n, rows in [(22, 256), (4, 512), (3, 1024), (1000, 128), (0, 512)])


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    names: dict[str, object] = {}
    exec(CHECK, names)
    names["check"]("cuda", torch.bfloat16, [*SHAPES, (4, 512, 1536), (2, 1024, 1024), (1, 2048, 512)])  # type: ignore[operator]


@pytest.mark.gpu
@pytest.mark.parametrize("coefficients", ["quintic", "polar_express"])
@pytest.mark.parametrize("shape", [(3, 1024, 2048), (2, 2048, 1024), (1, 1100, 1100), (3, 256, 512), (4, 512, 3840)])
def test_newton_schulz_with_them_is_as_near_to_float64_as_without(shape: tuple[int, int, int], coefficients: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from titanlm.optimizers import newton_schulz as module

    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to("cuda", torch.bfloat16)
    exact = module.newton_schulz(x.double(), 5, coefficients)
    errors = []
    for smallest in (1, 1 << 30):
        monkeypatch.setattr(module, "SYMMETRIC_FROM", smallest)
        monkeypatch.setattr(module, "SYMMETRIC_TILES", 0)
        errors.append(float((module.newton_schulz(x, 5, coefficients) - exact).norm() / exact.norm()))
    assert errors[0] < 1.2 * errors[1] + 1e-3
