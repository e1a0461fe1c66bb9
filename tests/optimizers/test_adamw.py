"""AdamW against a float64 loop written from the paper; compact moments against torch's in float64 and against torchao's."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from titanlm import checkpoint
from titanlm.guard import FiniteGuard
from titanlm.optimizers.moments import decode, encode, grid, levels, zeros
from titanlm.patterns import NamedParam
from titanlm.registry import Component


def reference(start, gradients, *, lr, betas, eps, weight_decay):
    """One scalar at a time, in Python floats (Loshchilov & Hutter, algorithm 2, decoupled decay)."""
    p, m, v = start, 0.0, 0.0
    for t, g in enumerate(gradients, 1):
        p *= 1 - lr * weight_decay
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        p -= lr * (m / (1 - betas[0] ** t)) / (math.sqrt(v / (1 - betas[1] ** t)) + eps)
    return p


def build(roles: dict[str, str], **settings):
    torch.manual_seed(0)
    params = [NamedParam(name, torch.nn.Parameter(torch.randn(3, 4, dtype=torch.float64)), role) for name, role in roles.items()]
    return params, Component.named("optimizer", "adamw", **settings).build(named_params=params)


def test_equals_the_scalar_loop() -> None:
    settings = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    ((_, parameter, _),), optimizer = build({"w": "matrix"}, **settings)
    start = parameter.detach().clone()
    gradients = torch.randn(10, 3, 4, dtype=torch.float64)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    for row in range(3):
        for column in range(4):
            expected = reference(start[row, column].item(), gradients[:, row, column].tolist(), **settings)
            assert parameter[row, column].item() == pytest.approx(expected, abs=1e-12)


def test_decay_only_on_matrices_and_head() -> None:
    roles = {"e": "embedding", "h": "head", "w": "matrix", "n": "norm", "b": "bias", "g": "gain"}
    params, optimizer = build(roles, lr=0.1, weight_decay=0.5)
    before = {name: parameter.detach().clone() for name, parameter, _ in params}
    for _, parameter, _ in params:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter, role in params:
        factor = 0.95 if role in ("matrix", "head") else 1.0
        assert torch.allclose(parameter, before[name] * factor, atol=1e-15), name


def test_flag_keeps_a_step_out() -> None:
    """What the finite guard relies on: with found_inf = 1 nothing changes, not even the step count."""
    ((_, parameter, _),), optimizer = build({"w": "matrix"})
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    before, state = parameter.detach().clone(), {k: v.clone() for k, v in optimizer.state[parameter].items()}
    optimizer.found_inf, optimizer.grad_scale = torch.ones(()), None
    parameter.grad = torch.full_like(parameter, float("nan"))
    optimizer.step()
    assert torch.equal(parameter, before)
    assert all(torch.equal(optimizer.state[parameter][key], value) for key, value in state.items())


# ---------------------------------------------------------------- compact moments
COMPACT = ("bf16", "int8", "fp8")
SHAPES = {"w": (16, 512), "odd": (70, 96), "narrow": (200, 33), "norm": (64,)}


def compact(form: str, shapes: dict[str, tuple[int, ...]] = SHAPES, device: str = "cpu", **settings: Any) -> tuple[list[torch.nn.Parameter], Any]:
    generator = torch.Generator().manual_seed(0)
    named = [NamedParam(name, torch.nn.Parameter(torch.randn(shape, generator=generator).to(device)), "matrix") for name, shape in shapes.items()]
    return [p.parameter for p in named], Component.named("optimizer", "adamw", moments=form, **{"lr": 1e-2, **settings}).build(named_params=named)


def train(parameters: list[torch.nn.Parameter], optimizers: list[Any], steps: range, peak: float = 1e-2, last: int = 200) -> None:
    """Noisy descent to a fixed point whose curvature differs by column, at a rate and a decay that fall from step to step."""
    for step in steps:
        generator = torch.Generator().manual_seed(step + 1)
        for p in parameters:
            noise = torch.randn(p.shape, generator=generator).to(p.device)
            p.grad = ((p.detach() - 1.0 + 0.3 * noise) * torch.logspace(-2, 0, p.size(-1), device=p.device)).to(p.dtype)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"], group["weight_decay"] = peak * (1 - step / last), 0.1 * (1 - step / last)
        for optimizer in optimizers:
            optimizer.step()


def everything(parameters: list[torch.nn.Parameter], optimizer: Any) -> list[Tensor]:
    """Bytes of all that a step may change."""
    return [t.detach().clone().view(torch.uint8) for p in parameters for t in (p, *(v.view(1) for v in optimizer.state[p].values() if not v.ndim),
                                                                                *(v for v in optimizer.state[p].values() if v.ndim))]  # fmt: skip


@pytest.mark.parametrize(("form", "tolerance"), [("bf16", 0.004), ("int8", 0.08), ("fp8", 0.08)])
def test_compact_moments_stay_close_to_float64(form: str, tolerance: float) -> None:
    """Share of the way from start to end, after 200 steps, by which the two ends differ."""
    parameters, optimizer = compact(form, {"w": (16, 512)})
    start = parameters[0].detach().double()
    twin = torch.nn.Parameter(start.clone())
    reference = torch.optim.AdamW([twin], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    train(parameters, [optimizer], range(200))
    train([twin], [reference], range(200))
    assert (parameters[0] - twin).norm() < tolerance * (twin - start).norm()


@pytest.mark.parametrize("betas", [(0.0, 0.95), (0.0, 0.0)])
@pytest.mark.parametrize("form", COMPACT)
def test_a_beta_of_zero_forgets_at_once(form: str, betas: tuple[float, float]) -> None:
    """As torch's does: with both at 0 the step is the sign of the gradient, whatever came before."""
    (parameter,), optimizer = compact(form, {"w": (64, 64)}, betas=betas, lr=0.1, weight_decay=0.0)
    theirs = torch.nn.Parameter(parameter.detach().clone())
    reference = torch.optim.AdamW([theirs], lr=0.1, betas=betas, weight_decay=0.0)
    for seed in range(3):
        parameter.grad = torch.randn(64, 64, generator=torch.Generator().manual_seed(seed))
        theirs.grad = parameter.grad.clone()
        optimizer.step()
        reference.step()
    assert (parameter - theirs).abs().max() < 0.15 * 0.3
    if betas == (0.0, 0.0):
        torch.testing.assert_close(parameter, theirs, rtol=0, atol=0.02)


@pytest.mark.parametrize(("form", "theirs"), [("int8", "AdamW8bit"), ("fp8", "AdamWFp8")])
def test_equals_torchao(form: str, theirs: str) -> None:
    """Rows of a multiple of 256, where its blocks are ours; its rate is a tensor, and its step is compiled unless told otherwise."""
    optim = pytest.importorskip("torchao.optim")
    (p,), optimizer = compact(form, {"w": (16, 512)})
    twin = torch.nn.Parameter(p.detach().clone())
    reference = getattr(optim, theirs)([twin], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    generator = torch.Generator().manual_seed(1)
    for _ in range(10):
        p.grad = torch.randn(p.shape, generator=generator)
        twin.grad = p.grad.clone()
        optimizer.step()
        with torch.compiler.set_stance("force_eager"):
            reference.step()
    # A value on the edge between two codes may fall on either side of it, after which one element differs.
    assert ((p - twin).abs() < 1e-6).float().mean() > 0.995
    for name in ("exp_avg", "exp_avg_sq"):
        codes = reference.state[twin][name].codes.view(torch.uint8)
        assert (optimizer.state[p][name].view(torch.uint8) == codes).float().mean() > 0.995, name


@pytest.mark.parametrize("signed", [True, False])
def test_levels_are_those_of_the_paper(signed: bool) -> None:
    utils = pytest.importorskip("torchao.optim.quant_utils")
    assert levels(signed) == pytest.approx(utils.create_dynamic_map(signed), abs=1e-7)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_each_element_is_rounded_to_the_nearest_level(form: str, signed: bool) -> None:
    """By a search over all 256 of them, in blocks of very different size; of second moments none becomes 0."""
    values = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) ** 3 * torch.logspace(-9, 9, 64).unsqueeze(1)
    values = values if signed else values.abs()
    where = grid(signed, values.device)
    like = list(zeros(values, form, "m").values())
    stored = encode(values, like, where, signed)
    codes = torch.arange(256, dtype=torch.uint8)
    table = where.levels if form == "int8" else codes.view(torch.float8_e4m3fn).float().nan_to_num(0.0) / 448
    table = table[table > 0] if not signed else table
    relative = values / values.abs().amax(1, keepdim=True)
    nearest = (relative.flatten()[:, None] - table).abs().amin(1).view_as(relative)
    error = (decode(stored, where) / values.abs().amax(1, keepdim=True) - relative).abs()
    assert (error <= nearest + 1e-6).all()
    assert signed or bool((decode(stored, where) > 0).all())


def test_a_vanishing_gradient_beside_large_ones_makes_no_leap() -> None:
    """Its second moment is far below the lowest level; rounded to 0 it would leave the first moment to be divided by eps alone."""
    for form in ("int8", "fp8"):
        (p,), optimizer = compact(form, {"w": (16, 256)}, weight_decay=0.0)
        start = p.detach().clone()
        for size in (1e-5, 1e-5, 1e-5, 1e-9, 0.0):
            p.grad = torch.ones(16, 256)
            p.grad[:, 0] = size
            optimizer.step()
        assert (p - start)[:, 0].abs().max() < 0.06, form


@pytest.mark.parametrize(
    ("form", "matrix", "odd"), [("fp32", 8.0, 8.0), ("bf16", 4.0, 4.0), ("int8", 2 + 8 / 256, 2 + 8 / 32), ("fp8", 2 + 8 / 256, 2 + 8 / 32)]
)
def test_bytes_of_state(form: str, matrix: float, odd: float) -> None:
    """A scale for 256 elements of a row of 512, for 32 of a row of 96; rows of 33 and vectors keep fp32."""
    parameters, optimizer = compact(form)
    train(parameters, [optimizer], range(1))
    size = [sum(v.nbytes for v in optimizer.state[p].values() if v.ndim) / p.numel() for p in parameters]
    rest = 4.0 if form == "bf16" else 8.0
    assert size == [matrix, odd, rest, rest]


@pytest.mark.parametrize("form", COMPACT)
def test_a_step_without_memory(form: str) -> None:
    """On the meta device, where a recipe's plan counts what an optimizer keeps."""
    parameters, optimizer = compact(form, device="meta")
    for p in parameters:
        p.grad = torch.empty_like(p)
    optimizer.step()
    real, other = compact(form)
    for p, q in zip(parameters, real, strict=True):
        assert {k: (v.shape, v.dtype) for k, v in optimizer.state[p].items()} == {k: (v.shape, v.dtype) for k, v in other.state[q].items()}


@pytest.mark.parametrize("begun", [True, False])
@pytest.mark.parametrize("form", COMPACT)
def test_the_flag_keeps_a_compact_step_out_to_the_bit(form: str, begun: bool) -> None:
    parameters, optimizer = compact(form)
    guard = FiniteGuard([optimizer], torch.device("cpu"), remember=10, on_nonfinite="skip", max_in_a_row=3)
    assert not guard.host_decides
    train(parameters, [optimizer], range(2 if begun else 0))
    before = everything(parameters, optimizer)
    guard.observe(2, (0,), torch.tensor(float("nan")), torch.tensor(1.0))
    for p in parameters:
        p.grad = torch.full_like(p, float("nan"))
    optimizer.step()
    assert all(map(torch.equal, everything(parameters, optimizer), before))
    guard.observe(3, (0,), torch.tensor(1.0), torch.tensor(1.0))
    train(parameters, [optimizer], range(2, 3))
    twins, other = compact(form)
    train(twins, [other], range(2 if begun else 0))
    train(twins, [other], range(2, 3))
    assert all(map(torch.equal, everything(parameters, optimizer), everything(twins, other)))


@pytest.mark.parametrize("form", COMPACT)
def test_restored_from_a_checkpoint_and_gone_on_equals_gone_on(form: str, tmp_path: Path) -> None:
    parameters, optimizer = compact(form)
    names = dict(zip(parameters, SHAPES, strict=True))
    train(parameters, [optimizer], range(3))
    state = {"model": {names[p]: p.detach() for p in parameters}, "optimizers": [checkpoint.optimizer_state(optimizer, names)]}
    folder = checkpoint.save(tmp_path, 3, state, {}, "")
    train(parameters, [optimizer], range(3, 6))
    saved = checkpoint.opened(folder)
    again, restored = compact(form)
    for p, name in zip(again, SHAPES, strict=True):
        p.data.copy_(saved.state["model"][name].whole())
    checkpoint.restore_optimizer(restored, dict(zip(again, SHAPES, strict=True)), saved.state["optimizers"][0])
    train(again, [restored], range(3, 6))
    assert all(map(torch.equal, everything(again, restored), everything(parameters, optimizer)))


@pytest.mark.parametrize("form", ["int8", *(pytest.param(form, marks=pytest.mark.slow) for form in ("bf16", "fp8"))])
def test_compiled_equals_eager_and_no_schedule_compiles_again(form: str) -> None:
    """One graph for each of three shapes; 100 other rates and decays make no more."""
    shapes = {"w": (16, 512), "twin": (16, 512), "narrow": (200, 33), "norm": (64,)}
    parameters, optimizer = compact(form, shapes)
    twins, reference = compact(form, shapes)
    optimizer.compile_kernels, optimizer.found_inf = True, torch.zeros(())
    torch._dynamo.reset()
    counters.clear()
    train(parameters, [optimizer], range(100))
    assert counters["stats"]["unique_graphs"] == 3
    train(twins, [reference], range(100))
    for p, twin in zip(parameters, twins, strict=True):
        assert (p - twin).norm() < 1e-3 * twin.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("form", COMPACT)
@pytest.mark.parametrize("compiled", [True, False])
def test_on_a_gpu_it_never_waits_and_equals_the_cpu(form: str, compiled: bool) -> None:
    parameters, optimizer = compact(form)
    theirs, on_gpu = compact(form, device="cuda")
    on_gpu.found_inf, on_gpu.compile_kernels = torch.zeros((), device="cuda"), compiled
    train(theirs, [on_gpu], range(1))  # compiles
    for p in theirs:
        p.grad = torch.zeros_like(p)
    before = everything(theirs, on_gpu)
    on_gpu.found_inf.fill_(1.0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        on_gpu.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(map(torch.equal, everything(theirs, on_gpu), before))
    on_gpu.found_inf.fill_(0.0)
    train(theirs, [on_gpu], range(1, 20))
    train(parameters, [optimizer], range(20))
    for p, twin in zip(parameters, theirs, strict=True):
        assert (p - twin.cpu()).norm() < 0.01 * p.norm()
