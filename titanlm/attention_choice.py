"""Which attention kernels a run uses: `model.attention_backend = "auto"` decided by measurement when training starts.

Timed are forward and backward pass of every backend that can serve, on drawn
inputs of a micro-batch's shape, before the model has any memory. Kernels that
compute from the same intermediates (``titanlm.kernels.causal_attention``) are
chosen apart for the two passes; the others serve both. FlashAttention 2 is
none of the candidates: it serves by its name "varlen", and where torch's own
choice, "sdpa", is measured fastest and happens to be it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from titanlm.batch import Batch, Row
from titanlm.config import RunConfig
from titanlm.kernels.causal_attention import KERNELS, copies
from titanlm.kernels.refusals import refusals, require
from titanlm.models.layers.attention import NAMED, Attention, attend_by_torch, attention_mask
from titanlm.packers.boundaries import finish
from titanlm.precision import DTYPES
from titanlm.tuned import Tuned

CAUSAL = ("cudnn", "flash4", "flash3", "sdpa")
INSIDE_DOCUMENTS = ("flash4", "flash3", "flex")
"""Candidates of "auto". Not "sdpa" with documents: its mask takes memory quadratic in the length of a row."""
MEAN_DOCUMENT = 600
"""Tokens, of the documents that are drawn for a measurement."""
CLEARLY = 0.98
"""Of the time of two kernels, what a backend must stay under that serves both passes: else noise chooses."""


@dataclass(frozen=True)
class Shape:
    """Letters as in ``CausalAttention``."""

    rows: int
    seq_len: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    documents: bool
    dtype: torch.dtype

    def __str__(self) -> str:
        mask = "inside documents" if self.documents else "causal"
        heads = f"{self.n_heads}/{self.n_kv_heads} heads × {self.head_dim}"
        return f"{self.rows} × {self.seq_len}, {heads}, {mask}, {str(self.dtype).removeprefix('torch.')}"

    def flops(self, batch: Batch) -> float:
        """Multiplications and additions of the forward pass over pairs that are seen; the backward pass has 2.5 times as many."""
        first = batch.positions if self.documents else torch.arange(self.seq_len).expand(self.rows, -1)
        return 4.0 * self.n_heads * self.head_dim * float((first + 1).sum())


class Passes(NamedTuple):
    """What a backend does for one layer, to be called again and again."""

    forward: Callable[[], Any]
    backward: Callable[[], Any]


def drawn_batch(shape: Shape, seed: int = 0) -> Batch:
    """Rows full of documents, or of one each, on the CPU; tokens are of no meaning."""
    size = shape.rows, shape.seq_len
    generator = np.random.default_rng(seed)
    begins = generator.random(size) < (1 / MEAN_DOCUMENT if shape.documents else 0.0)
    nothing = np.zeros(size, dtype=np.int64)
    ids = begins.cumsum(1)
    row = Row(nothing, nothing, nothing.astype(np.int32), ids, nothing.astype(np.int32))
    return Batch.of(finish(row, document_mask=shape.documents), document_mask=shape.documents)


def passes(backend: str, shape: Shape, batch: Batch, device: torch.device) -> Passes:
    """Both passes of a backend on drawn inputs, with as many heads of keys as it is given in a layer where it serves both.

    Raises TitanError where it refuses, RuntimeError and others where it fails.
    """
    generator = torch.Generator(device).manual_seed(0)
    n_kv_heads = shape.n_kv_heads * copies(backend, shape.n_heads, shape.n_kv_heads, shape.head_dim, device)
    sizes = [shape.n_heads, n_kv_heads, n_kv_heads, shape.n_heads]
    q, k, v, g = (torch.randn(shape.rows, shape.seq_len, heads, shape.head_dim, generator=generator, device=device, dtype=shape.dtype) for heads in sizes)
    mask = attention_mask(batch.to(device), backend, None, shape.head_dim, shape.dtype)
    if backend in KERNELS:
        kernel = KERNELS[backend]
        lengths: Any = mask
        y, lse = kernel.forward(q, k, v, lengths)
        return Passes(lambda: kernel.forward(q, k, v, lengths), lambda: kernel.backward(g, q, k, v, y, lse, lengths))
    inputs = q.requires_grad_(), k.requires_grad_(), v.requires_grad_()
    y = attend_by_torch(backend, q, k, v, mask)
    return Passes(lambda: attend_by_torch(backend, q, k, v, mask), lambda: torch.autograd.grad(y, inputs, g, retain_graph=True))


def seconds(call: Callable[[], Any], device: torch.device, repeats: int = 5, each: int = 10) -> float:
    """Median of the time of a call, ``each`` of them in a row at a time, after as many to warm up."""
    on_cuda = device.type == "cuda"

    def now() -> float:
        if on_cuda:
            torch.cuda.synchronize(device)
        return time.perf_counter()

    times = []
    for _ in range(1 + repeats):
        start = now()
        for _ in range(each):
            call()
        times.append((now() - start) / each)
    return statistics.median(times[1:])


def measure(names: Iterable[str], shape: Shape, device: torch.device, **counts: int) -> dict[str, tuple[float, float] | str]:
    """Backend → seconds of a forward and of a backward pass of one layer, or why there are none."""
    batch, found = drawn_batch(shape), dict[str, tuple[float, float] | str]()
    for name in names:
        try:
            both = passes(name, shape, batch, device)
            found[name] = seconds(both.forward, device, **counts), seconds(both.backward, device, **counts)
        except Exception as error:  # whatever a kernel fails with here, it is not the one to train with
            found[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return found


def fastest(found: dict[str, tuple[float, float] | str]) -> str:
    """The backend with the least time for both passes, or two kernels, "cudnn+flash4".

    Where nothing could be timed "sdpa", and "auto" where that is none of them.
    """
    times = {name: both for name, both in found.items() if not isinstance(both, str)}
    kernels = [name for name in times if name in KERNELS]
    whole = min(times.keys() - kernels, key=lambda name: sum(times[name]), default="sdpa" if "sdpa" in found else "auto")
    if not kernels:
        return whole
    first, second = (min(kernels, key=lambda name: times[name][direction]) for direction in (0, 1))
    if whole in times and sum(times[whole]) < CLEARLY * (times[first][0] + times[second][1]):
        return whole
    return first if first == second else f"{first}+{second}"


def settle_attention(config: RunConfig, model: Any, device: torch.device, rows: int, seq_len: int, tuned: Tuned) -> list[str]:
    """Make the model's attention what the config names, or by measurement what is fastest; what the user should know.

    Collective. On the CPU, in fp32 and in models without such a setting nothing
    changes. Raises TitanError when the backend that is named cannot serve here.
    """
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    if not layers:
        return []
    backend, head_dim = model.attention_backend, layers[0].head_dim
    documents, dtype = config.data.document_mask, DTYPES[config.train.precision]
    circumstances: dict[str, Any] = {"documents": documents, "dtype": dtype, "deterministic": config.train.deterministic, "device": device}
    if backend in NAMED:
        require(backend, head_dim, **circumstances)
    if backend != "auto" or device.type != "cuda" or dtype != torch.bfloat16:
        return []
    shape = Shape(rows, seq_len, layers[0].n_heads, layers[0].n_kv_heads, head_dim, documents, dtype)
    usable = [name for name in (INSIDE_DOCUMENTS if documents else CAUSAL) if not any(refusals(name, head_dim, **circumstances))]

    def decide() -> dict[str, Any]:
        if len(usable) == 1:
            return {"backend": usable[0]}
        found = measure(usable, shape, device)
        torch.cuda.empty_cache()
        milliseconds = {name: both if isinstance(both, str) else [round(1e3 * each, 3) for each in both] for name, both in found.items()}
        return {"backend": fastest(found), "forward, backward ms": milliseconds}

    def chosen(key: str) -> str:
        found = tuned.choice(key, decide)  # out of a file
        return str(found.get("backend")) if isinstance(found, dict) else "nothing"

    notes, key = [], f"attention of {shape}, {torch.cuda.get_device_name(device)}"
    while absent := set((backend := chosen(key)).split("+")) - {"auto", *usable}:
        notes.append(f"attention: {backend!r} was chosen before, and {min(absent)!r} cannot be used here; chosen again")
        key += f", without {min(absent)}"
    use_attention(model, backend)
    return notes


def use_attention(model: Any, backend: str) -> None:
    """From now on, in scoring too."""
    model.attention_backend = backend
    for module in model.modules():
        if isinstance(module, Attention):
            module.backend = backend
