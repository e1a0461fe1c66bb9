"""Time of a Muon step, banks against torch's loop over matrices, and the share that Newton-Schulz has in it.

    python benchmarks/muon.py
    python benchmarks/muon.py --device cuda --layers 11 --width 512

The matrices are those of a golf model: for each layer q and o (D, D), k and v
(D/2, D), up (3D, D) and down (D, 3D). Both optimizers take a step in turn, in
one process, so that whatever else the machine does falls on both; times are
medians with the distance between the quartiles. torch.optim.Muon computes in
bf16 whatever ``--ns-dtype`` is. The share is what is gained by leaving
Newton-Schulz out.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

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


def seconds(step: Callable[[], None], on_cuda: bool) -> float:
    if on_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if on_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(options: argparse.Namespace, ns_steps: int) -> dict[str, list[float]]:
    """Seconds of each step: of ``muon``, of the same without Newton-Schulz, and of torch's."""

    def ours() -> torch.optim.Optimizer:
        named = [NamedParam(str(i), parameter, "matrix") for i, parameter in enumerate(matrices(options.layers, options.width, options.device))]
        return muon(MuonConfig(ns_steps=ns_steps, ns_dtype=options.ns_dtype), named_params=named)

    without = ours()
    without.orthogonalise = lambda bank: bank  # type: ignore[attr-defined]
    torchs = torch.optim.Muon(matrices(options.layers, options.width, options.device), lr=0.02, weight_decay=0.0, ns_steps=ns_steps)
    steps: dict[str, Callable[[], None]] = {"muon": ours().step, "rest": without.step, "torch": torchs.step}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(-options.warm_up, options.repeats):
        for name, step in steps.items():
            taken = seconds(step, options.device == "cuda")
            if repeat >= 0:
                times[name].append(taken)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--ns-dtype", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--steps", type=int, nargs="+", default=[3, 5], help="numbers of Newton-Schulz steps")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--warm-up", type=int, default=2)
    options = parser.parse_args()

    n = sum(parameter.numel() for parameter in matrices(options.layers, options.width, options.device))
    print(f"{6 * options.layers} matrices, {n:,} parameters, width {options.width}, ns_dtype {options.ns_dtype}, torch {torch.__version__} on {options.device}")
    print(f"{'ns_steps':>8} {'muon ms':>9} {'IQR':>7} {'torch ms':>9} {'IQR':>7} {'of torch':>9} {'Newton-Schulz':>14}")
    for ns_steps in options.steps:
        times = measure(options, ns_steps)
        median = {name: statistics.median(values) for name, values in times.items()}
        spread = {name: 1e3 * (quarters[2] - quarters[0]) for name, values in times.items() for quarters in [statistics.quantiles(values, n=4)]}
        share = 1 - median["rest"] / median["muon"]
        both = " ".join(f"{1e3 * median[name]:>9.2f} {spread[name]:>7.2f}" for name in ("muon", "torch"))
        print(f"{ns_steps:>8} {both} {median['muon'] / median['torch']:>9.3f} {share:>14.1%}")


if __name__ == "__main__":
    main()
