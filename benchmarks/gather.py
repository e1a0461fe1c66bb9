"""Time in which a rank gathers a block's weights in bf16 and as codes of FP8 (`parallel.gather_dtype` = "compute" and "float8"), and what it is sent.

    python benchmarks/gather.py train_configs/decoder_3b_float8.toml --device cuda --ranks 8
    torchrun --standalone --nproc-per-node 2 benchmarks/gather.py train_configs/decoder_3b_float8.toml --device cuda

Under torchrun weights travel. In one process nothing does: it is one of
``--ranks``, what the others would send is never written, and what is left is
casting, copying and launching. So codes gain where what they spare takes longer
to come than what they cost here, and the latency of the message by which ranks
agree on scales; that bandwidth is printed.

FSDP2 gathers and lets go of the config's first block, whose weights are drawn:
in bf16, over all ranks, by `fsdp2` without offloading, whatever the config
says, and with codes made by compiled code where it compiles. Both take turns,
each begun behind other work: medians of ``--rounds``. `--section.key=value`
changes the config.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from clock import Clock

from titanlm.check import check
from titanlm.config import RunConfig, load
from titanlm.course import horizon_of, phases_of
from titanlm.device import choose_device
from titanlm.distributed import code_gather
from titanlm.distributed.code_gather import CodeGather
from titanlm.distributed.process_group import connected
from titanlm.distributed.strategy import build_strategy
from titanlm.distributed.world import Peers, World
from titanlm.errors import ConfigError, TitanError
from titanlm.precision import set_precision
from titanlm.recipe_plan import planned_model
from titanlm.run_choices import begin_quantizers
from titanlm.train_module import TrainModule
from titanlm.tuned import Tuned
from titanlm.weights import initialise

TIMEOUT_S = 600
WARM_UP = 3


class Silent(CodeGather):
    """Gathers nothing."""

    def __call__(self, output_tensor: Any, input_tensor: Any, group: Any, async_op: bool = False) -> None:
        pass


@contextmanager
def alone(n: int) -> Iterator[World]:
    """One of ``n`` ranks of which the others are not there: what it sends and asks for costs nothing, and never comes."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    gather: Any = code_gather._gather
    code_gather._gather = lambda *_: None  # the one of torch's fake group copies
    dist.init_process_group("fake", rank=0, world_size=n, store=FakeStore())
    try:
        yield World(size=n, local_size=n)
    finally:
        code_gather._gather = gather
        dist.destroy_process_group()


def first_block(config: RunConfig, gather_dtype: Any, world: World, device: torch.device, tuned: Tuned) -> tuple[Any, list[str]]:
    """Sharded, with weights; and what its quantizers said."""
    model = planned_model(config)
    model.blocks = model.blocks[:1]
    module = TrainModule(model, config.loss.build())
    set_precision(module, "bf16")
    strategy = build_strategy(replace(config.parallel, gather_dtype=gather_dtype), world, device, torch.bfloat16)
    strategy.shard(module)
    model.to_empty(device=device)
    initialise(model, config.train.seed)
    rows, seq_len = phases_of(config, world, horizon_of(config)).largest_pass(config.train.micro_batch_tokens != "auto")
    notes = begin_quantizers(config, model, rows * seq_len, device=device, compiled=config.train.compile != "none", tuned=tuned)
    return model.blocks[0], notes


def gathered(block: Any) -> None:
    block.unshard()
    block.reshard()


def measure(config: RunConfig, options: argparse.Namespace) -> list[str]:
    """What rank 0 prints. Raises TitanError for a config that is wrong, or of which nothing travels as codes."""
    config = replace(config, parallel=replace(config.parallel, strategy="fsdp2", gather_dtype="float8", cpu_offload=False))
    if problems := check(config).problems:
        raise ConfigError(problems, options.config)
    connects = World.from_environment()
    travels = connects.size > 1
    device = choose_device(options.device, connects.local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    ranks = connected(connects, device, timeout_s=TIMEOUT_S, init_timeout_s=TIMEOUT_S) if travels else alone(options.ranks)
    with tempfile.TemporaryDirectory() as folder, ranks as found:
        world = connects if travels else found
        tuned = Tuned(Path(folder), Peers(world if travels else None), lambda line: world.rank or print(line, file=sys.stderr))
        (plain, _), (coded, notes) = (first_block(config, how, world, device, tuned) for how in ("compute", "float8"))
        if not travels:
            plain.set_custom_all_gather(Silent(plain))
        gather = CodeGather(coded)
        # A rank's share in bf16, and as codes; as much comes from each of the others.
        shares = 2 * sum(span.end - span.start for span in gather.spans(world.size)), gather.sent_bytes(world.size)
        if shares[0] == shares[1]:
            why = "".join(f"\n  {note}" for note in notes)
            raise TitanError(f"{options.config}: nothing of its first block travels as codes, which quantizer 'float8' with recipe 'tensorwise' makes{why}")
        clock, times = Clock(options.device), (list[float](), list[float]())
        for _ in range(WARM_UP + options.rounds):
            for block, taken in zip((plain, coded), times):
                taken.append(clock.seconds(partial(gathered, block)))
        place = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        first = f"a block on {world.size} ranks{'' if travels else ', of which one is here'}, torch {torch.__version__} on {place}"
        come = [(world.size - 1) * share for share in shares]
        return [first, *lines(times[0][WARM_UP:], times[1][WARM_UP:], come[0], come[1], travels)] if world.rank == 0 else []


def lines(plain: list[float], coded: list[float], plain_bytes: int, coded_bytes: int, travels: bool) -> Iterator[str]:
    """From seconds of each round, and bytes that come."""
    for name, times, come in (("compute", plain, plain_bytes), ("float8", coded, coded_bytes)):
        quarters = statistics.quantiles(times, n=4)
        apart = 1e3 * (quarters[2] - quarters[0])
        yield f"{name:<8} {1e3 * statistics.median(times):8.3f} ms, quartiles {apart:.3f} ms apart; {come / 1e6:.3f} MB come"
    cost, spared = statistics.median(coded) - statistics.median(plain), plain_bytes - coded_bytes
    yield f"ratio    {statistics.median(coded) / statistics.median(plain):.3f}"
    if not travels:
        where = "at any bandwidth" if cost <= 0 else f"where a rank receives less than {spared / cost / 1e9:.3g} GB/s"
        yield f"codes cost {1e3 * cost:.3f} ms and a message, and spare {spared / 1e6:.3f} MB: they gain {where}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="train config; --section.key=value changes it")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--ranks", type=int, default=8, metavar="N", help="without torchrun, at least 2 (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=20, metavar="N", help="at least 4 (default: %(default)s)")
    options, overrides = parser.parse_known_args()
    wrong = [word for word in overrides if not (word.startswith("--") and "=" in word)]
    if wrong or options.ranks < 2 or options.rounds < 4:
        parser.error(f"{wrong[0]!r} is no override such as --model.n_layers=2" if wrong else "--ranks must be 2 or more, --rounds 4 or more")
    try:
        printed = measure(load(options.config, overrides), options)
    except TitanError as error:
        print(error, file=sys.stderr)
        return 2
    if printed:
        print("\n".join(printed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
