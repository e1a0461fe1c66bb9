"""Time of a Muon step, banks against torch's loop over matrices, and the share that Newton-Schulz has in it.

    python benchmarks/muon.py
    python benchmarks/muon.py --device cuda --layers 11 --width 512
    python benchmarks/muon.py --device cuda --products

The matrices are those of a golf model: for each layer q and o (D, D), k and v
(D/2, D), up (3D, D) and down (D, 3D). Both optimizers take a step in turn, in
one process, so that whatever else the machine does falls on both; times are
medians with the distance between the quartiles, on a GPU by its clock, behind
other work. torch.optim.Muon computes in bf16 whatever ``--ns-dtype`` is.
``compiled`` is ours as a compiled run has it. The share is what is gained by
leaving Newton-Schulz out, uncompiled.

``--products`` times Newton-Schulz alone for banks of m × 2m matrices in bf16, by
whole products and by the halves of ``titanlm.kernels.symmetric``, and both of
its products against the library's. The m from which halves are faster belongs in
``newton_schulz.SYMMETRIC_FROM``. ``--whole`` times Muon by whole products alone.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from clock import Clock
from torch import nn

from titanlm.optimizers import newton_schulz
from titanlm.optimizers.muon import MuonConfig, muon
from titanlm.patterns import NamedParam


def matrices(layers: int, width: int, device: str) -> list[nn.Parameter]:
    """The matrices of a model with gradients, fp32, the same at every call."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(width, width)] * 2 + [(width // 2, width)] * 2 + [(3 * width, width), (width, 3 * width)]
    parameters = [nn.Parameter(torch.randn(shape, generator=generator, device=device)) for _ in range(layers) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator, device=device)
    return parameters


def measure(options: argparse.Namespace, ns_steps: int) -> dict[str, list[float]]:
    """Seconds of each step: of ``muon``, of the same compiled and without Newton-Schulz, and of torch's."""

    def ours() -> torch.optim.Optimizer:
        named = [NamedParam(str(i), parameter, "matrix") for i, parameter in enumerate(matrices(options.layers, options.width, options.device))]
        return muon(MuonConfig(ns_steps=ns_steps, ns_dtype=options.ns_dtype), named_params=named)

    fused = ours()
    fused.compile_kernels = True  # type: ignore[attr-defined]
    without = ours()
    without.orthogonalise = lambda bank: bank  # type: ignore[attr-defined]
    torchs = torch.optim.Muon(matrices(options.layers, options.width, options.device), lr=0.02, weight_decay=0.0, ns_steps=ns_steps)
    return in_turn({"muon": ours().step, "compiled": fused.step, "rest": without.step, "torch": torchs.step}, options)


def in_turn(steps: dict[str, Callable[[], Any]], options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each of several things, one after the other so many times."""
    clock, times = Clock(options.device), {name: list[float]() for name in steps}
    for repeat in range(-options.warm_up, options.repeats):
        for name, step in steps.items():
            taken = clock.seconds(step)
            if repeat >= 0:
                times[name].append(taken)
    return times


def products(options: argparse.Namespace) -> None:
    from titanlm.kernels.symmetric import gram, polynomial

    print(f"bf16, 5 steps, torch {torch.__version__} on {torch.cuda.get_device_name()}; ms, whole then halved")
    print(f"{'n':>4} {'m':>5} {'Newton-Schulz':>24} {'X Xt':>24} {'bA + cAA':>24}")
    for rows in options.rows:
        n = max(1, 22 * 512**2 // rows**2)  # about as many weights as a golf model's
        x = torch.randn(n, rows, 2 * rows, device="cuda", dtype=torch.bfloat16)
        a = x[:, :, :rows] @ x[:, :, :rows].mT / rows**2

        def whole_or_halved(smallest: int, x: torch.Tensor = x) -> torch.Tensor:
            newton_schulz.SYMMETRIC_FROM, newton_schulz.SYMMETRIC_TILES = smallest, 0
            return newton_schulz.newton_schulz(x, 5, "quintic")

        pairs: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
            "Newton-Schulz": (partial(whole_or_halved, 1 << 30), partial(whole_or_halved, 1)),
            "gram": (partial(torch.bmm, x, x.mT), partial(gram, x)),
            "polynomial": (partial(torch.baddbmm, a, a, a, beta=-4.775, alpha=2.0315), partial(polynomial, a, 3.4445, -4.775, 2.0315)),
        }
        times = in_turn({f"{name} {side}": function for name, pair in pairs.items() for side, function in zip(("whole", "halved"), pair, strict=True)}, options)
        ms = {name: 1e3 * statistics.median(values) for name, values in times.items()}
        shown = [f"{ms[f'{name} whole']:>8.3f} {ms[f'{name} halved']:>8.3f} {ms[f'{name} halved'] / ms[f'{name} whole']:>6.2f}" for name in pairs]
        print(f"{n:>4} {rows:>5} {' '.join(shown)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--ns-dtype", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--steps", type=int, nargs="+", default=[3, 5], help="numbers of Newton-Schulz steps")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--products", action="store_true", help="time the products of Newton-Schulz instead, on CUDA")
    parser.add_argument("--whole", action="store_true", help="Newton-Schulz by whole products, whatever the matrices")
    parser.add_argument("--rows", type=int, nargs="+", default=[256, 384, 512, 768, 1024, 1536, 2048, 4096], help="m of --products")
    options = parser.parse_args()
    if options.products:
        if options.device != "cuda":
            parser.error("--products compares kernels of a GPU: add --device cuda")
        products(options)
        return
    if options.whole:
        newton_schulz.SYMMETRIC_FROM = 1 << 30

    n = sum(parameter.numel() for parameter in matrices(options.layers, options.width, options.device))
    print(f"{6 * options.layers} matrices, {n:,} parameters, width {options.width}, ns_dtype {options.ns_dtype}, torch {torch.__version__} on {options.device}")
    print(f"{'ns_steps':>8} {'muon ms':>9} {'IQR':>7} {'compiled':>9} {'IQR':>7} {'torch ms':>9} {'IQR':>7} {'of torch':>9} {'Newton-Schulz':>14}")
    for ns_steps in options.steps:
        times = measure(options, ns_steps)
        median = {name: statistics.median(values) for name, values in times.items()}
        spread = {name: 1e3 * (quarters[2] - quarters[0]) for name, values in times.items() for quarters in [statistics.quantiles(values, n=4)]}
        share = 1 - median["rest"] / median["muon"]
        both = " ".join(f"{1e3 * median[name]:>9.2f} {spread[name]:>7.2f}" for name in ("muon", "compiled", "torch"))
        print(f"{ns_steps:>8} {both} {median['muon'] / median['torch']:>9.3f} {share:>14.1%}")


if __name__ == "__main__":
    main()
