"""Triton kernels of the loss's passes over logits: one that reads them, and one that overwrites them by the gradient.

The twins in plain torch are ``statistics``, ``write_gradient`` and
``label_entries`` of ``titanlm.losses.chunked``. A row of logits is as long as
the vocabulary and is read once here, where the compiler's kernels take the
maximum first; capped logits need none, since they cannot exceed the cap.
"""

from __future__ import annotations

import torch
from torch import Tensor

from titanlm.kernels.jit import jit, tl, triton

_BLOCK = 4096
"""Logits that a program has in hand at a time."""


@jit
def _tanh(x):
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@jit
def _statistics(logits, stride, labels, z_y, lse, mean, V, cap, CAP: tl.constexpr, MEAN: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = logits + row * stride
    label = tl.maximum(tl.load(labels + row), 0)
    columns = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float32)
    totals = tl.zeros((BLOCK,), tl.float32)
    largest = tl.full((BLOCK,), cap if CAP else -float("inf"), tl.float32)
    for start in tl.range(0, V, BLOCK):
        inside = start + columns < V
        z = tl.load(place + start + columns, mask=inside, other=-float("inf")).to(tl.float32)
        if CAP:
            z = tl.where(inside, cap * _tanh(z / cap), -float("inf"))
        else:
            # A maximum for each place of the block, so that nothing is exchanged between threads until the end.
            new = tl.maximum(largest, z)
            sums *= tl.exp(tl.where(new == largest, 0.0, largest - new))
            largest = new
        # An infinity less itself is no number, and a number that is none has to come out as one: nothing else tells a guard.
        sums += tl.where(inside, tl.exp(tl.where(z == largest, 0.0, z - largest)), 0.0)
        if MEAN:
            totals += tl.where(inside, z, 0.0)
    top = tl.max(largest, 0)
    total = tl.sum(sums * tl.exp(tl.where(largest == top, 0.0, largest - top)), 0)
    z = tl.load(place + label).to(tl.float32)
    if CAP:
        z = cap * _tanh(z / cap)
    tl.store(z_y + row, z)
    tl.store(lse + row, top + tl.log(total))
    if MEAN:
        tl.store(mean + row, tl.sum(totals, 0) / V)


@jit
def _gradient(logits, stride, labels, lse, g_zy, g_lse, g_mean, V, cap, CAP: tl.constexpr, MEAN: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place, inside = logits + row * stride + columns, columns < V
    z = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    if CAP:
        tanh = _tanh(z / cap)
        z = cap * tanh
    gradient = tl.exp(z - tl.load(lse + row)) * tl.load(g_lse + row)
    gradient += tl.where(columns == tl.load(labels + row), tl.load(g_zy + row), 0.0)
    if MEAN:
        gradient += tl.load(g_mean + row) / V
    if CAP:
        gradient *= 1.0 - tanh * tanh
    tl.store(place, gradient.to(logits.dtype.element_ty), mask=inside)


def statistics(logits: Tensor, labels: Tensor, needs_mean: bool, cap: float | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """(z_y, lse, z̄ or None) of (n, V) logits, whose rows may lie apart, and (n,) labels; each (n,) fp32."""
    n, width = logits.shape
    z_y, lse, mean = (torch.empty(n, device=logits.device, dtype=torch.float32) for _ in range(3))
    block = min(_BLOCK, triton.next_power_of_2(width))
    _statistics[(n,)](
        logits, logits.stride(0), labels, z_y, lse, mean, width, cap or 1.0, CAP=cap is not None, MEAN=needs_mean, BLOCK=block, num_warps=max(1, block // 512)
    )  # fmt: skip
    return z_y, lse, mean if needs_mean else None


def write_gradient(logits: Tensor, labels: Tensor, lse: Tensor, g_zy: Tensor, g_lse: Tensor, g_mean: Tensor | None, cap: float | None) -> None:
    """Overwrite (n, V) logits by the gradient of the loss, that of the labels included; what lies between rows stays."""
    n, width = logits.shape
    block = min(_BLOCK, triton.next_power_of_2(width))
    _gradient[(n, triton.cdiv(width, block))](
        logits, logits.stride(0), labels, lse, g_zy, g_lse, g_lse if g_mean is None else g_mean, width, cap or 1.0,
        CAP=cap is not None, MEAN=g_mean is not None, BLOCK=block, num_warps=max(1, block // 512),
    )  # fmt: skip
