"""Peak memory and time of cross-entropy over full logits against chunks of them.

    python benchmarks/loss_memory.py
    python benchmarks/loss_memory.py --device cuda --vocab 200005 --width 640 --tokens 65536 --dtype bfloat16 --compile

Every variant runs forward and backward in a process of its own. The peak is
what a step adds to what was there before it: on CUDA by the allocator's own
count, on the CPU by the process's largest resident size. ``chunk 0`` is plain
autograd over full logits, the first line and the one ratios refer to.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time


def measure(options: argparse.Namespace, chunk_tokens: int) -> dict[str, float]:
    """Peak in bytes beyond inputs and weights, median seconds of a step, and the loss, of one variant in this process."""
    import torch

    from titanlm.losses.chunked import loss_sums
    from titanlm.losses.cross_entropy import CrossEntropy, CrossEntropyConfig
    from titanlm.models.layers.head import Head

    torch.manual_seed(0)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    on_cuda = device.type == "cuda"
    with device:
        head = Head(options.vocab, options.width)
        torch.nn.init.normal_(head.weight, std=options.width**-0.5)
        hidden = torch.randn(1, options.tokens, options.width, dtype=dtype, requires_grad=True)
        labels = torch.randint(options.vocab, (1, options.tokens))

    def plain(hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(head(hidden).flatten(0, 1).float(), labels.flatten())

    def chunked(hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss = CrossEntropy(CrossEntropyConfig(chunk_tokens=chunk_tokens))
        return loss_sums(hidden, labels, head, loss, compile_kernels=options.compile, fuses=options.compile).loss / labels.numel()

    compute = chunked if chunk_tokens else torch.compile(plain) if options.compile else plain

    def step(n_tokens: int) -> torch.Tensor:
        loss = compute(hidden[:, :n_tokens], labels[:, :n_tokens])
        loss.backward()
        hidden.grad = head.weight.grad = None
        return loss.detach()

    def peak() -> int:
        return torch.cuda.max_memory_allocated() if on_cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def synchronised_s() -> float:
        if on_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    # On the CPU the largest resident size never falls, so only a small step may come before the first count.
    warm_up = options.tokens if on_cuda else min(64, options.tokens)
    for _ in range(3 if on_cuda else 1):
        value = step(warm_up)
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = peak()
    times = []
    for _ in range(options.repeats):
        start = synchronised_s()
        value = step(options.tokens)
        times.append(synchronised_s() - start)
    return {"peak_bytes": peak() - before, "step_s": statistics.median(times), "loss": value.item()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--chunks", type=int, nargs="+", help="values of chunk_tokens; default: quarters of the tokens, down to 256")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="compile the passes over the logits; on CUDA in bf16, take titanlm's kernels")
    parser.add_argument("--variant", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.variant is not None:
        print(json.dumps(measure(options, options.variant)))
        return

    chunks = options.chunks or [size for size in (options.tokens // 4**i for i in range(1, 5)) if size >= 256]
    print(f"{options.tokens:,} tokens, vocabulary {options.vocab:,}, width {options.width}, {options.dtype} on {options.device}")
    print(f"{'chunk_tokens':>12} {'peak MB':>10} {'of full':>8} {'step ms':>9} {'of full':>8} {'loss':>9}")
    full: dict[str, float] = {}
    for chunk_tokens in (0, *chunks):
        command = [sys.executable, __file__, *sys.argv[1:], "--variant", str(chunk_tokens)]
        # glibc would otherwise keep what is freed, and the resident size would show it.
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"})
        if done.returncode:
            sys.exit(f"chunk_tokens = {chunk_tokens} failed:\n{done.stderr}")
        result = json.loads(done.stdout.splitlines()[-1])
        full = full or result
        memory, seconds = result["peak_bytes"] / full["peak_bytes"], result["step_s"] / full["step_s"]
        name = chunk_tokens or "full"
        print(f"{name:>12} {result['peak_bytes'] / 1e6:>10.1f} {memory:>8.3f} {result['step_s'] * 1e3:>9.1f} {seconds:>8.2f} {result['loss']:>9.5f}")


if __name__ == "__main__":
    main()
