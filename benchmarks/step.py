"""Time of a training step of any train config: optimizer, clipping, average and loader included.

    python benchmarks/step.py train_configs/debug.toml --warm-up 3 --steps 20
    python benchmarks/step.py train_configs/golf/pr369_logged.toml --train.micro_batch=64 --profile 30
    python benchmarks/step.py train_configs/yxanul/yxanul_270m.toml --stage 6

Of a curriculum it is the first stage, or that of ``--stage``, by itself. Steps are timed on the device, each from the end of the one before, without
waiting for it in between; the median and the distance between the quartiles
are of these. `--section.key=value` changes the config. Nothing is validated,
saved or logged, and the run folder is a temporary one.

MFU is FLOPs of forward and backward a token times tokens a second, over the
device's dense bf16 peak by its data sheet. Attention is counted in full, as
12·L·D·T (PaLM, arXiv:2204.02311), and in the line "causal" as the half of it
that a causal mask leaves. With --roof it is also given as a share of what a
matrix product of 8192³ reaches on this very device, just before.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace

import torch

from titanlm.config import RunConfig, load
from titanlm.course import legs_of
from titanlm.errors import TitanError
from titanlm.metrics import GIB, peak_flops, peak_memory_gib
from titanlm.train import Trainer


def seconds_of_steps(trainer: Trainer, n: int) -> list[float]:
    """Of each of the next ``n`` steps."""
    if trainer.device.type != "cuda":
        marks = [time.perf_counter()]
        for _ in range(n):
            trainer.train_step()
            marks.append(time.perf_counter())
        return [after - before for before, after in zip(marks, marks[1:])]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(n + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for event in events[1:]:
        trainer.train_step()
        event.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) / 1000 for before, after in zip(events, events[1:])]


def kernels(trainer: Trainer, n: int) -> dict[str, tuple[int, float]]:
    """Name → (calls, seconds) a step, over ``n`` steps; of CUDA kernels, or of operators on the CPU. The longest first."""
    from torch.profiler import ProfilerActivity, profile

    on_cuda = trainer.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU]) as profiler:
        for _ in range(n):
            trainer.train_step()
        if on_cuda:
            torch.cuda.synchronize()
    found: dict[str, list[float]] = defaultdict(list)
    for event in profiler.events():
        if (event.device_type == torch.autograd.DeviceType.CUDA) == on_cuda:
            found[event.name].append((event.self_device_time_total if on_cuda else event.self_cpu_time_total) / 1e6)
    ordered = sorted(found.items(), key=lambda item: -sum(item[1]))
    return {name: (round(len(times) / n), sum(times) / n) for name, times in ordered}


def roof() -> float:
    """FLOP/s of a bf16 matrix product of 8192³ on drawn numbers, the median of ten."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(14)]
    for event in events:
        torch.mm(a, b)
        event.record()
    torch.cuda.synchronize()
    return 2 * 8192**3 / (statistics.median(before.elapsed_time(after) for before, after in zip(events[3:], events[4:])) / 1000)


def stage_alone(config: RunConfig, number: int) -> RunConfig:
    """The config of a run that is one stage of the curriculum from beginning to end. Raises TitanError when there is no such stage."""
    legs = legs_of(config)
    if not 1 <= number <= len(legs):
        raise TitanError(f"--stage: {number}, and the curriculum has {len(legs)}")
    leg = legs[number - 1]
    return replace(config, curriculum=(), train=replace(config.train, seq_len=leg.seq_len, global_batch=leg.rows, clip=leg.clip or 0.0))


def measure(options: argparse.Namespace, overrides: list[str]) -> dict[str, object]:
    """What is printed, by name; seconds, bytes and FLOPs without a prefix."""
    with tempfile.TemporaryDirectory() as folder:
        quiet = [f"--run.dir={folder}", "--run.name=step", "--validation=[]", "--logger=[]", "--checkpoint.every=0", "--train.steps=1_000_000"]
        config = stage_alone(load(options.config, [*overrides, *quiet]), options.stage)
        started = time.perf_counter()
        with Trainer(config) as trainer:
            built_s = time.perf_counter() - started
            found: dict[str, object] = {"roof_flops": roof()} if options.roof and trainer.device.type == "cuda" else {}
            first_s = sum(seconds_of_steps(trainer, 1))
            seconds_of_steps(trainer, options.warm_up)
            trainer.loader.take_stall_s()
            times = seconds_of_steps(trainer, options.steps)
            stall_s = trainer.loader.take_stall_s()
            peak_gib = peak_memory_gib(trainer.device)
            if options.profile:
                found["kernels"] = kernels(trainer, 2)
            model, phase = trainer.module.model, trainer.phases.at(trainer.progress)
            tokens = phase.rows_per_rank * phase.seq_len * trainer.world.size
            step_s, quarters = statistics.median(times), statistics.quantiles(times, n=4)
            full, matrices = model.flops_per_token(phase.seq_len), model.flops_per_token(0)
            found |= {
                "config": options.config, "overrides": overrides, "stage": options.stage, "torch": torch.__version__,
                "device": torch.cuda.get_device_name(trainer.device) if trainer.device.type == "cuda" else "cpu",
                "tokens_per_step": tokens, "steps": len(times), "step_s": step_s, "iqr_s": quarters[2] - quarters[0], "tokens_per_s": tokens / step_s,
                "flops_per_s": full * tokens / step_s, "causal_flops_per_s": (full + matrices) / 2 * tokens / step_s,
                "peak_flops": peak_flops(trainer.device), "peak_bytes": round(peak_gib * GIB), "stall": stall_s / sum(times),
                "built_s": built_s, "first_step_s": first_s,
            }  # fmt: skip
            return found


def lines(found: dict[str, object], n_kernels: int) -> Iterator[str]:
    step_s: float = found["step_s"]  # type: ignore[assignment]
    yield f"{found['config']} {' '.join(found['overrides'])}"  # type: ignore[arg-type]
    stage = "" if found["stage"] == 1 else f"stage {found['stage']}, "
    yield f"{stage}torch {found['torch']} on {found['device']}, {found['tokens_per_step']:,} tokens a step, {found['steps']} steps"
    yield f"step            {1e3 * step_s:.2f} ms, quartiles {1e3 * found['iqr_s']:.2f} ms apart; the loader kept it waiting {found['stall']:.2%}"  # type: ignore[operator]
    yield f"tokens          {found['tokens_per_s']:,.0f} a second"
    yield f"memory          {found['peak_bytes'] / GIB:.2f} GiB at its peak"  # type: ignore[operator]
    yield f"start           {found['built_s']:.1f} s to build, {found['first_step_s']:.1f} s for the first step"
    for name, flops in (("PaLM", found["flops_per_s"]), ("causal", found["causal_flops_per_s"])):
        against = {"of the peak": found["peak_flops"], "of the roof": found.get("roof_flops")}
        shares = "".join(f", {flops / whole:.1%} {what}" for what, whole in against.items() if whole)  # type: ignore[operator]
        yield f"FLOPs, {name:<8} {flops / 1e12:.2f} T a second{shares}"  # type: ignore[operator]
    if "roof_flops" in found:
        yield f"roof            {found['roof_flops'] / 1e12:.0f} T a second, bf16, 8192³"  # type: ignore[operator]
    table: dict[str, tuple[int, float]] = found.get("kernels", {})  # type: ignore[assignment]
    busy_s = sum(seconds for _, seconds in table.values())
    if table:
        yield f"{len(table)} kernels, busy {1e3 * busy_s:.1f} ms a step; the longest:"
    for name, (calls, seconds) in list(table.items())[:n_kernels]:
        yield f"{1e3 * seconds:>9.2f} ms {seconds / busy_s:>6.1%} {calls:>6} × {1e6 * seconds / max(1, calls):>8.1f} µs  {name[:150]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="train config; --section.key=value changes it")
    parser.add_argument("--warm-up", type=int, default=20, metavar="N", help="steps before the timed ones (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=100, metavar="N", help="timed steps, at least 2 (default: %(default)s)")
    parser.add_argument("--stage", type=int, default=1, metavar="N", help="of the config's curriculum (default: %(default)s)")
    parser.add_argument("--profile", type=int, default=0, metavar="N", help="print the N longest kernels of a step")
    parser.add_argument("--roof", action="store_true", help="measure a large matrix product first")
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of text")
    options, rest = parser.parse_known_args()
    wrong = [word for word in rest if not (word.startswith("--") and "=" in word)]
    if wrong or options.steps < 2 or options.warm_up < 0:
        parser.error(f"{wrong[0]!r} is no override such as --train.micro_batch=64" if wrong else "--steps must be 2 or more, --warm-up 0 or more")
    try:
        found = measure(options, rest)
    except TitanError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(found) if options.json else "\n".join(lines(found, options.profile)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
