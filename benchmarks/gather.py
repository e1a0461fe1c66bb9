"""Time in which a rank gathers a block's weights in bf16 and as codes of FP8 (`parallel.gather_dtype` = "compute" and "float8"), and what it is sent.

    python benchmarks/gather.py train_configs/decoder_3b_float8.toml --device cuda --ranks 8
    torchrun --standalone --nproc-per-node 2 benchmarks/gather.py train_configs/decoder_3b_float8.toml --device cuda

Under torchrun weights travel. In one process nothing does: it is one of
``--ranks``, whatever the others would send is taken to be there at once, and
what is left is casting, copying and launching. So codes gain where what they
spare takes longer to come than what they cost here; that bandwidth is printed.

FSDP2 gathers and lets go of the config's first block, whose weights are drawn.
Both take turns, each begun behind other work: medians of ``--rounds``.
`--section.key=value` changes the config.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from clock import Clock

from titanlm.config import RunConfig, load
from titanlm.device import choose_device
from titanlm.distributed.code_gather import CodeGather
from titanlm.distributed.process_group import connected
from titanlm.distributed.strategy import build_strategy
from titanlm.distributed.world import Peers, World
from titanlm.errors import TitanError
from titanlm.precision import set_precision
from titanlm.recipe_plan import planned_model
from titanlm.run_choices import begin_quantizers
from titanlm.train_module import TrainModule
from titanlm.tuned import Tuned
from titanlm.weights import initialise

WARM_UP = 3


@contextmanager
def ranks(world: World, device: torch.device, n: int) -> Iterator[World]:
    """Those of torchrun, connected; without it, one of ``n`` that are not there."""
    if world.size > 1:
        with connected(world, device, timeout_s=0, init_timeout_s=600):
            yield world
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=n, store=FakeStore())
    try:
        yield World(size=n, local_size=n)
    finally:
        dist.destroy_process_group()


def first_block(config: RunConfig, gather_dtype: Any, world: World, device: torch.device, tuned: Tuned) -> Any:
    """Sharded, with weights. Raises TitanError when the tokenizer cannot say how large its vocabulary is."""
    model = planned_model(config)
    model.blocks = model.blocks[:1]
    module = TrainModule(model, config.loss.build())
    set_precision(module, "bf16")
    strategy = build_strategy(replace(config.parallel, strategy="fsdp2", gather_dtype=gather_dtype), world, device, torch.bfloat16)
    strategy.shard(module)
    model.to_empty(device=device)
    initialise(model, config.train.seed)
    rows = config.train.micro_batch * config.train.seq_len
    begin_quantizers(config, model, rows, device=device, compiled=device.type == "cuda", tuned=tuned)
    return model.blocks[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="train config; --section.key=value changes it")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--ranks", type=int, default=8, metavar="N", help="without torchrun, at least 2 (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=20, metavar="N", help="default: %(default)s")
    options, overrides = parser.parse_known_args()
    wrong = [word for word in overrides if not (word.startswith("--") and "=" in word)]
    if wrong or options.ranks < 2 or options.rounds < 1:
        parser.error(f"{wrong[0]!r} is no override such as --model.n_layers=2" if wrong else "--ranks must be 2 or more, --rounds 1 or more")
    try:
        measure(load(options.config, overrides), options)
    except TitanError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def measure(config: RunConfig, options: argparse.Namespace) -> None:
    world = World.from_environment()
    travels = world.size > 1
    device = choose_device(options.device, world.local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with tempfile.TemporaryDirectory() as folder, ranks(world, device, options.ranks) as world:
        tuned = Tuned(Path(folder), Peers(), print)
        blocks = {how: first_block(config, how, world, device, tuned) for how in ("compute", "float8")}
        gather = CodeGather(blocks["float8"])
        coded, whole = gather.sent_bytes(world.size), 2 * sum(span.end - span.start for span in gather.spans(world.size))
        if coded == whole:
            raise TitanError(f"{options.config}: nothing of its first block travels as codes; it needs quantizer 'float8' with recipe 'tensorwise'")
        clock, times = Clock(options.device), {how: list[float]() for how in blocks}

        def gathered(block: Any) -> None:
            block.unshard()
            block.reshard()

        for _ in range(WARM_UP + options.rounds):
            for how, block in blocks.items():
                times[how].append(clock.seconds(lambda block=block: gathered(block)))
        if world.rank == 0:
            report(times, {"compute": (world.size - 1) * whole, "float8": (world.size - 1) * coded}, world.size, device, travels)


def report(times: dict[str, list[float]], received: dict[str, int], n_ranks: int, device: torch.device, travels: bool) -> None:
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    print(f"a block on {n_ranks} ranks{'' if travels else ', of which one is here'}, torch {torch.__version__} on {place}")
    medians = {how: statistics.median(each[WARM_UP:]) for how, each in times.items()}
    for how, each in times.items():
        quarters = statistics.quantiles(each[WARM_UP:], n=4) if len(each) > WARM_UP + 1 else [0.0, 0.0, 0.0]
        print(f"{how:<8} {1e3 * medians[how]:8.3f} ms, quartiles {1e3 * (quarters[2] - quarters[0]):.3f} ms apart; {received[how] / 1e6:.2f} MB come")
    print(f"ratio    {medians['float8'] / medians['compute']:.3f}")
    if not travels:
        cost, spared = medians["float8"] - medians["compute"], received["compute"] - received["float8"]
        where = "at any bandwidth" if cost <= 0 else f"where a rank receives less than {spared / cost / 1e9:.3g} GB/s"
        print(f"codes cost {1e3 * cost:.3f} ms and spare {spared / 1e6:.2f} MB: they gain {where}")


if __name__ == "__main__":
    sys.exit(main())
