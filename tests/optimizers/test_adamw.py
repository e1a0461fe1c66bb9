"""AdamW against a float64 loop written from the paper."""

from __future__ import annotations

import math

import pytest
import torch

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
