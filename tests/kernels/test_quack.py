"""Products by QuACK: what is asked of the package, that it compiles, and on Hopper values and gradients."""

from __future__ import annotations

import hashlib
import inspect
import os
import subprocess
import sys
import textwrap
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from titanlm.kernels import fused, products_quack, relu2, relu2_triton
from titanlm.kernels.product_onto import ProductOnto
from titanlm.kernels.relu2 import Relu2Network


class Played:
    """What the package makes of a function of a tile: here of the whole product, in torch."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __call__(self, a: Tensor, b: Tensor, *c: Tensor, out: dict[str, Tensor], tuned: bool) -> None:
        assert not tuned
        out["D"].copy_(self.function(a.float() @ b.float(), *(each.float() for each in c))["D"])


@pytest.fixture
def quack(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    parts: dict[str, dict[str, Any]] = {
        "quack": {"activation": SimpleNamespace(relu_sq=lambda u: u.clamp(min=0) * u)},
        "quack.epilogue": {"gemm_epilogue": lambda: Played},
        "cutlass": {},
        "cutlass.cute": {"math": SimpleNamespace(sqrt=lambda v, fastmath: v.sqrt())},
    }
    for name, has in parts.items():
        module = ModuleType(name)
        vars(module).update(has)
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["cutlass"].cute = sys.modules["cutlass.cute"]  # type: ignore[attr-defined]
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("QUACK_CACHE_DIR", "")
    del os.environ["QUACK_CACHE_DIR"]
    products_quack._epilogues.cache_clear()
    yield
    products_quack._epilogues.cache_clear()


def drawn(*shape: int, device: str = "cpu", scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(*shape, device=device)).bfloat16()


def test_functions_of_a_tile(quack: None, tmp_path: Path) -> None:
    a, b, c = drawn(5, 16), drawn(8, 16), drawn(5, 8)
    u = (a.double() @ b.double().T).requires_grad_()
    h = relu2.relu2(u, 0.0)
    torch.testing.assert_close(products_quack.square(a, b).double(), h, rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(products_quack.add(a, b, c).double(), u + c, rtol=2**-8, atol=1e-5)
    (wanted,) = torch.autograd.grad(h, u, (g := drawn(5, 16)).double() @ b.double().T)
    torch.testing.assert_close(products_quack.slope(g, b, h.detach().bfloat16()).double(), wanted, rtol=2**-7, atol=1e-5)
    assert os.environ["QUACK_CACHE_DIR"] == str(tmp_path / "quack")


def test_the_package_serves_relu2_alone(quack: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaky relu² keeps its Triton kernel, and so does all where the package does not serve."""
    a, b = drawn(5, 16), drawn(8, 16)
    monkeypatch.setattr(relu2_triton, "product", lambda *_: ["Triton"])
    assert relu2._product(a, b, None, 0.0) == ["Triton"]
    monkeypatch.setattr(products_quack, "serves", lambda x: True)
    (h,) = relu2._product(a, b, None, 0.0)
    assert torch.equal(h, products_quack.square(a, b))
    assert torch.equal(relu2._product(a, b, h, 0.0)[0], products_quack.slope(a, b, h))
    assert relu2._product(a, b, None, 0.5) == ["Triton"]


def test_hopper_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for has, major, serves in ((True, 9, True), (True, 10, False), (True, 8, False), (True, 0, False), (False, 9, False)):
        monkeypatch.setattr(products_quack, "HAS_QUACK", has)
        monkeypatch.setattr(fused, "_major", lambda index, major=major: major)
        assert products_quack.serve(0) == serves
    assert not products_quack.serves(torch.ones(1))


@pytest.mark.parametrize(("version", "has"), [("0.6.5", True), ("0.6.12", True), ("0.6.4", False), ("0.7.0", False), ("0.6.5rc1", False), (None, False)])
def test_versions_like_the_one_that_was_tried(monkeypatch: pytest.MonkeyPatch, version: str | None, has: bool) -> None:
    def installed(name: str) -> str:
        if version is None:
            raise PackageNotFoundError(name)
        return version

    monkeypatch.setattr(products_quack.importlib.metadata, "version", installed)
    assert products_quack._installed() == has


def test_what_is_done_to_a_tile_has_a_name_of_its_own(quack: None) -> None:
    """By its name alone the package finds what it compiled, in a folder that outlives an upgrade; so with this digest the name has to change."""
    found = {
        name: hashlib.sha256(textwrap.dedent(inspect.getsource(made.function)).encode()).hexdigest()[:8] for name, made in products_quack._epilogues().items()
    }
    assert found == {"square": "b1c9be2e", "slope": "65797ce7", "add": "3b15e4a4"}


def test_a_package_with_other_names_costs_the_files_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("quack", "quack.gemm_runtime.host", "quack.cache", "quack.cache.jit"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    assert products_quack.kernels_in_use() == []


def test_an_empty_folder_is_none(quack: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QUACK_CACHE_DIR", "")
    products_quack.keep_on_disk()
    assert os.environ["QUACK_CACHE_DIR"] == str(tmp_path / "quack")


COMPILED = """
import torch
from quack.cache.async_compile import _install_gpu_blind_device_attrs
from quack.gemm_runtime import host
from titanlm.kernels import products_quack
_install_gpu_blind_device_attrs()
host.get_max_active_clusters = lambda *args, **named: 66
for name, function in products_quack._epilogues().items():
    a, b, c = (torch.empty(shape, dtype=torch.bfloat16) for shape in ((300, 512), (1536, 512), (300, 1536)))
    function.plan(a, b.T, *([] if name == "square" else [c]), out={"D": torch.empty_like(c)})
print(len(products_quack.kernels_in_use()))
"""


@pytest.mark.slow
@pytest.mark.skipif(not products_quack.HAS_QUACK, reason="needs quack-kernels")
def test_compiles_for_hopper(tmp_path: Path) -> None:
    """No GPU is needed; and a second process finds every file, by names that are the same there."""
    settings = {"QUACK_ARCH": "90", "CUTE_DSL_ARCH": "sm_90a", "CUDA_VISIBLE_DEVICES": "", "QUACK_CACHE_DIR": str(tmp_path)}
    made = []
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", COMPILED], env={**os.environ, **settings}, capture_output=True, text=True, check=False, timeout=280)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "3"
        made.append({path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.o")})
    assert made[0] == made[1]
    assert len(made[0]) == 3


# ---------------------------------------------------------------- on Hopper
@pytest.fixture
def hopper() -> str:
    if not (torch.cuda.is_available() and products_quack.serve(0)):
        pytest.skip("needs quack-kernels and a Hopper GPU")
    torch.manual_seed(0)
    return "cuda"


SHAPES = pytest.mark.parametrize(("m", "n", "k"), [(1, 512, 512), (257, 1024, 512), (4097, 1536, 512), (301, 512, 1536), (77, 520, 136)])


def close(got: Tensor, wanted: Tensor, tolerance: float = 0.01) -> None:
    """To a share of the largest magnitude."""
    assert got.dtype == torch.bfloat16
    assert (got.double() - wanted.double()).abs().max() <= tolerance * wanted.abs().max()


@pytest.mark.gpu
@SHAPES
def test_products(hopper: str, m: int, n: int, k: int) -> None:
    a, b, c = drawn(m, k, device=hopper), drawn(n, k, device=hopper, scale=k**-0.5), drawn(m, n, device=hopper)
    u = a.double() @ b.double().T
    close(products_quack.square(a, b), F.relu(u).square())
    close(products_quack.slope(a, b, c.abs()), u * 2 * c.abs().double().sqrt())
    close(products_quack.add(a, b, c), u + c)
    exact = relu2_triton.product(a, b, None, 0.0)[0]
    torch.testing.assert_close(products_quack.square(a, b), exact, rtol=2**-7, atol=1e-5)


@pytest.mark.gpu
@SHAPES
def test_product_onto(hopper: str, m: int, n: int, k: int) -> None:
    mine = [drawn(m, k, device=hopper), drawn(n, k, device=hopper, scale=k**-0.5), drawn(m, n, device=hopper)]
    g = drawn(m, n, device=hopper)
    theirs = [each.double().requires_grad_() for each in mine]
    mine = [each.requires_grad_() for each in mine]
    y, wanted = ProductOnto.apply(*mine), theirs[2] + F.linear(*theirs[:2])
    close(y, wanted)
    for got, reference in zip(torch.autograd.grad(y, mine, g), torch.autograd.grad(wanted, theirs, g.double()), strict=True):
        close(got, reference)
    assert torch.equal(torch.autograd.grad(ProductOnto.apply(*mine), mine[2], g)[0], g)


@pytest.mark.gpu
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize(("m", "d", "d_ff"), [(1, 512, 1024), (301, 512, 1536), (4097, 512, 1536)])
def test_relu2_network(hopper: str, m: int, d: int, d_ff: int, adds: bool) -> None:
    mine = [drawn(m, d, device=hopper), drawn(d_ff, d, device=hopper, scale=0.1), drawn(d, d_ff, device=hopper, scale=0.1)]
    mine += [drawn(m, d, device=hopper)] * adds
    g = drawn(m, d, device=hopper)
    theirs = [each.double().requires_grad_() for each in mine]
    mine = [each.requires_grad_() for each in mine]
    y = Relu2Network.apply(*mine[:3], 0.0, *mine[3:])
    wanted = relu2.plain_relu2_network(*theirs[:3]) + sum(theirs[3:])
    close(y, wanted, 0.02)
    for got, reference in zip(torch.autograd.grad(y, mine, g), torch.autograd.grad(wanted, theirs, g.double()), strict=True):
        close(got, reference, 0.02)


@pytest.mark.gpu
def test_what_is_not_finite_is_seen(hopper: str) -> None:
    """A guard against steps that are not finite looks at the loss and the gradients."""
    eye, u = torch.eye(8, device=hopper).bfloat16(), torch.ones(3, 8, device=hopper).bfloat16()
    u[1, 2] = torch.nan
    h, c = products_quack.square(u, eye), u.flip(0)
    assert h.isnan().tolist() == [[False] * 8, [True] * 8, [False] * 8]  # NaN · 0 in the product
    nan = torch.full_like(h, torch.nan)
    assert products_quack.slope(u, eye, nan).isnan().all()
    assert products_quack.add(torch.ones_like(u), eye, c).isnan().sum() == 1
    weight = torch.zeros(8, 8, device=hopper).bfloat16()
    weight[0, 0], ones = -torch.inf, torch.ones(1, 8, device=hopper).bfloat16()
    assert products_quack.square(ones, weight)[0].isnan().tolist() == [True] + [False] * 7  # of −∞; relu² is 0 there
