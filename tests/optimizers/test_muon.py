"""Muon against a float64 loop written from the records of parameter golf, and against torch's."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from titanlm import checkpoint
from titanlm.config import dump, load, loads
from titanlm.guard import FiniteGuard
from titanlm.patterns import NamedParam
from titanlm.registry import Component

SHAPES = [(6, 6), (4, 6), (4, 6), (9, 5), (6, 6), (6, 4), (1, 5), (6, 6)]
QUINTIC = [(3.4445, -4.7750, 2.0315)] * 5


def reference(start: np.ndarray, gradients: list[np.ndarray], **settings: Any) -> np.ndarray:
    """One matrix, no banks, everything in float64."""
    lr, wd, nesterov, rows = settings["lr"], settings["weight_decay"], settings["nesterov"], settings["normalise"] == "rows"
    p, buffer = start.copy(), np.zeros_like(start)
    for step, g in enumerate(gradients):
        mu = settings["momentum"][step]
        buffer = mu * buffer + g
        u = g + mu * buffer if nesterov else buffer.copy()
        if rows:
            for row in u:
                row /= max(np.sqrt((row * row).sum()), 1e-7)
        x = u / (np.sqrt((u * u).sum()) + 1e-7)
        if p.shape[0] > p.shape[1]:
            x = x.T
        for a, b, c in QUINTIC:
            gram = x @ x.T
            x = a * x + b * gram @ x + c * gram @ gram @ x
        if p.shape[0] > p.shape[1]:
            x = x.T
        p *= 1 - lr * wd
        p -= lr * max(1.0, p.shape[0] / p.shape[1]) ** 0.5 * x
    return p


def build(shapes: list[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32, device: str = "cpu", **settings: Any) -> tuple[list[Any], Any]:
    generator = torch.Generator().manual_seed(0)
    named = [NamedParam(f"w{i}", torch.nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)), "matrix") for i, shape in enumerate(shapes)]
    return [p.parameter for p in named], Component.named("optimizer", "muon", **{"ns_dtype": "fp32", **settings}).build(named_params=named)


def gradients(parameters: list[Any], steps: int) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [[torch.randn(p.shape, generator=generator).to(p.dtype) for p in parameters] for _ in range(steps)]


def run(parameters: list[Any], optimizer: Any, steps: list[list[Tensor]]) -> list[Tensor]:
    for values in steps:
        for p, value in zip(parameters, values, strict=True):
            p.grad = value.clone()
        optimizer.step()
    return [p.detach().clone() for p in parameters]


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("normalise", ["none", "rows"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_equals_the_float64_loop(nesterov: bool, normalise: str, weight_decay: float) -> None:
    """Tall, wide and square matrices in banks of one to three; momentum differs from step to step, as a schedule makes it."""
    settings = {"lr": 0.1, "nesterov": nesterov, "normalise": normalise, "weight_decay": weight_decay}
    parameters, optimizer = build(dtype=torch.float64, **settings)
    start, steps = [p.detach().numpy().copy() for p in parameters], gradients(parameters, 4)
    momenta = [0.85, 0.9, 0.95, 0.95]
    for values, momentum in zip(steps, momenta, strict=True):
        optimizer.param_groups[0]["momentum"] = momentum
        run(parameters, optimizer, [values])
    for index, p in enumerate(parameters):
        expected = reference(start[index], [values[index].numpy() for values in steps], momentum=momenta, **settings)
        np.testing.assert_allclose(p.detach().numpy(), expected, rtol=0, atol=2e-6)  # Newton-Schulz in fp32 has no more


@pytest.mark.parametrize(("ns_dtype", "tolerance"), [("fp32", 1e-5), ("bf16", 0.03)])
@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (8, 8)])
def test_equals_torch_muon(shape: tuple[int, int], ns_dtype: str, tolerance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its momentum is an average, a factor that Newton-Schulz takes out. It computes in bf16, of which it is kept for the tight comparison."""
    parameters, optimizer = build([shape], lr=0.2, momentum=0.9, weight_decay=0.1, ns_dtype=ns_dtype)
    start, steps = parameters[0].detach().clone(), gradients(parameters, 5)
    (got,) = run(parameters, optimizer, steps)
    twin = torch.nn.Parameter(start.clone())
    if ns_dtype == "fp32":
        monkeypatch.setattr(Tensor, "bfloat16", Tensor.clone)
    (expected,) = run([twin], torch.optim.Muon([twin], lr=0.2, momentum=0.9, weight_decay=0.1), steps)
    assert (got - expected).norm() < tolerance * (expected - start).norm()


def test_a_bank_gives_what_its_matrices_give_alone() -> None:
    parameters, optimizer = build([(6, 4)] * 7, weight_decay=0.1)
    steps = gradients(parameters, 3)
    starts = [p.detach().clone() for p in parameters]
    together = run(parameters, optimizer, steps)
    for index, start in enumerate(starts):
        (alone,), own = build([(6, 4)], weight_decay=0.1)
        alone.data.copy_(start)
        (expected,) = run([alone], own, [[values[index]] for values in steps])
        torch.testing.assert_close(together[index], expected, rtol=0, atol=1e-6)


def test_lr_decay_and_momentum_are_read_from_the_group_at_each_step() -> None:
    (p,), optimizer = build([(4, 4)], lr=0.1, weight_decay=0.0)
    assert {key: optimizer.param_groups[0][key] for key in ("lr", "momentum", "weight_decay")} == {"lr": 0.1, "momentum": 0.95, "weight_decay": 0.0}
    before = p.detach().clone()
    optimizer.param_groups[0].update(lr=0.5, weight_decay=0.2, momentum=0.0)
    run([p], optimizer, [[torch.zeros(4, 4)]])
    torch.testing.assert_close(p.detach(), before * 0.9)
    run([p], optimizer, gradients([p], 1))
    assert torch.equal(optimizer.state[p]["momentum_buffer"], gradients([p], 1)[0][0])


def test_a_parameter_without_gradient_is_passed_over() -> None:
    parameters, optimizer = build([(4, 4)] * 3, weight_decay=0.1)
    before = parameters[1].detach().clone()
    for index in (0, 2):
        parameters[index].grad = torch.ones(4, 4)
    optimizer.step()
    assert torch.equal(parameters[1], before)
    assert set(optimizer.state) == {parameters[0], parameters[2]}


@pytest.mark.parametrize("shape", [(5,), (2, 3, 4), ()])
def test_what_is_no_matrix_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"params: w1 has shape .*@matrix"):
        build([(3, 3), shape])


def test_bf16_momentum_is_rounded_once_a_step() -> None:
    """Against a loop in fp32 that rounds what it keeps; the direction is made of what was not rounded yet."""
    parameters, optimizer = build([(6, 4)] * 2, momentum=0.9, momentum_dtype="bf16")
    twins, reference = build([(6, 4)] * 2, momentum=0.9)
    steps = gradients(parameters, 4)
    kept = [torch.zeros(6, 4) for _ in parameters]
    for values in steps:
        for twin, buffer in zip(twins, kept, strict=True):
            reference.state[twin]["momentum_buffer"] = buffer.clone()
        run(parameters, optimizer, [values])
        run(twins, reference, [values])
        kept = [(0.9 * buffer.double() + value.double()).float().bfloat16().float() for buffer, value in zip(kept, values, strict=True)]
        for p, twin, buffer in zip(parameters, twins, kept, strict=True):
            torch.testing.assert_close(optimizer.state[p]["momentum_buffer"].float(), buffer, rtol=2**-8, atol=0)
            torch.testing.assert_close(p, twin, rtol=0, atol=2e-3)
    state = [optimizer.state[p]["momentum_buffer"] for p in parameters]
    assert [(t.dtype, t.nbytes) for t in state] == [(torch.bfloat16, 48)] * 2


# ---------------------------------------------------------------- compiled
@pytest.mark.parametrize("settings", [{"normalise": "rows"}, {"nesterov": False, "momentum_dtype": "bf16"}])
def test_compiled_equals_eager_and_no_schedule_compiles_again(settings: dict[str, Any]) -> None:
    """Two graphs, before and after Newton-Schulz, for each of three banks; other rates, decays and momenta make no more."""
    shapes = [(6, 8)] * 3 + [(8, 6)] * 2 + [(6, 6)]
    parameters, optimizer = build(shapes, weight_decay=0.1, **settings)
    twins, reference = build(shapes, weight_decay=0.1, **settings)
    optimizer.compile_kernels, optimizer.found_inf, reference.found_inf = True, torch.zeros(()), torch.zeros(())
    torch._dynamo.reset()
    counters.clear()
    for step, values in enumerate(gradients(parameters, 20)):
        for each in (optimizer, reference):
            each.param_groups[0].update(lr=0.02 * (1 - step / 30), weight_decay=0.1 * (1 - step / 40), momentum=0.85 + step / 200)
        got, expected = run(parameters, optimizer, [values]), run(twins, reference, [values])
    assert counters["stats"]["unique_graphs"] == 6
    tolerance = 2e-3 if "momentum_dtype" in settings else 1e-5
    for a, b, p, twin in zip(got, expected, parameters, twins, strict=True):
        assert (a - b).norm() < tolerance * b.norm()
        assert optimizer.state[p]["momentum_buffer"].dtype == reference.state[twin]["momentum_buffer"].dtype
    optimizer.found_inf.fill_(1.0)
    before = [t.detach().clone().view(torch.uint8) for p in parameters for t in (p, optimizer.state[p]["momentum_buffer"])]
    run(parameters, optimizer, [[torch.full_like(p, float("nan")) for p in parameters]])
    after = [t.detach().view(torch.uint8) for p in parameters for t in (p, optimizer.state[p]["momentum_buffer"])]
    assert all(map(torch.equal, after, before))


# ---------------------------------------------------------------- the flag
def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().view(torch.int32).clone()


@pytest.mark.parametrize("begun", [True, False])
@pytest.mark.parametrize("normalise", ["none", "rows"])
def test_the_flag_keeps_a_step_out_to_the_bit(begun: bool, normalise: str) -> None:
    parameters, optimizer = build([(4, 6), (4, 6), (6, 4)], weight_decay=0.1, normalise=normalise)
    for p in parameters:
        p.data[0, 0] = -0.0
    if begun:
        run(parameters, optimizer, gradients(parameters, 2))
        optimizer.state[parameters[0]]["momentum_buffer"][0, :2] = torch.tensor([-0.0, 1e-42])
    optimizer.found_inf, optimizer.grad_scale = torch.ones(()), None
    before = [bits(p) for p in parameters]
    buffers = [bits(optimizer.state[p]["momentum_buffer"]) for p in parameters] if begun else [torch.zeros(p.shape, dtype=torch.int32) for p in parameters]
    for value in (float("nan"), float("inf"), -1.0):
        run(parameters, optimizer, [[torch.full_like(p, value) for p in parameters]])
    assert all(torch.equal(bits(p), old) for p, old in zip(parameters, before, strict=True))
    assert all(torch.equal(bits(optimizer.state[p]["momentum_buffer"]), old) for p, old in zip(parameters, buffers, strict=True))


def test_a_lowered_flag_changes_nothing() -> None:
    parameters, optimizer = build(weight_decay=0.1)
    flagged, other = build(weight_decay=0.1)
    other.found_inf = torch.zeros(())
    steps = gradients(parameters, 3)
    assert all(torch.equal(a, b) for a, b in zip(run(parameters, optimizer, steps), run(flagged, other, steps), strict=True))


def test_the_guard_lets_the_device_decide() -> None:
    parameters, optimizer = build([(4, 4)])
    guard = FiniteGuard([optimizer], torch.device("cpu"), remember=10, on_nonfinite="skip", max_in_a_row=3)
    assert not guard.host_decides
    before = parameters[0].detach().clone()
    moved = []
    for loss in (1.0, float("nan"), 1.0):
        guard.observe(0, (0,), torch.tensor(loss), torch.tensor(1.0))
        run(parameters, optimizer, [[torch.full((4, 4), loss)]])
        moved.append(not torch.equal(parameters[0], before))
        before = parameters[0].detach().clone()
    assert moved == [True, False, True]


# ---------------------------------------------------------------- state
@pytest.mark.parametrize("momentum_dtype", ["fp32", "bf16"])
def test_restored_and_gone_on_equals_gone_on(momentum_dtype: str) -> None:
    """Through the state of a checkpoint, under parameter names, and through torch's own, which makes all state fp32."""
    parameters, optimizer = build(weight_decay=0.1, momentum_dtype=momentum_dtype)
    steps = gradients(parameters, 6)
    run(parameters, optimizer, steps[:3])
    middle = [p.detach().clone() for p in parameters]
    names = {p: f"w{index}" for index, p in enumerate(parameters)}
    state = checkpoint.optimizer_state(optimizer, names)
    assert {name: list(values) for name, values in state["params"].items()} == {name: ["momentum_buffer"] for name in names.values()}
    state = {"params": {name: {key: value.clone() for key, value in values.items()} for name, values in state["params"].items()}, "groups": state["groups"]}
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    expected = run(parameters, optimizer, steps[3:])
    for how in ("checkpoint", "torch") if momentum_dtype == "fp32" else ("checkpoint",):
        again, restored = build(weight_decay=0.1, momentum_dtype=momentum_dtype)
        for p, value in zip(again, middle, strict=True):
            p.data.copy_(value)
        if how == "checkpoint":
            checkpoint.restore_optimizer(restored, {p: f"w{index}" for index, p in enumerate(again)}, state)
        else:
            restored.load_state_dict(torch.load(buffer))
        assert all(torch.equal(a, b) for a, b in zip(run(again, restored, steps[3:]), expected, strict=True)), how


# ---------------------------------------------------------------- configs
def test_schedules_are_components_of_a_config(tiny: Any) -> None:
    ramp = '{ name = "ramp", start_factor = 0.9, steps = 1500 }'
    entries = f"""
[[optimizer]]
name = "muon"
momentum_schedule = {ramp}
weight_decay_schedule = {{ name = "linear", min_factor = 0.5 }}
[[optimizer]]
name = "adamw"
weight_decay_schedule = {ramp}
"""
    tiny.write_text(tiny.read_text().replace('[[optimizer]]\nname = "adamw"\nlr = 1e-2\n', entries))
    config = load(tiny)
    muon, adamw = (entry.config for entry in config.optimizer)
    assert muon.momentum_schedule == adamw.weight_decay_schedule == Component.named("scheduler", "ramp", start_factor=0.9, steps=1500)
    assert (muon.weight_decay_schedule.name, muon.weight_decay_schedule.config.min_factor) == ("linear", 0.5)
    assert loads(dump(config)) == config


# ---------------------------------------------------------------- on a GPU
@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_a_step_never_waits_for_the_gpu_and_equals_the_cpu(compiled: bool) -> None:
    settings = {"weight_decay": 0.1, "normalise": "rows", "coefficients": "polar_express"}
    parameters, optimizer = build(**settings)
    theirs, on_gpu = build(device="cuda", **settings)
    on_gpu.found_inf, on_gpu.compile_kernels = torch.zeros((), device="cuda"), compiled
    steps = gradients(parameters, 3)
    if compiled:
        on_gpu.found_inf.fill_(1.0)
        run(theirs, on_gpu, [[torch.zeros_like(p) for p in theirs]])
        on_gpu.found_inf.fill_(0.0)
    expected = run(parameters, optimizer, steps)
    for values in steps:
        for p, value in zip(theirs, values, strict=True):
            p.grad = value.cuda()
        torch.cuda.set_sync_debug_mode("error")
        try:
            on_gpu.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for p, value in zip(theirs, expected, strict=True):
        torch.testing.assert_close(p.detach().cpu(), value, rtol=0, atol=1e-5)
    before = [bits(p) for p in theirs]
    on_gpu.found_inf.fill_(1.0)
    run(theirs, on_gpu, [[torch.full_like(p, float("nan")) for p in theirs]])
    assert all(torch.equal(bits(p), old) for p, old in zip(theirs, before, strict=True))
