"""Time of one layer's attention, forward and backward, by every backend that can serve.

    python benchmarks/attention.py
    python benchmarks/attention.py --device cuda --rows 128 --seq-len 2048 --heads 8 --kv-heads 4 --head-dim 64
    python benchmarks/attention.py --device cuda --rows 8 --seq-len 2048 --heads 28 --kv-heads 4 --head-dim 128 --documents

Inputs are drawn; with ``--documents`` rows hold documents of 600 tokens on
average, which attention stays inside. Times are medians over runs of calls in a
row. T/s are multiplications and additions over the pairs that are seen, 4·H·dh
for each in the forward pass and 2.5 times as many in the backward pass. The
last column is the time of both passes as a share of that of the first backend
in the list. A backend that refuses or fails says why.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import get_args

import torch

from titanlm.attention_choice import Shape, drawn_batch, measure
from titanlm.models.layers.attention import Backend
from titanlm.precision import DTYPES


def lines(shape: Shape, found: dict[str, tuple[float, float] | str]) -> Iterator[str]:
    flops = shape.flops(drawn_batch(shape))
    yield f"{'backend':>8} {'forward ms':>11} {'T/s':>7} {'backward ms':>12} {'T/s':>7} {'of first':>9}"
    first = next((sum(both) for both in found.values() if not isinstance(both, str)), 0.0)
    for name, both in found.items():
        if isinstance(both, str):
            yield f"{name:>8} {both}"
            continue
        forward, backward = both
        rates = flops / forward / 1e12, 2.5 * flops / backward / 1e12
        yield f"{name:>8} {1e3 * forward:>11.3f} {rates[0]:>7.2f} {1e3 * backward:>12.3f} {rates[1]:>7.2f} {sum(both) / first:>9.3f}"


def main() -> None:
    names = [name for name in get_args(Backend) if name != "auto"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=32)
    parser.add_argument("--dtype", default="bf16", choices=[*DTYPES])
    parser.add_argument("--documents", action="store_true", help="attention stays inside documents")
    parser.add_argument("--backends", nargs="+", default=names, choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--repeats", type=int, default=5, help="runs of which the median is taken")
    parser.add_argument("--each", type=int, default=10, help="calls of a run")
    options = parser.parse_args()

    shape = Shape(options.rows, options.seq_len, options.heads, options.kv_heads, options.head_dim, options.documents, DTYPES[options.dtype])
    device = torch.device(options.device)
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    print(f"{shape}, torch {torch.__version__} on {place}")
    for line in lines(shape, measure(options.backends, shape, device, repeats=options.repeats, each=options.each)):
        print(line)


if __name__ == "__main__":
    main()
