"""Every Triton kernel compiled for Hopper and for Blackwell, as its callers launch it. No GPU is needed, only Triton.

The interpreter takes any Python; the compiler does not, and refuses at the
first launch on a GPU what it cannot take. So a change is tried by
``pip install triton`` and ``pytest tests/kernels/test_compiles.py`` first.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from titanlm.kernels import logits_triton, mix_triton, relu2_triton, rotate_triton, symmetric_triton
from titanlm.kernels.jit import TensorDescriptor

compiler, backends, runtime = (pytest.importorskip(f"triton.{name}") for name in ("compiler", "backends.compiler", "runtime.jit"))

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int64: "i64", torch.int32: "i32"}
SHARED_BYTES = 227 * 1024
"""That a program may have on either."""


def type_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"*{TYPES[value.dtype]}"
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>".replace(" ", "")
    return "fp32" if isinstance(value, float) else "i32"


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, dict[str, Any], dict[str, int]]]:
    """Kernel, arguments and compiler's options of all that is launched from now on, which does not run."""
    found: list[tuple[Any, dict[str, Any], dict[str, int]]] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
        options = {name: named.pop(name) for name in ("num_warps", "num_stages") if name in named}
        found.append((self, dict(inspect.signature(self.fn).bind(*args, **named).arguments), options))

    monkeypatch.setattr(runtime.JITFunction, "run", run)
    return found


def drawn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype)


def products() -> Iterator[Callable[[], Any]]:
    for slope in (0.0, 0.25):
        yield lambda slope=slope: relu2_triton.product(drawn(512, 512), drawn(1536, 512), None, slope)
        yield lambda slope=slope: relu2_triton.product(drawn(512, 512), drawn(1536, 512), drawn(512, 1536), slope)


def mixes() -> Iterator[Callable[[], Any]]:
    for n_terms in (2, 3):
        terms, weights = [drawn(64, 512) for _ in range(n_terms)], drawn(n_terms, 512, dtype=torch.float32)
        yield lambda t=terms, w=weights: mix_triton.mixed(t, w, 1e-6)
        for first in (None, drawn(64, 512)):
            carried = [first, None, drawn(64, 512)][-n_terms:] if n_terms == 3 else [first, drawn(64, 512)]
            yield lambda t=terms, w=weights, c=carried: mix_triton.mixed_backward(t, w, 1e-6, drawn(64, 512), drawn(64, 512), c)


def rotations() -> Iterator[Callable[[], Any]]:
    table = drawn(2, 64, 1, 32, dtype=torch.float32)
    for norms, gain, eps in ((None, drawn(8, dtype=torch.float32), 1e-6), (drawn(2, 64, dtype=torch.float32), None, 1e-6), (None, None, None)):
        common = table, table, norms, gain
        for copies in (1, 2):
            yield lambda c=common, e=eps, n=copies: rotate_triton.rotated(drawn(2, 64, 1024), *c, 8, 4, e, n)
            for own in (None, drawn(2, 64, 4, 64)):
                heads = [*(drawn(2, 64, n, 64) for n in (8, 4 * copies, 4 * copies)), own]
                yield lambda c=common, e=eps, n=copies, h=heads: rotate_triton.rotated_backward(*h, drawn(2, 64, 1024), *c, 8, 4, e, n)


def losses() -> Iterator[Callable[[], Any]]:
    labels, rows = torch.zeros(4, dtype=torch.int64), drawn(4, dtype=torch.float32)
    for cap, mean in ((None, False), (15.0, True)):
        for vocab in (1024, 200_005):
            logits = drawn(4, vocab)
            yield lambda z=logits, m=mean, c=cap: logits_triton.statistics(z, labels, m, c)
            yield lambda z=logits, m=mean, c=cap: logits_triton.write_gradient(z, labels, rows, rows, rows, rows if m else None, c)


def triangles() -> Iterator[Callable[[], Any]]:
    for polynomial in (True, False):
        yield lambda p=polynomial: symmetric_triton.lower_triangle(drawn(4, 512, 512), 1.0, 2.0, 3.0, p)


@pytest.mark.parametrize("capability", [90, 100])
@pytest.mark.parametrize("calls", [products, mixes, rotations, losses, triangles], ids=lambda calls: calls.__name__)
def test_compiles(calls: Callable[[], Iterator[Callable[[], Any]]], capability: int, launches: list[Any]) -> None:
    n_calls = 0
    for call in calls():
        call()
        n_calls += 1
    assert len(launches) == n_calls
    for kernel, arguments, options in launches:
        constant = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
        signature = {name: "constexpr" if name in constant else type_of(value) for name, value in arguments.items()}
        source = compiler.ASTSource(fn=kernel, signature=signature, constexprs={name: arguments[name] for name in constant})
        made = compiler.compile(source, target=backends.GPUTarget("cuda", capability, 32), options=options)
        assert made.asm["cubin"]
        assert made.metadata.shared <= SHARED_BYTES
