"""Time of an AdamW step and bytes of its state, for each form of the moments, compiled and not.

    python benchmarks/adamw.py
    python benchmarks/adamw.py --device cuda --layers 12 --width 768 --vocab 50304

The parameters are those of a decoder of that size: for each layer four (D, D),
two (4D, D), one (D, 4D) and two vectors, and a table (vocabulary, D). Each form
takes a step in turn, in one process, so that whatever else the machine does
falls on all; times are medians with the distance between the quartiles, on a
GPU by its clock, behind other work. `fp32` is torch's fused kernel, which is
never compiled.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
from clock import Clock
from torch import nn

from titanlm.optimizers.adamw import AdamWConfig, adamw
from titanlm.patterns import NamedParam

FORMS = [("fp32", False), *((form, compiled) for form in ("bf16", "int8", "fp8") for compiled in (False, True))]


def parameters(options: argparse.Namespace) -> list[nn.Parameter]:
    """Of a decoder, with gradients, fp32."""
    width = options.width
    layer = [(width, width)] * 4 + [(4 * width, width)] * 2 + [(width, 4 * width)] + [(width,)] * 2
    made = [nn.Parameter(torch.randn(shape, device=options.device)) for shape in [(options.vocab, width), *layer * options.layers]]
    for parameter in made:
        parameter.grad = torch.randn_like(parameter)
    return made


def optimizer_of(options: argparse.Namespace, form: Any, compiled: bool) -> torch.optim.Optimizer:
    named = [NamedParam(str(index), parameter, "matrix") for index, parameter in enumerate(parameters(options))]
    optimizer: Any = adamw(AdamWConfig(moments=form), named_params=named)
    optimizer.compile_kernels = compiled
    optimizer.found_inf, optimizer.grad_scale = torch.zeros((), device=options.device), None
    return optimizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=1024)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--warm-up", type=int, default=2)
    options = parser.parse_args()

    clock = Clock(options.device)
    optimizers = {choice: optimizer_of(options, *choice) for choice in FORMS}
    times: dict[Any, list[float]] = {choice: [] for choice in FORMS}
    for repeat in range(-options.warm_up, options.repeats):
        for choice, optimizer in optimizers.items():
            taken = clock.seconds(optimizer.step)
            if repeat >= 0:
                times[choice].append(taken)
    n = sum(parameter.numel() for group in optimizers[FORMS[0]].param_groups for parameter in group["params"])
    print(f"{n:,} parameters, torch {torch.__version__} on {options.device}")
    print(f"{'moments':>8} {'compiled':>8} {'ms':>9} {'IQR':>7} {'bytes a parameter':>18}")
    for (form, compiled), optimizer in optimizers.items():
        values = [1e3 * value for value in times[form, compiled]]
        quarters = statistics.quantiles(values, n=4)
        state = sum(value.nbytes for own in optimizer.state.values() for value in own.values())
        print(f"{form:>8} {'yes' if compiled else 'no':>8} {statistics.median(values):>9.2f} {quarters[2] - quarters[0]:>7.2f} {state / n:>18.3f}")


if __name__ == "__main__":
    main()
