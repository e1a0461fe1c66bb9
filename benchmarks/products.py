"""Time of the matrix products of a block, by the library, by Triton and by QuACK, with what is computed inside them.

    python benchmarks/products.py
    python benchmarks/products.py --device cuda --positions 262144 --width 512 --inner 1536

``up`` squares what is above 0, ``back`` multiplies a gradient by the slope of
that, ``sum`` adds a residual stream; ``plain`` does none of it. Plain torch
computes them apart, a pass over memory each. All take turns in one process,
over several rounds, because a GPU slows down under such a load: medians, and
the share of plain torch's time. T/s are those of the product alone.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from titanlm.attention_choice import seconds
from titanlm.kernels import products_quack
from titanlm.kernels.fused import serve

Ways = dict[str, Callable[[], Any]]


def cases(n: int, width: int, inner: int, device: torch.device) -> Iterator[tuple[str, float, Ways]]:
    """Name, multiplications and additions of the product, and who computes it how; plain torch first."""
    dtype = torch.bfloat16

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    x, up, down = drawn(n, width), drawn(inner, width) * width**-0.5, drawn(width, inner) * inner**-0.5
    h = F.relu(x @ up.T).square()
    on_cuda = device.type == "cuda"
    triton, quack = on_cuda and serve(device.index), on_cuda and products_quack.serves(x)
    flops = 2.0 * n * width * inner

    def ways(plain: Callable[[], Any], by_triton: Callable[[], Any] | None = None, by_quack: Callable[[], Any] | None = None) -> Ways:
        found = {"torch": plain}
        if triton and by_triton:
            found["Triton"] = by_triton
        if quack and by_quack:
            found["QuACK"] = by_quack
        return found

    def triton_product(a: Tensor, b: Tensor, kept: Tensor | None) -> Any:
        from titanlm.kernels.relu2_triton import product

        return product(a, b, kept, 0.0)

    across = down.T.contiguous()
    yield "up", flops, ways(lambda: F.relu(x @ up.T).square(), lambda: triton_product(x, up, None), lambda: products_quack.square(x, up))
    yield "back", flops, ways(lambda: (x @ across.T) * 2 * h.sqrt(), lambda: triton_product(x, across, h), lambda: products_quack.slope(x, across, h))
    yield "plain up", flops, ways(lambda: x @ up.T)
    yield "plain down", flops, ways(lambda: h @ down.T)
    yield "sum down", flops, ways(lambda: x + h @ down.T, None, lambda: products_quack.add(h, down, x))
    square = drawn(width, width) * width**-0.5
    yield "sum out", 2.0 * n * width * width, ways(lambda: x + x @ square.T, None, lambda: products_quack.add(x, square, x))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--positions", type=int, default=256)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--inner", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--each", type=int, default=10, help="calls of a round, after as many to warm up")
    options = parser.parse_args()
    device = torch.device(options.device)
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    print(f"{options.positions:,} × {options.width} and {options.inner}, bf16, torch {torch.__version__} on {place}")
    for name, flops, ways in cases(options.positions, options.width, options.inner, device):
        times: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(options.rounds):
            for way, call in ways.items():
                times[way].append(seconds(call, device, repeats=1, each=options.each))
        median = {way: statistics.median(each) for way, each in times.items()}
        shown = "   ".join(f"{way} {1e3 * each:.3f} ms {flops / each / 1e12:.0f} T/s {each / median['torch']:.3f}" for way, each in median.items())
        print(f"{name:<11} {shown}")


if __name__ == "__main__":
    main()
